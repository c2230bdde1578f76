"""Activation functions by the names that Hugging Face's configurations use."""

import functools

import flax.linen as nn

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),  # erf, as BERT was trained
    "gelu_python": functools.partial(nn.gelu, approximate=False),
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}

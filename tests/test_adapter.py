"""Bottleneck adapters: the equation, the two places, the starting point."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tables import noised

import jpeft
from jpeft.models import BertModel
from jpeft.models.bert.config import BertConfig

KEY = jax.random.key(0)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu", "tanh"])
def test_equation(activation):
    """h + W_up act(W_down h + b_down) + b_up, against torch's activations."""
    import torch

    acts = {
        "gelu": torch.nn.functional.gelu,
        "gelu_new": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
    }
    model, x = nn.Dense(6, name="down"), jax.random.normal(KEY, (4, 8))
    params = {"down": model.init(KEY, x)["params"]}

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, name="down")(x)

    peft = jpeft.apply(params, method=jpeft.adapter(size=3, activation=activation))
    peft = peft.replace(adapter=noised(peft.adapter, 0.5))
    leaves = jax.tree.map(np.array, peft.adapter["down"]["+"])
    h = np.array(x) @ np.array(params["down"]["kernel"]) + np.array(params["down"]["bias"])
    inner = acts[activation](torch.tensor(h @ leaves["down"]["kernel"] + leaves["down"]["bias"])).numpy()
    expected = h + inner @ leaves["up"]["kernel"] + leaves["up"]["bias"]
    np.testing.assert_allclose(jpeft.wrap(Net().apply, peft.method)(peft.variables, x), expected, atol=1e-5)


def test_starts_near_the_base():
    """Truncated normal with deviation 1e-3 (0.88e-3 once cut at two), zero biases: the change is of the order 1e-6 of the input."""
    params = {"down": {"kernel": jnp.zeros((8, 512)), "bias": jnp.zeros(512)}}
    leaves = jpeft.apply(params, method="adapter").adapter["down"]["+"]
    for side in ("down", "up"):
        kernel = np.array(leaves[side]["kernel"])
        assert np.std(kernel) == pytest.approx(0.8796e-3, rel=0.03)
        assert np.abs(kernel).max() <= 2e-3
        assert not np.any(leaves[side]["bias"])


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_two_in_every_block_and_all_norms(model_type):
    config = BertConfig(
        model_type=model_type, vocab_size=17, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=12, pad_token_id=1 if model_type == "roberta" else 0,
        type_vocab_size=0 if model_type == "distilbert" else 2,
    )  # fmt: skip
    model = BertModel(config, pooling=model_type == "bert")
    ids = jnp.full((1, 4), 5)
    params = model.init(KEY, ids)["params"]
    peft = jpeft.apply(params, method=jpeft.adapter(size=2))
    paths = list(jpeft.flatten(peft.adapter))
    assert sum(path.endswith("+/down/kernel") for path in paths) == 2 * 3
    assert sum(path.endswith("/scale") for path in paths) == 2 * 3 + 1
    peft = peft.replace(adapter=noised(peft.adapter, 0.3))
    forward = jax.jit(jpeft.wrap(model.apply, peft.method))
    grads = jax.grad(lambda a: jnp.sin(forward(peft.replace(adapter=a).variables, ids).last_hidden_state).sum())(peft.adapter)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_sits_before_the_residual():
    """LayerNorm(residual + adapter(dense(x))), computed by hand from the block's own parts."""
    config = BertConfig(
        vocab_size=17, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, max_position_embeddings=12
    )
    from jpeft.models.bert.encoder import ResidualOutput

    block, x, residual = ResidualOutput(config), jax.random.normal(KEY, (1, 4, 12)), jax.random.normal(KEY, (1, 4, 8))
    params = block.init(KEY, x, residual, True)["params"]
    peft = jpeft.apply(params, method=jpeft.adapter(size=2, target=["dense"]))
    peft = peft.replace(adapter=noised(peft.adapter, 0.5))
    norm, leaves = peft.adapter["LayerNorm"], peft.adapter["dense"]["+"]
    h = x @ params["dense"]["kernel"] + params["dense"]["bias"][None, None]
    leaves = jax.tree.map(lambda leaf: leaf.reshape((-1,) + leaf.shape[-1:]), leaves)
    inner = jax.nn.gelu(h @ leaves["down"]["kernel"] + leaves["down"]["bias"][None], approximate=False)
    h = h + inner @ leaves["up"]["kernel"] + leaves["up"]["bias"][None]
    h = h + residual
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + config.layer_norm_eps)
    h = h * norm["scale"][None, None] + norm["bias"][None, None]
    chex.assert_trees_all_close(jpeft.wrap(block.apply, peft.method)(peft.variables, x, residual, True), h, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "adapter: size=0 must be a whole number of at least 1"),
        ({"activation": "swish"}, "activation='swish' must be one of 'gelu', 'gelu_new', 'relu', 'silu', 'tanh'"),
        ({"target": ["up"]}, "target='up' matches none"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.apply({"down": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}}, method="adapter", **options)


def test_needs_one_feature_axis():
    with pytest.raises(ValueError, match="has 2 output axes"):
        jpeft.apply({"query": {"kernel": jnp.zeros((8, 2, 4))}}, method="adapter", target=["query"])

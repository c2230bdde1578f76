"""One linear layer adapted by HF PEFT, and jpeft's method on the same numbers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jpeft

Tensors = Mapping[str, np.ndarray]


class HFLayer(NamedTuple):
    """What HF PEFT computes, of the sum of the outputs' sines.

    Attributes:
      kernel: The base's, in Flax's order of axes.
      bias: Beside it.
      x: Inputs.
      y: Outputs.
      tensors: The adapter's, by their names in the file.
      grads: Their gradients.
    """

    kernel: np.ndarray
    bias: np.ndarray
    x: np.ndarray
    y: np.ndarray
    tensors: Tensors
    grads: Tensors


def hf_layer(config: Any, ins: int = 24, outs: int = 16, window: tuple[int, ...] = (), noise: float = 0.3) -> HFLayer:
    """A layer with noise on all that the method trains; a convolution for a window."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(ins, outs, window) if window else torch.nn.Linear(ins, outs)
    model = hf.get_peft_model(torch.nn.Sequential(torch.nn.Identity(), layer), config)
    named = {name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad}
    for leaf in named.values():
        leaf.data += noise * torch.randn(leaf.shape)
    x = torch.randn(4, ins, *(size + 2 for size in window)) if window else torch.randn(7, ins)
    y = model(x)
    torch.sin(y).sum().backward()
    last = lambda array: np.moveaxis(array.detach().numpy(), 1, -1) if window else array.detach().numpy()
    short = lambda name: name.removeprefix("base_model.model.1.").replace(".default", "")
    return HFLayer(
        layer.weight.detach().numpy().transpose(*range(2, 2 + len(window)), 1, 0),
        layer.bias.detach().numpy(),
        last(x),
        last(y),
        {short(name): leaf.numpy() for name, leaf in hf.get_peft_model_state_dict(model).items()},
        {short(name): leaf.grad.numpy() for name, leaf in named.items()},
    )


def assert_equals_hf(
    method: jpeft.Method, hf: HFLayer, leaves: Callable[[Tensors], Mapping[str, np.ndarray]], *, grads: bool = True, **tolerance: float
) -> None:
    """Outputs, merged outputs and gradients of the method on HF's numbers.

    Args:
      method: The method.
      hf: HF's layer.
      leaves: HF's tensors as the leaves beside the kernel; it must be linear, for gradients are converted by it, too.
      grads: Whether HF's gradients are right.
      **tolerance: Other than 1e-5.
    """

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return _layer(hf)(x)

    params = {"layer": {"kernel": jnp.asarray(hf.kernel), "bias": jnp.asarray(hf.bias)}}
    peft = jpeft.apply(params, method=method)
    own = {name: jnp.asarray(leaf) for name, leaf in leaves(hf.tensors).items()}
    assert jax.tree.map(jnp.shape, peft.adapter["layer"]["kernel"]) == jax.tree.map(jnp.shape, own)
    peft = peft.replace(adapter={**peft.adapter, "layer": {"kernel": own}})
    run = jpeft.wrap(Model().apply)
    tolerance = {"atol": 1e-5, "rtol": 1e-5, **tolerance}
    x = jnp.asarray(hf.x)
    np.testing.assert_allclose(run(peft, x), hf.y, **tolerance)
    np.testing.assert_allclose(Model().apply({"params": jpeft.merge(peft)}, x), hf.y, **tolerance)
    got = jax.jit(jax.grad(lambda adapter: jnp.sin(run(peft.replace(adapter=adapter), x)).sum()))(peft.adapter)["layer"]["kernel"]
    for name, grad in leaves(hf.grads).items() if grads else ():
        np.testing.assert_allclose(got[name], grad, atol=1e-4, rtol=1e-4, err_msg=name)


def _layer(hf: HFLayer) -> nn.Module:
    outs, window = hf.kernel.shape[-1], hf.kernel.shape[:-2]
    return nn.Conv(outs, window, padding="VALID", name="layer") if window else nn.Dense(outs, name="layer")

"""LoRA on every class of layer that has a kernel: against the kernel that NumPy changes, on linen and NNX, and at factored cost."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from tables import noised

import jpeft
from jpeft.core.flops import count_flops

KEY, RANK, ALPHA = jax.random.key(0), 2, 3.0
E, D, F = 3, 24, 32


class Net(nn.Module):
    """One layer under a name."""

    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


class Tied(nn.Module):
    """A table that is looked up, and whose rows are scored: a language model's tied head."""

    def setup(self):
        self.table = nn.Embed(D, F)

    def __call__(self, ids):
        return self.table.attend(jnp.tanh(self.table(ids)))


class NNXNet(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


class NNXTied(nnx.Module):
    def __init__(self):
        self.table = nnx.Embed(D, F, rngs=nnx.Rngs(0))

    def __call__(self, ids):
        return self.table.attend(jnp.tanh(self.table(ids)))


def conv(window, **options):
    return lambda: nn.Conv(F, window, **options), lambda: nnx.Conv(D, F, window, rngs=nnx.Rngs(0), **options)


def einsum(equation, shape, bias):
    return lambda: nn.Einsum(shape, equation), lambda: nnx.Einsum(equation, shape, bias, rngs=nnx.Rngs(0))


# (linen, nnx), shape of x, letters of kernel, a and b
LAYERS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "conv1d": (conv((3,), strides=2, kernel_dilation=2, padding="VALID"), (4, 17, D), "wio,wir,ro"),
    "conv2d": (conv((3, 2), strides=(2, 1), kernel_dilation=(1, 2), padding="SAME"), (2, 7, 6, D), "vwio,vwir,ro"),
    "conv2d-groups": (conv((3, 3), strides=2, padding=1, feature_group_count=4), (2, 7, 7, D), "vwio,vwir,ro"),
    "conv2d-depthwise": (conv((3, 3), feature_group_count=8), (2, 5, 5, D), "vwio,vwir,ro"),
    "conv3d": (conv((2, 2, 2), strides=(1, 2, 1), padding="CIRCULAR"), (2, 4, 4, 4, D), "uvwio,uvwir,ro"),
    "experts": (einsum("bted,edf->btef", (E, D, F), (E, F)), (4, 5, E, D), "edf,edr,erf"),
    "heads": (einsum("btd,dnh->btnh", (D, 4, 8), (4, 8)), (4, 5, D), "dnh,dr,rnh"),
    "from-heads": (einsum("btnh,nhd->btd", (4, 6, F), (F,)), (4, 5, 4, 6), "nhd,nhr,rd"),
    "tied": ((Tied, NNXTied), (4, 5), "vd,vr,rd"),
}


def adapted(name, host, view):
    """A model, a noisy adapter on it, inputs, and the base with the kernel that NumPy makes of both."""
    (make, make_nnx), shape, letters = LAYERS[name]
    x = jax.random.randint(KEY, shape, 0, D) if name == "tied" else jax.random.normal(KEY, shape)
    module = Tied() if name == "tied" else Net(make())
    params = noised(module.init(KEY, x)["params"], 0.3)
    path = "table/embedding" if name == "tied" else "layer/kernel"
    ndim = jpeft.flatten(params)[path].ndim
    axes = ((".*", jpeft.KernelAxes((), tuple(range(ndim - 1)), (ndim - 1,))),) if "conv" in name else jpeft.kernel_axes(module, params, x)
    method = jpeft.lora(rank=RANK, alpha=ALPHA, target=".*(kernel|embedding)", view=view, head=None, axes=axes)
    peft = jpeft.apply(params, method=method)
    peft = peft.replace(adapter=noised(peft.adapter, 0.3))
    leaves = jax.tree.map(np.array, jpeft.flatten(peft.adapter))
    kernel, factors = letters.split(",", 1)
    update = np.einsum(f"{factors}->{kernel}", leaves[f"{path}/a"], leaves[f"{path}/b"])
    changed = jpeft.tree.replace(params, {path: jnp.asarray(np.asarray(jpeft.flatten(params)[path]) + ALPHA / RANK * update)})
    if host == "linen":
        return module.apply, peft, x, {"params": changed}, module.apply
    model = make_nnx() if name == "tied" else NNXNet(make_nnx())
    nnx.update(model, jpeft.tree.replace(nnx.state(model, nnx.Param), jpeft.flatten(params)))
    ours = jpeft.Peft(nnx.state(model, nnx.Param), peft.adapter, method)
    return model, ours, x, {"params": changed}, module.apply


@pytest.mark.parametrize("host", ["linen", "nnx"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_the_kernel_of_numpy(name, host):
    for view in ("factored", "auto"):
        model, peft, x, changed, run = adapted(name, host, view)
        want = run(changed, x)
        got = jpeft.wrap(model)(peft, x)
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got / scale, want / scale, atol=1e-5)
    merged = jpeft.flatten(jpeft.merge(peft))
    chex.assert_trees_all_close(merged, jpeft.flatten(changed["params"]), atol=1e-5)


@pytest.mark.parametrize("host", ["linen", "nnx"])
@pytest.mark.parametrize("name", ["conv2d", "conv3d", "experts", "tied"])
def test_a_layer_costs_its_factors(name, host):
    """What LoRA adds to forward pass, dX and its own gradient is a few products of rank r, far from one of the kernel's size."""
    model, peft, x, _, run = adapted(name, host, "factored")
    forward = jpeft.wrap(model)
    loss = lambda adapter, x: jnp.sin(forward(peft.replace(adapter=adapter), x)).sum()
    of_base = lambda x: jnp.sin(run({"params": jpeft.unflatten(jpeft.flatten(peft.params))}, x)).sum()
    if name == "tied":  # ids take no gradient; the table's first use is differentiated on the way to it
        base = count_flops(jax.make_jaxpr(of_base)(x)).all * 2
        spent = count_flops(jax.make_jaxpr(jax.grad(loss))(peft.adapter, x)).all
    else:
        base = count_flops(jax.make_jaxpr(jax.grad(of_base))(x)).all
        spent = count_flops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(peft.adapter, x)).all
    kernel = next(leaf for path, leaf in jpeft.flatten(peft.params).items() if path.endswith(("kernel", "embedding")))
    inputs, outputs = (D, F) if name in ("tied", "experts") else (kernel.size // F, F)
    rows = jax.eval_shape(lambda: run({"params": jpeft.unflatten(jpeft.flatten(peft.params))}, x)).size // (D if name == "tied" else F)
    # The gradient of the inputs of a convolution with strides is one of as many positions as the inputs have.
    rows = rows if name == "tied" else max(rows, x.size // D)
    # Forward pass, da with db, and dX: three times 2 N (D + F) r; and a few passes over the outputs. A tied table has it twice.
    branch = 3 * 2 * rows * (inputs + outputs) * RANK * (2 if name == "tied" else 1)
    assert spent - base <= 1.25 * branch + 12 * rows * outputs + 4 * kernel.size, (spent, base, branch)

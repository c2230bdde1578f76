"""NNX modules inside linen ones, by `nnx.bridge.ToLinen`: adapted like the rest of the model."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from host_checks import noisy

import jpeft

KEY = jax.random.key(0)
W = 6
X = jax.random.normal(KEY, (2, 5, W))


class Mlp(nnx.Module):
    """Nested, with a list, running means and a product over two axes."""

    def __init__(self, rngs):
        self.up, self.norm = nnx.Linear(W, 8, rngs=rngs), nnx.BatchNorm(W, rngs=rngs)
        self.layers = nnx.List([nnx.LinearGeneral(8, (2, 3), rngs=rngs), nnx.LinearGeneral((2, 3), W, axis=(-2, -1), rngs=rngs)])

    def __call__(self, x):
        x = self.layers[1](self.layers[0](jnp.tanh(self.up(x))))
        return self.norm(x, use_running_average=False)


class Net(nn.Module):
    lift: Any = lambda cls: cls

    @nn.compact
    def __call__(self, x):
        return self.lift(bridge.ToLinen)(Mlp, name="inside")(nn.Dense(W, name="out")(x))


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(bridge.ToLinen(nnx.Linear, args=(W, W), name="inside")(x)), None

        return nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="layers")(x, None)[0]


METHODS = {
    "lora": lambda axes: jpeft.lora(rank=2, axes=axes),
    "dora": lambda axes: jpeft.dora(rank=2, axes=axes),
    "chain": lambda axes: jpeft.chain(lora=jpeft.lora(rank=2, axes=axes), bitfit=jpeft.bitfit(), more=jpeft.lora(rank=1, axes=axes)),
    "ia3": lambda axes: jpeft.ia3(target=".*up/kernel|.*inside/kernel", feedforward=None, axes=axes),
}


@pytest.mark.parametrize(
    ("model", "method"),
    [(Net(), "lora"), (Net(), "chain"), (Net(), "ia3"), (Net(nn.remat), "dora"), (Stack(), "lora")],
    ids=["lora", "chain", "ia3", "dora-remat", "lora-scan"],
)
def test_parameters_inside_are_adapted(model, method):
    variables = model.init(KEY, X)
    others = {name: tree for name, tree in variables.items() if name != "params"}
    peft = noisy(variables["params"], METHODS[method](jpeft.kernel_axes(model, variables, X)))
    if method == "lora":
        assert any("inside" in path for path in jpeft.flatten(peft.adapter))
    forward, apply = jpeft.wrap(model.apply), lambda params, **more: model.apply({**others, "params": params}, X, **more)
    out, state = forward(peft, X, collections=others, mutable=["batch_stats"])
    chex.assert_trees_all_close((out, dict(state)), apply(jpeft.merge(peft), mutable=["batch_stats"]), atol=1e-5, rtol=1e-4)
    assert jnp.abs(out - apply(peft.params)).max() > 1e-3
    random = jnp.asarray(np.random.RandomState(0).standard_normal(out.shape), out.dtype)
    loss = lambda adapter: (random * forward(peft.replace(adapter=adapter), X, collections=others)).sum()
    # What is only added in front of a normalisation over examples does nothing.
    dead = {path for path, leaf in jpeft.flatten(jax.grad(loss)(peft.adapter)).items() if not jnp.abs(leaf).max() > 1e-5}
    assert not {path for path in dead if "layers" not in path or "bias" not in path}


def test_a_bottleneck_goes_around_the_whole_only():
    model = Net()
    variables = model.init(KEY, X)
    others = {"batch_stats": variables["batch_stats"]}
    method = jpeft.adapter(size=2, target="(?P<module>inside)/norm/scale", train_norms=False, head=None, activation="tanh")
    around = noisy(variables["params"], method)
    h = model.apply(variables, X)
    down, up = (around.adapter["inside"]["+"][name] for name in ("down", "up"))
    bias = lambda leaves: leaves["bias"][None, None]
    want = h + jnp.tanh(h @ down["kernel"] + bias(down)) @ up["kernel"] + bias(up)
    chex.assert_trees_all_close(jpeft.wrap(model.apply)(around, X, collections=others), want, atol=1e-4)
    inside = noisy(variables["params"], jpeft.adapter(size=2, target="inside/up/kernel", head=None))
    with pytest.raises(ValueError, match="adapter adds to the module 'inside/up'.*in a module of another framework"):
        jpeft.wrap(model.apply)(inside, X, collections=others)

"""The linen host: leaves that no module reads, layers that are intercepted more than once, static settings."""

import dataclasses
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
import toy_host
from flax import linen as nn
from host_checks import noisy
from tables import MODELS, Classifier, base, batch, gpt2

import jpeft
from jpeft.core.method import Method
from jpeft.tree import put_grafts

KEY = jax.random.key(0)


# --- leaves that no module reads --------------------------------------------------------------------------------------------------------


class AtCore(Method):
    """Scales what the modules called `core` return, which have no parameters, as a prefix does."""

    name = "at_core"
    summary = "a scale of attention"

    def init(self, key, params, *, stats=None):
        del key, stats
        owners = sorted({path.partition("attn")[0] + "attn" for path in jpeft.flatten(params) if "attn/" in path})
        return jpeft.unflatten({f"{owner}/core/+/scale": jnp.zeros(()) for owner in owners})

    def call(self, layer, inputs, leaves, rng):
        return layer(*inputs) * (1 + leaves["+"]["scale"])


class Core(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(x)


class WithCore(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x):
        return Core(name="core")(nn.Dense(self.width, name="query")(x))


class Stack(nn.Module):
    core: bool
    jit: bool = False

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Layer(self.core, self.jit, name=f"layer_{i}")(x)
        return x


class Layer(nn.Module):
    core: bool
    jit: bool

    @nn.compact
    def __call__(self, x):
        kind = (nn.jit(WithCore) if self.jit else WithCore) if self.core else WithoutCore
        return kind(name="attn")(x)


class WithoutCore(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(4, name="query")(x))


def test_a_lost_method_is_refused_whatever_ran_before():
    """A model with cores and one without, with an equal method, in one process: the second is refused as it would be alone."""
    x = jnp.ones((2, 4))
    with_core, without = Stack(core=True), Stack(core=False)
    params = with_core.init(KEY, x)["params"]
    chex.assert_trees_all_equal_structs(params, without.init(KEY, x)["params"])
    peft = noisy(params, AtCore())
    assert jnp.abs(jpeft.wrap(with_core.apply)(peft, x) - with_core.apply({"params": params}, x)).max() > 1e-3
    with pytest.raises(ValueError, match="at_core adds to the module 'layer_0/attn/core', but no such module ran"):
        jpeft.wrap(without.apply)(peft, x)
    # One function that runs either model, as its argument says.
    forward = jpeft.wrap(lambda variables, x, core: (with_core if core else without).apply(variables, x), host="linen")
    forward(peft, x, True)
    with pytest.raises(ValueError, match="no such module ran"):
        forward(peft, x, False)


def test_a_prefix_is_not_lost_after_another_model_ran():
    """The scenario of a GPT-2 and a model without a core."""
    method, ids = jpeft.p_tuning_v2(length=3), batch()["x"]
    model = gpt2()
    peft = jpeft.apply(jax.jit(model.init)(KEY, ids)["params"], method=method)
    assert jnp.abs(jpeft.wrap(model.apply)(peft, ids) - model.apply({"params": peft.params}, ids)).max() > 1e-3
    with pytest.raises(ValueError, match="no such module ran"):
        jpeft.wrap(Classifier().apply)(jpeft.apply(base("plain"), method=method), ids)


def test_cached_traces_are_no_missing_modules():
    """`nn.jit` traces the first of equal blocks, once for all functions that run it: the other blocks and later calls are right."""
    x, model = jax.random.normal(KEY, (2, 4)), Stack(core=True, jit=True)
    peft = noisy(model.init(KEY, x)["params"], AtCore())
    want = jpeft.wrap(Stack(core=True).apply)(peft, x)
    for _ in range(2):
        forward = jpeft.wrap(model.apply)
        for _ in range(3):
            chex.assert_trees_all_close(forward(peft, x), want, atol=1e-6)
        chex.assert_trees_all_close(jax.jit(forward)(peft, x), want, atol=1e-6)


def test_a_decorated_method_is_adapted():
    """`@nn.remat` above `def __call__` makes no second module: the leaves are read where the method is called."""

    def build(transform: Any) -> nn.Module:
        class Kernel(nn.Module):
            @transform
            @nn.compact
            def __call__(self, x):
                return x @ self.param("kernel", nn.initializers.lecun_normal(), (8, 8))

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return Kernel(name="one")(jnp.tanh(nn.remat(Kernel)(name="two")(x)))

        return Net()

    for transform in (nn.remat, nn.jit):
        model, x = build(transform), jax.random.normal(KEY, (3, 8))
        fn = lambda params, x, model=model: model.apply({"params": params}, x)
        params = model.init(KEY, x)["params"]
        peft = noisy(params, jpeft.lora(rank=2))
        chex.assert_trees_all_close(jpeft.wrap(model.apply)(peft, x), fn(jpeft.merge(peft), x), atol=1e-5)


def test_a_layer_that_calls_its_base_class_is_adapted_once():
    """A subclass whose `__call__` calls `super().__call__`, with and without more around it; also of a lifted class."""

    class Plain(nn.Dense):
        def __call__(self, x):
            return super().__call__(x)

    class Active(nn.Dense):
        def __call__(self, x):
            return jnp.tanh(super().__call__(x))

    class Lifted(nn.remat(nn.Dense)):
        def __call__(self, x):
            return super().__call__(x)

    x = jax.random.normal(KEY, (2, 8))
    for cls in (Plain, Active, Lifted):
        model = nn.Sequential([cls(8)])
        params = model.init(KEY, x)["params"]
        axes = jpeft.kernel_axes(model, params, x)
        for method in (jpeft.lora(rank=2, view="factored"), jpeft.lora(rank=2, view="two-view"), jpeft.dora(rank=2, axes=axes)):
            peft = noisy(params, method)
            chex.assert_trees_all_close(jpeft.wrap(model.apply)(peft, x), model.apply({"params": jpeft.merge(peft)}, x), atol=1e-5)
        peft = noisy(params, jpeft.adapter(size=2, target=".*kernel", activation="tanh", head=None))
        down, up = (peft.adapter["layers_0"]["+"][name] for name in ("down", "up"))
        y = model.apply({"params": params}, x)
        want = y + toy_host.dense(up, jnp.tanh(toy_host.dense(down, y)))
        chex.assert_trees_all_close(jpeft.wrap(model.apply)(peft, x), want, atol=1e-5)


# --- static settings among the leaves ---------------------------------------------------------------------------------------------------


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Settings:
    """What a method wants to know at a layer, and jit must not trace."""

    power: int


class Power(Method):
    """``y * scale ** power``, with the power beside the scale as a static node."""

    name = "power"
    summary = "a static setting at a layer"

    def init(self, key, params, *, stats=None):
        del key, stats
        kernels = {path: leaf for path, leaf in jpeft.flatten(params).items() if re.fullmatch("(.*/)?down/kernel", path)}
        return jpeft.unflatten({f"{path}/scale": jnp.full((*leaf.shape[:-2], 1), 0.5) for path, leaf in kernels.items()})

    def bind(self, params, adapter, *, rng=None):
        clean, grafts = jpeft.tree.pop_grafts(super().bind(params, adapter, rng=rng))
        return put_grafts(clean, {path: {**leaves, "settings": Settings(3)} for path, leaves in grafts.items()})

    def call(self, layer, inputs, leaves, rng):
        assert isinstance(leaves["settings"], Settings)
        return layer(*inputs) * leaves["kernel"]["scale"][None, None] ** leaves["settings"].power


@pytest.mark.parametrize("name", ["plain", "scan", "remat", "jit"])
@pytest.mark.parametrize("chained", [False, True])
def test_static_nodes_reach_the_layers(name, chained):
    model, x = MODELS[name], batch()["x"]
    power = Power()
    peft = jpeft.apply(base(name), method=jpeft.chain(lora=jpeft.lora(rank=2), power=power) if chained else power)
    half = lambda path, leaf: leaf * 0.125 if re.fullmatch("(.*/)?down/(kernel|bias)", path) else leaf
    smaller = jpeft.tree.replace(peft.params, {path: half(path, leaf) for path, leaf in jpeft.flatten(peft.params).items()})
    forward = jpeft.wrap(model.apply)
    want = model.apply({"params": smaller}, x)
    chex.assert_trees_all_close([forward(peft, x), jax.jit(forward)(peft, x)], [want] * 2, atol=1e-5)
    chex.assert_trees_all_close(jpeft.ensemble(forward)(jpeft.stack([peft] * 2), x)[1], want, atol=1e-5)

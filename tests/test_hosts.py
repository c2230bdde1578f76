"""Hosts: the protocol, what each host promises, and the private parts of flax that the linen host stands on."""

import dataclasses
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_host
from flax import linen as nn
from flax import nnx
from tables import HEADS, MODELS, Classifier, base, batch, gpt2, noised
from toy_host import ToyHost, layer

import jpeft
from jpeft.core.method import Method
from jpeft.hosts import flax_internals, linen_layers, registry
from jpeft.hosts.base import Host
from jpeft.tree import put_grafts

KEY = jax.random.key(0)
ROOT = Path(__file__).parents[1]


def noisy(params: Any, method: Any, **options: Any) -> jpeft.Peft:
    peft = jpeft.apply(params, method=method, **options)
    return peft.replace(adapter=noised(peft.adapter))


def check_host(fn: Any, params: Any, x: jax.Array, method: Method, host: Any, atol: float = 1e-5) -> jpeft.Peft:
    """What every host promises for a method that begins as the base and merges: identity, merge, gradients, jit and vmap."""
    peft = jpeft.apply(params, method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the dense host says what it costs
        forward = jpeft.wrap(fn, host=host)
        chex.assert_trees_all_close(forward(peft, x), fn(params, x), atol=atol)
        peft = peft.replace(adapter=noised(peft.adapter))
        want = fn(jpeft.merge(peft), x)
        assert jnp.abs(want - fn(params, x)).max() > 1e-3
        chex.assert_trees_all_close(forward(peft, x), want, atol=atol)
        chex.assert_trees_all_close(jax.jit(forward)(peft, x), want, atol=atol)
        grads = jax.grad(lambda adapter: jnp.square(forward(peft.replace(adapter=adapter), x)).sum())(peft.adapter)
        assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
        stacked = jpeft.stack([peft, peft.replace(adapter=noised(peft.adapter, seed=4))])
        many = jpeft.ensemble(forward)(stacked, x)
        chex.assert_trees_all_close(many[0], want, atol=atol)
        assert jnp.abs(many[0] - many[1]).max() > 1e-3
    chex.assert_trees_all_equal_structs(jpeft.merge(peft), params)
    return peft


# --- the registry -----------------------------------------------------------------------------------------------------------------------


def test_hosts_are_found_and_ordered():
    model = nn.Dense(2)
    assert [host.name for host in registry.hosts()] == ["linen", "dense"]
    assert registry.host_for(model).name == registry.host_for(model.apply).name == "linen"
    assert registry.host_for(lambda params, x: x).name == "dense"
    toy = ToyHost()
    assert registry.host_for(model, toy) is toy


def test_only_hosts_and_models_name_a_framework():
    """No other file imports flax, by any spelling."""
    files = [path for path in (ROOT / "jpeft").rglob("*.py") if path.relative_to(ROOT / "jpeft").parts[0] not in ("hosts", "models")]
    imports = re.compile(r"^\s*(from|import) (flax|jpeft\.hosts\.(linen|flax)\w*|jpeft\.hosts import linen)", re.MULTILINE)
    examples = re.compile(r"^\s*>>> .*$", re.MULTILINE)
    named = [str(path.relative_to(ROOT)) for path in files if imports.search(examples.sub("", path.read_text()))]
    assert not named


def test_a_host_that_cannot_tell_says_so():
    with pytest.raises(ValueError, match="No host can read the geometry of kernels off a function"):
        jpeft.kernel_axes(lambda params, x: x, {}, jnp.ones(2))
    with pytest.raises(ValueError, match="No host can record"):
        registry.inputs_of(lambda params, x: x, {}, "core", jnp.ones(2))
    with pytest.raises(ValueError, match="was given a Dense: pass its `apply`"):
        jpeft.wrap(nn.Dense(2), jpeft.lora())


# --- the two forms of wrap --------------------------------------------------------------------------------------------------------------


def test_one_function_for_every_method():
    """forward(peft, x) for any method, the form with variables beside it, under jit, grad and vmap."""
    model, x = MODELS["plain"], batch()["x"]
    forward = jpeft.wrap(model.apply)
    assert forward.method is None
    compiled = jax.jit(forward)
    for method in (jpeft.lora(rank=2), jpeft.ia3(target=".*attn/(key|value)/kernel", feedforward=".*down/kernel")):
        peft = noisy(base("plain"), method)
        one = jpeft.wrap(model.apply, method)
        assert one.method == method
        want = one(peft.variables, x)
        chex.assert_trees_all_close([forward(peft, x), compiled(peft, x), one(peft, x)], [want] * 3, atol=1e-5)
        loss = lambda adapter, peft=peft: jnp.square(forward(peft.replace(adapter=adapter), x)).sum()
        other = lambda adapter, peft=peft, one=one: jnp.square(one(peft.replace(adapter=adapter).variables, x)).sum()
        chex.assert_trees_all_close(jax.grad(loss)(peft.adapter), jax.grad(other)(peft.adapter), rtol=1e-4, atol=1e-4)
        stacked = jpeft.stack([peft, peft])
        many = jax.vmap(forward, in_axes=(stacked.replace(params=None, adapter=0), None))(stacked, x)
        chex.assert_trees_all_close(many, jnp.stack([want, want]), atol=1e-5)
        for whole in (jpeft.ensemble(forward)(stacked, x), jpeft.ensemble(one)(stacked, x), jpeft.ensemble(one)(stacked.variables, x)):
            chex.assert_trees_all_close(whole, many, atol=1e-5)


def test_a_step_is_compiled_once_for_equal_options():
    model, x = MODELS["plain"], batch()["x"]
    forward = jpeft.wrap(model.apply)
    step = jax.jit(chex.assert_max_traces(lambda peft, x: forward(peft, x), n=1))
    for seed in (0, 1):
        step(jpeft.apply(base("plain"), method="lora", rank=2, key=jax.random.key(seed)), x)


def test_wrong_calls_of_forward():
    model, x = MODELS["plain"], batch()["x"]
    peft = jpeft.apply(base("plain"), method="lora", rank=2)
    with pytest.raises(ValueError, match=r"called with a Peft.*was given a dict.*jpeft.wrap\(model.apply, peft.method\)"):
        jpeft.wrap(model.apply)(peft.variables, x)
    with pytest.raises(ValueError, match=r"wrapped with jpeft.lora.*rank=3.*called with a Peft of jpeft.lora.*rank=2"):
        jpeft.wrap(model.apply, jpeft.lora(rank=3))(peft, x)
    with pytest.raises(ValueError, match=r"collections=\['lora'\] may not hold \['lora'\]"):
        jpeft.wrap(model.apply)(peft, x, collections={"lora": {}})


def test_other_collections_beside_a_peft():
    """Running means: read, written, and shared by the members of an ensemble."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(4, name="dense")(x))

    model, x = Net(), jax.random.normal(KEY, (16, 8))
    variables = model.init(KEY, x)
    means = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    peft, forward = noisy(variables["params"], jpeft.lora(rank=2)), jpeft.wrap(model.apply)
    merged = {"params": jpeft.merge(peft), "batch_stats": means}
    want = model.apply(merged, x)
    chex.assert_trees_all_close(forward(peft, x, collections={"batch_stats": means}), want, atol=1e-5)
    got, new = forward(peft, x, train=True, mutable=["batch_stats"], collections={"batch_stats": means})
    chex.assert_trees_all_close((got, new), model.apply(merged, x, train=True, mutable=["batch_stats"]), atol=1e-5)
    many = jpeft.ensemble(forward)(jpeft.stack([peft, peft]), x, collections={"batch_stats": means})
    chex.assert_trees_all_close(many, jnp.stack([want, want]), atol=1e-5)


def test_a_split_batch_takes_a_peft():
    model, x = MODELS["plain"], jnp.tile(batch()["x"], (8, 1))
    peft = noisy(base("plain"), jpeft.lora(rank=2))
    forward = jpeft.wrap(model.apply)
    mesh = jpeft.sharding.make_mesh()
    got = jax.jit(jpeft.sharding.by_example(forward, mesh))(peft, x)
    chex.assert_trees_all_close(got, forward(peft, x), atol=1e-5)


# --- other trees of parameters: NNX states, dataclasses ---------------------------------------------------------------------------------


class NNXModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.query = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.classifier = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        for each in self.layers:
            x = jnp.tanh(each(x))
        return self.classifier(self.query(x).reshape(x.shape[0], -1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    kernel: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return x @ self.kernel + self.bias[None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DataclassModel:
    query: Dense
    classifier: Dense

    def __call__(self, x):
        return self.classifier(jnp.tanh(self.query(x)))


def trees(kind: str) -> tuple[Any, Any]:
    """A function of parameters, and the parameters."""
    if kind == "nnx":
        graph, state = nnx.split(NNXModel(nnx.Rngs(0)))
        return lambda state, x: nnx.merge(graph, state)(x), state
    keys = jax.random.split(KEY, 2)
    model = DataclassModel(Dense(jax.random.normal(keys[0], (8, 4)), jnp.zeros(4)), Dense(jax.random.normal(keys[1], (4, 3)), jnp.zeros(3)))
    return lambda model, x: model(x), model


AXES = ((".*query/kernel", jpeft.KernelAxes((), (0,), (1, 2))),)


@pytest.mark.parametrize("kind", ["nnx", "dataclass"])
@pytest.mark.parametrize(
    "method",
    [
        jpeft.bitfit(),
        jpeft.freeze(target=["query"]),
        jpeft.lora(rank=2, axes=AXES),
        jpeft.lora(rank=2, target=["query"], axes=AXES),
        jpeft.dora(rank=2, axes=AXES),
    ],
    ids=["bitfit", "freeze", "lora", "lora-query", "dora"],
)
def test_any_pytree_goes_through_the_dense_host(kind, method):
    """Paths have the same form everywhere, so names and patterns mean the same; merge gives back the tree that was given."""
    if kind == "dataclass" and method.name in ("lora", "dora"):
        method = method.replace(axes=None)
    fn, params = trees(kind)
    x = jax.random.normal(KEY, (5, 8))
    peft = check_host(fn, params, x, method, "dense")
    paths = {path.partition("/kernel")[0] for path in jpeft.flatten(peft.adapter)}
    assert not any("value" in path for path in paths)
    assert ("query" in paths) == (method.name != "bitfit")
    assert type(jpeft.merge(peft)) is type(params)


def test_leaves_cannot_be_added_to_a_tree_that_is_no_nested_dict():
    _, params = trees("dataclass")
    with pytest.raises(ValueError, match="only to parameters in nested dicts"):
        put_grafts(params, {"query": {"kernel": 1}})


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


# --- what is linear about the layers of linen -------------------------------------------------------------------------------------------

D, N, H, E = 6, 2, 3, 4
LAYERS = {
    "dense": (nn.Dense(5), (2, 3, D)),
    "dense-general": (nn.DenseGeneral((N, H)), (2, 3, D)),
    "dense-general-heads": (nn.DenseGeneral(5, axis=(-2, -1)), (2, 3, N, H)),
    "dense-general-turned": (nn.DenseGeneral((5, 4), axis=(-1, -2)), (2, 3, N, H)),
    "dense-general-middle": (nn.DenseGeneral((N, H), axis=1), (2, D, 3)),
    "dense-general-batch": (nn.DenseGeneral((N, H), axis=-1, batch_dims=(0,)), (E, 3, D)),
    "dense-general-batch-middle": (nn.DenseGeneral(5, axis=(3, 2), batch_dims=(0, 1)), (E, 2, N, H, 3)),
    "einsum": (nn.Einsum((D, N, H), "btd,dnh->btnh"), (2, 3, D)),
    "einsum-out": (nn.Einsum((N, H, D), "btnh,nhd->btd"), (2, 3, N, H)),
    "einsum-turned": (nn.Einsum((D, N, H), "btd,dnh->bhtn", use_bias=False), (2, 3, D)),
    "einsum-ellipsis": (nn.Einsum((D, N, H), "...d,dnh->...nh"), (2, 3, D)),
    "einsum-ellipsis-middle": (nn.Einsum((D, N, H), "b...d,dnh->nb...h"), (2, 3, D)),
    "einsum-experts": (nn.Einsum((E, D, 5), "bted,edf->btef"), (2, 3, E, D)),
    "einsum-experts-last": (nn.Einsum((D, 5, E), "ebtd,dfe->bfte", use_bias=False), (E, 2, 3, D)),
    "conv": (nn.Conv(5, (3,), strides=2), (2, 6, D)),
    "embed": (nn.Embed(7, D), None),
}
NO_INPUT_SCALE = {"conv", "embed"}


def build(name: str) -> tuple[nn.Module, dict[str, Any], jax.Array]:
    module, shape = LAYERS[name]
    x = jnp.array([[1, 3, 6], [0, 0, 2]]) if shape is None else jax.random.normal(KEY, shape)
    return module, noised(module.init(KEY, x)["params"], 0.5), x


@pytest.mark.parametrize("name", LAYERS)
def test_scales_and_biases_equal_the_layer_on_a_changed_kernel(name):
    """Each function of `Linear` against the layer itself, run on the kernel that the function stands for."""
    module, own, x = build(name)
    linear = linen_layers.linear_of(module, "__call__", own, (x,))
    assert linear is not None
    assert linear.scale_outputs is not None
    assert linear.add_bias is not None
    assert (linear.scale_inputs is None) == (name in NO_INPUT_SCALE)
    kernel = own[linear.name]
    bias = {"bias": jnp.zeros_like(own["bias"])} if "bias" in own else {}
    run = lambda params: module.apply({"params": params}, x)
    stacked = linear.axes.stack
    for axes, scale, argument in ((linear.axes.outputs, linear.scale_outputs, "y"), (linear.axes.inputs, linear.scale_inputs, "x")):
        if scale is None:
            continue
        kept = [i for i in range(kernel.ndim) if i in axes or i in stacked]
        g = jax.random.normal(jax.random.key(1), [kernel.shape[i] for i in kept])
        wide = g.reshape([kernel.shape[i] if i in kept else 1 for i in range(kernel.ndim)])
        want = run({linear.name: kernel * wide, **bias})
        plain = {linear.name: kernel, **bias}
        got = scale(run(plain), g) if argument == "y" else module.apply({"params": plain}, scale(x, g))
        chex.assert_trees_all_close(got, want, atol=1e-5)
    if bias:
        chex.assert_trees_all_close(linear.add_bias(run({linear.name: kernel, **bias}), own["bias"]), run(own), atol=1e-6)
    shape_a, shape_b = linear.axes.factor_shapes(kernel.shape, 2)
    a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate((shape_a, shape_b)))
    chex.assert_trees_all_close(linear.apply_low_rank(x, a, b), run({linear.name: linear.axes.product(a, b), **bias}), atol=1e-4)


def method_for(kind: str, name: str, axes: Any) -> Method:
    target = ".*(kernel|embedding)"
    if kind == "dora":
        return jpeft.dora(rank=2, target=target, axes=axes, head=None)
    inner = kind == "ia3-inputs"
    return jpeft.ia3(target=target, feedforward=target if inner else None, axes=axes, head=None)


@pytest.mark.parametrize("kind", ["ia3", "ia3-inputs", "dora"])
@pytest.mark.parametrize("name", LAYERS)
def test_methods_merge_into_every_layer(name, kind):
    module, own, x = build(name)
    axes = jpeft.kernel_axes(module, own, x)
    peft = noisy(own, method_for(kind, name, axes))
    merged = module.apply({"params": jpeft.merge(peft)}, x)
    assert jnp.abs(merged - module.apply({"params": own}, x)).max() > 1e-2
    chex.assert_trees_all_close(jpeft.wrap(module.apply)(peft, x), merged, atol=1e-4)


@pytest.mark.parametrize("kind", ["ia3", "ia3-inputs", "dora"])
def test_tied_embeddings_agree_with_merge(kind):
    """Lookup and scores of one table, which the host runs by different functions."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(7, D, name="embed")
            return embed.attend(jnp.tanh(embed(ids)))

    model, ids = Tied(), jnp.array([[1, 3, 6]])
    params = model.init(KEY, ids)["params"]
    peft = noisy(params, method_for(kind, "embed", None))
    chex.assert_trees_all_close(jpeft.wrap(model.apply)(peft, ids), model.apply({"params": jpeft.merge(peft)}, ids), atol=1e-5)


@pytest.mark.parametrize("equation", ["bdd,dnh->bnh", "bd,dnn->bn", "bd,...d->b", "bd,nh->bdnh", "bd->b"])
def test_equations_that_are_no_product_with_a_kernel(equation):
    module = nn.Einsum((D, N, N), equation, use_bias=False)
    assert linen_layers.linear_of(module, "__call__", {"kernel": jnp.ones((D, N, N))}) is None


# --- a new host -------------------------------------------------------------------------------------------------------------------------


def toy_model(params, x):
    x = jnp.tanh(layer("heads", toy_host.heads, params, x))
    x = layer("scale", toy_host.scale, params, x)
    return layer("out", toy_host.dense, params, x)


def toy_params() -> dict[str, Any]:
    keys = jax.random.split(KEY, 3)
    out = {"kernel": jax.random.normal(keys[1], (HEADS * H, 3)), "bias": jnp.zeros(3)}
    return {"heads": {"kernel": jax.random.normal(keys[0], (D, HEADS, H))}, "scale": {"scale": jnp.ones(HEADS * H)}, "out": out}


def test_a_toy_host_runs_every_kind_of_method():
    """One file, `toy_host.py`: selective, reparametrised and additive methods, without a word of them."""
    host, params, x = ToyHost(), toy_params(), jax.random.normal(KEY, (4, D))
    assert host.recognises(toy_model)
    assert not host.recognises(jnp.tanh)
    axes = host.kernel_axes(toy_model, params, x)
    assert dict(axes) == {"heads/kernel": jpeft.KernelAxes((), (0,), (1, 2)), "out/kernel": jpeft.KernelAxes((), (0,), (1,))}
    for method in (
        jpeft.lora(rank=2, axes=axes, head=None),
        jpeft.lora(rank=2, axes=axes, head=None, view="two-view"),
        jpeft.dora(rank=2, axes=axes, head=None),
        jpeft.bitfit(head=None),
        jpeft.chain(bias=jpeft.bitfit(head=None), lora=jpeft.lora(rank=2, axes=axes, head=None)),
    ):
        check_host(toy_model, params, x, method, host)


def test_a_toy_host_runs_what_cannot_merge():
    host, params, x = ToyHost(), toy_params(), jax.random.normal(KEY, (4, D))
    peft = noisy(params, jpeft.adapter(size=2, target=["out"], activation="tanh", head=None))
    down, up = (peft.adapter["out"]["+"][name] for name in ("down", "up"))
    y = toy_model(params, x)
    want = y + toy_host.dense(up, jnp.tanh(toy_host.dense(down, y)))
    chex.assert_trees_all_close(jpeft.wrap(toy_model, host=host)(peft, x), want, atol=1e-5)
    with pytest.raises(ValueError, match=r"adds to the layers \['gone'\]"):
        lost = {**params, "gone": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}}
        jpeft.wrap(toy_model, host=host)(jpeft.apply(lost, method="lora", rank=1, target=["gone"], head=None), x)


def test_a_toy_host_records_inputs_and_maps_outputs():
    host, params, x = ToyHost(), toy_params(), jax.random.normal(KEY, (4, D))
    (given,) = host.inputs_of(toy_model, params, "out", x)["out"]
    chex.assert_trees_all_close(given, toy_host.scale(params["scale"], jnp.tanh(toy_host.heads(params["heads"], x))), atol=1e-6)
    zero = registry.map_outputs(jpeft.wrap(toy_model, host=host), jnp.zeros_like)
    chex.assert_trees_all_equal(zero(jpeft.apply(params, method=jpeft.bitfit(head=None)), x), jnp.zeros((4, 3)))


def test_the_skeleton_of_a_host_runs():
    spec = importlib.util.spec_from_file_location("skeleton_host", ROOT / "docs" / "skeletons" / "host.py")
    assert spec is not None
    assert spec.loader is not None
    skeleton = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(skeleton)
    model = skeleton.Model(("up", skeleton.dense), ("act", lambda own, x: jnp.tanh(x)), ("down", skeleton.dense))
    keys = jax.random.split(KEY, 2)
    params = {
        "up": {"kernel": jax.random.normal(keys[0], (D, 5)), "bias": jnp.zeros(5)},
        "act": {},
        "down": {"kernel": jax.random.normal(keys[1], (5, 3)), "bias": jnp.zeros(3)},
    }
    x = jax.random.normal(KEY, (4, D))
    for method in (jpeft.lora(rank=2), jpeft.dora(rank=2), jpeft.bitfit()):
        check_host(model.apply, params, x, method, skeleton.ListHost())
    peft = jpeft.apply({**params, "gone": params["up"]}, method="lora", rank=2)
    with pytest.raises(ValueError, match=r"adds to \['gone'\], but no such layer ran"):
        jpeft.wrap(model.apply, host=skeleton.ListHost())(peft, x)


def test_the_guide_names_every_method_of_a_host():
    guide = (ROOT / "docs" / "guides" / "adding_a_host.md").read_text()
    for name, _ in inspect.getmembers(Host, inspect.isfunction):
        assert f"`{name}`" in guide, name


# --- what flax keeps private ------------------------------------------------------------------------------------------------------------

VERSION = f"flax {flax.__version__} changed what jpeft/hosts/flax_internals.py relies on: "


def seen_inside(module: nn.Module, look: Any, *args: Any, **variables: Any) -> list[Any]:
    """What `look(context)` gives at each intercepted call."""
    found = []

    def record(next_fun, args, kwargs, context):
        if context.method_name == "__call__":
            found.append(look(context))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        module.apply(variables, *args)
    return found


def test_flax_gives_a_collection_of_a_scope():
    model, x = nn.Dense(4), jnp.ones((2, 3))
    params = {**model.init(KEY, x)["params"], "jpeft": {"leaf": jnp.ones(1)}}
    (own,) = seen_inside(model, lambda context: dict(flax_internals.collection(context.module, "params")), x, params=params)
    assert own.keys() == params.keys(), VERSION + "Scope._collection('params') must hold all entries of the module, leaves of methods too."
    assert own["kernel"] is params["kernel"], VERSION + "Scope._collection must give the arrays themselves."
    (cache,) = seen_inside(model, lambda context: flax_internals.collection(context.module, "cache"), x, params=params)
    assert not cache, VERSION + "Scope._collection must be empty for a collection that was not given."


LIFTS = {
    "remat": nn.remat(nn.Dense),
    "jit": nn.jit(nn.Dense),
    "vmap": nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False}),
    "scan": nn.scan(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}),
    "map_variables": nn.map_variables(nn.Dense, "params", lambda tree: tree, init=True),
}


@pytest.mark.parametrize("name", LIFTS)
def test_flax_tells_lifted_classes(name):
    """The class that a transform makes enters the transform; the class inside does not."""
    lifted = LIFTS[name](4)
    message = f"flax_internals.enters_transform no longer tells the class that nn.{name} makes from the one inside."
    assert flax_internals.enters_transform(lifted, "__call__"), VERSION + message
    assert not flax_internals.enters_transform(nn.Dense(4), "__call__"), VERSION + message
    if name == "scan":
        return
    x = jnp.ones((2, 3))
    calls = seen_inside(lifted, lambda context: type(context.module), x, **lifted.init(KEY, x))
    assert calls == [nn.Dense], VERSION + "an interceptor must see the module inside of the transform, of the class that was lifted."

    class Subclass(LIFTS[name]):
        def __call__(self, x):
            return super().__call__(x)

    calls = seen_inside(Subclass(4), lambda c: flax_internals.enters_transform(c.module, c.method_name), x, **lifted.init(KEY, x))
    assert calls == [True, False], VERSION + message


@pytest.mark.parametrize("transform", [nn.remat, nn.jit])
def test_flax_tells_decorated_methods(transform):
    """A decorated method is called once, so the call does not only enter a transform."""

    class Plain(nn.Module):
        @transform
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

    x = jnp.ones((2, 3))
    calls = seen_inside(Plain(), lambda c: flax_internals.enters_transform(c.module, c.method_name), x, **Plain().init(KEY, x))
    assert calls == [False, False], VERSION + "a decorated method and the layer inside must be intercepted once each."
    lifted = transform(Plain)()
    assert flax_internals.enters_transform(lifted, "__call__"), VERSION + "a lifted class whose method is decorated enters a transform."


def test_private_flax_is_used_in_one_file():
    """`scope._x`, `module._x`, and flax's underscored modules appear in flax_internals.py alone."""
    private = re.compile(r"\bscope\._\w|\bmodule\._[a-z]|co_filename|co_qualname|flax[\w.]*\._\w|linen import transforms")
    files = [path for path in (ROOT / "jpeft").rglob("*.py") if path.name != "flax_internals.py"]
    assert [str(path.relative_to(ROOT)) for path in files if private.search(path.read_text())] == []


def test_jit_keeps_traces_by_structure():
    """What the tags stand on: `nn.jit` looks a trace up by the structure of the parameters, across calls and functions."""
    traces = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(1)
            return nn.Dense(2)(x)

    x, model = jnp.ones((1, 3)), nn.jit(Counted)()
    params = Counted().init(KEY, x)["params"]
    traces.clear()
    for extra in ({}, {}, {"jpeft": {"one": {}}}, {"jpeft": {"two": {"leaf": 1.0}}}, {"jpeft": {"two": {"leaf": 1.0}}}):
        model.apply({"params": {**params, **extra}}, x)
    np.testing.assert_array_equal(len(traces), 3, VERSION + "nn.jit must trace anew for another structure, and only then.")


WALK = """
import jax, jax.numpy as jnp, jpeft
from jpeft.hosts import frame
from jpeft.hosts.registry import hosts

assert [host.name for host in hosts()] == ["linen", "list", "dense"]
model = frame.Model(("up", frame.dense))
peft = jpeft.apply({"up": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}, method="lora", rank=2)
forward = jpeft.wrap(model.apply)
assert forward.host.name == "list"
assert forward(peft, jnp.ones((2, 4))).shape == (2, 3)
"""


def test_a_host_is_one_file(tmp_path):
    """In a copy of the package, the skeleton of a host is found and chosen for the models that it recognises."""
    shutil.copytree(ROOT / "jpeft", tmp_path / "jpeft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "docs" / "skeletons" / "host.py", tmp_path / "jpeft" / "hosts" / "frame.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WALK], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr

"""The protocol of hosts: how they are found and chosen, both forms of wrap, other trees of parameters, and a new host."""

import dataclasses
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
import toy_host
from flax import linen as nn
from flax import nnx
from host_checks import check_host, noisy
from tables import HEADS, MODELS, base, batch
from toy_host import ToyHost, layer

import jpeft
from jpeft.hosts import registry
from jpeft.hosts.base import Host
from jpeft.tree import put_grafts

KEY = jax.random.key(0)
D, H = 6, 3  # width of an input, size of a head
ROOT = Path(__file__).parents[1]


# --- the registry -----------------------------------------------------------------------------------------------------------------------


def test_hosts_are_found_and_ordered():
    model = nn.Dense(2)
    assert [host.name for host in registry.hosts()] == ["linen", "nnx", "dense"]
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


WALK = """
import jax, jax.numpy as jnp, jpeft
from jpeft.hosts import frame
from jpeft.hosts.registry import hosts

assert [host.name for host in hosts()] == ["linen", "list", "nnx", "dense"]
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
    command = [sys.executable, "-c", WALK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr

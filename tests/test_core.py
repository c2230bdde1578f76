"""Peft, wrap, chain, optimizer, summary: the verbs and their refusals."""

import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze
from tables import MODELS, base, base_logits, batch, case, noised

import jpeft

KEY = jax.random.key(0)
PARAMS = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}, "classifier": {"kernel": jnp.ones((4, 2))}}


def test_methods_are_equal_by_their_options():
    assert jpeft.lora(rank=4) == jpeft.lora(rank=4) != jpeft.lora(rank=5)
    assert hash(jpeft.lora(target=["a", "b"])) == hash(jpeft.lora(target=("a", "b")))
    assert jpeft.chain(a=jpeft.lora(), b=jpeft.bitfit()) != jpeft.chain(b=jpeft.bitfit(), a=jpeft.lora())
    assert jpeft.lora().replace(rank=4) == jpeft.lora(rank=4)

    class Unmerged(jpeft.lora):
        def merge(self, params, adapter):
            return params

    assert Unmerged() != jpeft.lora()


@pytest.mark.parametrize("name", list(jpeft.methods()))
def test_configurations_round_trip_through_json(name):
    import json

    method = jpeft.make(name)
    assert jpeft.make(json.loads(json.dumps(method.config()))) == method
    assert eval(repr(method)) == method


def test_chain_configuration_round_trips():
    method = jpeft.chain(lora=jpeft.lora(rank={"dense": 3}), b=jpeft.bitfit())
    assert jpeft.make(method.config()) == method


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lroa", {}, "There is no method 'lroa'. Did you mean 'lora'"),
        ("lora", {"ranks": 3}, "lora has no option 'ranks'.*rank=8"),
        (jpeft.lora(), {"rank": 3}, r"is finished: give the options \['rank'\]"),
    ],
)
def test_unknown_methods_and_options(method, options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.apply(PARAMS, method=method, **options)


def test_the_head_is_trained_by_default_and_only_if_there():
    for name in ("freeze", "bitfit", "adapter", "lora"):
        options = {"subset": ["dense"]} if name == "bitfit" else {"target": ["dense"]}
        assert "classifier" in jpeft.apply(PARAMS, method=name, **options).adapter
        assert "classifier" not in jpeft.apply(PARAMS, method=name, head=None, **options).adapter
        without = {"dense": PARAMS["dense"]}
        assert set(jpeft.apply(without, method=name, **options).adapter) == {"dense"}
    with pytest.raises(ValueError, match="head='score' matches none of the 3 parameters"):
        jpeft.apply(PARAMS, method="bitfit", head="score")


def test_adapters_own_their_buffers():
    """Donating the adapter to a jitted step must not delete the base's arrays."""
    params = jax.tree.map(jnp.array, PARAMS)
    peft = jpeft.apply(params, method="bitfit")
    jax.jit(lambda a: jax.tree.map(lambda x: x + 1, a), donate_argnums=0)(peft.adapter)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_wrap_refuses_a_jitted_function():
    with pytest.raises(ValueError, match="jitted already.*jit the result instead"):
        jpeft.wrap(jax.jit(MODELS["plain"].apply), jpeft.lora())


def test_wrap_names_a_missing_collection():
    forward = jpeft.wrap(MODELS["plain"].apply, jpeft.lora())
    with pytest.raises(ValueError, match=r"lack the collection 'lora'.*they hold \['params'\]"):
        forward({"params": base("plain")}, batch()["x"])


def test_wrap_passes_everything_through():
    """Other collections, mutable=, rngs= and method=."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(4, name="dense")(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

        def twice(self, x, *, train):
            return 2 * self(x, train=train)

    model, x = Net(), jax.random.normal(KEY, (16, 8))
    variables = model.init(KEY, x, train=False)
    peft = jpeft.apply(variables["params"], method=jpeft.lora(rank=2))
    forward = jpeft.wrap(model.apply, peft.method)
    full = {**peft.variables, "batch_stats": variables["batch_stats"]}
    want, state = model.apply(variables, x, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"])
    got, new = forward(full, x, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"])
    chex.assert_trees_all_close((got, new), (want, state), atol=1e-6)
    _, new = forward(full, x, train=True, rngs={"dropout": KEY}, mutable=True)
    chex.assert_trees_all_equal_structs(new["params"], variables["params"])
    chex.assert_trees_all_close(forward(full, x, train=False, method=Net.twice), 2 * model.apply(variables, x, train=False), atol=1e-6)


def test_keyword_inputs_are_adapted_too():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="dense")(inputs=x)

    model, x = Net(), jnp.ones((2, 8))
    peft = jpeft.apply(model.init(KEY, x)["params"], method=jpeft.lora(rank=2))
    peft = peft.replace(adapter=noised(peft.adapter))
    chex.assert_trees_all_close(
        jpeft.wrap(model.apply, peft.method)(peft.variables, x), model.apply({"params": jpeft.merge(peft)}, x), atol=1e-6
    )


@pytest.mark.parametrize("transform", [nn.remat, nn.jit])
def test_a_layer_inside_a_lifted_transform_is_adapted_once(transform):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return transform(nn.Dense)(4, name="down")(x)

    model, x = Net(), jax.random.normal(KEY, (2, 8))
    params = model.init(KEY, x)["params"]
    lora = jpeft.apply(params, method=jpeft.lora(rank=2))
    lora = lora.replace(adapter=noised(lora.adapter))
    got = jpeft.wrap(model.apply, lora.method)(lora.variables, x)
    chex.assert_trees_all_close(got, model.apply({"params": jpeft.merge(lora)}, x), atol=1e-5)
    plain = jpeft.apply(params, method=jpeft.adapter(size=2))
    plain = plain.replace(adapter=noised(plain.adapter))

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="down")(x)

    want = jpeft.wrap(Plain().apply, plain.method)(plain.variables, x)
    chex.assert_trees_all_close(jpeft.wrap(model.apply, plain.method)(plain.variables, x), want, atol=1e-5)


def test_frozen_dicts_and_boxed_parameters():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="dense", kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out")))(x)

    model, x = Net(), jnp.ones((2, 8))
    boxed = model.init(KEY, x)["params"]
    peft = jpeft.apply(boxed, method=jpeft.lora(rank=2))
    peft = peft.replace(adapter=noised(peft.adapter))
    got = jpeft.wrap(model.apply, peft.method)(peft.variables, x)
    chex.assert_trees_all_close(got, model.apply({"params": jpeft.merge(peft)}, x), atol=1e-6)
    frozen = freeze(jax.tree.map(jnp.array, PARAMS))
    peft = jpeft.apply(frozen, method=jpeft.lora(rank=2))
    assert isinstance(jpeft.merge(peft), FrozenDict)


# --- the dense host -----------------------------------------------------------------------------------------------------------------


def dense_model(params, x):
    return jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"][None]) @ params["classifier"]["kernel"]


def test_dense_host_merges_and_says_so():
    peft = jpeft.apply(PARAMS, method=jpeft.lora(rank=2))
    peft = peft.replace(adapter=noised(peft.adapter))
    forward, x = jpeft.wrap(dense_model, peft.method), jnp.ones((3, 8))
    with pytest.warns(UserWarning, match="merged inside every step, which costs as much as full fine-tuning"):
        got = forward(peft.variables, x)
    chex.assert_trees_all_close(got, dense_model(jpeft.merge(peft), x))
    grads = jax.grad(lambda a: forward(peft.replace(adapter=a).variables, x).sum())(peft.adapter)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_dense_host_is_free_for_selective_methods():
    peft = jpeft.apply(PARAMS, method="bitfit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward = jpeft.wrap(dense_model, peft.method)
    chex.assert_trees_all_equal(forward(peft.variables, jnp.ones((3, 8))), dense_model(PARAMS, jnp.ones((3, 8))))


def test_dense_host_refuses_what_cannot_merge():
    peft = jpeft.apply(PARAMS, method=jpeft.adapter(target=["dense"]))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="nonlinear layer of its own"):
        jpeft.wrap(dense_model, peft.method)(peft.variables, jnp.ones((3, 8)))


def test_linen_host_inside_any_function():
    model = MODELS["plain"]

    def scores(variables, x):
        return jax.nn.softmax(model.apply(variables, x))

    cell = case("lora", "plain")
    got = jpeft.wrap(scores, cell.method, host="linen")(cell.noisy.variables, batch()["x"])
    chex.assert_trees_all_close(got, jax.nn.softmax(cell.forward(cell.noisy.variables, batch()["x"])), atol=1e-6)
    with pytest.raises(ValueError, match="host='equinox' is not one of"):
        jpeft.wrap(scores, cell.method, host="equinox")


# --- chains -------------------------------------------------------------------------------------------------------------------------


def test_chain_runs_and_merges_in_order():
    """LoRA inside, adapter outside: adapter(layer + lora), whatever the order of the leaves."""
    cell = case("chain", "plain")
    parts = dict(cell.method.parts)
    with_lora = {**cell.params}
    for name in ("bitfit", "lora"):
        with_lora = parts[name].merge(with_lora, cell.noisy.adapter[name])
    adapter = jpeft.Peft(with_lora, cell.noisy.adapter["adapter"], parts["adapter"])
    want = jpeft.wrap(cell.model.apply, adapter.method)(adapter.variables, batch()["x"])
    chex.assert_trees_all_close(cell.forward(cell.noisy.variables, batch()["x"]), want, atol=1e-5)


def test_chain_gives_a_shared_leaf_to_the_first():
    method = jpeft.chain(bitfit=jpeft.bitfit(), lora=jpeft.lora(rank=2))
    adapter = jpeft.apply(PARAMS, method=method).adapter
    assert "classifier" in adapter["bitfit"]
    assert "classifier" not in adapter["lora"]


def test_chain_refuses_an_order_that_loses_a_change():
    method = jpeft.chain(lora=jpeft.lora(rank=2), all=jpeft.freeze(target=["dense"]))
    with pytest.raises(ValueError, match=r"'all' replaces 'dense/kernel', which 'lora' before it adapts.*List 'all' before 'lora'"):
        jpeft.apply(PARAMS, method=method)
    swapped = jpeft.chain(all=jpeft.freeze(target=["dense"]), lora=jpeft.lora(rank=2))
    peft = jpeft.apply(PARAMS, method=swapped)
    peft = peft.replace(adapter=noised(peft.adapter))
    with pytest.warns(UserWarning):
        got = jpeft.wrap(dense_model, swapped)(peft.variables, jnp.ones((3, 8)))
    chex.assert_trees_all_close(got, dense_model(jpeft.merge(peft), jnp.ones((3, 8))))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "needs methods"),
        ({"params": jpeft.lora()}, "'params' is the base's own collection"),
        ({"a": jpeft.chain(b=jpeft.lora())}, "a chain within a chain"),
    ],
)
def test_chain_errors(parts, message):
    with pytest.raises(ValueError, match=message):
        jpeft.chain(**parts)


def test_chain_changed_counts_each_leaf_once():
    method = jpeft.chain(one=jpeft.lora(rank=1, head=None), two=jpeft.lora(rank=2, head=None, target=["dense"]))
    assert jpeft.summary(jpeft.apply(PARAMS, method=method)).changed == 8 * 4 + 4 * 2


# --- optimizers ---------------------------------------------------------------------------------------------------------------------


def test_optimizer_over_variables_leaves_the_base_alone():
    """A TrainState that holds everything, weight decay on, raw gradients on the base: it must not move, nor have moments."""
    peft = jpeft.apply(PARAMS, method=jpeft.lora(rank=2))
    tx = jpeft.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.5)), peft, over="variables")
    grads = jax.tree.map(jnp.ones_like, peft.variables)
    state = tx.init(peft.variables)
    updates, _ = tx.update(grads, state, peft.variables)
    new = optax.apply_updates(peft.variables, updates)
    chex.assert_trees_all_equal(new["params"], PARAMS)
    assert all(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(new["lora"]), jax.tree.leaves(peft.adapter), strict=True))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert moments <= 2 * jpeft.summary(peft).trained + 8
    # The clip counts trained leaves only: with the base in the norm, each update would be another one.
    alone = jpeft.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), peft)
    clipped, _ = alone.update(jax.tree.map(jnp.ones_like, peft.adapter), alone.init(peft.adapter), peft.adapter)
    assert float(optax.tree.norm(clipped)) == pytest.approx(1.0, rel=1e-5)


def test_optimizer_groups_and_frozen_leaves():
    class OnlyB(jpeft.lora):
        def labels(self, adapter):
            return jax.tree_util.tree_map_with_path(lambda k, _: "b" if k[-1].key == "b" else "freeze", adapter)

    peft = jpeft.apply(PARAMS, method=OnlyB(rank=2, head=None))
    assert jpeft.summary(peft).trained < jpeft.summary(peft).stored
    tx = jpeft.optimizer({"b": optax.sgd(1.0)}, peft)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, peft.adapter), tx.init(peft.adapter), peft.adapter)
    assert float(updates["dense"]["kernel"]["b"].max()) == -1
    assert float(jnp.abs(updates["dense"]["kernel"]["a"]).max()) == 0
    with pytest.raises(ValueError, match=r"for the labels \['c'\].*uses \['b'\]: no optimizer for \['b'\]"):
        jpeft.optimizer({"c": optax.sgd(1.0)}, peft)
    with pytest.raises(ValueError, match="over='params' is not one of"):
        jpeft.optimizer(optax.sgd(1.0), peft, over="params")


# --- the rest -----------------------------------------------------------------------------------------------------------------------


def test_summary_prints_three_counts():
    text = str(jpeft.summary(jpeft.apply(PARAMS, method=jpeft.lora(rank=2))))
    assert "trained              32  72.73 % of the base" in text
    assert "changed              40  90.91 %" in text
    assert "classifier" in text


def test_peft_goes_through_jit_and_vmap():
    cell = case("lora", "plain")
    forward = jpeft.wrap(cell.model.apply, cell.method)
    run = jax.jit(lambda peft, x: forward(peft.variables, x))
    chex.assert_trees_all_close(run(cell.peft, batch()["x"]), base_logits("plain"), atol=1e-5)
    many = jax.vmap(lambda key: jpeft.apply(cell.params, method=cell.method, key=key).adapter)(jax.random.split(KEY, 3))
    assert jax.tree.leaves(many)[0].shape[0] == 3


def test_penalty_is_zero_by_default():
    assert jpeft.penalty(jpeft.apply(PARAMS, method="lora")) == 0


def test_import_is_light():
    """Neither transformers, torch, orbax nor anything of the command line is imported with jpeft."""
    heavy = "transformers torch orbax grain pandas pyarrow matplotlib rich tyro datasets safetensors scipy.stats"
    code = f"import sys, jpeft; print([m for m in {heavy.split()!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    plain = "import sys, jax, flax, flax.linen, optax; print([m for m in " + repr(heavy.split()) + " if m in sys.modules])"
    baseline = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=True).stdout
    assert set(eval(out)) <= set(eval(baseline))


def test_public_names_are_documented():
    """Every public function and class: a docstring; every function: an example that runs (see the doctests)."""
    import inspect

    missing = []
    for name in dir(jpeft):
        thing = getattr(jpeft, name)
        if name.startswith("_") or inspect.ismodule(thing) or not callable(thing):
            continue
        doc = inspect.getdoc(thing) or ""
        if len(doc) < 60 or (inspect.isfunction(thing) and ">>>" not in doc):
            missing.append(name)
    assert not missing

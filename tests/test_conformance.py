"""Every method on every kind of linen model: what a method promises, whatever it is.

What runs a model forward, merges or differentiates does so under strict dtype promotion: no operation mixes dtypes unless the code says so.
(Training steps do not: optax multiplies integer counts by floats.)
"""

import itertools
from collections.abc import Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import forget_programs
from tables import DECODERS, ENCODERS, MERGES, METHODS, ROWS, Case, base_logits, batch, case, noised

import jpeft

CELLS = [(method, model) for method, row in ROWS.items() for model in row.models]
SEEN = itertools.count(1)
# One model for each method, scanned where there is one: for what takes a program of its own and depends on the method, not on the layers.
ONE_EACH = [(method, max(row.models, key=lambda model: "scan" in model)) for method, row in ROWS.items()]
TWO_EACH = list(dict.fromkeys([cell for method, model in ONE_EACH for cell in ((method, ROWS[method].models[0]), (method, model))]))


@pytest.fixture(params=CELLS, ids=lambda cell: "-".join(cell), scope="module")
def cell(request) -> Iterator[Case]:
    yield case(*request.param)
    if next(SEEN) % 16 == 0:  # programs of other cells are of no use, and a process may not hold any number of them
        forget_programs()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_models_of_every_kind(method):
    """Layer by layer, rematerialised, scanned; an encoder, a decoder, and a decoder of Llama's family."""
    lifts = {"remat" if "remat" in model else "scan" if "scan" in model else "plain" for model in ROWS[method].models}
    assert lifts == {"plain", "remat", "scan"}
    families = {model.split("-")[0] for model in ROWS[method].models if model in ENCODERS | DECODERS}
    assert families >= {"bert", "llama"}


@jax.numpy_dtype_promotion("strict")
def test_begins_as_the_base(cell):
    logits = cell.forward(cell.peft.variables, batch()["x"])
    chex.assert_trees_all_close(logits, base_logits(cell.model_name), atol=ROWS[cell.method_name].tolerance)


def test_noise_reaches_the_output(cell):
    logits = cell.forward(cell.noisy.variables, batch()["x"])
    assert jnp.abs(logits - base_logits(cell.model_name)).max() > 1e-2


@pytest.mark.parametrize("cell", ONE_EACH, ids=lambda cell: "-".join(cell), indirect=True, scope="module")
def test_trains_and_leaves_the_base_alone(cell):
    """Loss falls; with weight decay on, the base is bit-equal after 20 steps; the step is traced once."""
    before = jax.tree.map(np.array, cell.params)
    chex.clear_trace_counter()  # it counts by the function's name, which all cells share
    tx = jpeft.optimizer(optax.adamw(1e-2, weight_decay=0.1), cell.peft)
    forward = jpeft.wrap(cell.model.apply, cell.method)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(adapter, opt_state, peft, batch):
        def loss_fn(adapter):
            now = peft.replace(adapter=adapter)
            losses = optax.softmax_cross_entropy_with_integer_labels(forward(now.variables, batch["x"]), batch["y"])
            return losses.mean() + jpeft.penalty(now)

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    adapter, opt_state, losses = cell.peft.adapter, tx.init(cell.peft.adapter), []
    for i in range(20):
        # A new Peft with an equal method each time: the method is static and must hash alike.
        peft = jpeft.Peft(cell.params, cell.peft.adapter, cell.method.replace()) if i % 2 else cell.peft
        adapter, opt_state, loss = step(adapter, opt_state, peft, batch())
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0], losses
    chex.assert_trees_all_equal(cell.params, before)
    labels = jpeft.flatten(cell.method.labels(cell.peft.adapter))
    old, new = jpeft.flatten(cell.peft.adapter), jpeft.flatten(adapter)
    assert {path: np.array_equal(new[path], old[path]) for path in old} == {path: label == "freeze" for path, label in labels.items()}


@jax.numpy_dtype_promotion("strict")
def test_merge_equals_wrap(cell):
    if cell.method_name in MERGES:
        with pytest.raises(ValueError, match=MERGES[cell.method_name]):
            jpeft.merge(cell.noisy)
        return
    merged = jpeft.merge(cell.noisy)
    chex.assert_trees_all_equal_structs(merged, cell.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, cell.params)
    logits = jax.jit(cell.model.apply)({"params": merged}, batch()["x"])
    chex.assert_trees_all_close(logits, cell.forward(cell.noisy.variables, batch()["x"]), atol=1e-5)


def test_initialises_abstractly(cell):
    stats = cell.stats
    abstract = jax.eval_shape(lambda p: jpeft.apply(p, method=cell.method, stats=stats), cell.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract.adapter, cell.peft.adapter)
    assert jpeft.summary(abstract) == jpeft.summary(cell.peft)


def test_labels_and_variables_share_a_tree(cell):
    chex.assert_trees_all_equal_structs(cell.peft.labels, cell.peft.variables)
    assert set(jax.tree.leaves(cell.peft.labels["params"])) == {"freeze"}


def test_save_and_load(cell, tmp_path):
    jpeft.save(tmp_path / "out", cell.noisy)
    # A class that is not jpeft's own cannot be made from a file.
    loaded = jpeft.load(tmp_path / "out", cell.params, method=cell.method if cell.method_name.startswith("skeleton") else None)
    assert loaded.method == cell.method
    chex.assert_trees_all_equal(loaded.adapter, cell.noisy.adapter)


@pytest.mark.parametrize("cell", ONE_EACH, ids=lambda cell: "-".join(cell), indirect=True, scope="module")
def test_vmaps_over_adapters(cell):
    adapters = [noised(cell.peft.adapter, seed=i) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    run = jax.jit(
        jax.vmap(lambda adapter: jpeft.wrap(cell.model.apply, cell.method)(cell.peft.replace(adapter=adapter).variables, batch()["x"]))
    )
    each = jnp.stack([cell.forward(cell.peft.replace(adapter=adapter).variables, batch()["x"]) for adapter in adapters])
    chex.assert_trees_all_close(run(stacked), each, atol=1e-5)


def test_keeps_dtypes(cell):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), cell.params)
    peft = jpeft.apply(params, method=cell.method, stats=cell.stats)
    shape = jax.eval_shape(jpeft.wrap(cell.model.apply, cell.method), peft.variables, batch()["x"])
    assert shape.dtype == jax.eval_shape(cell.model.apply, {"params": params}, batch()["x"]).dtype
    assert shape.dtype == (jnp.float32 if cell.model_name in ENCODERS | DECODERS else jnp.bfloat16)  # our families compute in float32
    if cell.method_name not in MERGES:
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(jpeft.merge, peft), params)


# What merely replaces leaves is differentiated by plain autodiff anyway. LoRA stands for all rules of gradients on every kind of layer.
@pytest.mark.parametrize(
    "cell",
    [cell for cell in CELLS if METHODS[cell[0]].wraps_layers and (cell in TWO_EACH or cell[0] == "lora")],
    ids=lambda cell: "-".join(cell),
    indirect=True,
    scope="module",
)
@jax.numpy_dtype_promotion("strict")
def test_gradients_are_those_of_plain_autodiff(cell):
    """Whatever views and rules compute them: compared with autodiff of the merged model, in the same tree."""
    if cell.method_name in MERGES:
        # No merged form: compare a directional derivative with a central difference of the wrapped model.
        loss = jax.jit(lambda a: jnp.sum(jnp.sin(cell.forward(cell.noisy.replace(adapter=a).variables, batch()["x"]))))
        along = noised(jax.tree.map(jnp.zeros_like, cell.noisy.adapter), scale=1.0, seed=9)
        grads = jax.jit(jax.grad(loss))(cell.noisy.adapter)
        slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(along), strict=True))
        move = lambda t: jax.tree.map(lambda a, d: a + t * d, cell.noisy.adapter, along)
        # Five-point stencil: its error falls with the fourth power of the step, so float32 noise can be kept small beside it.
        h = 3e-3
        numeric = (8 * (loss(move(h)) - loss(move(-h))) - (loss(move(2 * h)) - loss(move(-2 * h)))) / (12 * h)
        assert slope == pytest.approx(float(numeric), rel=1e-2, abs=2e-2)
        return
    wrapped = lambda a: jnp.sum(jnp.sin(cell.forward(cell.noisy.replace(adapter=a).variables, batch()["x"])))
    merged = lambda a: jnp.sum(jnp.sin(cell.model.apply({"params": jpeft.merge(cell.noisy.replace(adapter=a))}, batch()["x"])))
    got, want = jax.jit(jax.grad(wrapped))(cell.noisy.adapter), jax.jit(jax.grad(merged))(cell.noisy.adapter)
    chex.assert_trees_all_close(got, want, atol=2e-5, rtol=1e-4)


def test_wrapping_leaves_the_parameters_in_place(cell):
    for mine, given in zip(jax.tree.leaves(cell.peft.params), jax.tree.leaves(cell.params), strict=True):
        assert mine is given

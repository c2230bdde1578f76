"""DiffPruning: the gates against the paper's figures, the projection, and what the second stage holds."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import MODELS, base, batch, case, noised

import jpeft
from jpeft.models import BertForSequenceClassification, abstract_params
from jpeft.models.bert.config import BertConfig
from jpeft.selective import hard_concrete, indices
from jpeft.selective.diff_pruning import OPEN_PENALTY

PARAMS = {
    "a": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.zeros(4)},
    "b": {"kernel": jnp.ones((4, 5))},
    "classifier": {"kernel": jnp.ones((5, 2))},
}


def trained(method=None, seed=0, **options):
    """An adapter as training might leave it: gates on both sides of zero."""
    peft = jpeft.apply(PARAMS, method=method or jpeft.diff_pruning(**options))
    noisy = jpeft.flatten(noised(peft.adapter, seed=seed))
    spread = {path: 20 * (leaf - 5) if "alpha" in path else leaf for path, leaf in noisy.items()}
    # No tensor is closed as a whole.
    spread |= {path: abs(leaf) + 0.1 for path, leaf in spread.items() if path.endswith("group")}
    return peft.replace(adapter=jpeft.unflatten(spread))


# --- gates ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "positive", "one", "mean"), [(0.0, 0.5, 1 / 6, 1 / 3), (5.0, 0.993307, 0.967408, 0.98482), (2.0, 0.880797, 0.596418, 0.77165)]
)
def test_probabilities_and_mean_of_a_gate(alpha, positive, one, mean):
    """By the midpoint rule over u, which is what a uniform draw averages."""
    n = 200_000
    z = np.asarray(hard_concrete.gate(jnp.full(n, alpha), (jnp.arange(n) + 0.5) / n))
    assert (z > 0).mean() == pytest.approx(positive, abs=1e-5)
    assert (z == 1).mean() == pytest.approx(one, abs=1e-5)
    assert z.mean() == pytest.approx(mean, abs=1e-5)
    assert float(hard_concrete.open_probability(jnp.asarray(alpha))) == pytest.approx(positive, abs=1e-6)


def test_a_draw_follows_the_gate():
    z = np.asarray(hard_concrete.sample(jax.random.key(0), jnp.zeros(40_000)))
    assert (z > 0).mean() == pytest.approx(0.5, abs=0.01)
    assert (z == 1).mean() == pytest.approx(1 / 6, abs=0.01)


def test_gradient_of_a_gate():
    """The closed form and central differences, on both sides of both kinks."""
    with jax.enable_x64(True):
        alpha, u = np.array([-3.0, -0.5, 0.3, 0.9, 4.0]), np.array([0.4, 0.7, 0.55, 0.6, 0.5])
        got = jax.vmap(jax.grad(hard_concrete.gate))(jnp.asarray(alpha), jnp.asarray(u))
        s = 1 / (1 + np.exp(-(np.log(u) - np.log1p(-u) + alpha)))
        inside = (s * 3 - 1.5 > 0) & (s * 3 - 1.5 < 1)
        assert set(inside) == {True, False}
        np.testing.assert_allclose(got, inside * 3 * s * (1 - s), rtol=1e-12)
        h = 1e-6
        numeric = (
            hard_concrete.gate(jnp.asarray(alpha + h), jnp.asarray(u)) - hard_concrete.gate(jnp.asarray(alpha - h), jnp.asarray(u))
        ) / (2 * h)
        np.testing.assert_allclose(got, numeric, atol=1e-8)


# --- the first stage -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
def test_groups_of_bert_large(scan):
    """393 tensors: 5 of the embeddings, 16 in each of 24 layers, 2 of the pooler, 2 of the head."""
    params = abstract_params(BertForSequenceClassification(BertConfig.bert_large_cased(scan=scan), num_labels=2))
    groups = lambda **options: sum(
        leaf.size
        for path, leaf in jpeft.flatten(jax.eval_shape(lambda p: jpeft.apply(p, "diff_pruning", **options), params).adapter).items()
        if path.endswith("alpha_group")
    )
    assert groups(head=None) == 393
    assert groups() == 391  # and the head's two, which have no gates


def test_it_trains_twice_the_model_and_changes_it_all():
    params = abstract_params(BertForSequenceClassification(BertConfig.bert_base_cased(), num_labels=2))
    s = jpeft.summary(jax.eval_shape(lambda p: jpeft.apply(p, "diff_pruning", structured=False), params))
    head = 2 * 768 + 2
    assert (s.trained, s.changed) == (2 * (s.base - head) + head, s.base)


@pytest.mark.parametrize("structured", [True, False])
def test_penalty_is_the_expected_number_of_open_gates(structured):
    peft = trained(structured=structured, l0=0.01)
    flat, expected = {path: np.asarray(leaf, np.float64) for path, leaf in jpeft.flatten(peft.adapter).items()}, 0.0
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    for path in ("a/kernel", "a/bias", "b/kernel"):
        for alpha in flat[f"{path}/alpha"].reshape(-1):
            expected += sigmoid(alpha) * (sigmoid(flat[f"{path}/alpha_group"]) if structured else 1)
    assert float(jpeft.penalty(peft)) == pytest.approx(0.01 * expected, rel=1e-5)


def test_the_default_penalty_is_that_of_bert_large_for_any_size():
    peft = jpeft.apply(PARAMS, "diff_pruning", structured=False)
    assert float(jpeft.penalty(peft)) == pytest.approx(OPEN_PENALTY * 0.993307, rel=1e-5)
    assert pytest.approx(41.9, abs=0.1) == OPEN_PENALTY


def test_gates_are_random_in_training_only():
    peft = trained()
    bind = lambda rng: jpeft.flatten(peft.method.bind(PARAMS, peft.adapter, rng=rng))["b/kernel"]
    keys = jax.random.split(jax.random.key(0), 400)
    draws = np.asarray(jax.jit(jax.vmap(bind))(keys))
    np.testing.assert_allclose(draws[3], bind(keys[3]), atol=1e-6)
    part = peft.adapter["b"]["kernel"]
    # The mean of many draws is E[z] E[z_g] w; E[z] from the paper's constants, by the midpoint rule.
    u = (jnp.arange(2000) + 0.5) / 2000
    mean = lambda alpha: np.asarray(hard_concrete.gate(alpha[..., None], u.reshape((1,) * alpha.ndim + (-1,))).mean(-1))
    np.testing.assert_allclose(draws.mean(0) - 1, mean(part["alpha"]) * mean(part["alpha_group"]) * part["w"], atol=0.02)
    want = np.clip(3 / (1 + np.exp(-part["alpha"])) - 1.5, 0, 1) * np.clip(3 / (1 + np.exp(-part["alpha_group"])) - 1.5, 0, 1) * part["w"]
    np.testing.assert_allclose(bind(None) - 1, want, atol=1e-6)


def test_the_wrapped_model_draws_by_its_dropout_rng():
    cell = case("diff_pruning", "plain")
    half = jax.tree.map(lambda leaf: jnp.where(leaf > 3, 0.0, leaf), cell.noisy.adapter)  # all gates at alpha = 0
    run = lambda rngs: cell.forward(cell.peft.replace(adapter=half).variables, batch()["x"], rngs=rngs)
    first, again, second, none = (
        run({"dropout": jax.random.key(1)}),
        run({"dropout": jax.random.key(1)}),
        run({"dropout": jax.random.key(2)}),
        run(None),
    )
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(none, run(None))


def test_two_groups_beside_the_head():
    peft = jpeft.apply(PARAMS, "diff_pruning", gate_rate=0.1, weight_rate=0.5)
    labels = jpeft.flatten(peft.method.labels(peft.adapter))
    assert {path.rpartition("/")[2]: label for path, label in labels.items()} == {
        "alpha": "gates", "alpha_group": "gates", "w": "weights", "kernel": "train",
    }  # fmt: skip
    tx = jpeft.optimizer(optax.adamw(1e-2, weight_decay=0.1), peft)
    state, adapter = tx.init(peft.adapter), peft.adapter
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, adapter), state, adapter)
        adapter = optax.apply_updates(adapter, updates)
    # Adam at 0.1 under equal gradients moves by 0.1 a step; decay would have moved alpha further.
    np.testing.assert_allclose(adapter["b"]["kernel"]["alpha"], 4.7, atol=1e-4)
    np.testing.assert_allclose(adapter["b"]["kernel"]["w"], -3 * 0.5e-2, atol=1e-4)
    np.testing.assert_allclose(adapter["classifier"]["kernel"], 1 - 3e-2 - 3e-3, atol=1e-4)


def test_differences_survive_in_half_precision():
    peft = jpeft.apply({"kernel": jnp.ones((4, 4), jnp.bfloat16)}, "diff_pruning")
    assert {leaf.dtype for leaf in jax.tree.leaves(peft.adapter)} == {jnp.dtype("float32")}
    assert jpeft.merge(peft)["kernel"].dtype == jnp.bfloat16


# --- projection ----------------------------------------------------------------------------------------------------------------------


def test_projection_keeps_the_largest_differences_of_all_tensors():
    peft = trained(sparsity=0.4, structured=True)
    after = jpeft.advance(peft)
    keep = int(46 * 0.4) - 10
    delta = jax.tree.map(lambda new, old: np.abs(np.asarray(new) - np.asarray(old)), jpeft.merge(peft), PARAMS)
    body = {path: leaf for path, leaf in jpeft.flatten(delta).items() if "classifier" not in path}
    assert sum(np.count_nonzero(leaf) for leaf in body.values()) > keep
    ranked = sorted(((size, path, i) for path, leaf in body.items() for i, size in enumerate(leaf.reshape(-1))), reverse=True)[:keep]
    flat = jpeft.flatten(after.adapter)
    got = {
        (path.removesuffix("/indices"), i) for path, leaf in flat.items() if path.endswith("indices") for i in indices.decode(leaf).tolist()
    }
    assert got == {(path, i) for _, path, i in ranked}
    # They go on from w as it was before gating; the head as it was trained.
    for path, leaf in flat.items():
        if path.endswith("/indices"):
            owner = path.removesuffix("/indices")
            w = jpeft.flatten(peft.adapter)[f"{owner}/w"].reshape(-1)
            np.testing.assert_array_equal(flat[f"{owner}/values"], w[indices.decode(leaf)])
    np.testing.assert_array_equal(after.adapter["classifier"]["kernel"], peft.adapter["classifier"]["kernel"])
    assert after.method == jpeft.diff_pruning(sparsity=0.4, stage="mask")
    assert after.method.stages == ()


def test_closed_gates_fill_up_what_open_ones_leave():
    peft = trained(sparsity=0.4, structured=False)
    shut = lambda path, leaf: jnp.where(leaf < leaf.max(), -9.0, 9.0) if path.endswith("a/kernel/alpha") else -9.0 * jnp.ones_like(leaf)
    flat = {path: shut(path, leaf) if path.endswith("alpha") else leaf for path, leaf in jpeft.flatten(peft.adapter).items()}
    after = jpeft.advance(peft.replace(adapter=jpeft.unflatten(flat)))
    assert jpeft.summary(after).trained == int(46 * 0.4)
    best = int(jnp.argmax(peft.adapter["a"]["kernel"]["alpha"]))
    assert best in indices.decode(after.adapter["a"]["kernel"]["indices"]).tolist()
    everything = np.sort(np.concatenate([np.abs(flat[f"{path}/w"]).reshape(-1) for path in ("a/kernel", "a/bias", "b/kernel")]))
    held = np.concatenate([np.abs(leaf) for path, leaf in jpeft.flatten(after.adapter).items() if path.endswith("/values")])
    assert np.isin(everything[-7:], held).all()


def test_projection_by_a_draw_depends_on_the_key():
    peft = trained(sparsity=0.4, draw=True)
    chosen = lambda i: [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(jpeft.advance(peft, key=jax.random.key(i)).adapter)]
    assert chosen(0) == chosen(0)
    assert any(chosen(0) != chosen(i) for i in (1, 2, 3))


def test_projection_needs_values():
    peft = trained(sparsity=0.4)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.eval_shape(jpeft.advance, peft)


# --- the second stage ----------------------------------------------------------------------------------------------------------------


def test_exactly_k_entries_differ_after_training_with_decay():
    cell = case("diff_pruning", "plain")
    peft = jpeft.advance(cell.noisy)
    k = int(jpeft.tree.size(cell.params) * 0.05)
    tx = jpeft.optimizer(optax.adamw(1e-2, weight_decay=0.1), peft)
    adapter, opt_state = peft.adapter, tx.init(peft.adapter)
    assert jpeft.tree.size(opt_state) == 2 * k + 1
    forward = jpeft.wrap(MODELS["plain"].apply, peft.method)
    loss = lambda a: optax.softmax_cross_entropy_with_integer_labels(
        forward(peft.replace(adapter=a).variables, batch()["x"]), batch()["y"]
    ).mean()
    step = jax.jit(jax.grad(loss))
    for _ in range(3):
        updates, opt_state = tx.update(step(adapter), opt_state, adapter)
        adapter = optax.apply_updates(adapter, updates)
    merged = jpeft.merge(peft.replace(adapter=adapter))
    different = sum(int(np.count_nonzero(new != old)) for new, old in zip(*map(jax.tree.leaves, (merged, base("plain"))), strict=True))
    assert different == k
    assert jpeft.summary(peft).changed == jpeft.summary(peft).trained == k


def test_a_later_stage_is_saved_and_loaded_as_it_is(tmp_path):
    after = jpeft.advance(trained(sparsity=0.4))
    jpeft.save(tmp_path / "out", after)
    loaded = jpeft.load(tmp_path / "out", PARAMS)
    assert loaded.method == after.method
    chex.assert_trees_all_equal(loaded.adapter, after.adapter)


def test_in_a_chain_with_another_method():
    chain = jpeft.chain(lora=jpeft.lora(rank=1, target="b/kernel", head=None), diff=jpeft.diff_pruning(sparsity=0.4))
    peft = jpeft.apply(PARAMS, method=chain)
    after = jpeft.advance(peft.replace(adapter=noised(peft.adapter)))
    assert after.method == jpeft.chain(lora=chain.parts[0][1], diff=jpeft.diff_pruning(sparsity=0.4, stage="mask"))
    assert jpeft.merge(after)["b"]["kernel"].shape == (4, 5)
    assert set(jax.tree.leaves(chain.labels(peft.adapter))) == {"train", "diff/weights", "diff/gates"}


# --- errors --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.0}, "sparsity=0.0 must be a number above 0 and at most 1"),
        ({"mask_share": 1.0}, "mask_share=1.0 must be a number above 0 and below 1"),
        ({"weight_rate": 0.0}, "weight_rate=0.0 must be a number above 0"),
        ({"l0": -1.0}, "l0=-1.0 must be a number of at least 0"),
        ({"stage": "fixed"}, "is not one of 'gates', 'mask'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.diff_pruning(**options)


def test_errors():
    with pytest.raises(ValueError, match="which the head with 10 uses up"):
        jpeft.advance(trained())
    with pytest.raises(ValueError, match="was given none. For the second stage alone, give scores"):
        jpeft.apply(PARAMS, "diff_pruning", stage="mask", sparsity=0.4)

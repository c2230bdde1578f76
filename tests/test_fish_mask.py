"""FishMask: which entries, how many, and that nothing else is ever held or moved."""

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
from jpeft.selective import choice, indices
from jpeft.stats import fisher

PARAMS = {
    "a": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.zeros(4)},
    "b": {"kernel": jnp.ones((4, 5))},
    "classifier": {"kernel": jnp.ones((5, 2))},
}


def scores(seed=0, params=PARAMS):
    return jax.tree.map(jnp.abs, noised(jax.tree.map(jnp.zeros_like, params), seed=seed))


def chosen(peft) -> dict[str, list[int]]:
    """The indices that an adapter holds, by path."""
    flat = jpeft.flatten(peft.adapter)
    return {path.removesuffix("/indices"): indices.decode(leaf).tolist() for path, leaf in flat.items() if path.endswith("/indices")}


# --- which ---------------------------------------------------------------------------------------------------------------------------


def test_the_highest_scores_of_all_tensors_together():
    stats = scores()
    peft = jpeft.apply(PARAMS, method="fish_mask", sparsity=0.4, stats=stats)
    keep = int(46 * 0.4) - 10
    body = {path: np.asarray(leaf) for path, leaf in jpeft.flatten(stats).items() if "classifier" not in path}
    ranked = sorted(((score, path, i) for path, leaf in body.items() for i, score in enumerate(leaf.reshape(-1))), reverse=True)[:keep]
    want = {path: sorted(i for _, p, i in ranked if p == path) for path in {p for _, p, _ in ranked}}
    assert chosen(peft) == want
    assert peft.adapter["classifier"]["kernel"].shape == (5, 2)


def test_ties_go_to_the_first_in_tree_order():
    stats = jax.tree.map(jnp.ones_like, PARAMS)
    assert chosen(jpeft.apply(PARAMS, method="fish_mask", sparsity=0.35, stats=stats)) == {"a/bias": [0, 1, 2, 3], "a/kernel": [0, 1]}
    stats["b"]["kernel"] = stats["b"]["kernel"].at[2, 1].set(2.0)
    assert chosen(jpeft.apply(PARAMS, method="fish_mask", sparsity=0.25, stats=stats)) == {"b/kernel": [11]}


@pytest.mark.parametrize(
    ("config", "total", "keep", "body"),
    [
        (BertConfig.bert_large_cased(), 333_581_314, 1_667_906, 1_665_856),
        (BertConfig.bert_base_cased(vocab_size=30_522), 109_483_778, 547_418, 545_880),
    ],
)
def test_published_counts(config, total, keep, body):
    params = abstract_params(BertForSequenceClassification(config, num_labels=2))
    assert jpeft.tree.size(params) == total
    assert choice.budget(params, 0.005, head=None) == keep
    assert choice.budget(params, 0.005, head="auto") == body


def test_counts_of_a_model():
    cell = case("fish_mask", "plain")
    s = jpeft.summary(cell.peft)
    assert s.trained == s.changed == int(s.base * 0.05)
    head = jpeft.tree.size(cell.params["classifier"])
    assert s.stored == head + 2 * (s.trained - head)


# --- how much ------------------------------------------------------------------------------------------------------------------------


def test_exactly_k_entries_change_in_training():
    cell = case("fish_mask", "plain")
    tx = jpeft.optimizer(optax.adamw(1e-2, weight_decay=0.1), cell.peft)
    adapter, opt_state = cell.peft.adapter, tx.init(cell.peft.adapter)
    loss = lambda a: optax.softmax_cross_entropy_with_integer_labels(
        cell.forward(cell.peft.replace(adapter=a).variables, batch()["x"]), batch()["y"]
    ).mean()
    step = jax.jit(jax.grad(loss))
    for _ in range(3):
        updates, opt_state = tx.update(step(adapter), opt_state, adapter)
        adapter = optax.apply_updates(adapter, updates)
    merged = jpeft.merge(cell.peft.replace(adapter=adapter))
    different = sum(int(np.count_nonzero(new != old)) for new, old in zip(*map(jax.tree.leaves, (merged, cell.params)), strict=True))
    assert different == int(jpeft.tree.size(cell.params) * 0.05)
    assert chosen(cell.peft.replace(adapter=adapter)) == chosen(cell.peft)


def test_nothing_dense_is_held():
    """Two moments of what is trained and a step count: no mask, no gradient and no moment of a weight's own size."""
    cell = case("fish_mask", "plain")
    k = jpeft.summary(cell.peft).trained
    state = jpeft.optimizer(optax.adamw(1e-2), cell.peft).init(cell.peft.adapter)
    assert jpeft.tree.size(state) == 2 * k + 1
    grads = jax.eval_shape(jax.grad(lambda a: cell.forward(cell.peft.replace(adapter=a).variables, batch()["x"]).sum()), cell.peft.adapter)
    chex.assert_trees_all_equal_shapes(grads, cell.peft.adapter)


def test_differences_survive_in_half_precision():
    """Many small steps add up beside a bfloat16 weight, which would round each of them away."""
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    peft = jpeft.apply(params, method="fish_mask", sparsity=0.25, stats={"kernel": jnp.eye(2)})
    adapter = peft.adapter
    for _ in range(100):
        adapter = {"kernel": {**adapter["kernel"], "values": adapter["kernel"]["values"] + 1e-3}}
    bound = jpeft.merge(peft.replace(adapter=adapter))["kernel"]
    assert bound.dtype == jnp.bfloat16
    np.testing.assert_allclose(bound[0, 0].astype(jnp.float32), 1.1, atol=4e-3)


# --- indices -------------------------------------------------------------------------------------------------------------------------


def test_indices_are_exact_whole_numbers():
    index = np.array([0, 1, 2**24 - 1, 2**24, 2**24 + 1, 31_000_003, 2**31 - 2])
    digits = indices.encode(index, 2**31 - 1)
    assert (digits.dtype, digits.shape) == (jnp.float32, (2, 7))
    np.testing.assert_array_equal(indices.decode(digits + 0.0), index)
    assert indices.encode(np.array([2**24 - 1]), 2**24).shape == (1, 1)


def test_indices_take_no_gradient():
    cell = case("fish_mask", "plain")
    grads = jax.grad(lambda a: cell.forward(cell.peft.replace(adapter=a).variables, batch()["x"]).sum())(cell.noisy.adapter)
    flat = jpeft.flatten(grads)
    assert not any(leaf.any() for path, leaf in flat.items() if path.endswith("/indices"))


# --- where it works ------------------------------------------------------------------------------------------------------------------


def test_any_pytree_and_the_dense_host():
    params = [{"w": jnp.ones((2, 3))}, {"w": jnp.ones((3, 2))}]
    stats = jax.tree.map(lambda p: jnp.arange(p.size, dtype=jnp.float32).reshape(p.shape), params)
    peft = jpeft.apply(params, method="fish_mask", sparsity=0.5, stats=stats)
    peft = peft.replace(adapter=noised(peft.adapter))
    model = lambda params, x: x @ params[0]["w"] @ params[1]["w"]
    x = jnp.ones((1, 2))
    merged = jpeft.merge(peft)
    assert isinstance(merged, list)
    chex.assert_trees_all_close(jpeft.wrap(model, peft.method)(peft.variables, x), model(merged, x))


def test_abstract_parameters_with_concrete_stats():
    stats = scores()
    abstract = jax.eval_shape(lambda p: jpeft.apply(p, method="fish_mask", sparsity=0.4, stats=stats), PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract.adapter, jpeft.apply(PARAMS, "fish_mask", sparsity=0.4, stats=stats).adapter)


# --- choosing again ------------------------------------------------------------------------------------------------------------------


def refreshed(times=2):
    """An adapter after each of its masks, noise as what was learnt under each."""
    peft = jpeft.apply(PARAMS, method="fish_mask", sparsity=0.4, refresh=times, stats=scores())
    out = [peft]
    for seed in range(1, times + 1):
        trained = {
            p: leaf + 0.1 if p.endswith("values") and "kept" not in p else leaf for p, leaf in jpeft.flatten(out[-1].adapter).items()
        }
        out[-1] = out[-1].replace(adapter=jpeft.unflatten(trained))
        out.append(jpeft.advance(out[-1], stats=scores(seed)))
    return out


def test_a_new_mask_changes_nothing_yet_and_chooses_as_the_first():
    first, second, third = refreshed()
    for before, seed in ((first, 1), (second, 2)):
        after = jpeft.advance(before, stats=scores(seed))
        chex.assert_trees_all_equal(jpeft.merge(after), jpeft.merge(before))
        fresh = jpeft.apply(PARAMS, method="fish_mask", sparsity=0.4, stats=scores(seed))
        assert {path: at for path, at in chosen(after).items() if "kept" not in path} == chosen(fresh)
    assert [p.method for p in (first, second, third)] == [jpeft.fish_mask(sparsity=0.4, refresh=n) for n in (2, 1, 0)]
    assert [[stage.share for stage in p.method.stages] for p in (first, second, third)] == [[1 / 3, 1 / 3], [1 / 2], []]


def test_what_was_learnt_is_kept_or_goes_on():
    _, second, third = refreshed()
    entries = lambda peft: {(path.removesuffix("/kept"), i) for path, at in chosen(peft).items() for i in at}
    new = lambda seed: {
        (path, i) for path, at in chosen(jpeft.apply(PARAMS, "fish_mask", sparsity=0.4, stats=scores(seed))).items() for i in at
    }
    assert entries(second) == new(0) | new(1)
    assert entries(third) == new(0) | new(1) | new(2)
    assert new(0) & new(1), "some entries are chosen again"
    labels = jpeft.flatten(third.method.labels(third.adapter))
    assert {path for path, label in labels.items() if label == "train"} == {
        path for path in labels if path.startswith("classifier") or (path.endswith("values") and "kept" not in path)
    }
    s = jpeft.summary(third)
    assert s.trained == int(46 * 0.4)
    assert s.changed == len(entries(third)) + 10
    merged = jpeft.merge(third)
    different = sum(int((np.asarray(a) != np.asarray(b)).sum()) for a, b in zip(*map(jax.tree.leaves, (merged, PARAMS)), strict=True))
    assert different == len(new(0) | new(1))  # the third mask has not been trained yet, and no noise was put on the head


def test_a_refreshed_adapter_is_saved_and_loaded(tmp_path):
    for i, peft in enumerate(refreshed()):
        jpeft.save(tmp_path / str(i), peft)
        loaded = jpeft.load(tmp_path / str(i), PARAMS)
        assert loaded.method == peft.method
        chex.assert_trees_all_equal(loaded.adapter, peft.adapter)


def test_a_refresh_needs_statistics():
    peft, stats = refreshed(1)[0], scores(1)
    with pytest.raises(ValueError, match="stage 'refresh' of fish_mask requires Fisher statistics of the current model"):
        jpeft.advance(peft)
    with pytest.raises(ValueError, match="call jpeft.advance outside of jit"):
        jax.eval_shape(lambda p: jpeft.advance(p, stats=stats), peft)
    with pytest.raises(ValueError, match="refresh=-1 must be a whole number of at least 0"):
        jpeft.fish_mask(refresh=-1)


# --- on disk -------------------------------------------------------------------------------------------------------------------------


def test_loading_needs_no_stats(tmp_path):
    peft = jpeft.apply(PARAMS, method="fish_mask", sparsity=0.4, stats=scores())
    jpeft.save(tmp_path / "out", peft)
    chex.assert_trees_all_equal(jpeft.load(tmp_path / "out", PARAMS).adapter, peft.adapter)


def test_loading_refuses_another_model(tmp_path):
    peft = jpeft.apply(PARAMS, method="fish_mask", sparsity=0.4, stats=scores())
    jpeft.save(tmp_path / "out", peft)
    bigger = {**PARAMS, "c": {"kernel": jnp.ones((4, 5))}}
    with pytest.raises(
        ValueError, match="does not fit these parameters: The adapter changes 8 entries, where sparsity=0.4 of this base is 16"
    ):
        jpeft.load(tmp_path / "out", bigger, check_base=False)
    swapped = {**PARAMS, "a": {"kernel": PARAMS["a"]["kernel"][:2], "bias": jnp.zeros(4)}, "b": {"kernel": jnp.ones((4, 6))}}
    with pytest.raises(ValueError, match="does not fit these parameters: The adapter changes entry .* of 'a/kernel', which has 8"):
        jpeft.load(tmp_path / "out", swapped, check_base=False)


# --- errors --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 1.5, -0.1])
def test_sparsity_is_a_share(sparsity):
    with pytest.raises(ValueError, match="must be a number above 0 and at most 1"):
        jpeft.fish_mask(sparsity=sparsity)


def test_errors():
    method = jpeft.fish_mask(sparsity=0.4)
    with pytest.raises(ValueError, match=r"was given none. Make the Fisher information .*fisher\(losses, params, batches\)"):
        jpeft.apply(PARAMS, method=method)
    with pytest.raises(ValueError, match="stats must be arrays: make them outside of jit"):
        jax.eval_shape(lambda p, s: jpeft.apply(p, method=method, stats=s), PARAMS, scores())
    with pytest.raises(ValueError, match="2 are missing or differ, such as 'a/bias'"):
        jpeft.apply(PARAMS, method=method, stats={"b": PARAMS["b"]})
    with pytest.raises(ValueError, match="zero everywhere outside the head.*A head that begins at zero"):
        jpeft.apply(PARAMS, method=method, stats=jax.tree.map(jnp.zeros_like, PARAMS))
    with pytest.raises(ValueError, match="'a/bias' are not finite"):
        jpeft.apply(PARAMS, method=method, stats=scores() | {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.full(4, jnp.nan)}})
    with pytest.raises(ValueError, match="which the head with 10 uses up"):
        jpeft.apply(PARAMS, method="fish_mask", stats=scores())


def test_a_zero_head_is_found_out():
    params = {**base("plain"), "classifier": jax.tree.map(jnp.zeros_like, base("plain")["classifier"])}

    def losses(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(MODELS["plain"].apply({"params": params}, batch["x"]), batch["y"])

    with pytest.raises(ValueError, match="A head that begins at zero"):
        jpeft.apply(params, method="fish_mask", sparsity=0.05, stats=fisher(losses, params, [batch()], chunk=5))

"""Statistics: Fisher information against per-example gradients one by one, and who is given which kind."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.stats import Fisher, KeyValues, LabelTokens, Movement, Prompt, fisher, movement


@pytest.fixture
def params(key):
    return {"a": {"kernel": jax.random.normal(key, (3, 4)), "bias": jnp.zeros(4)}, "head": jax.random.normal(jax.random.key(1), (4, 2))}


@pytest.fixture
def data():
    x = jax.random.normal(jax.random.key(2), (7, 3))
    return {"x": x, "y": jnp.arange(7) % 2}


def logits_fn(params, batch):
    return jnp.tanh(batch["x"] @ params["a"]["kernel"] + params["a"]["bias"][None]) @ params["head"]


def losses_fn(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits_fn(params, batch), batch["y"])


def one(data, i):
    return jax.tree.map(lambda x: x[i : i + 1], data)


def batches(data, *sizes):
    starts = np.cumsum([0, *sizes])
    return [jax.tree.map(lambda x, a=a, b=b: x[a:b], data) for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_empirical_is_the_mean_of_squared_gradients(params, data, chunk):
    grads = [jax.grad(lambda p, i=i: losses_fn(p, one(data, i)).sum())(params) for i in range(7)]
    want = jax.tree.map(lambda *g: sum(x**2 for x in g) / 7, *grads)
    chex.assert_trees_all_close(fisher(losses_fn, params, batches(data, 4, 3), chunk=chunk).values, want, rtol=1e-5)
    square_of_mean = jax.tree.map(jnp.square, jax.grad(lambda p: losses_fn(p, data).mean())(params))
    assert jnp.abs(want["head"] / square_of_mean["head"] - 1).max() > 1  # another estimator


@pytest.mark.parametrize("chunk", [1, 4])
def test_expected_is_the_exact_sum_over_classes(params, data, chunk):
    want = jax.tree.map(jnp.zeros_like, params)
    for i in range(7):
        p = jax.nn.softmax(logits_fn(params, one(data, i))[0])
        for c in range(2):
            g = jax.grad(lambda q, i=i, c=c: jax.nn.log_softmax(logits_fn(q, one(data, i))[0])[c])(params)
            want = jax.tree.map(lambda w, g, p=p[c]: w + p * g**2 / 7, want, g)
    got = fisher(logits_fn, params, [{"x": data["x"]}], mode="expected", chunk=chunk)
    chex.assert_trees_all_close(got.values, want, rtol=1e-4)


def test_number_of_samples(params, data):
    first = fisher(losses_fn, params, batches(data, 5))
    chex.assert_trees_all_close(fisher(losses_fn, params, batches(data, 4, 3), num_samples=5, chunk=3), first, rtol=1e-5)
    chex.assert_trees_all_close(fisher(losses_fn, params, batches(data, 2, 3), num_samples=None), first, rtol=1e-5)


def test_half_precision_is_summed_in_float32(params, data):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    stats = fisher(losses_fn, half, [data])
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "true"}, "mode='true' is not one of"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"num_samples": 0}, "no examples"),
        ({"fn": logits_fn}, r"one loss for each example, and gave shape \(1, 2\)"),
        ({"mode": "expected"}, r"must return logits \[examples, classes\], and gave \(1,\)"),
    ],
)
def test_errors(params, data, options, message):
    with pytest.raises(ValueError, match=message):
        fisher(**{"fn": losses_fn, "params": params, "batches": [data], **options})


def test_movement_is_absolute():
    moved = movement({"a": jnp.array([1.0, -2.0])}, {"a": jnp.array([0.0, 1.0])})
    np.testing.assert_array_equal(moved.values["a"], [1.0, 3.0])


# --- in methods -----------------------------------------------------------------------------------------------------------------------


SPARSE = jpeft.fish_mask(sparsity=0.3, refresh=1, head=None)
LEARNERS = jpeft.far(target="a/kernel", retention=0.5, stage="learners", head=None)


def test_each_part_of_a_chain_reads_its_kind_from_a_list(params, data):
    information = fisher(losses_fn, params, [data])
    # By their movement, neurons 1 and 2 are the learners; the Fisher information would choose others.
    tuned = {**params, "a": {**params["a"], "kernel": params["a"]["kernel"] + jnp.array([[0.0, 1.0, 1.0, 0.0]])}}
    moved = movement(params, tuned)
    chain = jpeft.chain(fish=SPARSE, far=LEARNERS)
    assert chain.requires_stats == (Fisher, Movement)
    for stats in ([information, moved], [moved, information]):
        peft = jpeft.apply(params, method=chain, stats=stats)
        assert peft.adapter["far"]["a"]["kernel"]["indices"].tolist() == [1, 2]
        chex.assert_trees_all_equal(peft.adapter["fish"], jpeft.apply(params, method=SPARSE, stats=information).adapter)
    with pytest.raises(ValueError, match="fish_mask chooses what to train by statistics .* was given none"):
        jpeft.apply(params, method=chain, stats=moved)


def test_fisher_information_of_a_chain(params, data):
    """A refresh takes the information of the model as it is: of the bound parameters, whatever other parts of the chain have added."""
    chain = jpeft.chain(bias=jpeft.bitfit(head=None), fish=SPARSE)
    peft = jpeft.apply(params, method=chain, stats=fisher(losses_fn, params, [data]))
    peft = peft.replace(adapter={**peft.adapter, "bias": {"a": {"bias": jnp.array([0.3, -2.0, 1.0, 0.5])}}})
    adapted = jpeft.wrap(losses_fn, chain)

    def losses(params, batch):
        return adapted(peft.replace(params=params).variables, batch)

    information = fisher(losses, params, [data])
    # The base's biases are replaced, so the loss does not depend on them. All else has the information of the merged parameters.
    merged = fisher(losses_fn, jpeft.merge(peft), [data]).values
    merged["a"]["bias"] = jnp.zeros(4)
    chex.assert_trees_all_close(information.values, merged, rtol=1e-5)
    after = jpeft.advance(peft, stats=[LabelTokens(((1,),)), information])
    assert after.method == jpeft.chain(bias=jpeft.bitfit(head=None), fish=SPARSE.replace(refresh=0))
    alone = jpeft.apply(params, method=SPARSE, stats=information).adapter
    trained = {path: leaf for path, leaf in jpeft.flatten(after.adapter["fish"]).items() if "kept" not in path}
    chex.assert_trees_all_equal(trained, jpeft.flatten(alone))


@pytest.mark.parametrize("method", [SPARSE, LEARNERS, jpeft.diff_pruning(stage="mask", sparsity=0.3, head=None)], ids=lambda m: m.name)
def test_a_plain_tree_serves_as_any_kind(params, method):
    tree = jax.tree.map(jnp.abs, params) | {"a": {"kernel": jnp.abs(params["a"]["kernel"]), "bias": jnp.ones(4)}}
    typed = jpeft.apply(params, method=method, stats=method.requires_stats[0](tree))
    chex.assert_trees_all_equal(typed.adapter, jpeft.apply(params, method=method, stats=tree).adapter)


def test_methods_of_scores_refuse_other_kinds(params):
    for stats in (LabelTokens(((1,),)), KeyValues({}), Prompt(jnp.ones((2, 3)))):
        with pytest.raises(ValueError, match="was given none"):
            jpeft.apply(params, method=SPARSE, stats=stats)
        with pytest.raises(ValueError, match="was given none"):
            jpeft.apply(params, method=LEARNERS, stats=stats)


def test_statistics_are_pytrees(params, data):
    doubled = jax.jit(lambda stats: jax.tree.map(lambda leaf: 2 * leaf, stats))(fisher(losses_fn, params, [data]))
    assert isinstance(doubled, Fisher)
    assert doubled["a"]["kernel"] is doubled.values["a"]["kernel"]

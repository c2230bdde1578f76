"""Adapters combined into one, in NumPy and as HF PEFT combines them; any change of weights as LoRA."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import MERGES, NEED_STATS, ROWS, base, noised

import jpeft
from jpeft.many import svd, task_vectors
from jpeft.many.parts import Factors
from jpeft.many.task_vectors import Options

PARAMS = {
    name: {"kernel": jax.random.normal(jax.random.key(i), (6, 5)), "bias": jnp.zeros(5)} for i, name in enumerate(("query", "value"))
} | {"head": {"kernel": jnp.ones((5, 2)), "bias": jnp.zeros(2)}}
WEIGHTS = (0.7, -0.4, 1.3)


def adapter(method, seed, params=PARAMS, **options):
    peft = jpeft.apply(params, method, key=jax.random.key(seed), **options)
    return peft.replace(adapter=noised(peft.adapter, scale=0.5, seed=seed))


def loras(ranks=(2, 2, 2), **options):
    return [adapter(jpeft.lora(rank=rank, alpha=3.0, **options), seed) for seed, rank in enumerate(ranks)]


def delta(peft, path="query/kernel"):
    """The change of a leaf, as merging makes it."""
    return np.asarray(jpeft.flatten(jpeft.merge(peft))[path] - jpeft.flatten(peft.params)[path])


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_sums(method):
    """Exact, heads included, also for other ranks, targets and scales; or the best of its rank."""
    own = [*loras((2, 1)), adapter(jpeft.lora(rank=3, rslora=True, target=["query"]), 7)]
    new = jpeft.combine(own, WEIGHTS, method)
    for path in ("query/kernel", "value/kernel", "head/kernel", "head/bias"):
        total = sum(w * delta(peft, path) for w, peft in zip(WEIGHTS, own))
        if method == "svd" and not path.startswith("head"):
            total = best(total, 3)
        np.testing.assert_allclose(delta(new, path), total, atol=1e-6 * max(1, np.abs(total).max()))
    ranks = {path: leaf.shape[1] for path, leaf in jpeft.flatten(new.adapter).items() if path.endswith("/a")}
    cat = {"query/kernel/a": 6, "value/kernel/a": 3}
    expected = {"cat": cat, "linear": cat | {"query/kernel/a": 5}, "svd": dict.fromkeys(cat, 3)}
    assert ranks == expected[method]


def test_the_result_is_an_ordinary_adapter(tmp_path):
    """It is saved, loaded, wrapped, made smaller and combined again."""
    new = jpeft.combine(loras((2, 1)), WEIGHTS[:2])
    jpeft.save(tmp_path / "new", new)
    chex.assert_trees_all_equal(jpeft.load(tmp_path / "new", PARAMS), new)
    again = jpeft.combine([new, new], [0.5, 0.5], rank=2)
    np.testing.assert_allclose(delta(again), best(delta(new), 2), atol=1e-5)
    assert again.method.rank == 2


def in_numpy(method, deltas, weights, density, majority):
    """The equations of the papers, number by number."""
    way, out = method.removesuffix("_svd"), np.zeros_like(deltas[0])
    kept = []
    for change in deltas:
        limit = np.sort(np.abs(change).ravel())[-int(density * change.size)]
        kept.append(np.where(np.abs(change) >= limit, change, 0))
    for at in np.ndindex(out.shape):
        terms = [(w, change[at]) for w, change in zip(weights, kept)]
        if way == "ties":
            votes = [x for _, x in terms] if majority == "total" else [np.sign(x) for _, x in terms]
            sign = 1 if sum(votes) >= 0 else -1
            terms = [(w, x) for w, x in terms if np.sign(x) == sign]
            out[at] = sum(w * x for w, x in terms) / max(1, len(terms))
        else:
            out[at] = sum(w * x for w, x in terms)
    return out


@pytest.mark.parametrize(("method", "majority"), [("ties", "total"), ("ties_svd", "frequency"), ("magnitude_prune", "total")])
def test_trimmed_sums(method, majority):
    """TIES on whole changes, of kernels and of heads: exact, or the best of the rank."""
    own = loras()
    new = jpeft.combine(own, WEIGHTS, method, density=0.5, majority_sign=majority)
    for path in ("query/kernel", "head/kernel"):
        expected = in_numpy(method, [delta(peft, path) for peft in own], WEIGHTS, 0.5, majority)
        if method.endswith("svd") and not path.startswith("head"):
            expected = best(expected, 2)
        np.testing.assert_allclose(delta(new, path), expected, atol=1e-5)


def test_dare_keeps_the_mean():
    """Numbers are dropped at the rate that was asked for and the others divided by it; nothing is dropped at a density of 1."""
    changes = np.ones((2, 100, 100), np.float32)
    one = task_vectors.dropped(changes[0], 0.25, jax.random.key(0))
    assert set(np.unique(one)) == {0.0, 4.0}
    assert abs(one.mean() - 1) < 0.05
    options = Options(0.25, "total", jax.random.key(1))
    linear = task_vectors.dare_linear(changes, (1.0, -0.5), options)
    assert set(np.unique(linear)) == {-2.0, 0.0, 2.0, 4.0}  # the two are dropped independently
    elected = task_vectors.dare_ties(changes * np.array([1, -3], np.float32)[:, None, None], (1.0, 1.0), options)
    assert set(np.unique(elected)) == {-12.0, 0.0, 4.0}
    own = loras()
    whole = jpeft.combine(own, WEIGHTS, "dare_linear", density=1.0)
    np.testing.assert_allclose(delta(whole), delta(jpeft.combine(own, WEIGHTS)), atol=1e-5)
    thin = [jpeft.combine(own, WEIGHTS, "dare_ties_svd", density=0.5, key=jax.random.key(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(delta(thin[0]), delta(thin[1]))
    assert np.abs(delta(thin[0]) - delta(thin[2])).max() > 1e-2


def test_biases_of_loras_own():
    """They are changes of the layers' biases, also of those that another part of a chain holds."""
    own = [
        adapter(jpeft.lora(rank=2), 1),
        adapter(jpeft.lora(rank=1, lora_bias=True), 2),
        adapter(jpeft.chain(biases=jpeft.bitfit(), lora=jpeft.lora(rank=1, lora_bias=True)), 3),
    ]
    new = jpeft.combine(own, WEIGHTS)
    for path in ("query/kernel", "query/bias", "head/kernel"):
        np.testing.assert_allclose(delta(new, path), sum(w * delta(peft, path) for w, peft in zip(WEIGHTS, own)), atol=1e-5)
    np.testing.assert_allclose(delta(jpeft.to_lora(own[2], rank=2), "query/bias"), delta(own[2], "query/bias"), atol=1e-6)


# --- HF PEFT ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_torch():
    """``(pefts, weights, method, **options) -> change of the query``, as HF PEFT's `add_weighted_adapter` makes it."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query = torch.nn.Linear(6, 5)

        def forward(self, x):
            return self.query(x)

    def run(pefts, weights, method, **options):
        model = None
        for i, own in enumerate(pefts):
            rank = own.adapter["query"]["kernel"]["a"].shape[1]
            config = peft.LoraConfig(r=rank, lora_alpha=3.0, target_modules=["query"])
            model = peft.get_peft_model(Net(), config, "0") if model is None else model
            if i:
                model.add_adapter(str(i), config)
            layer = model.base_model.model.query
            leaves = own.adapter["query"]["kernel"]
            layer.lora_A[str(i)].weight.data = torch.tensor(np.array(leaves["a"]).T)
            layer.lora_B[str(i)].weight.data = torch.tensor(np.array(leaves["b"]).T)
        model.add_weighted_adapter([str(i) for i in range(len(pefts))], list(weights), "new", method, **options)
        return model.base_model.model.query.get_delta_weight("new").detach().numpy().T

    return run


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cat", {}),
        ("svd", {}),
        ("svd", {"rank": 1}),
        ("ties_svd", {"density": 0.4}),
        ("ties_svd", {"density": 0.4, "majority_sign": "frequency"}),
        ("magnitude_prune_svd", {"density": 0.3}),
        ("linear", {"factors": True}),
        ("ties", {"factors": True, "density": 0.5}),
        ("magnitude_prune", {"factors": True, "density": 0.5}),
    ],
)
def test_as_hf_peft(in_torch, method, options):
    own = loras((3, 2, 2) if method in ("cat", "svd") else (2, 2, 2))
    names = {"rank": "svd_rank", "majority_sign": "majority_sign_method"}
    theirs = {names.get(name, name): value for name, value in options.items() if name != "factors"}
    expected = in_torch(own, WEIGHTS, method, **theirs)
    np.testing.assert_allclose(delta(jpeft.combine(own, WEIGHTS, method, **options)), expected, atol=2e-5)


def test_linear_by_factors_has_cross_terms(in_torch):
    """What HF PEFT calls linear is not the weighted sum of the changes, which `linear` is here."""
    own = loras()
    total = sum(w * delta(peft) for w, peft in zip(WEIGHTS, own))
    np.testing.assert_allclose(delta(jpeft.combine(own, WEIGHTS, "linear")), total, atol=1e-5)
    assert np.linalg.norm(in_torch(own, WEIGHTS, "linear") - total) > 0.3 * np.linalg.norm(total)


def test_vectors():
    """(IA)³: the sum of the changes; or the sum of the vectors, which HF PEFT takes."""
    own = [adapter(jpeft.ia3(target=["value"], feedforward=["query"]), seed) for seed in range(2)]
    leaves = lambda peft: (peft.adapter["value"]["kernel"]["l_out"], peft.adapter["query"]["kernel"]["l_in"])
    new, theirs = jpeft.combine(own, [0.6, 0.9], "linear"), jpeft.combine(own, [0.6, 0.9], "linear", factors=True)
    for mine, hf, one, two in zip(*map(leaves, (new, theirs, *own))):
        np.testing.assert_allclose(mine, 1 + 0.6 * (one - 1) + 0.9 * (two - 1), atol=1e-6)
        np.testing.assert_allclose(hf, 0.6 * one + 0.9 * two, atol=1e-6)
    total = sum(w * delta(peft) for w, peft in zip((0.6, 0.9), own))
    np.testing.assert_allclose(delta(new), total, atol=1e-5)
    np.testing.assert_allclose(
        delta(new, "head/kernel"), sum(w * delta(peft, "head/kernel") for w, peft in zip((0.6, 0.9), own)), atol=1e-6
    )


def test_stacked_layers_one_by_one():
    """A scanned stack is trimmed and combined layer by layer, its biases too."""
    params = base("scan")
    method = jpeft.chain(lora=jpeft.lora(rank=2), biases=jpeft.bitfit())
    own = [adapter(method, seed, params) for seed in range(2)]
    for way, options in (("cat", {}), ("ties", {"density": 0.3})):
        new = jpeft.combine(own, [1.0, 0.5], way, **options)
        for path in ("layers/up/kernel", "layers/attn/key/bias"):
            deltas = [delta(peft, path) for peft in own]
            if way == "cat":
                expected = [deltas[0][i] + 0.5 * deltas[1][i] for i in range(2)]
            else:
                expected = [in_numpy(way, [change[i] for change in deltas], (1.0, 0.5), 0.3, "total") for i in range(2)]
            np.testing.assert_allclose(delta(new, path), np.stack(expected), atol=1e-5, err_msg=path)


# --- to LoRA ------------------------------------------------------------------------------------------------------------------------------


# What changes no kernel, what has factors, and what is another form of a method that is there.
LEFT_OUT = ("bitfit", "ln_tuning", "lora", "skeleton", "chain-sparse", "diff_pruning", "far-learners", "adalora")


@pytest.mark.parametrize("name", [name for name in ROWS if name not in MERGES and not name.startswith(LEFT_OUT)])
def test_any_change_of_weights_as_lora(name):
    """Of all methods that merge: the same weights, biases, norms and heads included, up to the error that was asked for."""
    model = ROWS[name].models[0]
    params, method = base(model), ROWS[name].method
    peft = jpeft.apply(params, method, stats=jax.tree.map(jnp.abs, params) if name in NEED_STATS else None)
    peft = peft.replace(adapter=noised_values(peft))
    lora = jpeft.to_lora(peft, error=1e-3)
    assert lora.method.name == "lora"
    expected = lora.method.expected(params, lora.adapter)
    chex.assert_trees_all_equal_shapes_and_dtypes(expected, lora.adapter)
    old, new, got = (jpeft.flatten(tree) for tree in (params, jpeft.merge(peft), jpeft.merge(lora)))
    assert any((old[path] != new[path]).any() for path in old)
    for path, leaf in old.items():
        assert jnp.linalg.norm(got[path] - new[path]) <= 2e-3 * jnp.linalg.norm(new[path] - leaf) + 1e-6, path


def noised_values(peft):
    """Noise on the trained leaves alone: indices are none."""
    labels = peft.method.labels(peft.adapter)
    noisy = noised(peft.adapter)
    return jax.tree.map(lambda label, old, new: old if label == "freeze" else new, labels, peft.adapter, noisy)


def test_rank_and_error():
    """The best of a rank, the lowest rank of an error; from factors and from whole changes alike."""
    wide = adapter(jpeft.lora(rank=4), 3)
    change, scale = delta(wide), np.linalg.norm(delta(wide))
    for rank in (1, 3):
        np.testing.assert_allclose(delta(jpeft.to_lora(wide, rank=rank)), best(change, rank), atol=1e-5)
    rules = jpeft.to_lora(wide, rank={"query": 1, ".*": 2})
    assert [rules.adapter[name]["kernel"]["a"].shape for name in ("query", "value")] == [(6, 1), (6, 2)]
    assert jpeft.to_lora(wide, rank=99).adapter["query"]["kernel"]["a"].shape == (6, 4)
    for error in (0.5, 0.2, 0.0):
        lora = jpeft.to_lora(wide, error=error)
        rank = lora.adapter["query"]["kernel"]["a"].shape[1]
        assert np.linalg.norm(delta(lora) - change) <= error * scale + 1e-5
        assert rank == 1 or np.linalg.norm(best(change, rank - 1) - change) > error * scale
    dora = jpeft.to_lora(adapter("dora", 4), error=0.3)
    assert np.linalg.norm(delta(dora) - delta(adapter("dora", 4))) <= 0.3 * np.linalg.norm(delta(adapter("dora", 4))) + 1e-5
    tall = Factors(jnp.ones((3, 40, 2)), jnp.ones((3, 2, 4)))
    np.testing.assert_allclose(np.matmul(*svd.truncated(svd.of_factors(tall), 1)), 2 * np.ones((3, 40, 4)), atol=1e-5)


def refused(message):
    return pytest.raises(ValueError, match=message)


def test_what_cannot_be_combined():
    own = loras((2, 3))
    for method, options, message in (
        ("cat", {"density": 0.5}, "density=0.5 has no effect on cat"),
        ("ties", {}, r"density=None: ties needs the share of the numbers that it keeps, in \(0, 1\]"),
        ("ties", {"density": 0.0}, "density=0.0: ties needs"),
        ("mean", {}, "method='mean' is none of cat, svd, linear, ties"),
        ("ties", {"density": 0.5, "majority_sign": "most"}, "majority_sign='most' is neither 'total' nor 'frequency'"),
        ("svd", {"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ("svd", {"rank": 2, "error": 0.1}, "one of rank= and error="),
        ("dare_linear", {"density": 0.5, "key": 3}, "key=3 is no random key"),
        ("cat", {"factors": True}, "factors=True goes with linear, ties"),
        ("linear", {"factors": True}, "factors=True needs adapters of LoRA of one rank, and those at 'query/kernel' have the ranks 2, 3"),
    ):
        with refused(message):
            jpeft.combine(own, (1.0, 1.0), method, **options)
    for weights in ((1.0,), (1.0, float("nan"))):
        with refused("must be a number for each of the 2 adapters"):
            jpeft.combine(own, weights)
    with refused("needs at least one adapter"):
        jpeft.combine([], [])
    with refused("Adapter 1 of combine.. is for another base: 'query/bias' has other values there"):
        jpeft.combine([own[0], adapter(jpeft.lora(), 0, jax.tree.map(lambda leaf: leaf + 1, PARAMS))], (1, 1))
    with refused("takes adapters of LoRA and .IA.³, and was given dora. Turn it into LoRA first: jpeft.to_lora"):
        jpeft.combine([own[0], adapter("dora", 0)], (1, 1))
    with refused("these change no kernel, but 'head/bias', 'head/kernel', 'query/bias', 'value/bias'"):
        jpeft.combine([adapter("bitfit", 0), adapter("bitfit", 1)], (1, 1))
    bare = {"embed": {"embedding": jnp.ones((4, 3))}, "query": {"kernel": jnp.ones((3, 3))}}
    with refused(r"LoRA's own \(lora_bias=True\) into that of the layer, and the layer of 'query/kernel' has none"):
        jpeft.combine([adapter(jpeft.lora(rank=1, lora_bias=True, target=["query"], head=None), 0, bare)], [1])
    with refused("lora has tied='lookup', which changes the look-ups of 'embed/embedding'.* or give tied='both'"):
        jpeft.combine([adapter(jpeft.lora(rank=1, tied="lookup", target=["embed"], head=None), 0, bare)], [1])
    vectors = adapter(jpeft.ia3(target=["value"], feedforward=None), 0)
    with refused("adapters of LoRA or of .IA.³, and was given both"):
        jpeft.combine([own[0], vectors], (1, 1))
    with refused("method='svd': the vectors of .IA.³ can be combined by 'linear'"):
        jpeft.combine([vectors, vectors], (1, 1), "svd")
    with refused("one adapter scales its inputs and another its outputs"):
        jpeft.combine([vectors, adapter(jpeft.ia3(target=["query"], feedforward=["value"]), 0)], (1, 1), "linear")


def test_numbers_that_are_none():
    own = loras((2, 2))
    bad = own[0].replace(adapter=jax.tree.map(lambda leaf: leaf * jnp.nan, own[0].adapter))
    with refused("Adapter 1 of combine.*: the adapter holds numbers that are not finite, in 'head/bias'"):
        jpeft.combine([own[1], bad], (1, 1))
    with refused("to_lora.*: the adapter holds numbers that are not finite"):
        jpeft.to_lora(bad, rank=1)
    for verb in (lambda peft: jpeft.to_lora(peft, rank=1), lambda peft: jpeft.combine([peft], [1])):
        with refused("looks at numbers, and inside of jax.jit.* call it outside"):
            jax.jit(verb)(own[0])


def test_what_cannot_become_lora():
    own = loras((2,))[0]
    for options in ({}, {"rank": 2, "error": 0.1}):
        with refused("takes one of rank=, such as rank=16, and error="):
            jpeft.to_lora(own, **options)
    with refused("error=1.0 must be a share of the change's norm"):
        jpeft.to_lora(own, error=1.0)
    with refused("rank=1.5 must be a whole number"):
        jpeft.to_lora(own, rank=1.5)
    with refused("rank: the rule 'key' matches none of the 2 layers"):
        jpeft.to_lora(own, rank={"key": 2, ".*": 1})
    with refused("bitfit cannot become LoRA: it changes no kernel, but 'head/bias', 'head/kernel', 'query/bias', 'value/bias'"):
        jpeft.to_lora(adapter("bitfit", 0), rank=2)
    with refused("adapter cannot become LoRA: an adapter is a nonlinear layer of its own"):
        jpeft.to_lora(adapter(jpeft.adapter(size=2, target=["query"]), 0), rank=2)

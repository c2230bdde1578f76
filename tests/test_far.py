"""FAR: which neurons, that the layer in one piece is the paper's split, and what the second stage does not do any more."""

import importlib.util
import itertools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from tables import MODELS, base, batch, case, compiled_flops, noised, optimised

import jpeft
from jpeft import layouts
from jpeft.models import BertForSequenceClassification, abstract_params
from jpeft.models.bert.config import BertConfig
from jpeft.selective import columns

METHOD = jpeft.far(retention=0.25)
LAST = jpeft.far(retention=0.25, stage="learners")


def reconfigured(model="plain", seed=3, method=METHOD):
    """The second stage after a priming that moved everything at random."""
    peft = jpeft.apply(base(model), method=method)
    return jpeft.advance(peft.replace(adapter=noised(peft.adapter, seed=seed)))


# --- which neurons -------------------------------------------------------------------------------------------------------------------


def test_learners_are_those_that_moved_most():
    peft = jpeft.apply(base("plain"), method=METHOD)
    primed = peft.replace(adapter=noised(peft.adapter))
    after = jpeft.advance(primed)
    assert after.method == LAST
    kernels = [path for path in jpeft.flatten(peft.adapter) if path.endswith("kernel") and "classifier" not in path]
    assert kernels == [f"layer_{i}/{name}/kernel" for i in range(2) for name in ("down", "up")]
    old, new, got = jpeft.flatten(base("plain")), jpeft.flatten(primed.adapter), jpeft.flatten(after.adapter)
    for path in kernels:
        moved = np.abs(np.asarray(new[path]) - np.asarray(old[path])).sum(0)
        best = np.sort(np.argsort(-moved)[: round(0.25 * moved.size)])
        np.testing.assert_array_equal(got[f"{path}/indices"], best)
        np.testing.assert_array_equal(got[f"{path}/values"], new[path][:, best])
        bias = path.replace("kernel", "bias")
        np.testing.assert_array_equal(got[f"{bias}/indices"], best)
        np.testing.assert_array_equal(got[f"{bias}/values"], new[bias][best])
    np.testing.assert_array_equal(after.adapter["classifier"]["kernel"], primed.adapter["classifier"]["kernel"])


def test_scanned_layers_choose_each_for_itself():
    scanned = reconfigured("scan").adapter["layers"]["up"]["kernel"]["indices"]
    assert scanned.shape == (2, 8)
    assert set(scanned[0].tolist()) != set(scanned[1].tolist())
    peft = jpeft.apply(base("scan"), method=METHOD)
    moved = np.abs(np.asarray(noised(peft.adapter)["layers"]["up"]["kernel"] - peft.adapter["layers"]["up"]["kernel"])).sum(1)
    np.testing.assert_array_equal(scanned, np.sort(np.argsort(-moved, axis=-1)[:, :8], axis=-1))


def test_of_equal_neurons_the_first_are_taken():
    after = jpeft.advance(jpeft.apply({"mlp": {"up": {"kernel": jnp.ones((2, 6))}}}, method=jpeft.far(retention=0.5)))
    assert after.adapter["mlp"]["up"]["kernel"]["indices"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("scan", [False, True])
def test_counts_on_bert_base(scan):
    """Primed: the MLPs' 56,669,184; of 3072 and 768 neurons 768 and 192 remain."""
    params = abstract_params(BertForSequenceClassification(BertConfig.bert_base_cased(scan=scan), num_labels=2))
    head, layers, d, f = 2 * 768 + 2, 12, 768, 3072
    first = jax.eval_shape(lambda p: jpeft.apply(p, method="far"), params)
    assert jpeft.summary(first).trained == layers * (2 * d * f + d + f) + head == 56_669_184 + head
    s = jpeft.summary(jax.eval_shape(jpeft.advance, first))
    assert s.trained == s.changed == layers * ((d + 1) * 768 + (f + 1) * 192) + head
    assert s.stored == s.trained + layers * 2 * (768 + 192)


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("bert/encoder/layer/0/intermediate/dense/kernel", True),
        ("bert/encoder/layer/0/output/dense/kernel", True),
        ("bert/encoder/layer/0/attention/output/dense/kernel", False),
        ("transformer/layer/3/ffn/lin2/kernel", True),
        ("transformer/layer/3/attention/q_lin/kernel", False),
        ("h/0/mlp/c_proj/kernel", True),
        ("h/0/attn/c_proj/kernel", False),
        ("layers/mlp/gate_proj/kernel", True),
        ("layers/self_attn/o_proj/kernel", False),
        ("encoder/block/0/layer/1/DenseReluDense/wi_0/kernel", True),
        ("pooler/dense/kernel", False),
    ],
)
def test_what_a_feed_forward_layer_is_called(path, is_one):
    assert bool(layouts.find([path], "@ffn_in|@ffn_out", required=False)) == is_one


def test_what_else_is_trained():
    peft = jpeft.apply(base("plain"), method=jpeft.far(also=r".*/attn/.*"))
    more = {path for path in jpeft.flatten(peft.adapter) if "/attn/" in path}
    assert len(more) == 16
    after = jpeft.flatten(jpeft.advance(peft).adapter)
    assert more <= after.keys()


# --- the layer in one piece ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 5])
def test_it_is_the_papers_split_for_every_permutation(count):
    """``[x W_t + b_t, x W_f + b_f]`` permuted back, and the gradient of its trained half, for all 120 orders of five neurons."""
    rng = np.random.default_rng(0)
    x, dy, kernel, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 4), (2, 3, 5), (4, 5), (5,)))
    model, tuned, tuned_bias = nn.Dense(5), kernel + rng.normal(size=kernel.shape).astype(np.float32), bias + 1
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    forward = jpeft.wrap(model.apply, LAST)

    @jax.jit
    def mine(values, bias_values, at, x):
        def run(values, bias_values, x):
            adapter = {"kernel": {"values": values, "indices": at}, "bias": {"values": bias_values, "indices": at}}
            return forward(jpeft.Peft(params, adapter, LAST).variables, x)

        y, pull = jax.vjp(run, values, bias_values, x)
        return y, *pull(jnp.asarray(dy))

    for permutation in itertools.permutations(range(5)):
        learner, frozen = np.array(permutation[:count]), np.array(permutation[count:], int)
        inverse = np.argsort(permutation)
        trained = x @ tuned[:, learner] + tuned_bias[learner]
        y = np.concatenate([trained, x @ kernel[:, frozen] + bias[frozen]], -1)[..., inverse]
        d = dy[..., list(permutation)]
        dx = d[..., :count] @ tuned[:, learner].T + d[..., count:] @ kernel[:, frozen].T
        want = y, np.einsum("abi,abo->io", x, d[..., :count]), d[..., :count].sum((0, 1)), dx
        got = mine(tuned[:, learner], tuned_bias[learner], jnp.asarray(learner, jnp.float32), x)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_a_step_forms_no_gradient_of_frozen_columns():
    """Beside the forward pass and dX, a quarter of the FLOPs of dW is left; gradient, moments and adapter have the learners' sizes."""
    inputs, outputs, tokens = 256, 512, 1024
    model, x = nn.Sequential([nn.Dense(8), nn.Dense(inputs), nn.Dense(outputs)]), jnp.ones((tokens, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    first = jax.eval_shape(lambda p: jpeft.apply(p, method=jpeft.far(target="layers_2/kernel", also="layers_0/kernel")), params)
    second = jax.eval_shape(jpeft.advance, first)

    def flops(peft):
        forward = jpeft.wrap(model.apply, peft.method)
        return compiled_flops(jax.grad(lambda a, peft: forward(peft.replace(adapter=a).variables, x).sum()), peft.adapter, peft)

    saved = flops(first) - flops(second)
    assert saved == pytest.approx(0.75 * 2 * tokens * inputs * outputs, rel=0.02)
    state = jax.eval_shape(jpeft.optimizer(optax.adamw(1e-3), second).init, second.adapter)
    learning = (inputs + 1) * outputs // 4 + 8 * 8
    assert jpeft.tree.size(state) == 2 * learning + 1


@pytest.fixture(scope="module")
def benchmark():
    """The module that makes the published table."""
    spec = importlib.util.spec_from_file_location("far_benchmark", Path(__file__).parents[1] / "benchmarks" / "far.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("case", "temp"),
    [
        # What of the gradients of the frozen neurons' weights must be saved of the temporary memory alone, in kernels more or less.
        pytest.param((8, 32, False, False, 1), None, id="long"),
        pytest.param((1, 4, False, False, 1), 0.0, id="short"),
        pytest.param((8, 32, True, True, 1), 0.0, id="scan-remat"),
        pytest.param((8, 32, False, False, 4), -0.25, id="micro-batches"),
    ],
)
def test_a_step_saves_memory(benchmark, case, temp):
    """By XLA's account of whole steps with clipping and AdamW: FLOPs and the peak of all memory fall by what the gradients of the frozen
    neurons' weights make up or more, whatever the batch; so does temporary memory where gradients exist when activations do."""
    sizes = benchmark.Sizes(d=64, f=256, heads=2, layers=2)
    case = benchmark.Case(*case)
    with optimised():
        before, after = (benchmark.spent(fn) for fn, _ in benchmark.compiled(case, 0.25, sizes).values())
    flops, nbytes = benchmark.bounds(case, 0.25, sizes)
    kernel = 4 * sizes.d * sizes.f
    if not case.loops:
        assert before.flops - after.flops >= flops
    # Beside gradients, two moments and a trained copy of each frozen weight are gone; and the pretrained kernels are there instead.
    assert before.peak - after.peak >= (nbytes if temp is None else 2 * nbytes)
    # Layer by layer with long activations: one kernel with its learners where there was the gradient of one kernel.
    assert before.temp - after.temp >= (-0.5 * kernel if temp is None else nbytes + temp * kernel)


def test_a_layer_that_another_method_wraps_is_differentiated_as_it_is():
    """Within a chain, behind a bottleneck, the layer's outputs are no linear function of its kernel any more."""
    chain = jpeft.chain(adapter=jpeft.adapter(size=3, target="layer_0/down/kernel", train_norms=False, head=None), far=LAST)
    peft = jpeft.apply(base("plain"), method=chain, stats=jpeft.stats.movement(base("plain"), noised(base("plain"))))
    peft = peft.replace(adapter=noised(peft.adapter, scale=0.3))
    loss = jax.jit(lambda a: jnp.sin(jpeft.wrap(MODELS["plain"].apply, chain)(peft.replace(adapter=a).variables, batch()["x"])).sum())
    at = jpeft.flatten(peft.adapter)
    along = {path: jnp.zeros_like(leaf) for path, leaf in at.items()} | {
        "far/layer_0/down/kernel/values": jax.random.normal(jax.random.key(1), at["far/layer_0/down/kernel/values"].shape)
    }
    slope = sum(jnp.vdot(g, along[path]) for path, g in jpeft.flatten(jax.grad(loss)(peft.adapter)).items())
    move = lambda t: jpeft.unflatten({path: leaf + t * along[path] for path, leaf in at.items()})
    h = 3e-3
    numeric = (8 * (loss(move(h)) - loss(move(-h))) - (loss(move(2 * h)) - loss(move(-2 * h)))) / (12 * h)
    assert slope == pytest.approx(float(numeric), rel=1e-2, abs=1e-2)


@pytest.mark.parametrize(
    "other",
    [
        jpeft.lora(rank=2, target="@ffn_in|@ffn_out", head=None),
        jpeft.dora(rank=2, target="@ffn_in|@ffn_out", head=None),
        jpeft.ia3(head=None),
    ],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("order", ["before", "after"])
def test_in_a_chain_the_layer_computes_what_merging_writes(other, order):
    """Behind a weight method, learners replace columns of the kernel that it leaves; in front of one, it changes their kernel."""
    model, x = MODELS["bert"], batch()["x"]
    parts = {"far": LAST, "other": other} if order == "before" else {"other": other, "far": LAST}
    chain = jpeft.chain(**parts)
    peft = jpeft.apply(base("bert"), method=chain, stats=jpeft.stats.movement(base("bert"), noised(base("bert"))))
    labels = peft.method.labels(peft.adapter)
    noise = noised(peft.adapter, scale=0.3)
    peft = peft.replace(adapter=jax.tree.map(lambda leaf, new, label: new if label == "train" else leaf, peft.adapter, noise, labels))
    bound = jax.jit(jpeft.wrap(model.apply, chain))(peft.variables, x)
    chex.assert_trees_all_close(bound, model.apply({"params": jpeft.merge(peft)}, x), atol=1e-4, rtol=1e-4)


# --- merged --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["plain", "scan"])
def test_frozen_neurons_are_bit_for_bit_the_pretrained_ones(model):
    peft = reconfigured(model)
    peft = peft.replace(
        adapter=jax.tree.map(lambda leaf, label: leaf + 1.0 if label == "train" else leaf, peft.adapter, peft.method.labels(peft.adapter))
    )
    merged, old, flat = jpeft.flatten(jpeft.merge(peft)), jpeft.flatten(base(model)), jpeft.flatten(peft.adapter)
    for path in (path.removesuffix("/indices") for path in flat if path.endswith("/indices")):
        at = np.asarray(flat[f"{path}/indices"]).astype(int)
        new, before = np.asarray(merged[path]), np.asarray(old[path])
        if at.ndim == 1:
            new, before, at = new[None], before[None], at[None]
        for i, row in enumerate(at):
            rest = np.setdiff1d(np.arange(new.shape[-1]), row)
            assert new[i][..., rest].tobytes() == before[i][..., rest].tobytes()
            assert (new[i][..., row] != before[i][..., row]).all()
    untouched = [path for path in old if path not in flat and f"{path}/values" not in flat]
    assert untouched
    assert all(merged[path] is old[path] for path in untouched)


def test_half_precision_is_kept():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base("plain"))
    peft = jpeft.advance(jpeft.apply(params, method=METHOD))
    assert peft.adapter["layer_0"]["up"]["kernel"]["values"].dtype == jnp.float32  # it is trained
    chex.assert_trees_all_equal(jpeft.merge(peft), params)


def test_the_second_stage_on_its_own():
    tuned = noised(base("plain"))
    peft = jpeft.apply(base("plain"), method=LAST, stats=jpeft.stats.movement(base("plain"), tuned))
    assert peft.adapter["layer_0"]["up"]["kernel"]["values"].shape == (16, 8)
    chex.assert_trees_all_equal(jpeft.merge(peft), base("plain"))


def test_placing_without_learners_changes_nothing_and_all_changes_all():
    leaf = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(columns.place_columns(leaf, -leaf[:, [2, 0, 1]], jnp.array([2.0, 0.0, 1.0])), -leaf)


# --- errors --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retention": 0.0}, "retention=0.0 must be a number above 0 and at most 1"),
        ({"priming_share": 0.0}, "priming_share=0.0 must be a number above 0 and below 1"),
        ({"stage": "done"}, "is not one of 'priming', 'learners'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.far(**options)


def test_errors():
    params = {"a": {"kernel": jnp.ones((3, 2, 2))}, "b": {"kernel": jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match="'a/kernel' .* is no kernel with one axis of inputs"):
        jpeft.apply(params, method="far", target="a/kernel")
    with pytest.raises(ValueError, match="no parameter of the model has this role"):
        jpeft.apply(params, method="far")
    with pytest.raises(ValueError, match="was given none. Give stats=jpeft.stats.movement"):
        jpeft.apply(params, method="far", target="b/kernel", stage="learners")
    with pytest.raises(ValueError, match="lacks 1 of the kernels"):
        jpeft.apply(params, method="far", target="b/kernel", stage="learners", stats={"b": {"kernel": jnp.ones(3)}})
    assert case("bitfit", "plain").method.stages == ()

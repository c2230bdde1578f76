"""The loss of a language model without logits: equal to that of the logits, whatever is trained, and never the logits of a whole batch."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from tables import NEED_STATS, ROWS, noised, optimised
from test_sharding import MESHES, mesh_of

import jpeft
from jpeft import sharding, stats
from jpeft.models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, partition_rules
from jpeft.models.common import token_loss
from jpeft.models.common.token_loss import TokenLoss
from jpeft.tasks.generation import Generation
from jpeft.training.config import TrainConfig
from jpeft.training.evaluate import Evaluator

VOCAB, BATCH, LENGTH = 40, 8, 9  # a length that chunks do not divide
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32, initializer_range=0.3
)
LLAMA: dict[str, Any] = dict(**SIZES, num_key_value_heads=2, intermediate_size=32, attention_bias=True, model_type="qwen3")
TIED, UNTIED = (LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied)) for tied in (True, False))
GPT2 = GPT2LMHeadModel(GPT2Config(**SIZES, scan=True))


def bert(kind: str = "bert", **changes: Any) -> nn.Module:
    sizes = SIZES | ({"type_vocab_size": 0} if kind == "distilbert" else {}) | changes
    return BertForMaskedLM(BertConfig(**sizes, intermediate_size=32, model_type=kind))


@functools.cache
def batch() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(1), 3)
    ids, labels = (jax.random.randint(key, (BATCH, LENGTH), 0, VOCAB) for key in keys[:2])
    return {
        "input_ids": ids,
        "attention_mask": jnp.ones_like(ids).at[0, 6:].set(0),
        "labels": jnp.where(jax.random.bernoulli(keys[2], 0.3, ids.shape), -100, labels).at[1].set(-100),
    }


@functools.cache
def base(model: nn.Module) -> Any:
    params = jax.jit(model.init)(jax.random.key(0), batch()["input_ids"])["params"]
    return noised(params, 0.05)  # so that no bias is zero


def from_logits(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> TokenLoss:
    """The same by its definition."""
    expected = optax.smooth_labels(jax.nn.one_hot(labels, VOCAB), smoothing)
    seen = labels != -100
    losses = jnp.where(seen, optax.softmax_cross_entropy(logits, expected), 0)
    return TokenLoss(losses, seen & (logits.argmax(-1) == labels))


def both(forward: Any, **more: Any) -> tuple[Any, Any]:
    """``variables -> loss`` through labels and through logits. The tokens have different weights, some of them none."""
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    weights = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 5 / 50
    through_labels = lambda variables: (weights * forward(variables, **inputs, labels=batch()["labels"], **more).loss).sum()
    through_logits = lambda variables: (weights * from_logits(forward(variables, **inputs, **more), batch()["labels"]).loss).sum()
    return through_labels, through_logits


def assert_close(got: Any, want: Any) -> None:
    """To 1e-5 of each leaf's largest number."""
    for mine, other in zip(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(jax.device_get(want)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5 * (1 + np.abs(other).max(initial=0)))


def check_equal(forward: Any, variables_of: Any, trained: Any) -> None:
    """Loss and gradients by both ways, in one program."""
    first, second = both(forward)
    grads = lambda loss, trained: jax.value_and_grad(lambda trained: loss(variables_of(trained)))(trained)
    got, want = jax.jit(lambda trained: (grads(first, trained), grads(second, trained)))(trained)
    assert_close(got, want)


# --- what it is -------------------------------------------------------------------------------------------------------


FAMILIES = {
    "llama": UNTIED,
    "bert": bert(),
    "roberta-own": bert("roberta", tie_word_embeddings=False),
    "electra": bert("electra", embedding_size=8),
    "electra-own": bert("electra", embedding_size=8, tie_word_embeddings=False),
    "distilbert": bert("distilbert"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_logits(family):
    model, (ids, mask, labels) = FAMILIES[family], batch().values()

    @jax.jit
    def run(variables):
        given = [model.apply(variables, ids, mask, labels=labels, label_smoothing=smoothing) for smoothing in (0.0, 0.2)]
        return model.apply(variables, ids, mask), *given

    logits, plain, smooth = run({"params": base(model)})
    for got, smoothing in ((plain, 0.0), (smooth, 0.2)):
        chex.assert_trees_all_close(got.loss, from_logits(logits, labels, smoothing).loss, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got.correct, from_logits(logits, labels).correct)
    assert plain.loss.dtype == jnp.float32
    assert plain.correct.dtype == jnp.bool_
    assert not plain.loss[1].any()
    assert not plain.correct[1].any()


def test_the_arithmetic_by_hand():
    labels = jnp.array([[2, -100, 0]])
    logits = jnp.log(jnp.array([[[0.2, 0.3, 0.5], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2]]])) + 7
    got, slope = token_loss._score(logits, labels, 0.0)
    np.testing.assert_allclose(got.loss, [[np.log(2), 0, np.log(2.5)]], rtol=1e-5)
    assert got.correct.tolist() == [[True, False, True]]  # of equal scores the first wins, as in argmax
    np.testing.assert_allclose(slope()[0, 0], [0.2, 0.3, -0.5], rtol=1e-5)
    smooth = optax.softmax_cross_entropy(logits[0], optax.smooth_labels(jax.nn.one_hot(labels[0], 3), 0.3))
    got, slope = token_loss._score(logits, labels, 0.3)
    np.testing.assert_allclose(got.loss[0, ::2], smooth[::2], rtol=1e-5)
    np.testing.assert_allclose(slope()[0, 0], [0.1, 0.2, -0.3], rtol=1e-5)


def test_parameters_are_the_same_with_labels():
    ids, labels = batch()["input_ids"], batch()["labels"]
    for model in (TIED, UNTIED, bert()):
        plain, labelled = (
            jax.eval_shape(functools.partial(model.init, jax.random.key(0)), ids, **more) for more in ({}, {"labels": labels})
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(plain, labelled)


def test_labels_that_are_no_words():
    model, ids = UNTIED, batch()["input_ids"]
    run = lambda labels, **more: model.apply({"params": base(model)}, ids, labels=labels, **more)
    for wrong in (VOCAB, -1):
        labels = batch()["labels"].at[2, 3].set(wrong)
        with pytest.raises(ValueError, match=rf"labels holds {wrong}, and the model scores {VOCAB} words, 0 to 39\. .* the label -100\."):
            run(labels)
        loss = jax.jit(run)(labels).loss
        assert jnp.isnan(loss[2, 3])
        assert jnp.isnan(loss).sum() == 1
    with pytest.raises(ValueError, match=r"labels have the shape \(8, 8\), but the ids \(8, 9\)"):
        run(batch()["labels"][:, 1:])
    with pytest.raises(ValueError, match=r"labels are float32, but must be whole numbers"):
        run(batch()["labels"].astype(jnp.float32))
    with pytest.raises(ValueError, match="labels= asks for the loss of all tokens and logits_at="):
        run(batch()["labels"], logits_at=jnp.zeros(BATCH, int))


# --- what is trained --------------------------------------------------------------------------------------------------

# The head is frozen, adapted or trained by one or the other.
# Those that are left out differ from one that is here inside of the blocks alone.
NAMES = ("freeze", "bitfit", "trainable_tokens", "fish_mask", "diff_pruning", "far", "adapter", "lora", "lora-two-view", "lora-factored")
NAMES += ("dora", "ia3", "prompt_tuning", "p_tuning", "prefix_tuning", "chain")
METHODS = {name: row.method for name, row in ROWS.items() if name in NAMES} | {
    "lora-head": jpeft.lora(rank={"lm_head": 3, ".*": 2}, alpha={"lm_head": 5.0, ".*": 7.0}),
    "lora-embedding": jpeft.lora(rank=2, target=["embed_tokens"]),
    "lora-body": jpeft.lora(rank=2, target=".*_proj/kernel"),
    "freeze-all": jpeft.freeze(top=1),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_gradients_of_the_logits(name):
    tied = name in ("lora-embedding", "lora-body", "trainable_tokens", "lora-two-view", "lora-factored", "fish_mask")
    model, method = TIED if tied else UNTIED, METHODS[name]
    needed = jax.tree.map(jnp.abs, base(model)) if name in NEED_STATS else None
    given = [stats.Fisher(needed), stats.Movement(needed)] if needed is not None else None
    peft = jpeft.apply(base(model), method=method, key=jax.random.key(7), stats=given)
    peft = peft.replace(adapter=noised(peft.adapter))
    check_equal(jpeft.wrap(model.apply, method), lambda adapter: peft.replace(adapter=adapter).variables, peft.adapter)


@pytest.mark.parametrize("model", [TIED, GPT2, bert()], ids=["llama-tied", "gpt2", "bert"])
def test_full_fine_tuning_has_the_gradients_of_the_logits(model):
    """A tied embedding gets the gradient of the lookup and that of the head."""
    check_equal(model.apply, lambda params: {"params": params}, base(model))


@pytest.mark.parametrize("name", ["bitfit", "lora-factored", "prompt_tuning"])
def test_a_masked_model_has_the_gradients_of_the_logits(name):
    model, method = bert(), METHODS[name]
    peft = jpeft.apply(base(model), method=method, key=jax.random.key(7))
    peft = peft.replace(adapter=noised(peft.adapter))
    check_equal(jpeft.wrap(model.apply, method), lambda adapter: peft.replace(adapter=adapter).variables, peft.adapter)


# --- under transformations --------------------------------------------------------------------------------------------


def adapted(target: str) -> tuple[Any, Any, jpeft.Peft]:
    """The loss as a function of the adapter, by both ways."""
    peft = jpeft.apply(base(UNTIED), method=jpeft.lora(rank=2, target=target), key=jax.random.key(7))
    peft = peft.replace(adapter=noised(peft.adapter))
    first, second = both(jpeft.wrap(UNTIED.apply, peft.method))
    return *((lambda adapter, loss=loss: loss(peft.replace(adapter=adapter).variables)) for loss in (first, second)), peft


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_transformations_keep_the_method_around_the_head(target):
    """A rule for derivatives is traced later than the model, when no method is around any layer."""
    labels, logits, peft = adapted(target)
    want = jax.jit(jax.grad(logits))(peft.adapter)
    ways = {
        "jit": jax.grad(jax.jit(labels)),
        "remat": jax.jit(jax.grad(jax.checkpoint(labels))),
        "scan": jax.jit(lambda adapter: jax.lax.scan(lambda total, _: (total, jax.grad(labels)(adapter)), 0.0, None, length=2)[1]),
        "vmap": jax.jit(jax.vmap(jax.grad(labels))),
        "outer": jax.jit(jax.grad(lambda adapters: jax.vmap(labels)(adapters).sum())),
    }
    for name, way in ways.items():
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), peft.adapter)
        got = way(stacked if name in ("vmap", "outer") else peft.adapter)
        got = got if name in ("jit", "remat") else jax.tree.map(lambda leaf: leaf[1], got)
        assert_close(got, want)


def test_the_frozen_head_is_run_once_and_the_trained_one_twice(monkeypatch):
    runs = []
    score = token_loss._score
    monkeypatch.setattr(token_loss, "_score", lambda *args: runs.append(1) or score(*args))
    for target, count in (("q_proj", 2), ("lm_head", 4)):  # two chunks
        runs.clear()
        loss, _, peft = adapted(target)
        jax.make_jaxpr(jax.grad(loss))(peft.adapter)
        assert len(runs) == count, target


def test_a_long_batch_runs_in_a_loop(monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK", 2 * BATCH)
    monkeypatch.setattr(token_loss, "PIECES", 3)
    for target in ("q_proj", "lm_head"):
        labels, logits, peft = adapted(target)
        assert "scan" in str(jax.make_jaxpr(labels)(peft.adapter))
        got, want = (jax.jit(jax.value_and_grad(loss))(peft.adapter) for loss in (labels, logits))
        assert_close(got, want)


def test_dropout_around_the_head():
    """The backward pass sees the masks of the forward pass, and each chunk has masks of its own."""
    peft = jpeft.apply(base(UNTIED), method=jpeft.lora(rank=2, target="lm_head", dropout=0.5), key=jax.random.key(7))
    peft = peft.replace(adapter=noised(peft.adapter, 0.3))
    forward = jpeft.wrap(UNTIED.apply, peft.method)
    ids = jnp.broadcast_to(batch()["input_ids"][:1, :1], (1, 8))
    run = lambda adapter: (
        forward(
            peft.replace(adapter=adapter).variables,
            ids,
            labels=jnp.full((1, 8), 3),
            deterministic=False,
            rngs={"dropout": jax.random.key(5)},
        ).loss
    )
    losses = jax.jit(run)(peft.adapter)
    assert len(set(losses[0].tolist())) == 8
    # The loss is convex in b alone and smooth, so a central difference along b must agree.
    grads = jax.jit(jax.grad(lambda adapter: run(adapter).sum()))(peft.adapter)
    move = lambda t: jax.tree.map(lambda leaf, grad: leaf + t * grad / optax.tree.norm(grads), peft.adapter, grads)
    slope = (jax.jit(run)(move(1e-2)).sum() - jax.jit(run)(move(-1e-2)).sum()) / 2e-2
    np.testing.assert_allclose(slope, optax.tree.norm(grads), rtol=1e-3)


def test_fisher_information_of_the_loss():
    task, arrays = Generation(), {"input_ids": batch()["input_ids"], "label": batch()["labels"]}
    run = lambda params, batch: UNTIED.apply({"params": params}, **task.loss_inputs(batch))
    new = stats.fisher(lambda params, batch: task.losses(run(params, batch), batch), base(UNTIED), [arrays], chunk=BATCH)
    logits = lambda params, batch: UNTIED.apply({"params": params}, batch["input_ids"])
    old = stats.fisher(lambda params, batch: task.losses(logits(params, batch), batch), base(UNTIED), [arrays], chunk=BATCH)
    chex.assert_trees_all_close(new.values, old.values, rtol=1e-4, atol=1e-5)


# --- on meshes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("name", ["lora-body", "lora-embedding", "full"])
def test_a_mesh_has_the_loss_of_one_device(name, mesh_name):
    """With the tied embedding frozen, adapted and trained."""
    model, mesh, rules = TIED, mesh_of(mesh_name), partition_rules(TIED)
    peft = None if name == "full" else jpeft.apply(base(model), method=METHODS[name], key=jax.random.key(7))
    plain = model.apply if peft is None else jpeft.wrap(model.apply, peft.method)
    trained, variables_of = base(model), lambda trained: {"params": trained}
    if peft is not None:
        peft = peft.replace(adapter=noised(peft.adapter))
        trained, variables_of = peft.adapter, lambda trained: peft.replace(adapter=trained).variables
    want = jax.jit(jax.value_and_grad(lambda trained: both(plain)[1](variables_of(trained))))(trained)

    there = sharding.shard(base(model) if peft is None else peft, mesh, rules)
    inputs = sharding.shard_batch(jax.tree.map(np.asarray, batch()), mesh)
    weights = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 5 / 50
    forward = sharding.by_example(plain, mesh)

    def loss(trained, params, inputs):
        variables = {"params": trained} if peft is None else peft.replace(params=params, adapter=trained).variables
        return (weights * forward(variables, **inputs).loss).sum()

    arguments = (there, there) if peft is None else (there.adapter, there.params)
    got = jax.jit(jax.value_and_grad(loss))(*arguments, inputs)
    assert_close(got, want)


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_a_step_holds_no_logits_and_computes_them_once():
    """Temporary bytes at most a quarter of those with logits; FLOPs at most twice the forward pass.

    The chunks of so small a batch are written out, not a loop, so XLA counts each of them.
    """
    vocabulary = 65536
    sizes: dict[str, Any] = dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=1024)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))
    ids = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    peft = jax.eval_shape(lambda params: jpeft.apply(params, method=jpeft.lora(rank=8, target=".*_proj/kernel")), params)
    forward = jpeft.wrap(model.apply, peft.method)
    variables = lambda adapter, params: {"params": params, "lora": adapter}

    def new(adapter, params, ids):
        return forward(variables(adapter, params), ids, labels=ids).loss.mean()

    def old(adapter, params, ids):
        return optax.softmax_cross_entropy_with_integer_labels(forward(variables(adapter, params), ids), ids).mean()

    with optimised():
        step, forward_pass, today = (
            jax.jit(fn).lower(peft.adapter, params, ids).compile() for fn in (jax.value_and_grad(new), new, jax.value_and_grad(old))
        )
    assert "4,512,65536]" in today.as_text()
    assert "2048,65536]" in today.as_text()
    for program in (step, forward_pass):
        assert not any(f"{shape},{vocabulary}]" in program.as_text() for shape in ("4,512", "2048"))
    assert step.memory_analysis().temp_size_in_bytes <= 0.25 * today.memory_analysis().temp_size_in_bytes
    assert step.cost_analysis()["flops"] <= 1.01 * 2 * forward_pass.cost_analysis()["flops"]


# --- in the trainer ---------------------------------------------------------------------------------------------------


def test_generation_asks_the_model_for_its_loss():
    task = Generation()
    columns = {"input_ids": batch()["input_ids"], "attention_mask": batch()["attention_mask"], "label": batch()["labels"]}
    settings = TrainConfig(model="m", data="d", output="o", task="generation", label_smoothing=0.2)
    model, variables = UNTIED, {"params": base(UNTIED)}
    logits = model.apply(variables, columns["input_ids"], columns["attention_mask"])
    for given in (None, settings):
        outputs = model.apply(variables, **task.loss_inputs(columns, given))
        assert isinstance(outputs, TokenLoss)
        # Logits are still understood, of a model that takes no labels.
        np.testing.assert_allclose(task.losses(outputs, columns, given), task.losses(logits, columns, given), rtol=1e-5)
    outputs = model.apply(variables, **task.loss_inputs(columns))
    chex.assert_trees_all_close(task.scores(outputs, columns), task.scores(logits, columns), rtol=1e-5)


def test_an_evaluation_without_logits_finds_what_is_not_finite():
    model = UNTIED
    peft = jpeft.apply(base(model), method=jpeft.lora(rank=2))
    arrays = {"input_ids": np.asarray(batch()["input_ids"]), "label": np.asarray(batch()["labels"].at[1].set(3))}
    evaluator = Evaluator(jpeft.wrap(model.apply, peft.method), Generation(), 4)
    found = evaluator.metrics(peft, arrays)
    logits = model.apply({"params": base(model)}, arrays["input_ids"])
    want = from_logits(logits, jnp.asarray(arrays["label"]))
    tokens = (arrays["label"] != -100).sum()
    assert found["loss"] == pytest.approx(float(want.loss.sum() / tokens), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(float(want.correct.sum() / tokens))
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), peft.adapter)
    with pytest.raises(ValueError, match="outputs for row 1 and 7 others are not finite"):
        evaluator.metrics(dataclasses.replace(peft, adapter=broken), arrays)

"""Multitask prompt tuning: its equation, HF PEFT, the task of each example, sources, counts, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_twins import to_torch, twins
from nnx_models import linen, linen_params, nnx_model
from tables import base, batch, encoder, noised
from tiny_text import make_model, make_rows, write_csv

import jpeft
from jpeft.models import BertConfig, BertModel, abstract_params, generate
from jpeft.stats import Prompt, source_prompt

TASKS = (2, 0, 0, 1, 2)  # of the five examples of `batch()`
WTE = {"wte": {"embedding": jnp.ones((50, 8))}}


def made(params, **options):
    peft = jpeft.apply(params, method="multitask_prompt_tuning", length=3, head=None, **options)
    return peft.replace(adapter=noised(peft.adapter, scale=0.3))


def leaves_of(peft):
    """The method's own leaves by name."""
    return {path.rpartition("/")[2]: np.asarray(leaf) for path, leaf in jpeft.flatten(peft.adapter).items() if "/+/" in path}


def test_equation():
    """P_t = S ∘ (C_t R_t): each example reads the prompt of its task, and its gradient goes there alone."""
    model, x = encoder(), batch()["x"]
    peft = jpeft.assign(made(base("bert"), tasks=3, rank=2), TASKS)
    forward = jax.jit(jpeft.wrap(model.apply))
    own = leaves_of(peft)
    assert own["task"].tolist() == list(TASKS)
    assert {label for path, label in jpeft.flatten(peft.method.labels(peft.adapter)).items() if path.endswith("task")} == {"freeze"}
    prompts = own["shared"] * np.einsum("tlr,trd->tld", own["cols"], own["rows"])
    plain = jax.jit(jpeft.wrap(model.apply, jpeft.prompt_tuning(length=3, head=None)))
    want = [
        plain(jpeft.apply(peft.params, method="prompt_tuning", length=3, head=None, stats=Prompt(prompts[t])).variables, x[i : i + 1])[0]
        for i, t in enumerate(TASKS)
    ]
    chex.assert_trees_all_close(forward(peft, x), jnp.stack(want), atol=1e-5)
    # Without the examples of task 1, nothing of its own has a gradient.
    two = jpeft.assign(peft, [2, 0, 0, 0, 2])
    grads = jax.jit(jax.grad(lambda adapter: jnp.sin(forward(two.replace(adapter=adapter), x)).sum()))(two.adapter)
    for name, leaf in leaves_of(two.replace(adapter=grads)).items():
        if name in ("cols", "rows"):
            assert [bool(np.abs(part).max() > 0) for part in leaf] == [True, False, True]


def test_one_task_needs_no_index():
    peft = made(base("bert"))
    own = leaves_of(peft)
    rows = own["shared"] * (own["cols"][0] @ own["rows"][0])
    prompt = jpeft.apply(peft.params, method="prompt_tuning", length=3, head=None, stats=Prompt(rows))
    forward = jax.jit(jpeft.wrap(encoder().apply))
    chex.assert_trees_all_close(forward(peft, batch()["x"]), forward(prompt, batch()["x"]), atol=1e-5)
    with pytest.raises(ValueError, match="takes no index"):
        jpeft.assign(peft, [0])


def test_hosts_agree():
    """The same in NNX, whose scanned blocks see nothing of it."""
    model, x = nnx_model("core-scan"), batch()["x"]
    ours = jpeft.assign(made(model, tasks=3), TASKS)
    theirs = jpeft.Peft(linen_params("core-scan"), ours.adapter, ours.method)
    want = jax.jit(jpeft.wrap(linen("core-scan").apply))(theirs, x)
    chex.assert_trees_all_close(jax.jit(jpeft.wrap(model))(ours, x), want, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # HF PEFT calls transformers by names that those are to lose
def test_hf_peft():
    """The same logits of the text's tokens, with the task of each example; and generation by the prompt of each task, beams included."""
    hf = pytest.importorskip("peft")
    theirs, loaded = twins("gpt2", scan=False)
    config = hf.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=3, num_ranks=2)
    wrapped = hf.get_peft_model(theirs, config).eval()
    peft = jpeft.assign(made(loaded.params, tasks=3, rank=2), [2, 0])
    own, encoder = leaves_of(peft), wrapped.prompt_encoder["default"]
    encoder.embedding.weight.data = to_torch(own["shared"])
    encoder.prefix_task_cols.data, encoder.prefix_task_rows.data = to_torch(own["cols"]), to_torch(own["rows"])
    ids = np.array([[2, 4, 9, 2], [2, 5, 7, 3]])
    want = wrapped(input_ids=to_torch(ids).long(), task_ids=to_torch([2, 0]).long()).logits.detach().numpy()
    forward = jpeft.wrap(loaded.model.apply, peft.method)
    got = jax.jit(forward)(peft.variables, ids)
    np.testing.assert_allclose(got, want[:, 3:], atol=1e-5 * np.abs(want).max())
    both = generate(forward, peft.variables, ids, max_new_tokens=3, beams=2).tokens
    swapped = generate(forward, jpeft.assign(peft, [0, 2]).variables, ids[::-1], max_new_tokens=3, beams=2).tokens
    np.testing.assert_array_equal(both, swapped[::-1])


def test_counts():
    """``l d + T r (l + d)``; HF PEFT's numbers for a BERT-base with 20 rows."""
    params = abstract_params(BertModel(BertConfig.bert_base_cased()))
    for tasks, rank in ((1, 1), (6, 2)):
        method = jpeft.multitask_prompt_tuning(tasks=tasks, rank=rank)
        summary = jpeft.summary(jax.eval_shape(lambda p, m=method: jpeft.apply(p, method=m), params))
        assert summary.trained == summary.stored == 20 * 768 + tasks * rank * (20 + 768)


def test_begins_near_the_shared_prompt():
    """Of the factors the first is 1 plus noise, the others are noise."""
    own = leaves_of(jpeft.apply(WTE, method="multitask_prompt_tuning", length=40, tasks=2, rank=3, init="tokens", tokens=[3]))
    np.testing.assert_array_equal(own["shared"], np.ones((40, 8)))
    np.testing.assert_allclose(own["cols"].mean((0, 1)), [1, 0, 0], atol=0.02)
    np.testing.assert_allclose(own["rows"].mean((0, 2)), [1, 0, 0], atol=0.05)
    assert np.abs(own["cols"] - own["cols"].mean((0, 1))).std() < 0.03


def test_starts_from_a_source():
    """Another task begins from the mean of the tasks, from one of them, or from the shared prompt alone; as HF PEFT's three ways."""
    source = made(WTE, tasks=4)
    own = leaves_of(source)
    start = lambda stats, **options: leaves_of(jpeft.apply(WTE, method="multitask_prompt_tuning", length=3, stats=stats, **options))
    for stats, cols, rows in (
        (source_prompt(source), own["cols"].mean(0), own["rows"].mean(0)),
        (source.adapter, own["cols"].mean(0), own["rows"].mean(0)),
        (source_prompt(source, task=2), own["cols"][2], own["rows"][2]),
    ):
        for tasks in (1, 2):
            got = start(stats, tasks=tasks)
            np.testing.assert_array_equal(got["shared"], own["shared"])
            for i in range(tasks):
                np.testing.assert_allclose(got["cols"][i], cols, rtol=1e-6)
                np.testing.assert_allclose(got["rows"][i], rows, rtol=1e-6)
    got = start(Prompt(own["shared"]))
    np.testing.assert_array_equal(got["shared"], own["shared"])
    assert abs(got["cols"].mean() - 1) < 0.1
    # And a prompt of another method.
    other = jpeft.apply(WTE, method="prompt_tuning", length=3)
    np.testing.assert_array_equal(start(other.adapter)["shared"], leaves_of(other)["prompt"])


def test_saves_and_loads_with_and_without_an_index(tmp_path):
    peft = made(WTE, tasks=3)
    for name, given in (("plain", peft), ("assigned", jpeft.assign(peft, TASKS))):
        jpeft.save(tmp_path / name, given)
        loaded = jpeft.load(tmp_path / name, WTE)
        assert loaded.method == peft.method
        chex.assert_trees_all_equal(loaded.adapter, given.adapter)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: made(WTE, tasks=0), "tasks=0 must be a whole number of at least 1"),
        (lambda: made(WTE, init="tokens"), "multitask_prompt_tuning: init='tokens' needs tokens="),
        (lambda: made(WTE, tasks=2, stats=Prompt(jnp.ones((4, 8)))), r"rows of shape \(4, 8\) where \(3, 8\) is needed"),
        (lambda: made(WTE, rank=2, stats=source_prompt(made(WTE))), r"task_cols of shape \(3, 1\) where \(3, 2\) is needed"),
        (lambda: source_prompt(made(WTE, tasks=2), task=2), "no task 2: the prompt has the tasks 0 to 1"),
        (lambda: source_prompt(jpeft.apply(WTE, method="prompt_tuning")), "no prompt that tasks share"),
        (lambda: jpeft.assign(made(WTE, tasks=2), [0, 2]), "index of example 1 is 2. There are tasks 0 to 1"),
        (lambda: jpeft.merge(made(WTE)), "lengthens the text"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_trainer_has_one_task(tmp_path, fails):
    make_model(tmp_path / "model")
    write_csv(tmp_path / "data.csv", make_rows(30))
    sources = ("--model", tmp_path / "model", "--data", tmp_path / "data.csv", "--output", tmp_path / "run")
    line = fails("train", *sources, "--max-length", 8, "--method", "multitask_prompt_tuning", "tasks=2")
    assert "needs an index for each example, and the trainer gives none" in line
    assert not (tmp_path / "run").exists()


def test_errors_of_a_call():
    model, x = encoder(), batch()["x"]
    peft = made(base("bert"), tasks=3)
    forward = jpeft.wrap(model.apply)
    with pytest.raises(ValueError, match=r"needs an index for each example of the batch: peft = jpeft.assign"):
        forward(peft, x)
    with pytest.raises(ValueError, match="batch has 5 examples and the index 2"):
        forward(jpeft.assign(peft, [0, 1]), x)
    # An index that is known only inside of a program cannot be refused: its example answers NaN, never another task's answer.
    got = jax.jit(lambda index: forward(jpeft.assign(peft, index), x))(jnp.array([0, 3, 1, 1, 1]))
    assert np.isnan(got).any(1).tolist() == [False, True, False, False, False]

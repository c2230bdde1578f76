"""docs/skeletons/task.py as it stands, put into the table of tasks: it trains, evaluates, predicts and is opened again."""

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_text import make_model, make_rows, write_csv

import jpeft
from jpeft.data import Table
from jpeft.tasks.registry import TASKS
from jpeft.tasks.task import Decoding, find_task
from jpeft.training.config import TrainConfig
from jpeft.training.evaluate import Evaluator
from jpeft.training.run import load_run
from jpeft.training.train import train

SKELETON = Path(__file__).parents[1] / "docs" / "skeletons" / "task.py"
NAME = "multi-label-classification"


@pytest.fixture
def task(monkeypatch):
    """The skeleton as a file of the package, and its line in the table."""
    spec = importlib.util.spec_from_file_location("jpeft.tasks.skeleton", SKELETON)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "jpeft.tasks.skeleton", module)
    monkeypatch.setitem(TASKS, NAME, "jpeft.tasks.skeleton.MultiLabelClassification")
    return find_task(NAME)


def test_metrics_by_hand(task):
    scores, label = np.array([[2.0, -1.0], [1.0, 3.0]], np.float32), np.array([[1, 1], [0, 1]], np.float32)
    metrics = task.metrics(scores, {"label": label}, ("a", "b"))
    # Two of three predicted labels are right, of three.
    assert metrics["f1"] == pytest.approx(2 * 2 / (3 + 3))
    log = lambda z: np.log1p(np.exp(z))
    assert metrics["loss"] == pytest.approx((log(-2) + log(1) + log(1) + log(-3)) / 4, rel=1e-5)
    np.testing.assert_array_equal(task.counts({"label": jnp.asarray(label)}), [2, 2])


def test_a_run(task, tmp_path):
    make_model(tmp_path / "model", dropout=0.0)
    # A second label in every other row.
    rows = [(text, f"{label},odd" if i % 2 else label) for i, (text, label) in enumerate(make_rows(90))]
    rows = [(f"{text} two" if "odd" in label else text, label) for text, label in rows]
    write_csv(tmp_path / "data.csv", rows)
    config = TrainConfig(
        model=str(tmp_path / "model"), data=str(tmp_path / "data.csv"), output=str(tmp_path / "run"), task=NAME, max_length=10,
        steps=60, batch_size=16, learning_rate=2e-2, eval_every=60, keep_best=True, label_smoothing=0.05, progress="none",
    )  # fmt: skip
    result = train(config)
    assert result.validation["f1"] > 0.6
    run = load_run(result.path)
    assert run.labels == ("fruit", "metal", "odd", "water")
    arrays = run.task.encode(Table(["apple pear two here", "iron lead here"]), run.loaded.tokenizer, labels=None, max_length=10)
    evaluator = Evaluator(jpeft.wrap(run.loaded.model.apply, run.peft.method), run.task, 2, run.labels)
    answers = run.task.predictions(evaluator.answers(run.peft, arrays, Decoding()), run.labels, run.loaded.tokenizer)
    assert [set(answer["probabilities"]) for answer in answers] == [set(run.labels)] * 2


def test_columns_that_are_not_declared_are_refused(task):
    with pytest.raises(ValueError, match="encodes the column 'weight', which is neither in its inputs"):
        task.check_columns({"input_ids": np.zeros(1), "weight": np.zeros(1)})


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="There is no task 'tagging'; there are generation, sequence-classification"):
        find_task("tagging")

"""What a model is asked to do: how a table becomes arrays, logits become a loss, metrics and predictions.

A new task (token classification, generation) is one more `Task` in `TASKS`; trainer and command line never ask which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Float

from jpeft import data
from jpeft.metrics import accuracy, macro_f1

Arrays = dict[str, np.ndarray]

# Columns of a batch that are not inputs of the model.
TARGETS = frozenset({"label", "weight"})


@dataclasses.dataclass(frozen=True)
class Task:
    """The pure functions that tell one task from another."""

    # As `jpeft.models.load(task=...)` knows it.
    name: str
    # The validation metric that early stopping, keep_best and comparisons look at.
    metric: str
    # Training table -> label names in the order of the logits.
    labels: Callable[[data.Table], tuple[str, ...]]
    # (table, tokenizer, labels=, max_length=) -> arrays, one row an example; labels=None for unlabelled tables.
    encode: Callable[..., Arrays]
    # (logits, batch) -> loss of each example, [batch].
    losses: Callable[[Array, Mapping[str, Any]], Float[Array, " batch"]]
    # (logits, arrays) -> metrics over all rows.
    metrics: Callable[[np.ndarray, Arrays], dict[str, float]]
    # (logits, labels) -> one JSON-ready prediction per row.
    predictions: Callable[[np.ndarray, Sequence[str]], list[dict[str, Any]]]
    # Whether more of the metric is better: True for accuracy, False for perplexity.
    higher_is_better: bool = True

    def better(self, value: float, than: float) -> bool:
        """Whether one value of the metric is really better than another."""
        return value > than if self.higher_is_better else value < than


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a batch that the model takes (everything but labels and weights)."""
    return {name: column for name, column in batch.items() if name not in TARGETS}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: listing the tasks, if there is none.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(sorted(TASKS))}")
    return TASKS[name]


def _class_losses(logits: Array, batch: Mapping[str, Any]) -> Float[Array, " batch"]:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype("float32"), batch["label"])


def _class_metrics(logits: np.ndarray, arrays: Arrays) -> dict[str, float]:
    expected = arrays["label"]
    predicted = logits.argmax(-1).astype(expected.dtype)
    loss = float(np.mean(np.asarray(_class_losses(jax.numpy.asarray(logits), arrays))))
    return {"loss": loss, "accuracy": accuracy(predicted, expected), "macro_f1": macro_f1(predicted, expected)}


def _class_predictions(logits: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    probabilities = np.asarray(jax.nn.softmax(logits.astype("float32"), axis=-1))
    return [{"label": labels[int(row.argmax())], "probabilities": dict(zip(labels, map(float, row)))} for row in probabilities]


SEQUENCE_CLASSIFICATION = Task(
    name="sequence-classification",
    metric="accuracy",
    labels=data.label_names,
    encode=data.encode,
    losses=_class_losses,
    metrics=_class_metrics,
    predictions=_class_predictions,
)

TASKS = {task.name: task for task in (SEQUENCE_CLASSIFICATION,)}

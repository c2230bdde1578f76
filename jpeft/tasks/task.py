"""What a model is asked to do: how a table becomes arrays, logits become a loss, metrics and predictions.

A task is one more `Task` in `TASKS`; trainer and command line never ask which.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from jpeft import data
from jpeft.models import generate
from jpeft.tasks import generation, tagging, token_loss
from jpeft.tasks.metrics import accuracy, macro_f1

Arrays = dict[str, np.ndarray]

# Columns of a batch that are not inputs of the model.
TARGETS = frozenset({"label", "weight", "complete", "first"})


class Decoding(NamedTuple):
    """How text is generated."""

    # Longest continuation.
    max_new_tokens: int = 64
    # The ids that end a text, and the one that fills up after it.
    stop: tuple[int, ...] = ()
    pad: int = 0
    # None for the most likely token each time, else tokens are drawn; see `jpeft.models.generate`.
    key: jax.Array | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """The pure functions that tell one task from another."""

    name: str
    # What `jpeft.models.load(task=...)` calls the models for it.
    model: str
    # The columns of data that it reads besides the text.
    columns: tuple[str, ...]
    # The validation metric that early stopping and keep_best watch, and which way is better.
    metric: str
    higher_is_better: bool
    # Training table -> label names in the order of the logits; none for a task without classes.
    labels: Callable[[data.Table], tuple[str, ...]]
    # (table, tokenizer, labels=, max_length=) -> arrays; labels=None for tables to be predicted, where rows are those of the table.
    encode: Callable[..., Arrays]
    # (logits, batch) -> loss of each row, summed over what is predicted in it.
    losses: Callable[[Array, Mapping[str, Any]], Float[Array, " batch"]]
    # batch -> how many predictions that is. The loss of a batch is the sum of the losses over the sum of these.
    counts: Callable[[Mapping[str, Any]], Float[Array, " batch"]]
    # (logits, batch) -> what the metrics need of each row, as arrays [batch, ...]; computed where the logits are.
    scores: Callable[[Array, Mapping[str, Any]], PyTree]
    # (scores, arrays, labels) -> metrics over all rows.
    metrics: Callable[[Any, Arrays, Sequence[str]], dict[str, float]]
    # (forward, variables, batch, decoding) -> answers for each row, as arrays [batch, ...].
    answer: Callable[[Callable[..., Any], Mapping[str, Any], Mapping[str, Any], Decoding], PyTree]
    # (answers, labels, tokenizer) -> one JSON-ready prediction per row.
    predictions: Callable[[Any, Sequence[str], Any], list[dict[str, Any]]]
    # Whether answers are generated text, so that `Decoding` has a meaning.
    generates: bool = False

    def better(self, value: float, than: float) -> bool:
        """Whether one value of the watched metric is better than another."""
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


# --- classification ---------------------------------------------------------------------------------------------------


def _class_losses(logits: Array, batch: Mapping[str, Any]) -> Float[Array, " batch"]:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype("float32"), batch["label"])


def _class_metrics(logits: np.ndarray, arrays: Arrays, labels: Sequence[str]) -> dict[str, float]:
    del labels
    expected = arrays["label"]
    predicted = logits.argmax(-1).astype(expected.dtype)
    loss = float(np.mean(np.asarray(_class_losses(jnp.asarray(logits), arrays))))
    return {"loss": loss, "accuracy": accuracy(predicted, expected), "macro_f1": macro_f1(predicted, expected)}


@functools.partial(jax.jit, static_argnames="forward")
def _logits(forward: Callable[..., Any], variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> Array:
    return forward(variables, **inputs, deterministic=True).astype("float32")


def _class_predictions(logits: np.ndarray, labels: Sequence[str], tokenizer: Any) -> list[dict[str, Any]]:
    del tokenizer
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
    return [{"label": labels[int(row.argmax())], "probabilities": dict(zip(labels, map(float, row)))} for row in probabilities]


SEQUENCE_CLASSIFICATION = Task(
    name="sequence-classification",
    model="sequence-classification",
    columns=("pair", "label"),
    metric="accuracy",
    higher_is_better=True,
    labels=data.label_names,
    encode=data.encode,
    losses=_class_losses,
    counts=lambda batch: jnp.ones(batch["label"].shape),
    scores=lambda logits, batch: logits.astype("float32"),
    metrics=_class_metrics,
    answer=lambda forward, variables, batch, decoding: _logits(forward, variables, model_inputs(batch)),
    predictions=_class_predictions,
)


# --- token classification ---------------------------------------------------------------------------------------------


def _tags(forward: Callable[..., Any], variables: Mapping[str, Any], batch: Mapping[str, Any], decoding: Decoding) -> dict[str, Array]:
    del decoding
    return {"predicted": _logits(forward, variables, model_inputs(batch)).argmax(-1), "first": batch["first"]}


def _tag_predictions(answers: Mapping[str, np.ndarray], labels: Sequence[str], tokenizer: Any) -> list[dict[str, Any]]:
    del tokenizer
    return [{"tags": tags} for tags in tagging.tags_of(answers["predicted"], answers["first"], labels)]


TOKEN_CLASSIFICATION = Task(
    name="token-classification",
    model="token-classification",
    columns=("tags",),
    metric="f1",
    higher_is_better=True,
    labels=tagging.tag_names,
    encode=tagging.encode,
    losses=token_loss.losses,
    counts=token_loss.counts,
    scores=tagging.scores,
    metrics=tagging.metrics,
    answer=_tags,
    predictions=_tag_predictions,
)


# --- generation -------------------------------------------------------------------------------------------------------


def _continuations(
    forward: Callable[..., Any], variables: Mapping[str, Any], batch: Mapping[str, Any], decoding: Decoding
) -> dict[str, Array]:
    made = generate(forward, variables, batch["input_ids"], batch["attention_mask"], **decoding._asdict())
    return {"tokens": made.tokens, "lengths": made.lengths}


def _text_predictions(answers: Mapping[str, np.ndarray], labels: Sequence[str], tokenizer: Any) -> list[dict[str, Any]]:
    del labels
    return [{"generated": text} for text in generation.texts(answers["tokens"], answers["lengths"], tokenizer)]


GENERATION = Task(
    name="generation",
    model="causal-lm",
    columns=("target",),
    metric="perplexity",
    higher_is_better=False,
    labels=lambda table: (),
    encode=generation.encode,
    losses=token_loss.losses,
    counts=token_loss.counts,
    scores=generation.scores,
    metrics=lambda scores, arrays, labels: generation.metrics(scores, arrays),
    answer=_continuations,
    predictions=_text_predictions,
    generates=True,
)

TASKS = {task.name: task for task in (SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, GENERATION)}

"""One label for a text or a pair of texts."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jpeft import data
from jpeft.tasks.cross_entropy import cross_entropy
from jpeft.tasks.metrics import accuracy, macro_f1
from jpeft.tasks.task import Arrays, Batch, Decoding, Task
from jpeft.training.config import Settings


class SequenceClassification(Task):
    """One label for a text or a pair of texts."""

    name = "sequence-classification"
    model = "sequence-classification"
    columns = ("pair", "label")
    metric = "accuracy"

    def label_names(self, table: data.Table) -> tuple[str, ...]:
        """Return the classes of a training table; see `jpeft.data.label_names`."""
        return data.label_names(table)

    def encode(self, table: data.Table, tokenizer: Any, *, labels: Sequence[str] | None, max_length: int) -> Arrays:
        """Return token ids and label numbers; see `jpeft.data.encode`."""
        return data.encode(table, tokenizer, labels=labels, max_length=max_length)

    def losses(self, logits: Array, batch: Batch, settings: Settings | None = None) -> Float[Array, " batch"]:
        """Return the cross entropy of each row's label."""
        smoothing = 0.0 if settings is None else settings.label_smoothing
        return cross_entropy(logits, jnp.asarray(batch["label"]), smoothing)

    def counts(self, batch: Batch) -> Float[Array, " batch"]:
        """Return 1 for each row."""
        return jnp.ones(batch["label"].shape)

    def scores(self, logits: Array, batch: Batch) -> Array:
        """Return the logits, [batch, classes]."""
        del batch
        return logits.astype("float32")

    def metrics(self, scores: np.ndarray, arrays: Arrays, labels: Sequence[str]) -> dict[str, float]:
        """Return loss, accuracy and macro F1 of the logits of all rows, [rows, classes]."""
        del labels
        expected = arrays["label"]
        predicted = scores.argmax(-1).astype(expected.dtype)
        loss = float(np.mean(np.asarray(self.losses(jnp.asarray(scores), arrays))))
        return {"loss": loss, "accuracy": accuracy(predicted, expected), "macro_f1": macro_f1(predicted, expected)}

    def answer(self, forward: Callable[..., Any], variables: Mapping[str, Any], batch: Batch, decoding: Decoding) -> Array:
        """Return the logits of each row, [batch, classes]."""
        del decoding
        return classify(forward, variables, self.model_inputs(batch))

    def predictions(self, answers: np.ndarray, labels: Sequence[str], tokenizer: Any) -> list[dict[str, Any]]:
        """Return the most likely label of each row, and the probability of each label."""
        del tokenizer
        probabilities = np.asarray(jax.nn.softmax(answers, axis=-1))
        return [{"label": labels[int(row.argmax())], "probabilities": dict(zip(labels, map(float, row)))} for row in probabilities]


@functools.partial(jax.jit, static_argnames="forward")
def classify(forward: Callable[..., Any], variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> Array:
    """Return the logits of a model without dropout, in float32."""
    return forward(variables, **inputs, deterministic=True).astype("float32")

"""A task to copy: several labels for one text, "sports,politics" in the label column, by one sigmoid for each label.

Every method is documented in `jpeft.tasks.task.Task`. Change name, docstrings and bodies; delete this paragraph.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jpeft import data
from jpeft.tasks.sequence_classification import classify
from jpeft.tasks.task import Arrays, Batch, Decoding, Task
from jpeft.training.config import Settings


class MultiLabelClassification(Task):
    """Any number of labels for a text or a pair of texts."""

    # The name on the command line, and the kind of model: which head `jpeft.models.load` puts on it.
    name = "multi-label-classification"
    model = "sequence-classification"
    # Columns of the data besides the text. `Settings` has a flag for each.
    columns = ("pair", "label")
    # The metric that early stopping watches, one of those that `metrics` returns.
    metric = "f1"
    higher_is_better = True
    # `inputs` are the model's arguments, by default the token ids and masks of a text model. All other columns are `targets`.
    targets = ("label",)

    def label_names(self, table: data.Table) -> tuple[str, ...]:
        """Return all labels that occur in a training table, by name."""
        return tuple(sorted({name for row in table.label or () for name in row.split(",")}))

    def encode(self, table: data.Table, tokenizer: Any, *, labels: Sequence[str] | None, max_length: int) -> Arrays:
        """Return token ids and, with `labels`, 1 for each label of a row and 0 for all others, [rows, labels]."""
        arrays = data.encode(table, tokenizer, labels=None, max_length=max_length)
        if labels is not None:
            chosen = [set(row.split(",")) for row in table.label or ()]
            arrays["label"] = np.array([[name in names for name in labels] for names in chosen], np.float32)
        return arrays

    def losses(self, logits: Array, batch: Batch, settings: Settings | None = None) -> Float[Array, " batch"]:
        """Return the binary cross entropy, summed over the labels of each row."""
        # settings.label_smoothing, or a flag of your own, has its effect here: it is in `settings` in training and nowhere else.
        smoothing = 0.0 if settings is None else settings.label_smoothing
        target = (1 - smoothing) * jnp.asarray(batch["label"]) + smoothing / 2
        return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), target).sum(-1)

    def counts(self, batch: Batch) -> Float[Array, " batch"]:
        """Return the number of labels of each row: each is a prediction."""
        rows, labels = batch["label"].shape
        return jnp.full((rows,), float(labels))

    def scores(self, logits: Array, batch: Batch) -> Array:
        """Return the logits, [batch, labels]."""
        del batch
        return logits.astype(jnp.float32)

    def metrics(self, scores: np.ndarray, arrays: Arrays, labels: Sequence[str]) -> dict[str, float]:
        """Return the loss, and F1 over the labels of all rows together."""
        del labels
        expected, predicted = arrays["label"] > 0, scores > 0
        loss = float(np.asarray(self.losses(jnp.asarray(scores), arrays)).sum() / expected.size)
        total = predicted.sum() + expected.sum()
        return {"loss": loss, "f1": float(2 * (predicted & expected).sum() / total) if total else 1.0}

    def answer(self, forward: Callable[..., Any], variables: Mapping[str, Any], batch: Batch, decoding: Decoding) -> Array:
        """Return the logits, [batch, labels]."""
        del decoding
        return classify(forward, variables, self.model_inputs(batch))

    def predictions(self, answers: np.ndarray, labels: Sequence[str], tokenizer: Any) -> list[dict[str, Any]]:
        """Return the labels of each row, and the probability of every label."""
        del tokenizer
        probabilities = np.asarray(jax.nn.sigmoid(answers))
        return [
            {"labels": [name for name, p in zip(labels, row) if p > 0.5], "probabilities": dict(zip(labels, map(float, row)))}
            for row in probabilities
        ]

"""Evaluation of an adapted model over a whole table, in batches of few shapes: they are padded, and the padding is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, PyTree

from jpeft import data, distributed
from jpeft.core.peft import Peft
from jpeft.models.common.positions import PositionsError
from jpeft.tasks.task import Arrays, Batch, Decoding, Task
from jpeft.training import buckets
from jpeft.training.finite import check_metrics, check_outputs, finite_rows


class Evaluator:
    """Runs an adapted model over arrays without dropout.

    Args:
      forward: `jpeft.wrap(model.apply, peft.method)`.
      task: Defines metrics and answers.
      batch_size: Rows per compiled call.
      labels: Names of the classes, if there are any.
      put: Puts a batch onto the devices of the model.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        task: Task,
        batch_size: int,
        labels: Sequence[str] = (),
        *,
        put: Callable[[PyTree], PyTree] = lambda batch: batch,
    ):
        self._put = put
        self.task = task
        self.batch_size = batch_size
        self.labels = tuple(labels)
        self.forward = forward

        def scores(peft: Peft, batch: Batch) -> tuple[PyTree, jax.Array]:
            outputs = forward(peft.variables, **task.loss_inputs(batch), deterministic=True)
            return task.scores(outputs, batch), _finite(outputs)

        self._scores = jax.jit(scores)

    def metrics(self, peft: Peft, arrays: Arrays) -> dict[str, float]:
        """Return the task's metrics over all rows of `arrays`.

        Raises:
          ValueError: if the outputs of a row are not finite.
        """
        batches = data.eval_batches(arrays, self.batch_size)
        scores, finite = self._over(lambda batch, index: self._scores(peft, batch), batches)
        check_outputs(peft, finite)
        metrics = self.task.metrics(scores, arrays, self.labels)
        check_metrics(metrics)
        return metrics

    def answers(self, peft: Peft, arrays: Arrays, decoding: Decoding, *, longest: int | None = None) -> PyTree:
        """Return the task's answers to all rows of `arrays`, in order, from batches of few shapes (`jpeft.training.buckets`).

        Args:
          peft: Base and adapter.
          arrays: Columns of the task's `encode`, without labels.
          decoding: How text is generated.
          longest: The longest row that `encode` may make. Shorter ones are filled up, so that few lengths are compiled; None only cuts.

        Raises:
          ValueError: if the answer to a row holds numbers that are not finite.
        """

        def run(batch: dict[str, np.ndarray], index: int) -> PyTree:
            # Each batch draws with a key of its own.
            key = None if decoding.key is None else jax.random.fold_in(decoding.key, index)
            return self.task.answer(self.forward, peft.variables, batch, decoding._replace(key=key))

        fitted = buckets.fit_length(arrays, longest)
        try:
            answers = self._over(run, buckets.batches(fitted, self.batch_size))
        except PositionsError:
            # Only filled up, texts and what is generated may take more positions than the model has.
            if longest is None:
                raise
            answers = self._over(run, buckets.batches(arrays, self.batch_size))
        check_outputs(peft, finite_rows(answers))
        return answers

    def _over(self, run: Callable[[dict[str, np.ndarray], int], PyTree], batches: Iterable[dict[str, np.ndarray]]) -> PyTree:
        """Return the results of `run(batch, number of the batch)` for each row."""
        parts: list[PyTree] = []

        def take(outputs: PyTree, rows: np.ndarray) -> None:
            parts.append(jax.tree.map(lambda x: np.asarray(x)[rows], distributed.to_numpy(outputs)))

        waiting = None
        for index, batch in enumerate(batches):
            # JAX computes asynchronously: this batch is computed while the one before is fetched.
            started = run(self._put(batch), index), batch["weight"] > 0
            if waiting is not None:
                take(*waiting)
            waiting = started
        if waiting is not None:
            take(*waiting)
        return jax.tree.map(lambda *columns: np.concatenate(columns), *parts)


def _finite(outputs: PyTree) -> Bool[jax.Array, " rows"]:
    """Return for each row whether all of its outputs are finite. A loss of tokens says nothing of those that are not predicted."""
    floats = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all(range(1, leaf.ndim)) for leaf in floats]).all(0)

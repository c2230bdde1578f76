"""Logits of a whole split, in fixed shapes: one compilation, the last batch padded and its padding dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jpeft import data
from jpeft.peft import Peft
from jpeft.task import Arrays, Task, model_inputs


class Evaluator:
    """Runs an adapted model over arrays without dropout.

    Args:
        forward: `jpeft.wrap(model.apply, peft.method)`.
        task: Gives the metrics.
        batch_size: Rows per compiled call.
    """

    def __init__(self, forward: Callable[..., Any], task: Task, batch_size: int):
        self.task = task
        self.batch_size = batch_size
        self._forward = jax.jit(lambda peft, inputs: forward(peft.variables, **inputs, deterministic=True))

    def logits(self, peft: Peft, arrays: Arrays) -> np.ndarray:
        """Logits of every row of `arrays`, in order, float32."""
        chunks = []
        for batch in data.eval_batches(arrays, self.batch_size):
            logits = jax.device_get(self._forward(peft, model_inputs(batch)))
            chunks.append(np.asarray(logits, np.float32)[batch["weight"] > 0])
        return np.concatenate(chunks)

    def metrics(self, peft: Peft, arrays: Arrays) -> dict[str, float]:
        """The task's metrics over every row of `arrays`."""
        return self.task.metrics(self.logits(peft, arrays), arrays)

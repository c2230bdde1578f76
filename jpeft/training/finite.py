"""What is not finite, NaN or infinite, is an error: of outputs, of metrics, of the adapter that a run keeps."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool, PyTree

from jpeft.core.peft import Peft
from jpeft.tree.finite import not_finite
from jpeft.tree.paths import first_few


def check_adapter(peft: Peft, step: int, learning_rate: float) -> None:
    """Raise an error if the adapter of a run has numbers that are not finite.

    Raises:
      ValueError: naming the leaves.
    """
    if bad := not_finite(peft.adapter):
        raise ValueError(
            f"The adapter is not finite after step {step}, in {first_few(bad, 3)}: training diverged. Nothing of this step was saved. Try "
            f"a learning rate below {learning_rate:g}."
        )


def check_outputs(peft: Peft, finite: Bool[np.ndarray, " rows"]) -> None:
    """Raise an error if the outputs of a row are not finite.

    Args:
      peft: The model.
      finite: Whether the outputs of each row are.

    Raises:
      ValueError: naming the first such row, and where the numbers come from.
    """
    if finite.all():
        return
    bad = np.flatnonzero(~finite)
    several = f" and {len(bad) - 1} others" if len(bad) > 1 else ""
    raise ValueError(f"The model's outputs for row {bad[0] + 1}{several} are not finite numbers. {explain(peft)}")


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raise an error if a metric is not finite, though the outputs are.

    Raises:
      ValueError: naming the metric.
    """
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise ValueError(f"The metric {name} is {value}: the model's outputs are finite, but too large to compute it.")


def explain(peft: Peft) -> str:
    """Say where numbers that are not finite come from: the adapter, the base, or the computation."""
    if bad := not_finite(peft.adapter):
        return f"The adapter holds such numbers, in {first_few(bad, 3)}: its training diverged, or its files were changed."
    if bad := not_finite(peft.params):
        return f"The base model holds such numbers, in {first_few(bad, 3)}: its checkpoint is damaged."
    return "Adapter and base are finite, so the numbers grow too large on the way: compute in float32, or train at a lower rate."


def finite_rows(answers: PyTree) -> Bool[np.ndarray, " rows"]:
    """Return for each row whether all of its floating-point answers are finite."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(answers)]
    finite = np.ones(len(leaves[0]), bool)
    for leaf in leaves:
        if np.issubdtype(leaf.dtype, np.inexact):
            finite &= np.isfinite(leaf).reshape(len(leaf), -1).all(-1)
    return finite


def report_losses(losses: Sequence[float], step: int, learning_rate: float, peft: Peft) -> None:
    """Raise an error if the loss of a step is not finite.

    Args:
      losses: Losses of the newest steps.
      step: Number of the first of them, from 1.
      learning_rate: Peak learning rate.
      peft: The model as it was before the run.

    Raises:
      ValueError: naming the step.
    """
    if np.all(np.isfinite(losses)):
        return
    index = int(np.argmin(np.isfinite(losses)))
    # At the first step nothing has been trained yet.
    if step + index == 1 and not_finite(peft.params):
        raise ValueError(f"The loss is {losses[index]} at step 1. {explain(peft)}")
    raise ValueError(f"The loss is {losses[index]} at step {step + index}: training diverged. Try a learning rate below {learning_rate:g}.")

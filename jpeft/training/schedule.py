"""The schedule of the learning rate, and the optimizer that uses it."""

from __future__ import annotations

import optax

from jpeft.core.decay import decay_mask
from jpeft.deprecation import renamed_members

SHAPES = ("constant", "linear", "cosine")


def learning_rate_schedule(shape: str, peak: float, steps: int, warmup: float = 0.0) -> optax.Schedule:
    """Return a schedule: linear warmup over a share of all steps, then constant, linear to zero, or half a cosine to zero.

    With w = round(warmup · steps), step t < w uses peak·(t+1)/(w+1), so the first step already moves the parameters.

    Args:
      shape: One of `SHAPES`.
      peak: Largest learning rate.
      steps: Number of optimizer steps of the whole run.
      warmup: Share of the steps with a rising rate, between 0 and 1.

    Raises:
      ValueError: for another shape.

    >>> float(learning_rate_schedule("linear", 1.0, 10)(5))
    0.5
    """
    rising = round(warmup * steps)
    falling = max(steps - rising, 1)
    shapes = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, falling),
        "cosine": lambda: optax.cosine_decay_schedule(peak, falling),
    }
    if shape not in shapes:
        raise ValueError(f"There is no schedule {shape!r}; there are {', '.join(SHAPES)}.")
    if not rising:
        return shapes[shape]()
    return optax.join_schedules([optax.linear_schedule(peak / (rising + 1), peak, rising), shapes[shape]()], [rising])


def clipped_adamw(
    schedule: optax.Schedule, *, weight_decay: float = 0.0, decay_biases: bool = True, clip: float | None = None
) -> optax.GradientTransformation:
    """Return AdamW after clipping by the global norm; `jpeft.optimizer` confines it to the trained leaves.

    Args:
      schedule: Step -> learning rate.
      weight_decay: Decoupled weight decay.
      decay_biases: Whether weight decay acts on biases and normalisations, too; see `jpeft.decay_mask`.
      clip: Largest global norm of the gradient; None for no clipping.
    """
    adamw = optax.adamw(schedule, weight_decay=weight_decay, mask=None if decay_biases else decay_mask)
    return adamw if clip is None else optax.chain(optax.clip_by_global_norm(clip), adamw)


__getattr__ = renamed_members(__name__, optimizer="clipped_adamw")

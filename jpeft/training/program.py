"""The program of a step: its optimizer, and the compiled function with its cost. Shapes are enough to compile it."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import optax

import jpeft
from jpeft.core.lr_scale import scale_leaves
from jpeft.core.method import FREEZE
from jpeft.core.peft import Peft
from jpeft.hosts.check.reach import check_reach
from jpeft.tasks.task import Task
from jpeft.training.config import TrainConfig
from jpeft.training.cost import Cost, cost
from jpeft.training.schedule import clipped_adamw
from jpeft.training.step import make_step
from jpeft.tree.paths import flatten


def make_optimizer(
    config: TrainConfig, peft: Peft, schedule: optax.Schedule, initialised: Collection[str], head_lr_scale: float
) -> optax.GradientTransformation:
    """Return the optimizer of an adapter.

    Args:
      config: Weight decay and clipping.
      peft: Base, adapter and method, as arrays or as shapes.
      schedule: Number of updates -> learning rate.
      initialised: Paths of the parameters that the checkpoint lacks.
      head_lr_scale: Learning rate of these as a multiple of that of the others.
    """
    adamw = clipped_adamw(schedule, weight_decay=config.weight_decay, decay_biases=config.decay_biases, clip=config.clip)
    return scale_leaves(jpeft.optimizer(adamw, peft), peft.adapter, initialised, head_lr_scale)


def compile_step(
    forward: Callable[..., Any],
    tx: optax.GradientTransformation,
    task: Task,
    peft: Peft,
    config: TrainConfig,
    arguments: tuple[Any, ...],
    out_shardings: Any = None,
) -> tuple[Any, Cost]:
    """Return the compiled step and what it costs. It is compiled ahead for these shapes: another shape is an error, not a second program.

    Args:
      forward: As for `make_step`, like the three below.
      tx: The optimizer.
      task: The task.
      peft: Method and structure.
      config: Settings of the loss, micro-batches.
      arguments: Of the step, as arrays or as shapes.
      out_shardings: As for `jax.jit`.
    """
    step = make_step(forward, tx, task, peft, config.grad_accum, config)
    traced = jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings).trace(*arguments)
    trained = [path for path, label in flatten(peft.method.labels(peft.adapter)).items() if label != FREEZE]
    check_reach(traced.jaxpr, len(traced.jaxpr.jaxpr.outvars) - 1, peft.adapter, trained, peft.method.name)
    compiled = traced.lower().compile()
    return compiled, cost(compiled, traced.jaxpr)

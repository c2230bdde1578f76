"""One stage of training: its method, optimizer and compiled step, and the arrays that the step changes."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

import jpeft
from jpeft.core.peft import Peft
from jpeft.core.stages import Segment
from jpeft.training.cost import Cost, StageCost
from jpeft.training.evaluate import Evaluator
from jpeft.training.keys import keys
from jpeft.training.prepare import Setup
from jpeft.training.program import compile_step, make_optimizer
from jpeft.training.remat import Remat, choose_remat, memory_limit, with_remat
from jpeft.training.schedule import learning_rate_schedule
from jpeft.training.snapshot import Progress


@dataclasses.dataclass
class StageState:
    """All that differs between two stages of a run.

    Attributes:
      peft: Base and method; the adapter is the one that the stage began with.
      segment: The steps of the stage.
      schedule: Number of updates in this stage -> learning rate.
      forward: The model with the method in it.
      evaluator: Metrics of the model.
      step: The compiled training step.
      cost: What a step costs.
      compile_seconds: Time of compiling the step.
      remat: In one line, how activations are recomputed, and why.
      adapter: The adapter as it is now.
      opt_state: State of the optimizer.
      best_adapter: Adapter of the best evaluation; None if the last adapter is kept.
    """

    peft: Peft
    segment: Segment
    schedule: optax.Schedule
    forward: Callable[..., Any]
    evaluator: Evaluator
    step: Callable[..., Any]
    cost: Cost
    compile_seconds: float
    remat: str
    adapter: PyTree
    opt_state: PyTree
    best_adapter: PyTree | None

    @property
    def current(self) -> Peft:
        """The base with the adapter as it is now."""
        return self.peft.replace(adapter=self.adapter)

    @property
    def kept(self) -> Peft:
        """The base with the adapter that the run would keep if it ended now."""
        return self.current if self.best_adapter is None else self.peft.replace(adapter=self.best_adapter)

    def summary(self, end: int) -> StageCost:
        """Return what the stage did until step `end`, and what its step cost."""
        return StageCost(
            name=self.segment.name,
            begin=self.segment.begin,
            end=end,
            trained=jpeft.summary(self.current).trained,
            flops=self.cost.flops,
            temporary_bytes=self.cost.temporary_bytes,
        )

    def arrays(self) -> dict[str, PyTree]:
        """Return the arrays that a checkpoint holds."""
        best = {} if self.best_adapter is None else {"best_adapter": self.best_adapter}
        return {"adapter": self.adapter, "opt_state": self.opt_state, **best}

    def set_arrays(self, arrays: dict[str, PyTree]) -> None:
        """Replace the arrays by those of a checkpoint."""
        self.adapter, self.opt_state = arrays["adapter"], arrays["opt_state"]
        self.best_adapter = arrays.get("best_adapter")


def begin_stage(setup: Setup, peft: Peft, stage: int) -> StageState:
    """Set up a stage and compile its step.

    Args:
      setup: The run.
      peft: The base, the method of the stage, and the adapter to begin with.
      stage: Number of the stage, from 0.
    """
    config, devices, segment = setup.config, setup.devices, setup.segments[stage]
    peft = devices.put(peft)
    schedule = _schedule(setup, segment)
    tx = make_optimizer(config, peft, schedule, setup.new, setup.head_lr_scale)
    forward = devices.forward(jpeft.wrap(setup.loaded.model.apply, peft.method))
    # A copy, because the step overwrites its arguments, and the caller still needs its own adapter.
    adapter = jax.tree.map(jnp.copy, peft.adapter)
    opt_state = devices.state(tx, adapter)

    begun = time.perf_counter()
    arguments = (adapter, opt_state, peft.params, setup.batch(0), keys(config.seed).dropout, np.int32(0))
    placed, costs = devices.out_shardings(adapter, opt_state), {}

    def compile_with(remat: Remat) -> Any:
        model = with_remat(setup.loaded.model, remat)
        run = devices.forward(jpeft.wrap(model.apply, peft.method))
        compiled, costs[remat] = compile_step(run, tx, setup.task, peft, config, arguments, placed)
        return compiled

    chosen = choose_remat(config.remat, compile_with, memory_limit())
    return StageState(
        peft=peft,
        segment=segment,
        schedule=schedule,
        forward=forward,
        evaluator=Evaluator(forward, setup.task, config.batch_size, setup.labels, put=devices.batch),
        step=chosen.compiled,
        cost=costs[chosen.remat],
        compile_seconds=time.perf_counter() - begun,
        remat=chosen.line,
        adapter=adapter,
        opt_state=opt_state,
        best_adapter=jax.tree.map(jnp.copy, adapter) if setup.keeps_best else None,
    )


def begin_stage_of_checkpoint(setup: Setup, progress: Progress) -> StageState:
    """Set up the stage in which a checkpoint was taken; the checkpoint's arrays are still to be loaded into it."""
    peft = setup.peft
    if progress.stage:
        zeros = {path: jnp.zeros(shape, dtype) for path, (shape, dtype) in progress.leaves.items()}
        peft = Peft(peft.params, jpeft.unflatten(zeros), jpeft.make(progress.method))
    return begin_stage(setup, peft, progress.stage)


def _schedule(setup: Setup, segment: Segment) -> optax.Schedule:
    """Return the learning rate by the number of updates in the stage, which is what the optimizer counts."""
    begin, end = segment.schedule_span
    schedule = learning_rate_schedule(setup.config.schedule, setup.learning_rate, end - begin, setup.config.warmup)
    return lambda count: schedule(count + segment.begin - begin)

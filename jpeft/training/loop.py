"""The training loop: steps, log lines, evaluations, checkpoints and changes of stage."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import jpeft
from jpeft.checkpoint.fingerprint import leaf_table
from jpeft.distributed import gather_to_host, on_first_process, stop_signal
from jpeft.training.finite import check_adapter, report_losses
from jpeft.training.interrupt import InterruptedRun
from jpeft.training.keys import keys
from jpeft.training.plot import plot_run
from jpeft.training.prepare import Setup
from jpeft.training.progress import Reporter
from jpeft.training.run_folder import RunFolder
from jpeft.training.snapshot import Progress, Snapshots
from jpeft.training.stage import StageState, begin_stage


class Loop:
    """The state of a run between two steps.

    Attributes:
      state: The present stage with its arrays.
      progress: Where the run stands, besides the arrays.
      losses: Losses since the last log line. They stay on the device until then, so that steps need not wait for each other.
      compile_seconds: Time of compiling the steps of all stages in this process.

    Args:
      setup: The run.
      folder: Its files.
      snapshots: Its checkpoints.
      state: The stage to begin with.
      progress: Where the run stands.
      report: Shows progress.
    """

    def __init__(self, setup: Setup, folder: RunFolder, snapshots: Snapshots, state: StageState, progress: Progress, report: Reporter):
        self.setup, self.config, self.folder, self.snapshots, self.report = setup, setup.config, folder, snapshots, report
        self.state = state
        self.progress = progress
        self.losses: list[Any] = list(progress.losses)
        self.compile_seconds = state.compile_seconds
        self._key = keys(setup.config.seed).dropout
        self._eval_every = setup.config.eval_every or setup.steps_per_epoch
        # Time of the beginning of this process's part; time spent in earlier parts; compile time that was over before this part.
        self._begin, self._seconds_before, self._compiled_before = time.perf_counter(), progress.seconds, state.compile_seconds
        # Time and step since which the rate of the next log line is measured.
        self._rate_since = (time.perf_counter(), progress.step)

    @property
    def done(self) -> bool:
        """Whether all steps are done, or in the last stage evaluations have stopped improving."""
        patience, last = self.config.patience, self.progress.stage + 1 == len(self.setup.segments)
        return self.progress.step >= self.setup.steps or (last and patience is not None and self.progress.stale >= patience)

    def run(self, signals: list[int]) -> None:
        """Train to the end and save the last checkpoint.

        Args:
          signals: Signals that were caught since the beginning; a new one ends the run after the present step.

        Raises:
          InterruptedRun: once a checkpoint is written.
        """
        self._restart_rate()
        while not self.done:
            self.snapshots.check()
            if signum := stop_signal(signals):
                self._interrupt(signum)
            step = self._step()
            ends_stage = step == self.state.segment.end
            if ends_stage or step % self.config.log_every == 0:
                self._log()
            if ends_stage or step % self._eval_every == 0:
                self._evaluate()
            # Advance before the checkpoint, which then belongs to the new stage.
            if ends_stage and not self.done:
                self._advance()
            if ends_stage or self.done or step % self.config.checkpoint_every == 0:
                self._checkpoint()
        self.snapshots.wait()

    def seconds(self) -> float:
        """Return the time spent in the loop by all processes that had a part in the run, without compiling."""
        compiling = self.compile_seconds - self._compiled_before
        return self._seconds_before + time.perf_counter() - self._begin - compiling

    # --- one thing at a time ------------------------------------------------------------------------------------------

    def _batch(self, index: int) -> PyTree:
        return self.setup.batch(index)

    def _step(self) -> int:
        """Do one step and return the number of finished steps."""
        index, state = self.progress.step, self.state
        batch = self._batch(index)
        state.adapter, state.opt_state, loss = state.step(
            state.adapter, state.opt_state, state.peft.params, batch, self._key, np.int32(index)
        )
        self.losses.append(loss)
        self.progress = dataclasses.replace(self.progress, step=index + 1)
        return index + 1

    def _interrupt(self, signum: int) -> None:
        self._checkpoint()
        self.snapshots.wait()
        on_first_process(lambda: plot_run(self.folder, self.config, self.setup.task))
        raise InterruptedRun(signum, self.progress.step, self.folder.path)

    def _advance(self) -> None:
        """Begin the method's next stage, with another adapter, optimizer and step, and no best evaluation yet."""
        self._check_diverged()
        stage, index, step = self.state.peft.method.stages[0], self.progress.stage + 1, self.progress.step
        # The stage may choose on the host what it trains.
        peft = self.state.peft.replace(adapter=gather_to_host(self.state.adapter))
        stats = self.setup.statistics(stage.requires_stats, peft, self.state.forward)
        peft = jpeft.advance(peft, key=jax.random.fold_in(keys(self.config.seed).adapter, index), stats=stats)
        finished = (*self.progress.finished, self.state.summary(step)._asdict())
        self.state = begin_stage(self.setup, peft, index)
        self.compile_seconds += self.state.compile_seconds
        self.progress = dataclasses.replace(self.progress, stage=index, best=None, best_step=0, stale=0, finished=finished)
        trained, segment = jpeft.summary(peft).trained, self.state.segment
        self.folder.append({"step": step, "epoch": self._epoch(), "split": "stage", "stage": stage.name, "trained": trained})
        self.report.message(f"stage {stage.name!r}: steps {segment.begin + 1} to {segment.end}, {trained:,} parameters trained")
        self._restart_rate()

    def _log(self) -> None:
        step, losses = self.progress.step, self._fetch_losses()
        since, first = self._rate_since
        rate = (step - first) * self.config.batch_size / (time.perf_counter() - since)
        loss = float(np.mean(losses))
        # The learning rate of the last update.
        learning_rate = float(np.asarray(self.state.schedule(step - 1 - self.state.segment.begin)))
        record = {"step": step, "epoch": self._epoch(), "split": "train", "loss": loss}
        self.folder.append(record | {"learning_rate": learning_rate, "samples_per_second": float(f"{rate:.4g}")})
        self.losses = []
        metric, latest = self.setup.task.metric, self.progress.latest
        self.report.update(step, loss, "" if latest is None else f"validation {metric} {latest:.4f}", rate)
        self._restart_rate()

    def _evaluate(self) -> None:
        if "validation" not in self.setup.splits:
            return
        self._check_diverged()
        step, progress = self.progress.step, self.progress
        metrics = self.state.evaluator.metrics(self.state.current, self.setup.splits["validation"])
        self.folder.append({"step": step, "epoch": self._epoch(), "split": "validation", **metrics})
        value = metrics[self.setup.task.metric]
        if progress.best is None or self.setup.task.is_better(value, progress.best):
            self.progress = dataclasses.replace(progress, latest=value, best=value, best_step=step, stale=0)
            if self.setup.keeps_best:
                self.state.best_adapter = jax.tree.map(jnp.copy, self.state.adapter)
        else:
            self.progress = dataclasses.replace(progress, latest=value, stale=progress.stale + 1)
        self._restart_rate()

    def _checkpoint(self) -> None:
        self._check_diverged()
        state = self.state
        stage = {"method": state.peft.method.config(), "leaves": leaf_table(state.adapter)} if self.progress.stage else {}
        losses, seconds = tuple(self._fetch_losses()), self.seconds()
        self.progress = dataclasses.replace(self.progress, losses=losses, seconds=seconds, **stage)
        self.snapshots.save(state.arrays(), self.progress)
        self._restart_rate()

    def _fetch_losses(self) -> list[float]:
        """Return the losses since the last log line as numbers.

        Raises:
          ValueError: if one is not finite.
        """
        losses = [float(loss) for loss in self.losses]
        report_losses(losses, self.progress.step - len(losses) + 1, self.setup.learning_rate, self.setup.peft)
        self.losses = list(losses)
        return losses

    def _check_diverged(self) -> None:
        """Raise an error if a loss or the adapter is not finite. The losses alone do not show the last update."""
        self._fetch_losses()
        check_adapter(self.state.current, self.progress.step, self.setup.learning_rate)

    def _restart_rate(self) -> None:
        self._rate_since = (time.perf_counter(), self.progress.step)

    def _epoch(self) -> float:
        return round(self.progress.step / self.setup.steps_per_epoch, 4)

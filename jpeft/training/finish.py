"""The end of a run: last evaluations, the adapter on disk, the picture, the result."""

import warnings

import jax
import numpy as np

import jpeft
from jpeft.checkpoint.adapter import save_adapter
from jpeft.checkpoint.files import size_on_disk, write_json
from jpeft.distributed import on_first_process
from jpeft.training.cost import StageCost, largest
from jpeft.training.finite import check_adapter
from jpeft.training.loop import Loop
from jpeft.training.plot import plot_run
from jpeft.training.result import Result
from jpeft.training.run import save_merged
from jpeft.training.run_folder import RunFolder


def finish(loop: Loop, run: str) -> Result:
    """Evaluate and save the adapter that is kept, and write the result as the last file of the run.

    Args:
      loop: The training, which is over.
      run: Checksum of the run's configuration, which the adapter records.
    """
    setup, config, folder, state, progress = loop.setup, loop.config, loop.folder, loop.state, loop.progress
    seconds = loop.seconds()
    kept = state.kept
    check_adapter(kept, progress.step, setup.learning_rate)
    metrics = {name: state.evaluator.metrics(kept, setup.splits[name]) if name in setup.splits else {} for name in ("validation", "test")}
    stages = (*(StageCost(**stage) for stage in progress.finished), state.summary(progress.step))
    # Parts that only training needs, such as a prompt encoder, are kept in checkpoints but not in the saved adapter.
    kept = jpeft.fold(kept)
    save_adapter(folder.adapter, kept, overwrite=True, run=run)
    summary = jpeft.summary(kept)
    result = Result(
        **metrics,
        best=progress.best,
        best_step=progress.best_step,
        steps=progress.step,
        trained=largest(stages, "trained"),
        seconds=round(seconds, 3),
        compile_seconds=round(loop.compile_seconds, 3),
        path=folder.path,
        peft=kept,
        stored=summary.stored,
        changed=summary.changed,
        adapter_bytes=on_first_process(lambda: size_on_disk(folder.adapter)),
        step_seconds=on_first_process(lambda: _step_seconds(folder, config.batch_size)),
        flops=largest(stages, "flops"),
        temporary_bytes=largest(stages, "temporary_bytes"),
        stages=[stage._asdict() for stage in stages],
        device=jax.devices()[0].device_kind,
    )
    if config.export:
        save_merged(folder.merged, setup.loaded, kept)

    def write() -> None:
        try:
            plot_run(folder, config, setup.task)
        except (OSError, ValueError) as error:
            warnings.warn(f"{folder.curve} could not be drawn ({error})", stacklevel=2)
        write_json(folder.result, result.to_json())

    on_first_process(write)
    return result


def _step_seconds(folder: RunFolder, batch_size: int) -> float | None:
    rates = [record["samples_per_second"] for record in folder.records() if record["split"] == "train"]
    return float(batch_size / np.median(rates)) if rates else None

"""Training: the base frozen, one compiled step, and a run on disk that survives being killed.

A run is prepared (`prepare.py`), trained in stages (`stage.py`, `step.py`, `loop.py`) and finished (`finish.py`). A method may train in
stages (`jpeft.Stage`): between two of them it changes what is trained, and optimizer and step are built again. A checkpoint records the
method of its stage, so that a run can be continued in any of them.

Several processes (`jpeft.distributed`) train on one mesh of all their devices. Each runs all of this and reads its own rows of a batch; the
first of them writes the files of the run.
"""

import json
import warnings
from typing import Any

import jpeft
from jpeft.checkpoint.adapter import WrongBaseError
from jpeft.checkpoint.plain_paths import check_path
from jpeft.distributed import check_equal, is_first, on_first_process
from jpeft.models.checkpoints.notes import say, unsaid
from jpeft.training.base_files import changed_files
from jpeft.training.config import TrainConfig, check_values, from_json, resolved, to_json
from jpeft.training.finish import finish
from jpeft.training.interrupt import InterruptedRun, deferred_signals
from jpeft.training.loop import Loop
from jpeft.training.opening import opening
from jpeft.training.prepare import Setup, prepare
from jpeft.training.progress import Reporter, reporter
from jpeft.training.result import Result, read_result
from jpeft.training.run import load_run, save_merged
from jpeft.training.run_data import check_run_data
from jpeft.training.run_folder import RunFolder, config_checksum
from jpeft.training.run_lock import RunLock
from jpeft.training.snapshot import Progress, Snapshots
from jpeft.training.stage import StageState, begin_stage, begin_stage_of_checkpoint


def train(config: TrainConfig, *, report: Reporter | None = None) -> Result:
    """Train as configured, or continue a run, in the folder `config.output`.

    Args:
      config: The configuration.
      report: Shows progress; by default what `config.progress` names, in the first of several processes.

    Raises:
      ValueError: for bad input, before anything is written; with several processes also if they were started with different input.
      InterruptedRun: after Ctrl-C or SIGTERM, once a checkpoint is written.

    >>> result = train(TrainConfig(model="all-MiniLM-L6-v2", data="builtin", output="run"))  # doctest: +SKIP
    >>> result.test["accuracy"]                                                               # doctest: +SKIP
    """
    check_values(config)
    config = resolved(config)
    check_equal({"version of jpeft": jpeft.__version__, "configuration": to_json(config)})
    folder, lock = RunFolder(config.output), RunLock(config.output)
    if config.resume:
        recorded = on_first_process(lambda: to_json(folder.as_recorded(config)))
        config = from_json(recorded)
    on_first_process(lambda: _check_folder(folder, config))
    with unsaid():  # it was said when the run was trained
        finished = _read_finished(config, folder)
    if finished is not None:
        return finished
    try:
        # For the run's life. It also shows that the folder can be written, before the model is loaded.
        on_first_process(lambda: _lock(folder, lock, config))
        return _train(config, folder, lock, report or reporter(config.progress if is_first() else "none"))
    finally:
        lock.release()


def _check_folder(folder: RunFolder, config: TrainConfig) -> None:
    """Check that the run may be written to its folder, and remove what a killed process left there."""
    check_path(folder.path)
    try:
        folder.tidy()
        folder.check(config)
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"The output folder {folder.path} cannot be written: {error.strerror or error}.") from error


def _lock(folder: RunFolder, lock: RunLock, config: TrainConfig) -> None:
    """Lock the folder, and check it again: another process may have used it in between."""
    lock.acquire()
    folder.check(config)
    folder.check_places()


def _train(config: TrainConfig, folder: RunFolder, lock: RunLock, report: Reporter) -> Result:
    """Prepare the run, whose folder is locked, and train it."""
    recorded = on_first_process(lambda: folder.read_config().get("method") if config.resume and folder.in_use else None)
    setup = prepare(config, recorded)
    about = setup.to_json()
    check_equal({name: about.get(name) for name in ("method", "labels", "base", "base_files", "data", "adapter")})
    if config.resume:
        on_first_process(lambda: _check_same(folder, setup, about))
    return _run(setup, about, folder, lock, report)


def _read_finished(config: TrainConfig, folder: RunFolder) -> Result | None:
    """Return the result of a finished run that is to be continued, and export its model if that is asked for only now.

    None if it is not finished, or its result or adapter is damaged, which is said, and there are checkpoints to make them from.
    """
    if not config.resume or not on_first_process(lambda: folder.in_use and folder.finished):
        return None
    try:
        result = read_result(folder, model=config.model)
    except WrongBaseError:
        raise
    except ValueError as error:
        if not on_first_process(lambda: any(folder.checkpoints.glob("*/checksums.json"))):
            raise
        warnings.warn(f"{error} The run is continued from its checkpoints, which makes the adapter again", stacklevel=2)
        return None
    if on_first_process(lambda: "data" in folder.moved(config)):
        check_run_data(load_run(folder.path, model=config.model, data=config.data))
    if config.export and not on_first_process(folder.merged.exists):
        lock = RunLock(folder.path)
        on_first_process(lock.acquire)
        try:
            save_merged(folder.merged, load_run(folder.path, model=config.model).loaded, result.peft)
        finally:
            lock.release()
    return result


def _check_same(folder: RunFolder, setup: Setup, about: dict[str, Any]) -> None:
    """Raise an error if data, base or defaults, which the configuration only names, are not those that the run began with."""
    if not folder.in_use:
        return
    before, now = folder.read_config(), json.loads(json.dumps(about))
    # Earlier versions wrote the head's scale under another name.
    before.setdefault("head_lr_scale", before.get("head_rate"))
    # Compilers draw a new head alike but for its last bits, and checkpoints hold it where it is trained. Earlier versions recorded only a
    # fingerprint of both together.
    if "pretrained" in before and setup.replaces_initialised:
        before["base"], now["base"] = before["pretrained"], now["pretrained"]
    names = ("labels", "learning_rate", "head_lr_scale", "steps", "base", "data", "adapter")
    changed = [name for name in names if before.get(name) != now.get(name)]
    # Runs of earlier versions do not record the files beside the weights.
    changed += changed_files(before.get("base_files"), now["base_files"])
    if changed:
        places = f"its model is {now['run']['model']}, its data {now['run']['data']}"
        raise ValueError(f"Cannot resume {folder.path}: since it began, its {', '.join(changed)} changed; {places}.")


def _run(setup: Setup, about: dict[str, Any], folder: RunFolder, lock: RunLock, report: Reporter) -> Result:
    """Train from the beginning or from the newest checkpoint, and finish the run."""
    config = setup.config
    snapshots = None
    if config.resume and on_first_process(lambda: folder.in_use):
        snapshots = Snapshots(folder.checkpoints, config.keep)
        state, progress = _restore(setup, snapshots)
        if progress.step:
            report.message(f"continuing {folder.path} after step {progress.step}")
    else:
        # Compile before writing anything, so that an error here leaves no run folder.
        state, progress = begin_stage(setup, setup.peft, 0), Progress()
    with deferred_signals() as signals:
        if snapshots is None:
            on_first_process(lambda: folder.begin(about, lock, overwrite=config.overwrite))
            snapshots = Snapshots(folder.checkpoints, config.keep)
        run = on_first_process(lambda: config_checksum(folder.read_config()))
        on_first_process(lambda: folder.rewind(progress.step, logged=progress.step - len(progress.losses)))
        loop = Loop(setup, folder, snapshots, state, progress, report)
        report.message(opening(setup, state.remat))
        if setup.new or not setup.loaded.initialised:  # else the adapter that training begins with holds what the checkpoint lacks
            say(setup.loaded.note)
        report.start(setup.steps, progress.step)
        try:
            loop.run(signals)
        finally:
            report.stop()
            snapshots.close()
        # All steps are saved, so a signal from here on waits for the last evaluation and the result.
        result = finish(loop, run)
    if signals:
        raise InterruptedRun(signals[0], loop.progress.step, folder.path)
    return result


def _restore(setup: Setup, snapshots: Snapshots) -> tuple[StageState, Progress]:
    """Return the stage and progress of the newest readable checkpoint; of the beginning if there is none."""
    progress = snapshots.newest()
    state = begin_stage_of_checkpoint(setup, progress or Progress())
    if progress is not None:
        state.set_arrays(snapshots.load(progress.step, state.arrays()))
    return state, progress or Progress()

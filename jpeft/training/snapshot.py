"""Checkpoints of a training run: everything that changes from step to step, on disk with Orbax.

Data order and dropout are functions of the seed and the step, so a snapshot is the adapter, the optimizer state and a few numbers. The
base is never written. The last file of a snapshot lists the checksums of all others: a snapshot that was cut short, lost or changed is
recognised before Orbax opens it, named in a warning, and the snapshot before it is used.

Training waits until the arrays are copied to the host, and not for the disk: Orbax writes in the background. When a snapshot is on disk,
its checksums are written, and only then older snapshots are deleted, all in the background. The next snapshot waits for that.

Each of several processes writes the parts that its devices hold, and reads those that they are to hold, so the number of processes may
change. All processes call every method here together, on a folder that all of them see.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jpeft.checkpoint.files import write_json
from jpeft.checkpoint.fingerprint import damaged_files, file_checksums
from jpeft.distributed import check_done, is_first, on_first_process

CHECKSUMS = "checksums.json"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, besides its arrays.

    Attributes:
      step: Finished optimizer steps.
      best: Best validation metric of the present stage; None before the first evaluation.
      best_step: Step of the best evaluation.
      stale: Evaluations since then.
      latest: Validation metric of the newest evaluation, shown while training.
      losses: Losses of the steps since the last line in metrics.jsonl.
      seconds: Wall time of the loop with its evaluations, of all processes that had a part in the run.
      stage: Number of the stage of training, from 0.
      method: Configuration of the method, in stages after the first.
      leaves: Shape and dtype of each leaf of the adapter, in stages after the first.
      finished: What each stage before the present one did and what its step cost; see `StageCost`.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    latest: float | None = None
    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    stage: int = 0
    method: dict[str, Any] = dataclasses.field(default_factory=dict)
    leaves: dict[str, Any] = dataclasses.field(default_factory=dict)
    finished: tuple[dict[str, Any], ...] = ()


class Snapshots:
    """The snapshots in one folder, the newest `keep` of them.

    Args:
      folder: Created if it does not exist. Half-written snapshots in it, left by a killed process, are removed.
      keep: Number of snapshots to keep.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int):
        self.folder = os.path.abspath(folder)
        self._keep = keep
        # Not Orbax's `CheckpointManager`. It asks JAX's preemption service, also from its background thread, with other numbers than
        # `distributed.stop_signal`; and it deletes the old snapshot before the new one has its checksums.
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        # Steps of the snapshots, the same in all processes. The last one may not be written to the end.
        self._steps: list[int] = on_first_process(self._find)

    def save(self, arrays: PyTree, progress: Progress) -> None:
        """Begin to write a snapshot, once the one before is written; do nothing if there is one of that step.

        The arrays may be donated or overwritten as soon as this returns.

        Raises:
          OSError: if the snapshot before could not be written, see `wait`.
        """
        self.wait()
        step = progress.step
        if step in self._steps:
            return
        if jax.process_count() == 1:
            arrays = jax.device_get(arrays)
        about = dataclasses.asdict(progress) | {"losses": list(progress.losses), "finished": list(progress.finished)}
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(about))
        # Orbax copies the arrays before it returns.
        self._checkpointer.save(self._folder(step), args=items)
        self._steps.append(step)
        self._writing = self._background.submit(self._seal, step, self._steps[: -self._keep])

    def check(self) -> None:
        """Raise the error that `wait` would raise, if it is known by now. Calling this at every step costs nothing.

        Several processes must learn of an error together, so with them only `wait` and `save` raise it.
        """
        if jax.process_count() == 1 and self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the saved snapshot is whole on disk and older ones are deleted.

        Raises:
          OSError: in all processes, if one of them could not write its part, or the first one could not write the checksums.
        """
        if self._writing is None:
            return
        failure = None
        try:
            self._writing.result()
        except Exception as error:  # any error of a file system
            failure = error
        self._writing = None
        newest = self._steps[-1]
        try:
            check_done(failure)
        except Exception as error:
            self._steps.pop()
            cause = f"{type(error).__name__}: {str(error)[:300]}"
            raise OSError(f"The checkpoint {self._folder(newest)} could not be written; earlier ones are as they were. {cause}") from error
        self._steps = self._steps[-self._keep :]

    def newest(self) -> Progress | None:
        """Return where the run stood at the newest readable snapshot; None if there is none.

        Unreadable ones are named in a warning and removed, so that the continued run can write them again.
        """
        self.wait()
        for step in reversed(self._steps.copy()):
            folder = self._folder(step)
            # The checksums alone show damage, before Orbax opens anything: when one of its reads fails, its other reads continue in the
            # background.
            damage = on_first_process(lambda folder=folder: _damage(folder))
            if not damage:
                return self.progress(step)
            warnings.warn(f"checkpoint {folder} is damaged and is left out: {damage}", stacklevel=2)
            on_first_process(lambda folder=folder: shutil.rmtree(folder))
            self._steps.remove(step)
        return None

    def load(self, step: int, like: PyTree) -> PyTree:
        """Return the arrays of a whole snapshot.

        Args:
          step: Its step, from `newest`.
          like: Arrays of the same structure, shapes and types, on the devices where the snapshot's arrays are to be.

        Raises:
          ValueError: if its arrays are of another structure or shape. The snapshot is left as it is.
        """
        folder = self._folder(step)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
        try:
            return self._checkpointer.restore(folder, args=items)["arrays"]
        except Exception as error:  # another version's optimizer state, too little memory: deleting the snapshot would not help
            raise ValueError(
                f"The checkpoint {folder} is whole, but cannot be continued here; it was left as it is. "
                f"Orbax says: {type(error).__name__}: {str(error)[:300]}."
            ) from error

    def restore(self, like: Callable[[Progress], PyTree]) -> tuple[PyTree, Progress] | None:
        """Return the arrays and the progress of the newest readable snapshot; None if there is none.

        Args:
          like: `like(progress)` is what `load` calls `like`.
        """
        progress = self.newest()
        return None if progress is None else (self.load(progress.step, like(progress)), progress)

    def close(self) -> None:
        """Finish writing and release the folder. A process may do this alone, after another error.

        Raises:
          Exception: the error that kept the last snapshot from being written, if nothing has raised it yet.
        """
        try:
            if self._writing is not None:
                self._writing.result()
        finally:
            self._checkpointer.close()
            self._background.shutdown()

    def progress(self, step: int) -> Progress:
        """Return where the run stood at a snapshot, which must be whole."""
        read = self._checkpointer.restore(self._folder(step), args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
        return Progress(**read | {"losses": tuple(read["losses"]), "finished": tuple(read.get("finished", ()))})

    def _find(self) -> list[int]:
        """Remove half-written snapshots, and return the steps of all others in order."""
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(partial)
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())

    def _seal(self, step: int, old: list[int]) -> None:
        """In the background: when all files are there, write their checksums, and then delete old snapshots."""
        self._checkpointer.wait_until_finished()
        if is_first():
            folder = self._folder(step)
            write_json(folder / CHECKSUMS, file_checksums(folder, skip=CHECKSUMS))
            for old_step in old:
                shutil.rmtree(self._folder(old_step))

    def _folder(self, step: int) -> Path:
        return Path(self.folder, str(step))


def _damage(folder: Path) -> str:
    """Return what is wrong with a snapshot's files; an empty string if nothing is."""
    try:
        written = json.loads((folder / CHECKSUMS).read_text())
    except FileNotFoundError:
        return "it was not written to the end"
    except ValueError:
        return f"{CHECKSUMS} has changed"
    changed = damaged_files(folder, written, skip=CHECKSUMS)
    return f"{changed[0]} has changed ({len(changed)} such files)" if changed else ""

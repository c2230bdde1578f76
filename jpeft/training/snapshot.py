"""Checkpoints of a training run: everything that changes from step to step, on disk with Orbax.

Data order and dropout are functions of the seed and the step, so a snapshot is the adapter, the optimizer state and a
few numbers. The base is never written. A snapshot's last file lists the checksums of all others: one that was cut
short, lost or changed is recognised before Orbax opens it, named in a warning, and the snapshot before it is used.

Training waits until the arrays are copied to the host, and not for the disk: Orbax writes in the background. When all of it is there, the
checksums are written, and only then older snapshots are deleted, all in the background. One snapshot at a time: the next one waits.

Of several processes each writes the parts that its devices hold, and reads those that they are to hold: their number may change from
one to the next. All call everything here, on a folder that they all see.
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

from jpeft import distributed
from jpeft.checkpoint.files import write_json
from jpeft.checkpoint.fingerprint import damaged_files, file_checksums

CHECKSUMS = "checksums.json"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, besides its arrays."""

    # Finished optimizer steps.
    step: int = 0
    # Best validation metric so far, the step it was reached at, and the evaluations since.
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    # Validation metrics of the newest evaluation, shown while training.
    latest: float | None = None
    # Losses of the steps since the last line in metrics.jsonl.
    losses: tuple[float, ...] = ()
    # Wall time of the loop with its evaluations, of all processes that had a part in the run.
    seconds: float = 0.0
    # The stage of training, from 0. Beyond the first: the method's configuration, and shape and dtype of each leaf of its adapter.
    stage: int = 0
    method: dict[str, Any] = dataclasses.field(default_factory=dict)
    leaves: dict[str, Any] = dataclasses.field(default_factory=dict)


class Snapshots:
    """The snapshots in one folder, the newest `keep` of them.

    Args:
        folder: Made if it is not there. What a killed process left half-written in it is removed.
        keep: How many are kept.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int):
        self.folder = os.path.abspath(folder)
        self._keep = keep
        # Not Orbax's `CheckpointManager`. It asks JAX's preemption service, also from its background thread, with numbers that are not
        # those of `distributed.stop_signal`; and it deletes the old before the new has its checksums.
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        # The same in all processes; the last one may still be being written.
        self._steps: list[int] = distributed.from_first(self._find)

    def save(self, arrays: PyTree, progress: Progress) -> None:
        """Begins to write one snapshot, once the one before is written; does nothing if that step is there already.

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
        about = dataclasses.asdict(progress) | {"losses": list(progress.losses)}
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(about))
        # Orbax copies the arrays before it returns.
        self._checkpointer.save(self._folder(step), args=items)
        self._steps.append(step)
        self._writing = self._background.submit(self._seal, step, self._steps[: -self._keep])

    def check(self) -> None:
        """Raises what `wait` would, if it is known by now; to be called at every step, which costs nothing.

        Several processes must learn of it together, and so only from `wait` and `save`.
        """
        if jax.process_count() == 1 and self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Returns when all that was saved is whole on disk, and what is no longer kept is deleted.

        Raises:
            OSError: in all processes, if one of them could not write its part, or the first one not the checksums.
        """
        if self._writing is None:
            return
        failure = None
        try:
            self._writing.result()
        except Exception as error:  # whatever a file system may say
            failure = error
        self._writing = None
        newest = self._steps[-1]
        try:
            distributed.check_done(failure)
        except Exception as error:
            self._steps.pop()
            said = f"{type(error).__name__}: {str(error)[:300]}"
            raise OSError(f"checkpoint {self._folder(newest)} could not be written; those before it are as they were. {said}") from error
        self._steps = self._steps[-self._keep :]

    def restore(self, like: Callable[[Progress], PyTree]) -> tuple[PyTree, Progress] | None:
        """The newest readable snapshot, in the structure and on the devices of `like(progress)`; None if there is none.

        Unreadable ones are named in a warning and removed, so that the continued run can write them again.
        """
        self.wait()
        for step in reversed(self._steps.copy()):
            folder = self._folder(step)
            # The checksums alone tell what is damaged, before Orbax opens anything: its other reads go on in the background when one fails.
            damage = distributed.from_first(lambda folder=folder: _damage(folder))
            if damage:
                warnings.warn(f"checkpoint {folder} is damaged and is left out: {damage}", stacklevel=2)
                distributed.from_first(lambda folder=folder: shutil.rmtree(folder))
                self._steps.remove(step)
                continue
            progress = self.progress(step)
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like(progress))
            items = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
            try:
                return self._checkpointer.restore(folder, args=items)["arrays"], progress
            except Exception as error:  # another version's optimizer state, too little memory: nothing that deleting would mend
                raise ValueError(
                    f"checkpoint {folder} is whole, but cannot be continued here; it was left as it is. "
                    f"Orbax says: {type(error).__name__}: {str(error)[:300]}"
                ) from error
        return None

    def close(self) -> None:
        """Lets go of the folder, once what this process writes is written. A process may do this alone, when something else has failed.

        Raises:
            Exception: what kept the last snapshot from being written, if nothing has raised it yet.
        """
        try:
            if self._writing is not None:
                self._writing.result()
        finally:
            self._checkpointer.close()
            self._background.shutdown()

    def progress(self, step: int) -> Progress:
        """Where the run stood at one snapshot, which must be whole."""
        read = self._checkpointer.restore(self._folder(step), args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
        return Progress(**read | {"losses": tuple(read["losses"])})

    def _find(self) -> list[int]:
        """The steps of the snapshots, in order, once what is no snapshot is removed."""
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(partial)
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())

    def _seal(self, step: int, old: list[int]) -> None:
        """In the background: once all files are there, writes their checksums, and then deletes the old snapshots."""
        self._checkpointer.wait_until_finished()
        if distributed.is_first():
            folder = self._folder(step)
            write_json(folder / CHECKSUMS, file_checksums(folder, skip=CHECKSUMS))
            for each in old:
                shutil.rmtree(self._folder(each))

    def _folder(self, step: int) -> Path:
        return Path(self.folder, str(step))


def _damage(folder: Path) -> str:
    """What is wrong with a snapshot's files; empty if nothing is."""
    try:
        written = json.loads((folder / CHECKSUMS).read_text())
    except FileNotFoundError:
        return "it was not written to the end"
    except ValueError:
        return f"{CHECKSUMS} is not as it was written"
    changed = damaged_files(folder, written, skip=CHECKSUMS)
    return f"{changed[0]} is not as it was written ({len(changed)} such files)" if changed else ""

"""Checkpoints of a training run: everything that changes from step to step, on disk with Orbax.

Data order and dropout are functions of the seed and the step, so a snapshot is the adapter, the optimizer state and a few numbers. The
base is never written. The last file of a snapshot lists the checksums of all others: a snapshot that was cut short, lost or changed is
recognised before Orbax opens it, named in a warning, and the snapshot before it is used. If it is the list itself that is damaged, the
snapshot is used only where no other one is whole.

Training waits until the arrays are copied to the host, and not for the disk: Orbax writes in the background. When a snapshot is on disk,
its checksums are written, and only then older snapshots are deleted, all in the background. The next snapshot waits for that.

Each of several processes writes the parts that its devices hold, and reads those that they are to hold, so the number of processes may
change. All processes call every method here together, on a folder that all of them see.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jpeft.checkpoint.arrays import check_arrays, indexed
from jpeft.checkpoint.background import QuietOrbax, in_short
from jpeft.checkpoint.files import read_file, write_json
from jpeft.checkpoint.fingerprint import damaged_files, file_checksums
from jpeft.checkpoint.plain_paths import PlainPath
from jpeft.checkpoint.records import checksum
from jpeft.checkpoint.temporary import delete
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
        self._plain = PlainPath(self.folder)
        self._quiet = QuietOrbax()
        self._failed = False

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
        self._checkpointer.save(self._plain.path / str(step), args=items)
        self._steps.append(step)
        count = len(jax.tree.leaves(arrays))
        self._writing = self._background.submit(self._seal, step, count, self._steps[: -self._keep])

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
            self._failed = True
            self._steps.pop()
            cause = self._plain.own_words(in_short(error))
            raise OSError(f"The checkpoint {self._folder(newest)} could not be written; earlier ones are as they were. {cause}") from error
        self._steps = self._steps[-self._keep :]

    def newest(self) -> Progress | None:
        """Return where the run stood at the newest readable snapshot; None if there is none.

        Unreadable ones are named in a warning and removed, so that the continued run can write them again. One whose checksums cannot be
        read is used if no other one is whole.
        """
        self.wait()
        damage: dict[int, _Damage] = {}
        for step in reversed(self._steps):
            damage[step] = _Damage(*on_first_process(lambda step=step: _damage(self._folder(step))))
            if not damage[step].text:
                break
        whole = [step for step, found in damage.items() if not found.text]
        unchecked = [step for step, found in damage.items() if found.of_checksums]
        chosen = next(iter([*whole, *unchecked]), None)
        for step, found in damage.items():
            if step == chosen:
                if found.text:
                    warnings.warn(f"{found.text}; no other checkpoint is whole, so this one is used unchecked", stacklevel=2)
            elif chosen is None or step > chosen or found.text:
                warnings.warn(f"checkpoint {self._folder(step)} is damaged and is left out: {found.text}", stacklevel=2)
                on_first_process(lambda step=step: delete(self._folder(step)))
                self._steps.remove(step)
        self._drop_old()
        return None if chosen is None else self.progress(chosen)

    def _drop_old(self) -> None:
        """Delete snapshots that are too many, which a kill may have left; perhaps in part."""
        for step in self._steps[: -self._keep]:
            on_first_process(lambda step=step: delete(self._folder(step)))
        self._steps = self._steps[-self._keep :]

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
            with indexed(self._plain.path / str(step)) as whole:
                on_first_process(lambda: check_arrays(whole / "arrays", len(jax.tree.leaves(like))))
                return self._checkpointer.restore(whole, args=items)["arrays"]
        except Exception as error:  # another version's optimizer state, too little memory: deleting the snapshot would not help
            raise ValueError(
                f"The checkpoint {folder} is whole, but cannot be continued here; it was left as it is. "
                f"Orbax says: {self._plain.own_words(in_short(error))}."
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
            self._plain.close()
            self._quiet.close(failed=self._failed)

    def progress(self, step: int) -> Progress:
        """Return where the run stood at a snapshot, which must be whole."""
        items = ocp.args.Composite(progress=ocp.args.JsonRestore())
        try:
            read = self._checkpointer.restore(self._plain.path / str(step), args=items)["progress"]
            return Progress(**read | {"losses": tuple(read["losses"]), "finished": tuple(read.get("finished", ()))})
        except Exception as error:
            raise ValueError(
                f"The checkpoint {self._folder(step)} is whole, but its progress cannot be read here; it was left as it is. "
                f"{self._plain.own_words(in_short(error))}."
            ) from error

    def _find(self) -> list[int]:
        """Remove half-written snapshots, and return the steps of all others in order.

        Raises:
          ValueError: if the folder is a link: nothing is written through one.
        """
        folder = Path(self.folder)
        if folder.is_symlink():
            raise ValueError(f"{folder} is a link to {os.path.realpath(folder)}: put the folder itself in its place, or remove the link.")
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            delete(partial)
        for path in folder.iterdir():
            if path.name.isdecimal() and (path.is_symlink() or not path.is_dir()):
                warnings.warn(f"{path} is not the folder of a checkpoint and is removed", stacklevel=2)
                delete(path)
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())

    def _seal(self, step: int, count: int, old: list[int]) -> None:
        """In the background: when all files are there, write their checksums, and then delete old snapshots."""
        self._checkpointer.wait_until_finished()
        if is_first():
            check_arrays(self._plain.path / str(step) / "arrays", count)
            folder = self._folder(step)
            written = file_checksums(folder, skip=CHECKSUMS)
            write_json(folder / CHECKSUMS, {"files": written, "checksum": checksum(written)})
            for old_step in old:
                delete(self._folder(old_step))

    def _folder(self, step: int) -> Path:
        return Path(self.folder, str(step))


class _Damage(NamedTuple):
    """What is wrong with a snapshot's files.

    Attributes:
      text: In words; empty if nothing is.
      of_checksums: Whether it is their list that is damaged, so that nothing is known of the others.
    """

    text: str
    of_checksums: bool = False


def _damage(folder: Path) -> _Damage:
    """Compare the files of a snapshot with the list of their checksums."""
    file = folder / CHECKSUMS
    try:
        written = _read_checksums(file)
    except FileNotFoundError:
        return _Damage("it was not written to the end")
    except (OSError, ValueError, RecursionError) as error:
        return _Damage(f"{file} is damaged ({error})", of_checksums=True)
    try:
        changed = damaged_files(folder, written, skip=CHECKSUMS)
    except OSError as error:
        return _Damage(f"{error.filename} cannot be read ({error.strerror})")
    return _Damage(f"{folder / changed[0]} has changed ({len(changed)} such files)" if changed else "")


def _read_checksums(file: Path) -> Mapping[str, int]:
    """Return the checksums of files by their names.

    Raises:
      ValueError: if the list is not as it was written.
    """
    content = json.loads(read_file(file).decode())
    if not isinstance(content, dict):
        raise ValueError("It holds no list of files.")
    # Earlier versions wrote the list alone.
    files = content.get("files", content)
    if not isinstance(files, dict) or ("checksum" in content and content["checksum"] != checksum(files)):
        raise ValueError("It is not as it was written.")
    return files

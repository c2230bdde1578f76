"""Checkpoints of a training run: everything that changes from step to step, on disk with Orbax.

Data order and dropout are functions of the seed and the step, so a snapshot is the adapter, the optimizer state and a
few numbers. The base is never written. A snapshot's last file lists the checksums of all others: one that was cut
short, lost or changed is recognised before Orbax opens it, named in a warning, and the snapshot before it is used.

Of several processes each writes the parts that its devices hold, and reads those that they are to hold: their number may change from
one to the next. All call everything here, on a folder that they all see.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jpeft import distributed
from jpeft.checkpoint.fingerprint import damaged_files, file_checksums
from jpeft.files import write_json

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
    # The stage of training, from 0. Beyond the first: the method's configuration, and shape and dtype of each leaf of its adapter.
    stage: int = 0
    method: dict[str, Any] = dataclasses.field(default_factory=dict)
    leaves: dict[str, Any] = dataclasses.field(default_factory=dict)


class Snapshots:
    """The snapshots in one folder, the newest `keep` of them.

    Args:
        folder: Created with the first snapshot.
        keep: How many are kept.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int):
        self.folder = os.path.abspath(folder)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                # An adapter is small: writing in line costs milliseconds, and what was reported as saved is saved.
                enable_async_checkpointing=False,
                # What a killed process left half-written.
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, arrays: PyTree, progress: Progress) -> None:
        """Writes one snapshot, atomically; does nothing if that step is there already."""
        if progress.step in self._manager.all_steps():
            return
        if jax.process_count() == 1:
            arrays = jax.device_get(arrays)
        about = dataclasses.asdict(progress) | {"losses": list(progress.losses)}
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(about))
        self._manager.save(progress.step, args=items)
        self._manager.wait_until_finished()
        folder = self._folder(progress.step)
        distributed.from_first(lambda: write_json(folder / CHECKSUMS, file_checksums(folder, skip=CHECKSUMS)))

    def restore(self, like: Callable[[Progress], PyTree]) -> tuple[PyTree, Progress] | None:
        """The newest readable snapshot, in the structure and on the devices of `like(progress)`; None if there is none.

        Unreadable ones are named in a warning and removed, so that the continued run can write them again.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                progress = self.progress(step)
            except Exception as error:  # Orbax and TensorStore raise many types for a damaged file.
                self._leave_out(step, error)
                continue
            # Not within a try: what goes wrong here is no fault of the snapshot's.
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like(progress))
            try:
                items = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
                return self._manager.restore(step, args=items)["arrays"], progress
            except Exception as error:
                self._leave_out(step, error)
        return None

    def _leave_out(self, step: int, error: Exception) -> None:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        warnings.warn(f"checkpoint {self._folder(step)} is damaged and is left out: {reason}", stacklevel=3)
        self._manager.delete(step)

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()

    def progress(self, step: int) -> Progress:
        """Where the run stood at one snapshot.

        Raises:
            ValueError: if the snapshot is incomplete or damaged.
        """
        distributed.from_first(lambda: _check(self._folder(step)))
        read = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
        return Progress(**read | {"losses": tuple(read["losses"])})

    def _folder(self, step: int) -> Path:
        return Path(self.folder, str(step))


def _check(folder: Path) -> None:
    """Raises a ValueError if a snapshot is incomplete or damaged."""
    if not (folder / CHECKSUMS).exists():
        raise ValueError("it was not written to the end")
    # Found here rather than by Orbax, whose other reads go on in the background when one fails.
    if changed := damaged_files(folder, json.loads((folder / CHECKSUMS).read_text()), skip=CHECKSUMS):
        raise ValueError(f"{changed[0]} is not as it was written ({len(changed)} such files)")

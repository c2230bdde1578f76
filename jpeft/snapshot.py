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
        self._keep = keep
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                # Not Orbax's own `max_to_keep`, which deletes the old before the new has its checksums: between the two a kill would leave
                # nothing.
                max_to_keep=None,
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
        for old in sorted(self._manager.all_steps())[: -self._keep]:
            self._manager.delete(old)

    def restore(self, like: Callable[[Progress], PyTree]) -> tuple[PyTree, Progress] | None:
        """The newest readable snapshot, in the structure and on the devices of `like(progress)`; None if there is none.

        Unreadable ones are named in a warning and removed, so that the continued run can write them again.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            # The checksums alone tell what is damaged, before Orbax opens anything: its other reads go on in the background when one fails.
            damage = distributed.from_first(lambda step=step: _damage(self._folder(step)))
            if damage:
                warnings.warn(f"checkpoint {self._folder(step)} is damaged and is left out: {damage}", stacklevel=2)
                self._manager.delete(step)
                continue
            progress = self.progress(step)
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like(progress))
            items = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
            try:
                return self._manager.restore(step, args=items)["arrays"], progress
            except Exception as error:  # another version's optimizer state, too little memory: nothing that deleting would mend
                raise ValueError(
                    f"checkpoint {self._folder(step)} is whole, but cannot be continued here; it was left as it is. "
                    f"Orbax says: {type(error).__name__}: {str(error)[:300]}"
                ) from error
        return None

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()

    def progress(self, step: int) -> Progress:
        """Where the run stood at one snapshot, which must be whole."""
        read = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
        return Progress(**read | {"losses": tuple(read["losses"])})

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

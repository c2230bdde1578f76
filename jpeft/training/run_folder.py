"""The files of a run.

RUN/config.json        the configuration, labels, method: all that eval, predict and merge need
RUN/metrics.jsonl      one line per log or evaluation
RUN/curve.png          loss and validation metric over steps
RUN/checkpoints/STEP/  adapter, optimizer state, progress; the newest few
RUN/adapter/           the trained adapter, as `jpeft.save` writes it
RUN/merged/            with `export`: a Hugging Face folder
RUN/result.json        written last: the run is finished if it exists
RUN/lock               names the process that trains the run, while it does
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft import distributed
from jpeft.checkpoint.files import read_file, replace_folder, write_atomically, write_json
from jpeft.checkpoint.records import check_record, checksum, sealed
from jpeft.checkpoint.temporary import LEFTOVER, Temporary, delete, remove_leftovers
from jpeft.deprecation import renamed_fields
from jpeft.training.config import TrainConfig, changed_fields, from_json, pinned, to_json
from jpeft.training.overwrite import check_overwrite
from jpeft.training.places import PLACES
from jpeft.training.run_lock import LOCK, RunLock
from jpeft.training.setting import unrecorded


@renamed_fields(about="read_config")
class RunFolder:
    """The files of one run; nothing is created before `begin`."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.curve = self.path / "curve.png"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"
        self.result = self.path / "result.json"

    @property
    def in_use(self) -> bool:
        """Whether the folder holds anything but a lock and dot files, which a killed process may leave."""
        if not os.path.lexists(self.path):
            return False
        return not self.path.is_dir() or any(p.name[0] != "." and p.name != LOCK for p in self.path.iterdir())

    def read_config(self) -> dict[str, Any]:
        """Return the contents of config.json.

        Raises:
          ValueError: if the folder holds no run, or its configuration was changed since it was written.
        """
        try:
            about = json.loads(read_file(self.config).decode())
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{self.path} is not the folder of a training run: it has no config.json.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.config} cannot be read: {error}.") from None
        if not isinstance(about, dict) or not isinstance(about.get("run"), dict):
            raise ValueError(f"{self.config} is not the configuration of a training run; was a model's folder given?")
        check_record(about, self.config, config_checksum)
        if wrong := _wrong_field(about):
            raise ValueError(f"{self.config} is damaged: its {wrong!r} is {str(about.get(wrong))[:60]!r}.")
        return about

    def read_result(self) -> dict[str, Any] | None:
        """Return the contents of result.json; None if there is no such file.

        Raises:
          ValueError: if it is damaged.
        """
        try:
            values = json.loads(read_file(self.result).decode())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.result} cannot be read: {error}.") from None
        numbers = ("steps", "trained", "seconds", "compile_seconds", "best_step")
        splits = [values.get(name) for name in ("validation", "test")] if isinstance(values, dict) else [None]
        if not all(isinstance(split, dict) and all(map(_is_number, split.values())) for split in splits):
            raise ValueError(f"{self.result} is damaged: it has no metrics of the splits.")
        if missing := [name for name in numbers if not _is_number(values.get(name))]:
            raise ValueError(f"{self.result} is damaged: it has no number for {missing[0]!r}.")
        return values

    @property
    def finished(self) -> bool:
        """Whether the run is finished; a damaged result is named in a warning, and then it is not."""
        try:
            return self.read_result() is not None
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
            return False

    def lock(self) -> RunLock:
        """Return the lock of the folder, for `acquire`."""
        return RunLock(self.path)

    def tidy(self) -> None:
        """Remove what a killed process left behind, in the folder and beside it, unless another process trains the run."""
        remove_leftovers(self.path)
        if not self.path.is_dir() or not any(_is_leftover(path) for path in self.path.iterdir()):
            return
        lock = self.lock()
        try:
            lock.acquire()
        except ValueError:  # in use, or on a disk that is read-only
            return
        self.tidy_locked()
        lock.release()

    def tidy_locked(self) -> None:
        """Remove what a killed process left behind in the folder, whose lock this process holds."""
        for name in (self.adapter, self.merged):
            remove_leftovers(name)
        for path in self.path.iterdir():
            if path.name != LOCK and _is_leftover(path):
                delete(path)

    def as_recorded(self, config: TrainConfig) -> TrainConfig:
        """Return the configuration with settings that the run was begun without, because they are newer, as the run behaved."""
        if not self.in_use:
            return config
        record = self.read_config()["run"]
        known = dataclasses.replace(config, **{name: value for name, value in unrecorded(TrainConfig).items() if name not in record})
        # An adapter to train on brings its method. It may be elsewhere now: its fingerprint is recorded, too.
        if record.get("adapter") is not None:
            known = dataclasses.replace(known, method=record["method"], adapter=known.adapter or record["adapter"])
        return pinned(known, record)

    def check(self, config: TrainConfig) -> None:
        """Raise an error if the folder is in use, or holds a run of another configuration than the one to be continued.

        Raises:
          ValueError: saying which, and what to do.
        """
        if not self.in_use:
            return
        if config.resume:
            # `from_json` gives fields that are newer than the run the values that it behaved by.
            record = self.read_config()["run"]
            changed = changed_fields(to_json(pinned(from_json(record), record)), to_json(self.as_recorded(config)))
            # Base and data may be elsewhere now: their fingerprints tell whether they are the same.
            changed = {name: values for name, values in changed.items() if name not in PLACES}
            if changed:
                fields = ", ".join(f"{name} ({old!r} before, {new!r} now)" for name, (old, new) in changed.items())
                raise ValueError(f"Cannot resume {self.path} with another configuration: {fields}.")
        elif not config.overwrite:
            raise ValueError(
                f"The output folder {self.path} is in use: choose another, continue its run with --resume, or delete it with --overwrite."
            )
        else:
            # Only a run may be deleted; a mistyped path must not cost someone a home directory.
            check_overwrite(self.path, {"model": config.model, "data": config.data})

    def moved(self, config: TrainConfig) -> list[str]:
        """Return which of base and data the run recorded at another place than the configuration names."""
        recorded = from_json(self.read_config()["run"])
        return [name for name in PLACES if getattr(recorded, name) != getattr(config, name)]

    def check_places(self) -> None:
        """Check that nothing is in the way where the run will write.

        Raises:
          ValueError: naming it. Nothing is written through a link.
        """
        for path in (self.metrics, self.checkpoints):
            if path.is_symlink():
                raise ValueError(f"{path} is a link to {os.path.realpath(path)}: put the original in its place, or remove the link.")
        for path in (self.config, self.metrics, self.curve, self.result):
            if path.is_dir() and not path.is_symlink():
                raise ValueError(f"{path} is a folder and not a file of the run: remove it.")
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise ValueError(f"{self.checkpoints} is not a folder: remove it.")

    def begin(self, about: dict[str, Any], lock: RunLock, *, overwrite: bool) -> None:
        """Write config.json; if `overwrite`, into a new folder that takes the place of the old one, which is then deleted.

        Args:
          about: Contents of config.json.
          lock: The lock of the folder, which is held.
          overwrite: Whether the folder may hold a run.
        """
        if not (overwrite and self.in_use):
            write_json(self.config, sealed(about, config_checksum))
            return
        temporary = Temporary(self.path)
        try:
            new = temporary.make_folder()
            write_json(new / self.config.name, sealed(about, config_checksum))
            lock.move_to(new)
            replace_folder(new, self.path)
        finally:
            temporary.remove()

    def append(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl, in the first process. The line is in the file, not in a buffer, on return."""
        if not distributed.is_first():
            return
        # Never through a link that somebody has put there.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with open(self.metrics, "a", encoding="utf-8", opener=lambda path, _: os.open(path, flags, 0o666)) as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, without a last line that a kill cut short. Other damaged lines are left out with a warning."""
        try:
            lines = read_file(self.metrics).split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            warnings.warn(f"{self.metrics} cannot be read ({error.strerror}); the curve is drawn without it", stacklevel=2)
            return []
        *whole, last = [_read_line(line) for line in lines]
        if damaged := [number for number, record in enumerate(whole, 1) if record is None]:
            warnings.warn(f"{self.metrics} is damaged: line {damaged[0]} is left out ({len(damaged)} such lines)", stacklevel=2)
        return [record for record in (*whole, last) if record is not None]

    def rewind(self, step: int, *, logged: int = 0) -> None:
        """Remove the lines of metrics.jsonl after `step`, which the continued run writes again.

        Args:
          step: The step of the checkpoint.
          logged: The last step of which the file should have a line of training; 0 for none. Its lack is said in a warning.
        """
        records = [record for record in self.records() if record["step"] <= step]
        last = max((record["step"] for record in records if record["split"] == "train"), default=0)
        if last < logged:
            warnings.warn(f"{self.metrics} lacks lines up to step {logged}; the curve is drawn without them", stacklevel=2)
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in records))


def config_checksum(about: Mapping[str, Any]) -> str:
    """Return a digest of config.json without the places of model, data and run: they may be moved, and have fingerprints of their own."""
    run = {name: value for name, value in about["run"].items() if name not in ("model", "data", "output")}
    return checksum({**about, "run": run})


def _read_line(line: bytes) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl; None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("split") not in ("train", "validation", "stage") or type(record.get("step")) is not int:
        return None
    numbers = [value for name, value in record.items() if name not in ("split", "stage")]
    needed = {"train": ("loss", "samples_per_second"), "validation": ("loss",)}.get(record["split"], ())
    sound = all(value is None or _is_number(value) for value in numbers) and all(_is_number(record.get(name)) for name in needed)
    return record if sound else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_leftover(path: Path) -> bool:
    return path.name == LOCK or LEFTOVER.fullmatch(path.name) is not None


def _wrong_field(about: dict[str, Any]) -> str:
    """Return the name of a field of config.json that is missing or of another type; an empty string if there is none."""
    labels = about.get("labels")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return "labels"
    kinds = {"learning_rate": (int, float), "steps": int, "base": str, "data": dict}
    return next((name for name, kind in kinds.items() if not isinstance(about.get(name), kind)), "")

"""The files of a run.

RUN/config.json        the configuration, labels, method: all that eval, predict and merge need
RUN/metrics.jsonl      one line per log or evaluation
RUN/curve.png          loss and validation metric over steps
RUN/checkpoints/STEP/  adapter, optimizer state, progress; the newest few
RUN/adapter/           the trained adapter, as `jpeft.save` writes it
RUN/merged/            with `export`: a Hugging Face folder
RUN/result.json        written last: the run is finished if it exists
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from jpeft import distributed
from jpeft.checkpoint.files import write_atomically, write_json
from jpeft.deprecation import renamed_fields
from jpeft.training.config import TrainConfig, changed_fields, from_json, to_json
from jpeft.training.places import PLACES
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
        """Whether the folder holds anything but dot files, which a killed first write may leave."""
        return self.path.exists() and (not self.path.is_dir() or any(p.name[0] != "." for p in self.path.iterdir()))

    def read_config(self) -> dict[str, Any]:
        """Return the contents of config.json.

        Raises:
          ValueError: if the folder holds no run.
        """
        try:
            about = json.loads(self.config.read_text())
        except FileNotFoundError:
            raise ValueError(f"{self.path} is not the folder of a training run: it has no config.json.") from None
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.config} cannot be read: {error}.") from None
        if not isinstance(about, dict) or not isinstance(about.get("run"), dict):
            raise ValueError(f"{self.config} is not the configuration of a training run; was a model's folder given?")
        return about

    def as_recorded(self, config: TrainConfig) -> TrainConfig:
        """Return the configuration with settings that the run was begun without, because they are newer, as the run behaved."""
        if not self.in_use:
            return config
        record = self.read_config()["run"]
        return dataclasses.replace(config, **{name: value for name, value in unrecorded(TrainConfig).items() if name not in record})

    def check(self, config: TrainConfig) -> None:
        """Raise an error if the folder is in use, or holds a run of another configuration than the one to be continued.

        Raises:
          ValueError: saying which, and what to do.
        """
        if not self.in_use:
            return
        if config.resume:
            # `from_json` gives fields that are newer than the run the values that it behaved by.
            changed = changed_fields(to_json(from_json(self.read_config()["run"])), to_json(config))
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
            # Only the folder of a run may be deleted; a mistyped path must not cost someone a home directory.
            self.read_config()

    def moved(self, config: TrainConfig) -> list[str]:
        """Return which of base and data the run recorded at another place than the configuration names."""
        recorded = from_json(self.read_config()["run"])
        return [name for name in PLACES if getattr(recorded, name) != getattr(config, name)]

    def begin(self, about: dict[str, Any], *, overwrite: bool) -> None:
        """Create the folder, after deleting it if `overwrite`, and write config.json."""
        if overwrite and self.in_use:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config, about)

    def append(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl, in the first process. The line is in the file, not in a buffer, on return."""
        if not distributed.is_first():
            return
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, without a last line that a kill cut short."""
        if not self.metrics.exists():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def rewind(self, step: int) -> None:
        """Remove the lines of metrics.jsonl after `step`, which the continued run writes again."""
        lines = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        write_atomically(self.metrics, "".join(lines))

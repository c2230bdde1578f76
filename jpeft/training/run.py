"""A run on disk, and opening it again.

RUN/config.json        the configuration, labels, method: all that eval, predict and merge need
RUN/metrics.jsonl      one line per log or evaluation
RUN/curve.png          loss and validation metric over steps
RUN/checkpoints/STEP/  adapter, optimizer state, progress; the newest few
RUN/adapter/           the trained adapter, as `jpeft.save` writes it
RUN/merged/            with `export`: a Hugging Face folder
RUN/result.json        written last: its presence means that the run is finished
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

import jpeft
from jpeft import distributed, models
from jpeft.checkpoint.files import write_atomically, write_json
from jpeft.core.peft import Peft
from jpeft.tasks.task import Task, find_task
from jpeft.training.config import TrainConfig, changed_fields, from_json, parse_options, to_json
from jpeft.tree.head import HEAD


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
        """Whether the folder holds anything (dot files aside: a killed first write leaves one)."""
        return self.path.exists() and (not self.path.is_dir() or any(p.name[0] != "." for p in self.path.iterdir()))

    def about(self) -> dict[str, Any]:
        """What config.json says.

        Raises:
            ValueError: if the folder holds no run.
        """
        try:
            about = json.loads(self.config.read_text())
        except FileNotFoundError:
            raise ValueError(f"{self.path} is not the folder of a training run: it has no config.json") from None
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.config} cannot be read: {error}") from None
        if not isinstance(about, dict) or not isinstance(about.get("run"), dict):
            raise ValueError(f"{self.config} is not the configuration of a training run; was a model's folder given?")
        return about

    def check(self, config: TrainConfig) -> None:
        """Refuses a folder that is in use, or a continuation under another configuration.

        Raises:
            ValueError: saying which, and what to do.
        """
        if not self.in_use:
            return
        if config.resume:
            # By way of from_json, so that a field which is newer than the run has its default there.
            changed = changed_fields(to_json(from_json(self.about()["run"])), to_json(config))
            if changed:
                fields = ", ".join(f"{name} ({old!r} before, {new!r} now)" for name, (old, new) in changed.items())
                raise ValueError(f"cannot resume {self.path} with another configuration: {fields}")
        elif not config.overwrite:
            raise ValueError(
                f"the output folder {self.path} is in use: choose another, continue its run with --resume, or delete it with --overwrite"
            )
        else:
            # Only what a run wrote is deleted; a mistyped path must not cost someone a home directory.
            self.about()

    def begin(self, about: dict[str, Any], *, overwrite: bool) -> None:
        """Creates the folder, or empties it first, and writes config.json."""
        if overwrite and self.in_use:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config, about)

    def append(self, record: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl, once of all processes; it is in the file, not in a buffer, on return."""
        if not distributed.is_first():
            return
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that a kill cut short is left out."""
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
        """Drops the lines of metrics.jsonl after `step`: the continued run writes them again."""
        lines = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        write_atomically(self.metrics, "".join(lines))


class Keys(NamedTuple):
    """All randomness of a run, from its seed."""

    head: jax.Array
    adapter: jax.Array
    dropout: jax.Array
    # For the data order, a number.
    data: int


def keys(seed: int) -> Keys:
    """Independent keys for the new head, the adapter, dropout and the data order."""
    head, adapter, dropout, data = jax.random.split(jax.random.key(seed), 4)
    return Keys(head, adapter, dropout, int(jax.random.bits(data)))


def columns(config: TrainConfig, task: Task) -> dict[str, Any]:
    """The columns that the task reads, as `jpeft.data.read` and `splits` take them.

    Raises:
        ValueError: if the configuration names one that the task has no use for.
    """
    optional = {"pair": config.pair, "label": config.label, "target": config.target, "tags": config.tags}
    # The columns of labels and tags have names from the start.
    idle = [name for name in ("pair", "target") if optional[name] is not None and name not in task.columns]
    if idle:
        raise ValueError(
            f"the task {task.name} has no use for {idle[0]}={optional[idle[0]]!r}; it reads {', '.join(('text', *task.columns))}"
        )
    return {"text": config.text, **{name: column if name in task.columns else None for name, column in optional.items()}}


def load_base(config: TrainConfig, labels: tuple[str, ...], mesh: Mesh | None = None) -> models.Loaded:
    """The pretrained model with a head for `labels`, on a mesh if one is given.

    Raises:
        ValueError: from the loader, or if the model cannot take `max_length` tokens.
    """
    loaded = models.load(
        config.model,
        task=find_task(config.task).model,
        labels=labels,
        dtype=config.dtype,
        remat=config.remat,
        scan=config.scan,
        key=keys(config.seed).head,
        mesh=mesh,
    )
    if config.max_length > loaded.config.max_length:
        raise ValueError(f"max_length={config.max_length} is more than the model's {loaded.config.max_length} positions")
    return loaded


def method_options(config: TrainConfig, tokenizer: Any = None) -> dict[str, Any]:
    """The configured method's options; where `tokens` is given as text, and there is a tokenizer, the token ids that it is."""
    options = parse_options(config.options)
    if isinstance(options.get("tokens"), str) and tokenizer is not None:
        options["tokens"] = tokenizer(options["tokens"], add_special_tokens=False)["input_ids"]
    return options


def attach(
    config: TrainConfig,
    params: Any,
    fresh: Iterable[str] = (),
    statistics: Mapping[str, Callable[[], Any]] | None = None,
    tokenizer: Any = None,
) -> Peft:
    """The base with a fresh adapter of the configured method.

    Args:
        config: Names the method.
        params: The base.
        fresh: Paths that the checkpoint did not hold. Beside the head this may be a pooler, which must not stay at its random start.
        statistics: What `Method.needs` may name, by that name; made only if it does.
        tokenizer: As for `method_options`.

    Raises:
        ValueError: if the method needs something that is not there.
    """
    options = method_options(config, tokenizer)
    others = [path for path in fresh if not re.fullmatch(HEAD, path)]
    if others and "head" not in options:
        options["head"] = "|".join([HEAD, *sorted(map(re.escape, others))])
    method = jpeft.make(config.method, **options)
    make = (statistics or {}).get(method.needs or "")
    if method.needs and make is None:
        raise ValueError(f"{config.method} needs {method.needs!r} statistics of model and data, which are not at hand here")
    stats = None if make is None else distributed.within_reach(make())
    return jpeft.apply(params, method=method, key=keys(config.seed).adapter, stats=stats)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, loaded: the model, its trained adapter as inference needs it (`jpeft.fold`), and what its outputs mean."""

    folder: RunFolder
    config: TrainConfig
    task: Task
    labels: tuple[str, ...]
    loaded: models.Loaded
    peft: Peft


def open_run(path: str | os.PathLike[str]) -> Run:
    """Loads the model of a finished run with its adapter.

    Raises:
        ValueError: if `path` holds no finished run, or the base is no longer the one it was trained on.
    """
    folder = RunFolder(path)
    about = folder.about()
    if not folder.adapter.exists():
        raise ValueError(f"the run in {folder.path} is not finished: continue it with --resume")
    config = from_json(about["run"])
    labels = tuple(about["labels"])
    loaded = load_base(config, labels)
    peft = jpeft.fold(jpeft.load(folder.adapter, loaded.params))
    return Run(folder, config, find_task(config.task), labels, loaded, peft)


def save_merged(folder: str | os.PathLike[str], loaded: models.Loaded, peft: Peft) -> None:
    """Writes the merged model as a Hugging Face folder with its labels and tokenizer; the folder may exist if empty.

    Of several processes all call it, and each has the whole model in its host's memory for a while.

    Raises:
        ValueError: the method's reason, if it cannot merge.
    """
    params = distributed.within_reach(jpeft.merge(peft))
    write = lambda: models.save(folder, loaded.model, params, labels=loaded.labels, tokenizer=loaded.tokenizer, overwrite=True)
    distributed.from_first(write)

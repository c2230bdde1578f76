"""The results of a comparison, read from the folders of finished runs: as data, table, Markdown and picture."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jpeft
from jpeft.checkpoint.files import write_atomically, write_json
from jpeft.comparison.rows import Row
from jpeft.comparison.scatter import Line, Point, plot_scatter
from jpeft.comparison.stages import stages_table
from jpeft.core.summary import readable_bytes
from jpeft.tasks.task import Task, find_task
from jpeft.training.config import TrainConfig, changed_fields, from_json, to_json
from jpeft.training.run_folder import RunFolder
from jpeft.training.setting import names_where

# Settings that may differ between the rows of a comparison.
PER_ROW = names_where(TrainConfig, lambda about: about.per_row)


class Failure(NamedTuple):
    """A run that failed."""

    row: Row
    seed: int
    message: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row with its finished runs.

    Attributes:
      row: The row.
      results: Contents of the runs' result.json, by seed.
      folders: Names of the runs' folders, by seed.
    """

    row: Row
    results: Mapping[int, Mapping[str, Any]]
    folders: Mapping[int, str]

    @property
    def label(self) -> str:
        """The row's name; "frozen base" for a head alone if the model has none."""
        return "frozen base" if self.row.is_baseline and self.median("trained") == 0 else self.row.label

    def scores(self, split: str, metric: str) -> list[float]:
        """Return the metric of each finished run that has it."""
        return [result[split][metric] for result in self.results.values() if metric in result[split]]

    def median(self, name: str) -> float | None:
        """Return the median over the runs of a number in result.json; None if no run has it."""
        values = [value for result in self.results.values() if (value := result.get(name)) is not None]
        return float(statistics.median(values)) if values else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Rows that were trained with the same settings.

    Attributes:
      task: The task of all runs.
      config: The settings shared by all runs. Fields that differ between rows are meaningless here. None if no run is finished.
      entries: The rows, in the order of the table.
      failures: Runs that failed.
      left_out: Rows that do not apply, with the reason.
      parameters: Parameter count on the horizontal axis of the picture: "trained", "stored" or "changed".
      subject: Model and data in words, for caption and picture; by default their names.
    """

    task: Task
    config: TrainConfig | None
    entries: tuple[Entry, ...]
    failures: tuple[Failure, ...]
    left_out: Mapping[Row, str]
    parameters: str
    subject: str = ""

    @property
    def split(self) -> str:
        """The split that rows are compared on: the test split, or the validation split if there is no test split."""
        return "test" if any(entry.scores("test", self.task.metric) for entry in self.entries) else "validation"

    @property
    def seeds(self) -> list[int]:
        """All seeds, sorted."""
        return sorted({seed for entry in self.entries for seed in entry.results} | {failure.seed for failure in self.failures})

    def table(self, columns: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
        """Return head and body of the table as text.

        Args:
          columns: Heads of the columns to keep, in order; all by default.
        """
        rows = [self._cells(entry) for entry in self.entries]
        head = list(columns or rows[0]) if rows else []
        if unknown := [name for name in head if name not in rows[0]]:
            raise ValueError(f"The table has no columns {unknown}; it has {list(rows[0])}.")
        return head, [[row[name] for name in head] for row in rows]

    def _cells(self, entry: Entry) -> dict[str, str]:
        metric = self.task.metric
        quality = {self.split: self._score(entry, self.split)}
        if self.split == "test":
            quality["validation"] = self._score(entry, "validation")
        count, size = (lambda name: _text(entry.median(name), "{:,.0f}")), (lambda name: _text(entry.median(name), bytes=True))
        return {
            "method": entry.label,
            **{f"{split} {metric}": text for split, text in quality.items()},
            "trained": count("trained"),
            "stored": count("stored"),
            "changed": count("changed"),
            "ms/step": _text(entry.median("step_seconds"), "{:,.0f}" if self._slow else "{:.2f}", scale=1e3),
            "GFLOP/step": _text(entry.median("flops"), "{:,.4g}", scale=1e-9),
            "memory/step": size("temporary_bytes"),
            "adapter": size("adapter_bytes"),
            "seconds": _text(entry.median("seconds"), "{:,.0f}"),
            "learning rate": f"{entry.row.learning_rate:g}",
        }

    @property
    def _slow(self) -> bool:
        return all((entry.median("step_seconds") or 1) > 0.05 for entry in self.entries)

    def _score(self, entry: Entry, split: str) -> str:
        scores = entry.scores(split, self.task.metric)
        if not scores:
            return "–" if entry.results else "failed"
        spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
        missing = f" ({len(scores)} of {len(self.seeds)} seeds)" if len(scores) < len(self.seeds) else ""
        return f"{statistics.mean(scores):.3f}{spread}{missing}"

    @property
    def notes(self) -> list[str]:
        """Remarks below the table: failures, rows that do not apply, runs on other data."""
        notes = [f"{failure.row.label}, seed {failure.seed} failed: {failure.message}" for failure in self.failures]
        notes += [f"{row.label} does not apply: {message}" for row, message in self.left_out.items()]
        seen = {json.dumps(result.get("data")) for entry in self.entries for result in entry.results.values()}
        if len(seen) > 1:
            notes.append("not all runs have seen the same data: their config.json show which; delete the old ones and run them again")
        return notes

    @property
    def title(self) -> str:
        """The subject; by default the names of model and data."""
        assert self.config is not None
        return self.subject or f"{Path(self.config.model).name} on {Path(self.config.data).name}"

    def caption(self) -> str:
        """Return what the numbers mean and how they were obtained, as Markdown."""
        assert self.config is not None
        seeds = ", ".join(map(str, self.seeds))
        kinds = sorted({str(result["device"]) for entry in self.entries for result in entry.results.values() if result.get("device")})
        mean = f"mean ± standard deviation over seeds {seeds}" if len(self.seeds) > 1 else f"seed {seeds}"
        length = f"{self.config.steps} steps" if self.config.steps else f"{self.config.epochs} epochs"
        several = "; of a method that trains in stages, those of the costliest stage" if self.stages else ""
        return (
            f"{self.title}, {length}, batches of {self.config.batch_size} × {self.config.max_length} tokens; {mean}. Trained: "
            "scalars that the optimizer moves; stored: scalars of the adapter; changed: scalars of the base that take another value; "
            f"times ({', '.join(kinds) or 'unknown device'}), FLOPs and temporary memory are those of one training step{several}."
            f"{self._uncertainty()}"
        )

    def _uncertainty(self) -> str:
        """Return how many examples the metric is of, and how uncertain it is for that reason alone."""
        counts = {result["examples"].get(self.split) for entry in self.entries for result in entry.results.values()} - {None}
        if len(counts) != 1:
            return ""
        (count,) = counts
        text = f" The {self.split} split has {count:,} examples"
        scores = [statistics.mean(found) for entry in self.entries if (found := entry.scores(self.split, self.task.metric))]
        if self.task.metric != "accuracy" or not scores:
            return f"{text}."
        share = statistics.median(scores)
        # Of a share p of n independent examples: sqrt(p (1 - p) / n).
        return f"{text}: an accuracy of {share:.3f} has a standard error of {math.sqrt(share * (1 - share) / count):.3f}."

    @property
    def stages(self) -> str:
        """The Markdown table of the rows that train in stages; empty without any."""
        return stages_table({entry.label.replace("|", r"\|"): entry.results.values() for entry in self.entries})

    def markdown(self, columns: Sequence[str] | None = None) -> str:
        """Return table, caption and notes as Markdown, and with all columns the table of stages."""
        head, body = self.table(columns)
        rule = ["---", *["---:"] * (len(head) - 1)]
        escaped = [[cell.replace("|", r"\|") for cell in row] for row in (head, rule, *body)]
        lines = ["| " + " | ".join(row) + " |" for row in escaped]
        stages = ["", self.stages] if self.stages and columns is None else []
        return "\n".join([*lines, "", self.caption(), *(f"\n- {note}" for note in self.notes), *stages]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        assert self.config is not None
        return {
            "jpeft": jpeft.__version__,
            "task": self.task.name,
            "metric": self.task.metric,
            "split": self.split,
            "higher_is_better": self.task.higher_is_better,
            "settings": {name: value for name, value in to_json(self.config).items() if name not in PER_ROW | {"output"}},
            "seeds": self.seeds,
            "rows": [self._row_json(entry) for entry in self.entries],
            "left_out": [{"label": row.label, "error": message} for row, message in self.left_out.items()],
            "notes": self.notes,
        }

    def _row_json(self, entry: Entry) -> dict[str, Any]:
        scores = entry.scores(self.split, self.task.metric)
        runs = [{"seed": seed, "folder": entry.folders[seed], **result} for seed, result in entry.results.items()]
        errors = [{"seed": failure.seed, "error": failure.message} for failure in self.failures if failure.row == entry.row]
        return {
            "label": entry.label,
            "family": entry.row.family,
            "method": entry.row.method,
            "options": list(entry.row.options),
            "learning_rate": entry.row.learning_rate,
            "mean": statistics.mean(scores) if scores else None,
            "std": statistics.stdev(scores) if len(scores) > 1 else None,
            "runs": runs,
            "errors": errors,
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw quality against parameters as a PNG."""
        points, lines = [], []
        for entry in self.entries:
            if not (scores := entry.scores(self.split, self.task.metric)):
                continue
            mean, spread = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
            # A row without parameters cannot be on a logarithmic axis, so it becomes a line.
            if entry.row.is_baseline or not entry.median(self.parameters):
                lines.append(Line(entry.label, mean))
            else:
                points.append(Point(entry.row.label, entry.median(self.parameters) or 0.0, mean, spread, entry.row.family))
        measure = f"{self.split} {self.task.metric.replace('_', ' ')}"
        plot_scatter(
            path,
            points,
            lines,
            x_label=f"{self.parameters} parameters",
            y_label=measure + ("" if self.task.higher_is_better else ", lower is better"),
            title=f"{len(self.entries)} methods by {measure} and {self.parameters} parameters\n{self.title}",
        )

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write results.json, table.md and compare.png into a folder; nothing if no run is finished."""
        if self.config is None:
            return
        folder = Path(folder)
        write_json(folder / "results.json", self.to_json())
        write_atomically(folder / "table.md", self.markdown())
        self.plot(folder / "compare.png")


def collect(
    folders: Sequence[str | os.PathLike[str]],
    *,
    order: Sequence[Row] = (),
    failures: Sequence[Failure] = (),
    left_out: Mapping[Row, str] | None = None,
    parameters: str = "trained",
) -> Comparison:
    """Return the comparison of finished runs.

    Args:
      folders: Folders of finished runs.
      order: Rows in the order of the table; others follow, sorted by family.
      failures: Runs that failed.
      left_out: Rows that do not apply, with the reason.
      parameters: Parameter count of the picture: "trained", "stored" or "changed".

    Raises:
      ValueError: if the runs differ in settings that all rows must share, or two of them are the same.
    """
    results: dict[Row, dict[int, dict[str, Any]]] = {}
    names: dict[Row, dict[int, str]] = {}
    first: TrainConfig | None = None
    first_about: dict[str, Any] = {}
    for folder in map(RunFolder, folders):
        about = folder.read_config()
        config = from_json(about["run"])
        first, first_about = first or config, first_about or about
        changed = changed_fields(to_json(first), to_json(config))
        different = {name: values for name, values in changed.items() if name not in PER_ROW and not _only_moved(name, first_about, about)}
        if different:
            fields = ", ".join(f"{name} ({old!r} and {new!r})" for name, (old, new) in different.items())
            raise ValueError(f"{first.output} and {folder.path} cannot be compared: they differ in {fields}.")
        row = Row(config.method, config.options, about["learning_rate"])
        if config.seed in results.setdefault(row, {}):
            raise ValueError(f"{folder.path} and {names[row][config.seed]} are the same run: {row.label}, seed {config.seed}.")
        # Runs of earlier versions do not record the number of examples.
        shared = {"data": about["data"], "examples": about.get("examples", {})}
        results[row][config.seed] = _result(folder) | shared
        names.setdefault(row, {})[config.seed] = folder.path.name
    failed = [failure.row for failure in failures]
    rows = list(dict.fromkeys([*(row for row in order if row in results or row in failed), *sorted(results, key=lambda row: row.rank)]))
    return Comparison(
        task=find_task(first.task if first else "sequence-classification"),
        config=first,
        entries=tuple(Entry(row, dict(sorted(results.get(row, {}).items())), names.get(row, {})) for row in rows),
        failures=tuple(failures),
        left_out=left_out or {},
        parameters=parameters,
    )


def _only_moved(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs, given by their config.json, found the same base, or the same data, in two places."""
    digest = {"model": "pretrained", "data": "data"}.get(name)
    return digest is not None and one.get(digest) is not None and one[digest] == other.get(digest)


def _result(folder: RunFolder) -> dict[str, Any]:
    """Return the contents of a finished run's result.json."""
    result = folder.read_result()
    if result is None:
        raise ValueError(f"The run in {folder.path} is not finished: it has no result.json.")
    return result


def run_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the folders of finished runs directly below a folder.

    Raises:
      ValueError: if there are none.
    """
    # A damaged result is named in a warning, and the others are reported without it.
    found = [path.parent for path in sorted(Path(folder).glob("*/result.json")) if RunFolder(path.parent).finished]
    if not found:
        raise ValueError(f"There are no finished runs in {folder}: give the folder that contains the folders of runs.")
    return found


def _text(value: float | None, form: str = "", *, scale: float = 1.0, bytes: bool = False) -> str:
    if value is None:
        return "–"
    return readable_bytes(value) if bytes else form.format(value * scale)

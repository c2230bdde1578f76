"""Several methods on one task with shared seeds: each row and seed is an ordinary run in a folder of the comparison.

Finished runs are read back, interrupted runs are continued, and a method that fails does not stop the others.
"""

import dataclasses
import traceback
from collections.abc import Callable
from pathlib import Path

from jpeft.checkpoint.files import check_output
from jpeft.comparison.report import Comparison, Failure, collect
from jpeft.comparison.rows import ALL, Row, parse_rows
from jpeft.training.config import CompareConfig, Settings, TrainConfig, check_values, resolved
from jpeft.training.run_folder import RunFolder
from jpeft.training.run_lock import RunInUseError
from jpeft.training.setting import check_ranges
from jpeft.training.train import train

# One run of a row.
RowRun = tuple[Row, TrainConfig]


def compare(config: CompareConfig, *, say: Callable[[str], None] = print) -> Comparison:
    """Train the runs that are missing, and write results.json, table.md and compare.png into `config.output`.

    Args:
      config: The configuration.
      say: Called with one line at the beginning and at the end of each run.

    Returns:
      The comparison, with the rows that failed.

    Raises:
      ValueError: for input that concerns all rows, a row that does not exist, or a run folder of another configuration.
      InterruptedRun: after Ctrl-C or SIGTERM, once the finished runs are written.
    """
    check_ranges(config)
    rows = parse_rows(config.methods, config.learning_rate)
    if not rows:
        raise ValueError("methods must name one row or more, got none.")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"seeds={list(config.seeds)} must be one or more different numbers.")
    # Seed by seed, so that all rows have a result early.
    runs = [(row, _run_config(config, row, seed)) for seed in config.seeds for row in rows]
    check_output(Path(config.output, "results.json"), folder=True)
    for _, run in runs:
        check_values(run)
        RunFolder(run.output).check(run)
    outcome = _Outcome()
    try:
        for number, (row, run) in enumerate(runs, 1):
            folder = RunFolder(run.output)
            # A finished run is read back without its model, unless that must show that base and data are those of the run, elsewhere.
            if (not folder.finished or folder.moved(run)) and row not in outcome.refused:
                say(f"[{number}/{len(runs)}] {row.label}, seed {run.seed}")
                say(_train(row, run, rows, outcome))
    except KeyboardInterrupt:
        _collect(config, runs, outcome.failures, {}).write(config.output)
        raise
    # A refused row that was named is a failure. Of "all" methods, those that do not apply are left out.
    named = parse_rows([text for text in config.methods if text != ALL], config.learning_rate)
    failures = [Failure(row, seed, outcome.refused[row]) for row in named if row in outcome.refused for seed in config.seeds]
    left_out = {row: message for row, message in outcome.refused.items() if row not in named}
    comparison = _collect(config, runs, outcome.failures + failures, left_out)
    comparison.write(config.output)
    return comparison


@dataclasses.dataclass
class _Outcome:
    """Failures so far, and the rows that were refused before anything was written, which every seed would repeat."""

    failures: list[Failure] = dataclasses.field(default_factory=list)
    refused: dict[Row, str] = dataclasses.field(default_factory=dict)


def _train(row: Row, run: TrainConfig, rows: list[Row], outcome: _Outcome) -> str:
    """Train one run and return a line about its result, or enter its failure in `outcome`.

    Raises:
      ValueError: if the first rows are all refused for the same reason, which is then a reason of data or model.
    """
    try:
        result = train(run)
    except Exception as error:
        message = " ".join(str(error).split())
        if not isinstance(error, ValueError):
            # Not a user error: print the traceback.
            traceback.print_exception(error)
            message = f"{type(error).__name__}: {message}"
        if not isinstance(error, ValueError) or isinstance(error, RunInUseError) or RunFolder(run.output).in_use:
            outcome.failures.append(Failure(row, run.seed, message))
            return f"{row.label}: {message}"
        outcome.refused[row] = message
        refused = outcome.refused
        if list(refused) == rows[: len(refused)] and len(refused) == min(3, len(rows)) and len(set(refused.values())) == 1:
            raise
        return f"{row.label}: {message}"
    split, scores = ("test", result.test) if result.test else ("validation", result.validation)
    return f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()) + f"  {result.seconds:.0f} s"


def _run_config(config: CompareConfig, row: Row, seed: int) -> TrainConfig:
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(Settings)}
    folder, former = Path(config.output, row.folder(seed)), Path(config.output, row.former_folder(seed))
    if former.exists() and not folder.exists():
        folder = former
    of_row = {"output": str(folder), "learning_rate": row.learning_rate}
    return resolved(TrainConfig(**shared | of_row, method=row.method, options=row.options, seed=seed, resume=True))


def _collect(config: CompareConfig, runs: list[RowRun], failures: list[Failure], left_out: dict[Row, str]) -> Comparison:
    """Return the comparison of the runs that are finished."""
    folders = [Path(run.output) for _, run in runs if RunFolder(run.output).finished]
    order = list(dict.fromkeys(row for row, _ in runs))
    return collect(folders, order=order, failures=failures, left_out=left_out, parameters=config.parameters)

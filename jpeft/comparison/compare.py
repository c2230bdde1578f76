"""Several methods on one task with shared seeds: every row and seed an ordinary run below one folder.

What is finished is read back, what was interrupted continues, and a method that fails leaves the others alone.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from pathlib import Path

from jpeft.comparison.report import Comparison, Failure, collect
from jpeft.comparison.rows import ALL, Row, parse_rows
from jpeft.training.config import CompareConfig, Settings, TrainConfig, check_values, resolved
from jpeft.training.run_folder import RunFolder
from jpeft.training.train import train


def compare(config: CompareConfig, *, say: Callable[[str], None] = print) -> Comparison:
    """Trains what is missing and writes results.json, table.md and compare.png into `config.output`.

    Args:
        config: The configuration.
        say: Shown one line at the start and at the end of each run.

    Returns:
        The comparison, with the rows that failed.

    Raises:
        ValueError: for input that no row can do anything with, a row that does not exist, or a run folder of another configuration.
        InterruptedRun: after Ctrl-C or SIGTERM; what is finished has been written.
    """
    rows = parse_rows(config.methods, config.learning_rate)
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"seeds must be one or more different numbers, got {list(config.seeds)}")
    # Seed by seed, so that all rows are there early.
    runs = [(row, _run(config, row, seed)) for seed in config.seeds for row in rows]
    for _, run in runs:
        check_values(run)
        RunFolder(run.output).check(run)
    failures: list[Failure] = []
    refused: dict[Row, str] = {}
    try:
        for number, (row, run) in enumerate(runs, 1):
            if RunFolder(run.output).result.exists() or row in refused:
                continue
            say(f"[{number}/{len(runs)}] {row.label}, seed {run.seed}")
            try:
                result = train(run)
            except Exception as error:
                message = " ".join(str(error).split())
                if not isinstance(error, ValueError):
                    # Nobody's wrong input: whoever mends it wants to see where.
                    traceback.print_exception(error)
                    message = f"{type(error).__name__}: {message}"
                if isinstance(error, ValueError) and not RunFolder(run.output).in_use:
                    # Refused before anything was written, and so it will be with every seed.
                    refused[row] = message
                    # The first three rows alike: it is the data or the model, and the others need not say so too.
                    if list(refused) == rows[: len(refused)] and len(refused) == min(3, len(rows)) and len(set(refused.values())) == 1:
                        raise
                else:
                    failures.append(Failure(row, run.seed, message))
                say(f"{row.label}: {message}")
            else:
                scores = result.test or result.validation
                say("  ".join(f"{name} {value:.4f}" for name, value in scores.items()) + f"  {result.seconds:.0f} s")
    except KeyboardInterrupt:
        _finished(config, runs, failures, {}).write(config.output)
        raise
    # Asked for by name, and so missed; of all methods, those are left out that do not apply.
    named = parse_rows([text for text in config.methods if text != ALL], config.learning_rate)
    failures += [Failure(row, seed, refused[row]) for row in named if row in refused for seed in config.seeds]
    comparison = _finished(config, runs, failures, {row: message for row, message in refused.items() if row not in named})
    comparison.write(config.output)
    return comparison


def _run(config: CompareConfig, row: Row, seed: int) -> TrainConfig:
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(Settings)}
    own = {"output": str(Path(config.output) / row.folder(seed)), "learning_rate": row.learning_rate}
    return resolved(TrainConfig(**shared | own, method=row.method, options=row.options, seed=seed, resume=True))


def _finished(config: CompareConfig, runs: list[tuple[Row, TrainConfig]], failures: list[Failure], refused: dict[Row, str]) -> Comparison:
    folders = [Path(run.output) for _, run in runs if RunFolder(run.output).result.exists()]
    order = list(dict.fromkeys(row for row, _ in runs))
    return collect(folders, order=order, failures=failures, left_out=refused, parameters=config.parameters)

"""`jpeft compare`: fine-tune a model with many methods and seeds. Its flags are the fields of `CompareConfig`."""

from __future__ import annotations

from jpeft.cli.command import Command
from jpeft.cli.report import print_comparison
from jpeft.comparison.compare import compare
from jpeft.training.config import CompareConfig


def _run(config: CompareConfig) -> int:
    comparison = compare(config)
    print_comparison(comparison, config.output)
    return 1 if comparison.failures else 0


def _interrupted(config: CompareConfig) -> str:
    del config
    return "interrupted between two runs; the same command continues from here"


COMMAND = Command("compare", CompareConfig, _run, interrupted=_interrupted, names={"seed": "--seeds"}, holds_notes=False)

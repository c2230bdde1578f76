"""`jpeft train`: fine-tune a model with one method. Its flags are the fields of `TrainConfig`."""

from __future__ import annotations

from jpeft.cli.command import Command
from jpeft.cli.tables import print_metrics
from jpeft.training.config import TrainConfig
from jpeft.training.run_folder import RunFolder
from jpeft.training.train import train


def _run(config: TrainConfig) -> None:
    result = train(config)
    print_metrics({split: metrics for split in ("validation", "test") if (metrics := getattr(result, split))})
    print(f"{result.trained:,} trained parameters, {result.steps} steps in {result.seconds:.1f} s; saved in {result.path}")


def _interrupted(config: TrainConfig) -> str:
    # The first Ctrl-C saves a checkpoint and raises InterruptedRun. A second one ends here at once; an older checkpoint may exist.
    saved = any(RunFolder(config.output).checkpoints.glob("*/checksums.json"))
    return "interrupted" + ("; continue from the newest checkpoint with --resume" if saved else "")


COMMAND = Command("train", TrainConfig, _run, resume_flags=("--resume",), interrupted=_interrupted, holds_notes=False)

"""What a run results in."""

import dataclasses
from pathlib import Path
from typing import Any

from jpeft.core.peft import Peft
from jpeft.training.run import load_run
from jpeft.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a run. Runs of earlier versions lack the fields with defaults.

    Attributes:
      validation: Metrics of the kept adapter on the validation split; empty without one.
      test: Metrics on the test split; empty without one.
      best: Best validation metric; None without evaluations.
      best_step: Step of the best evaluation; 0 without evaluations.
      steps: Finished steps; fewer than planned after early stopping.
      trained: Scalars that the optimizer moves, in the stage that moves the most; see `jpeft.Summary`.
      seconds: Wall time of the training loop with its evaluations, without compiling. If the run was continued, all its parts up to their
        newest checkpoints count.
      compile_seconds: Time of compiling the steps of all stages, in this process.
      path: Folder of the run.
      peft: The base with the trained adapter, folded (`jpeft.fold`).
      stored: Scalars of the saved adapter.
      changed: Scalars of the base that take another value.
      adapter_bytes: Size of the saved adapter's files.
      step_seconds: Seconds per step: the median over the lines of metrics.jsonl, without evaluations and checkpoints.
      flops: Floating point operations of a step on one device, of the costliest stage; see `jpeft.training.cost.cost`.
      temporary_bytes: Peak of a step's temporary memory, of the stage that takes the most.
      device: Name of the device.
      stages: What each stage did and cost; the fields are those of `jpeft.training.cost.StageCost`.
    """

    validation: dict[str, float]
    test: dict[str, float]
    best: float | None
    best_step: int
    steps: int
    trained: int
    seconds: float
    compile_seconds: float
    path: Path
    peft: Peft = dataclasses.field(repr=False)
    stored: int | None = None
    changed: int | None = None
    adapter_bytes: int | None = None
    step_seconds: float | None = None
    flops: float | None = None
    temporary_bytes: int | None = None
    device: str | None = None
    stages: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return all but the arrays and the folder."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("path", "peft")}


def read_result(folder: RunFolder, *, model: str | None = None) -> Result:
    """Return the result of a finished run, with its model loaded.

    Args:
      folder: The files of the run.
      model: Where the base is now; None for where the run found it.

    Raises:
      ValueError: if it is not finished, or its result or adapter is damaged.
    """
    values = folder.read_result()
    if values is None:
        raise ValueError(f"The run in {folder.path} is not finished: it has no result.json.")
    if unknown := sorted(values.keys() - {field.name for field in dataclasses.fields(Result)}):
        raise ValueError(f"{folder.result} has the unknown fields {unknown}: another version of jpeft wrote it.")
    try:
        return Result(**values, path=folder.path, peft=load_run(folder.path, model=model).peft)
    except TypeError as error:
        raise ValueError(f"{folder.result} is damaged: {error}.") from error

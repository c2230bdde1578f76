"""What a training step of a method needs: parameters, operations and memory, from the program that the trainer would run.

The step is the trainer's own, compiled for shapes. Nothing of the size of a weight is read, downloaded or allocated.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

import jpeft
from jpeft.comparison.rows import ALL, Row, parse_rows
from jpeft.core.peft import Peft
from jpeft.estimation import shapes
from jpeft.estimation.memory import largest_that_fits, parse_memory
from jpeft.estimation.program import StepCost, find_any_mesh, step_cost
from jpeft.models.common.config import ModelConfig
from jpeft.sharding.mesh import batch_parts
from jpeft.tasks.task import Task
from jpeft.training.build import make_method, picks_blocks
from jpeft.training.config import TrainConfig, check_values

Remat = bool | Literal["dots"]
# From the fastest to the one that needs the least memory.
REMATS: tuple[Remat, ...] = (False, "dots", True)


@dataclasses.dataclass(frozen=True)
class Fit:
    """What fits into the memory of a device.

    Attributes:
      memory: The memory, in bytes.
      fits: Whether the batch that was asked for fits with some recomputation.
      remat: The least recomputation with which it does; True, the most, if it does not.
      largest_batch: The largest batch with that recomputation; 0 if nothing fits.
    """

    memory: int
    fits: bool
    remat: Remat
    largest_batch: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one method needs. Bytes and operations are those of one device; of several stages, those of the costliest.

    Attributes:
      method: The method with its options, as it was given.
      base: Scalars of the frozen base.
      trained: Scalars that the optimizer moves.
      stored: Scalars of the adapter.
      flops: Floating point operations of a step; see `jpeft.training.cost.cost`.
      weights_bytes: Bytes of the base.
      adapter_bytes: Bytes of the adapter.
      optimizer_bytes: Bytes of the optimizer's state.
      temporary_bytes: Peak of what exists only during the step: activations, gradients. None where the step could not be compiled.
      total_bytes: All of it: arguments and temporaries of the step, at their peak. None where the step could not be compiled.
      platform: What the step was compiled for, such as "cpu"; empty where it could not be compiled. Another one's temporaries are others.
      devices: Number of devices.
      settings: The shape of the step: task, batch_size, max_length, dtype, param_dtype, remat, scan, mesh, grad_accum.
      fit: What fits into the memory, if one was given.
    """

    method: str
    base: int
    trained: int
    stored: int
    flops: float
    weights_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    temporary_bytes: int | None
    total_bytes: int | None
    platform: str
    devices: int
    settings: dict[str, Any]
    fit: Fit | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return dataclasses.asdict(self)


def estimate(
    model: Any,
    method: str | Sequence[str] = "lora",
    *,
    task: str | None = None,
    batch_size: int = 16,
    max_length: int = 128,
    labels: int = 2,
    dtype: Any = None,
    param_dtype: Any = None,
    remat: Remat | None = None,
    scan: bool | None = None,
    mesh: str | None = None,
    grad_accum: int = 1,
    memory: int | float | str | None = None,
    revision: str | None = None,
) -> Any:
    """Return what a training step of a method needs: parameters, operations and memory.

    The step is the trainer's, compiled for shapes: no weights are read or allocated, and of a model on the hub config.json alone is
    downloaded. A head with labels counts as newly made.

    Args:
      model: A folder with a config.json, the file itself, a hub id, or a configuration such as `jpeft.models.LlamaConfig`.
      method: A method with its options, spelled like a row of ``jpeft compare``: "lora rank=4 target=query", "full", "head-only"; or
        several of them, or "all".
      task: Name of the task; None for the first that the model can be trained for.
      batch_size: Examples of a step, over all devices.
      max_length: Tokens of an example.
      labels: Outputs of a head with labels.
      dtype: Of the computation; None for the trainer's default, or the configuration's if `model` is one. Like the three below.
      param_dtype: Of the base; by default what config.json says of the checkpoint.
      remat: Recompute activations in the backward pass: False, "dots" or True; by default not at all, which is what "auto" tries first.
      scan: Run the layers as one loop.
      mesh: Devices by axis, such as "data=2,fsdp=4"; None for one device. On more devices than there are, the step cannot be compiled:
        the bytes of temporaries are then unknown.
      grad_accum: Micro-batches of a step.
      memory: Memory of a device, in bytes or such as "16GiB": find out whether the batch fits, with which `remat`, and which is the
        largest that does.
      revision: Branch, tag or commit of a model on the hub.

    Returns:
      An `Estimate`, or a list of them if `method` is a list or "all".

    Raises:
      ValueError: for a model that cannot be read, a method that does not apply, or settings out of range.

    >>> from jpeft.models import BertConfig
    >>> config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    >>> found = estimate(config, "lora rank=2", batch_size=4, max_length=8)
    >>> found.trained, found.weights_bytes == 4 * found.base
    (546, True)
    """
    limit = None if memory is None else parse_memory(memory)
    rows = parse_rows([method] if isinstance(method, str) else list(method))
    if not rows:
        raise ValueError("method must name one method or more, got none.")
    if labels < 1:
        raise ValueError(f"labels must be at least 1, got {labels}.")
    config, folder = shapes.find_config(model, revision)
    chosen = shapes.find_task_of(config, task)
    # A configuration says what it wants; a checkpoint is trained with the trainer's defaults.
    given = {
        "dtype": _checked_dtype("dtype", dtype),
        "param_dtype": _checked_dtype("param_dtype", param_dtype),
        "remat": remat,
        "scan": scan,
    }
    if not isinstance(model, ModelConfig):
        config = shapes.with_usual_numerics(config, folder, given["param_dtype"])
    config = shapes.with_numerics(config, **given)
    run = TrainConfig(
        model=str(folder),
        data="",
        output="",
        task=chosen.name,
        batch_size=batch_size,
        max_length=max_length,
        dtype=config.dtype.name,
        remat=config.remat,
        scan=config.scan if scan is not None or isinstance(model, ModelConfig) else None,
        mesh=mesh,
        grad_accum=grad_accum,
    )
    check_values(run)
    if max_length > config.max_length:
        raise ValueError(f"max_length={max_length} is more than the model's {config.max_length} positions.")
    # Of "all" methods, those that do not apply are left out.
    every = ALL in ([method] if isinstance(method, str) else method)
    found = _Subject(config, folder, chosen, labels, run).estimates(rows, limit, every=every)
    return found[0] if isinstance(method, str) and method != ALL else found


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What all methods of one call have in common."""

    config: ModelConfig
    folder: Path
    task: Task
    labels: int
    run: TrainConfig

    def estimates(self, rows: Sequence[Row], memory: int | None, *, every: bool) -> list[Estimate]:
        """Return what each method needs; of `every` method, of those that apply."""
        found = []
        for row in rows:
            try:
                found.append(self.estimate(row, memory))
            except ValueError as error:
                if not every:
                    raise
                warnings.warn(f"{row.label} does not apply: {error}", stacklevel=3)
        return found

    def estimate(self, row: Row, memory: int | None) -> Estimate:
        """Return what one method needs."""
        stages = self._stages(row, self.run.batch_size, self.config.remat)
        costs = [cost for _, cost in stages]

        def most(name: str) -> Any:
            return max((value for cost in costs if (value := getattr(cost, name)) is not None), default=None)

        summaries = [jpeft.summary(peft) for peft, _ in stages]
        settings = {
            "task": self.task.name,
            **{name: getattr(self.run, name) for name in ("batch_size", "max_length", "dtype")},
            "param_dtype": self.config.param_dtype.name,
            "remat": self.run.remat,
            "scan": self._config_for(row).scan,
            **{name: getattr(self.run, name) for name in ("mesh", "grad_accum")},
        }
        return Estimate(
            method=row.label,
            base=summaries[0].base,
            trained=max(summary.trained for summary in summaries),
            stored=summaries[-1].stored,
            **{name: most(name) for name in StepCost._fields},
            settings=settings,
            fit=None if memory is None else self._fit(row, memory, most("total_bytes")),
        )

    def _config_for(self, row: Row) -> ModelConfig:
        """Return the configuration of the model for a method: unrolled by default for one that is told about single blocks."""
        asked = dataclasses.replace(self.run, method=row.method, options=row.options)
        return shapes.with_numerics(self.config, scan=False) if self.run.scan is None and picks_blocks(asked) else self.config

    def _stages(self, row: Row, batch_size: int, remat: Remat) -> list[tuple[Peft, StepCost]]:
        """Return each stage of the method with what its step needs."""
        config = shapes.with_numerics(self._config_for(row), remat=remat)
        loaded = shapes.make_loaded(config, self.folder, self.task, self.labels)
        run = dataclasses.replace(self.run, method=row.method, options=row.options, batch_size=batch_size, remat=remat)
        # The number of steps makes no difference to what one of them needs.
        method = make_method(run, loaded).for_steps(10**9)
        methods = [method, *(later for _, later in shapes.later_methods(method))]
        pefts = [shapes.make_peft(loaded, each) for each in methods]
        return [(peft, step_cost(run, loaded, self.task, peft)) for peft in pefts]

    def _fit(self, row: Row, memory: int, total: int | None) -> Fit:
        """Return what fits into the memory of a device, given the bytes of the step that was asked for."""
        if total is None:
            raise ValueError(f"memory needs a step that is compiled, and the mesh {self.run.mesh!r} has more devices than there are.")
        # Only whole micro-batches on every device.
        mesh = find_any_mesh(self.run)
        unit = self.run.grad_accum * (1 if mesh is None else batch_parts(mesh))

        @functools.cache
        def bytes_of(number: int, remat: Remat) -> int:
            if (number * unit, remat) == (self.run.batch_size, self.config.remat):
                return total
            return max(cost.total_bytes or 0 for _, cost in self._stages(row, number * unit, remat))

        asked = self.run.batch_size // unit
        able: list[Remat] = []
        for each in REMATS[REMATS.index(self.config.remat) :]:
            if not able and bytes_of(asked, each) <= memory:
                able.append(each)
        remat: Remat = able[0] if able else True
        largest = largest_that_fits(lambda number: bytes_of(number, remat), memory, asked)
        return Fit(memory, bool(able), remat, largest * unit)


def _checked_dtype(name: str, dtype: Any) -> str | None:
    """Return the name of a dtype that is given by its name or as one.

    Raises:
      ValueError: for anything that is not float32 or bfloat16.
    """
    try:
        found = None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        found = ""
    if found not in (None, "float32", "bfloat16"):
        raise ValueError(f"{name}={dtype!r} is not one of float32, bfloat16.")
    return found

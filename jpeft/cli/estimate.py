"""`jpeft estimate`: what a training step needs, without a weight."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Annotated, Any, Literal

import jax
import tyro

from jpeft.cli.command import Command
from jpeft.cli.tables import print_table
from jpeft.core.summary import readable_bytes
from jpeft.estimation.estimate import Estimate, estimate
from jpeft.sharding import parse_mesh
from jpeft.training.config import TaskName


@dataclasses.dataclass(frozen=True)
class EstimateArgs:
    """Estimate what a training step needs: parameters, operations and memory (`estimate MODEL lora "lora rank=32" full`).

    The trainer's own step is compiled for shapes: no weights are read, and of a model on the hub config.json alone is downloaded.
    """

    # Folder with a config.json, the file itself, or a hub id.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    # Methods, each with its options in quotes, as rows of `jpeft compare`; "all" stands for every method that applies.
    methods: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="METHOD ...")] = ("lora",)
    # Branch, tag or commit of the model on the hub; none for its main branch.
    revision: str | None = None
    # Task of the model; none for the first that it can be trained for.
    task: TaskName | None = None
    # Number of labels of a head with labels, which counts as newly made.
    labels: int = 2
    # Examples per optimizer step.
    batch_size: int = 16
    # Tokens per example.
    max_length: int = 128
    # Type that the model computes in; none for the trainer's default.
    dtype: Literal["float32", "bfloat16"] | None = None
    # Type of the base's weights; none for the trainer's default.
    param_dtype: Literal["float32", "bfloat16"] | None = None
    # Recompute activations in the backward pass: True, False or dots; none for the trainer's default.
    remat: bool | Literal["dots"] | None = None
    # Run the layers as one loop: True or False; none for the trainer's default.
    scan: bool | None = None
    # Devices by axis, e.g. data=2,fsdp=4; none for one device. They need not exist on a CPU.
    mesh: str | None = None
    # Micro-batches that each batch is split into.
    grad_accum: int = 1
    # Memory of a device, such as 16GiB or 80GB: find out what fits into it; none does not.
    memory: str | None = None
    # Print the numbers as JSON, a list with an object for each method.
    json: bool = False


def _run(args: EstimateArgs) -> None:
    if args.mesh is not None:
        _make_devices(math.prod(parse_mesh(args.mesh).values()))
    options: dict[str, Any] = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    model, methods, as_json = (options.pop(name) for name in ("model", "methods", "json"))
    found = estimate(model, methods, **options)
    if as_json:
        print(json.dumps([each.to_json() for each in found], indent=2))
    elif found:
        print_estimates(found)


def print_estimates(found: list[Estimate]) -> None:
    """Print a row for each method, and what the numbers mean."""
    rows = [_cells(each) for each in found]
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    first = found[0]
    about = first.settings
    where = "one device" if first.devices == 1 else f"one of {first.devices} devices ({about['mesh']})"
    parts = [f"layers {'scanned' if about['scan'] else 'unrolled'}", f"remat={about['remat']}"]
    parts += [f"grad_accum={about['grad_accum']}"] if about["grad_accum"] > 1 else []
    print(
        f"\n{about['task']}, {first.base:,} parameters in {about['param_dtype']}, computed in {about['dtype']}; a step of "
        f"{about['batch_size']} × {about['max_length']} tokens on {where}; {', '.join(parts)}."
    )
    if first.platform:
        print(f"Compiled for {first.platform}; another backend's temporaries are others.")
    else:
        print("Not compiled, because there are fewer devices than the mesh has: temporaries are unknown.")
    if first.fit:
        print(f"Memory {readable_bytes(first.fit.memory)}: the least remat with which the batch fits, and the largest batch with it.")


def _cells(each: Estimate) -> dict[str, str]:
    size = lambda number: "–" if number is None else readable_bytes(number)
    cells = {
        "method": each.method,
        "trained": f"{each.trained:,}",
        "stored": f"{each.stored:,}",
        "GFLOP/step": f"{each.flops * 1e-9:,.4g}",
        "weights": size(each.weights_bytes),
        "adapter": size(each.adapter_bytes),
        "optimizer": size(each.optimizer_bytes),
        "temporaries": size(each.temporary_bytes),
        "total": size(each.total_bytes),
    }
    if each.fit is None:
        return cells
    return cells | {
        "fits": "yes" if each.fit.fits else "no",
        "remat": str(each.fit.remat),
        "largest batch": f"{each.fit.largest_batch:,}",
    }


def _make_devices(count: int) -> None:
    """Have as many CPU devices as a mesh asks for, if JAX runs on the CPU and has not begun."""
    if count > 1:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:  # JAX has begun, with the devices that it has
            return


COMMAND = Command("estimate", EstimateArgs, _run, names={"model": "MODEL", "methods": "METHOD"})

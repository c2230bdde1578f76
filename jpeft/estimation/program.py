"""The trainer's step, compiled for shapes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import jpeft
from jpeft import models, sharding
from jpeft.core.flops import count_flops
from jpeft.core.peft import Peft
from jpeft.estimation.shapes import make_batch
from jpeft.sharding.mesh import AnyMesh, batch_parts
from jpeft.tasks.task import Task
from jpeft.training.config import TrainConfig
from jpeft.training.devices import Devices
from jpeft.training.program import compile_step, make_optimizer
from jpeft.training.schedule import learning_rate_schedule
from jpeft.training.step import make_step


class StepCost(NamedTuple):
    """What one step needs on one device; the fields are those of `jpeft.estimation.estimate.Estimate`."""

    flops: float | None
    weights_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    temporary_bytes: int | None
    total_bytes: int | None
    platform: str
    devices: int


def step_cost(run: TrainConfig, loaded: models.Loaded, task: Task, peft: Peft) -> StepCost:
    """Compile the step of a run and return what it needs. On more devices than there are, its operations alone are counted.

    Args:
      run: The settings of the step.
      loaded: The model, whose parameters may be shapes.
      task: The task.
      peft: Base, adapter and method, as shapes.
    """
    mesh = find_any_mesh(run)
    # The values of the rates make no difference to the program.
    schedule = learning_rate_schedule(run.schedule, 1e-3, 100, run.warmup)
    tx = make_optimizer(run, peft, schedule, loaded.initialised, peft.method.head_lr_scale)
    opt_state = jax.eval_shape(tx.init, peft.adapter)
    batch = make_batch(task, loaded.config, run.batch_size, run.max_length)
    forward = jpeft.wrap(loaded.model.apply, peft.method)
    rest = (jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), np.int32))
    placed = peft if mesh is None else sharding.shard(peft, mesh, models.partition_rules(loaded.model))
    if mesh is not None:
        opt_state = _placed(opt_state, sharding.state_shardings(opt_state, placed.adapter))
    sizes = (_bytes(placed.params), _bytes(placed.adapter), _bytes(opt_state))
    if mesh is not None and not isinstance(mesh, Mesh):
        step = make_step(forward, tx, task, peft, run.grad_accum, run)
        traced = jax.jit(step).trace(peft.adapter, jax.eval_shape(tx.init, peft.adapter), peft.params, batch, *rest)
        return StepCost(count_flops(traced.jaxpr).all / mesh.size, *sizes, None, None, "", mesh.size)
    devices = Devices(mesh)
    if mesh is not None:
        batch = jax.tree.map(lambda leaf: _placed(leaf, sharding.batch_sharding(mesh)), batch)
    arguments = (placed.adapter, opt_state, placed.params, batch, *rest)
    out = devices.out_shardings(placed.adapter, opt_state)
    compiled, found = compile_step(devices.forward(forward), tx, task, placed, run, arguments, out)
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes if memory else None
    total = None if held is None or found.temporary_bytes is None else int(held) + found.temporary_bytes
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return StepCost(found.flops, *sizes, found.temporary_bytes, total, platform, 1 if mesh is None else mesh.size)


def find_any_mesh(run: TrainConfig) -> AnyMesh | None:
    """Return the mesh of a run, of devices that are there or, if they are too few, of none; None for one device.

    Raises:
      ValueError: if the sizes do not fit the devices, or the batch does not fit the mesh.
    """
    if run.mesh is None:
        return None
    sizes: dict[str, Any] = sharding.parse_mesh(run.mesh)
    count = math.prod(sizes.values()) if -1 not in sizes.values() else jax.device_count()
    if count > jax.device_count():
        mesh: AnyMesh = sharding.abstract_mesh(count, **{"data": 1, "fsdp": 1} | sizes)
    else:
        mesh = sharding.make_mesh(**{"data": 1} | sizes, devices=jax.devices()[:count])
    rows = run.batch_size // run.grad_accum
    if rows % batch_parts(mesh):
        what = "batch_size" if run.grad_accum == 1 else "batch_size / grad_accum"
        raise ValueError(f"{what}={rows} cannot be split over data * fsdp = {batch_parts(mesh)} devices of the mesh {run.mesh!r}.")
    return mesh


def _placed(tree: Any, where: Any) -> Any:
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, where)


def _bytes(tree: Any) -> int:
    """Return the bytes of some arrays on one device."""
    shape = lambda leaf: leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return sum(math.prod(shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

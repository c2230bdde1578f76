"""Meshes of devices with the axes data, fsdp and tensor, and batches on them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jpeft.core.limits import Range
from jpeft.core.options import fits
from jpeft.distributed import place

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
AnyMesh = Mesh | AbstractMesh

_TYPES = (AxisType.Auto,) * len(AXES)


def make_mesh(*, data: int | None = None, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these devices; neighbours in the hardware share the last axis, ``tensor``, which communicates most.

    Args:
      data: Groups that hold the weights each for itself and share out the batch; by default -1, or 1 if another size is -1.
      fsdp: Parts that the weights, and the batch, are split into.
      tensor: Parts that each layer's computation is split into.
      devices: All of every process by default.

    Raises:
      ValueError: unless the sizes multiply to the number of devices. One of them may be -1: what is left.

    >>> dict(make_mesh().shape) == {"data": len(jax.devices()), "fsdp": 1, "tensor": 1}
    True
    """
    devices = list(jax.devices() if devices is None else devices)
    data = (1 if -1 in (fsdp, tensor) else -1) if data is None else data
    return jax.make_mesh(_sizes(len(devices), data, fsdp, tensor), AXES, _TYPES, devices=devices)


def abstract_mesh(devices: int, *, data: int = 1, fsdp: int = -1, tensor: int = 1) -> AbstractMesh:
    """A mesh of that many devices which need not exist, for `plan` and for ahead-of-time compilation.

    Raises:
      ValueError: as `make_mesh`.

    >>> abstract_mesh(256, tensor=8).shape["fsdp"]
    32
    """
    return AbstractMesh(_sizes(devices, data, fsdp, tensor), AXES, axis_types=_TYPES)


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes in ``"data=2,fsdp=4"``, as keyword arguments of `make_mesh`. Axes that are not named keep their defaults.

    Raises:
      ValueError: for another form, an unknown axis, or one that is given twice.

    >>> parse_mesh("data=2,fsdp=4")
    {'data': 2, 'fsdp': 4}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or re.fullmatch(r"-1|[0-9]{1,9}", size) is None:
            raise ValueError(f"mesh {text!r}: {part!r} is not AXIS=SIZE with each of {', '.join(AXES)} at most once, as in data=2,fsdp=4.")
        sizes[name] = int(size)
    if not sizes:
        raise ValueError(f"mesh {text!r} names no axis: give sizes as in data=2,fsdp=4.")
    return sizes


def batch_axes(mesh: AnyMesh) -> tuple[str, ...]:
    """The mesh's axes that a batch is split over."""
    return tuple(name for name in (DATA, FSDP) if name in mesh.shape)


def batch_parts(mesh: AnyMesh) -> int:
    """Number of parts that a batch is split into."""
    return math.prod(mesh.shape[name] for name in batch_axes(mesh))


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """The first axis of every array of a batch over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, P(batch_axes(mesh)))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch of NumPy or JAX arrays on the mesh, split along its first axis.

    Raises:
      ValueError: if the number of examples is no multiple of data * fsdp.
    """
    parts = batch_parts(mesh)
    sizes = sorted({len(leaf) for leaf in jax.tree.leaves(batch)})
    if any(size % parts for size in sizes):
        raise ValueError(f"A batch of {sizes} examples cannot be split into data * fsdp = {parts} equal parts; choose a multiple.")
    return jax.tree.map(lambda leaf: place(leaf, batch_sharding(mesh)), batch)


def shard_rows(arrays: Mapping[str, np.ndarray], rows: np.ndarray, mesh: Mesh) -> dict[str, jax.Array]:
    """The batch of these rows on the mesh, split along its first axis. A process reads only the rows that its own devices hold.

    Args:
      arrays: Columns [N, ...], in every process.
      rows: Numbers of the batch's rows, in every process the same.
      mesh: As for `shard_batch`, which gives the same from the whole batch.

    >>> mesh = make_mesh(data=1, devices=jax.devices()[:1])
    >>> shard_rows({"x": np.arange(5) * 10}, np.array([3, 1]), mesh)["x"].tolist()
    [30, 10]
    """
    where = batch_sharding(mesh)

    def column(values: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return values[rows[index[0]]]

        return jax.make_array_from_callback((len(rows), *values.shape[1:]), where, part)

    return {name: column(values) for name, values in arrays.items()}


def _sizes(count: int, data: int, fsdp: int, tensor: int) -> tuple[int, ...]:
    sizes = {DATA: data, FSDP: fsdp, TENSOR: tensor}
    shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(not fits(size, Annotated[int, Range(-1)]) or size == 0 for size in sizes.values()):
        raise ValueError(f"mesh {shown}: sizes are at least 1, and one of them may be -1, for the devices that are left.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if rest:
        sizes[rest[0]] = count // known
    if math.prod(sizes.values()) != count or 0 in sizes.values():
        asks = f"asks for a multiple of {known}" if rest else f"asks for {known}"
        raise ValueError(f"mesh {shown} {asks} devices, and there are {count}. Sizes must multiply to that; -1 stands for what is left.")
    return tuple(sizes.values())

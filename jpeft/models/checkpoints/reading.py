"""Reads the parameters that a plan names, onto the devices of a mesh if asked, and makes the others."""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jpeft import distributed
from jpeft.models.checkpoints.layout import Entry
from jpeft.models.checkpoints.plan import Plan
from jpeft.models.checkpoints.tensors import Tensors
from jpeft.models.common.config import ModelConfig
from jpeft.tree.paths import unflatten

Shard = Callable[[Entry], NamedSharding]


def read_params(tensors: Tensors, plan: Plan, key: jax.Array, shard: Shard | None) -> dict[str, Any]:
    """Return all parameters of a plan.

    Args:
      tensors: of the checkpoint.
      plan: what is read and what is newly initialised.
      key: for what is newly initialised.
      shard: where each parameter goes; None for the default device.

    Raises:
      ValueError: if a tensor is damaged or holds NaN or infinite values.
    """
    params: dict[str, jax.Array] = {}
    config: ModelConfig = plan.model.config  # pyright: ignore[reportAttributeAccessIssue]
    for entry in plan.layout:
        rows = plan.rows_of(entry)
        if entry.path in plan.fresh:
            leaf = _initialise(entry, config, key)
        elif shard is not None and rows is None:
            params[entry.path] = _read_shards(entry, tensors, shard(entry))
            continue
        else:
            whole = _aligned(entry.shape, entry.dtype)
            entry.fill(whole, tensors.read)
            _check_finite(whole, entry, tensors)
            leaf = jnp.asarray(whole if rows is None else whole[..., list(rows)])
        params[entry.path] = leaf if shard is None else distributed.place(leaf, shard(entry))
    return unflatten(params)


def _read_shards(entry: Entry, tensors: Tensors, sharding: NamedSharding) -> jax.Array:
    """Return a parameter on its mesh.

    Each part that this process's devices hold is read once, even if several devices hold it, and freed once it is on them.
    """
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}  # (start, stop) for each axis of a part -> the devices that hold it
    for device, index in sharding.addressable_devices_indices_map(entry.shape).items():
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index or (), entry.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        names, part = entry.find_part(tuple(slice(*bound) for bound in bounds))
        leaf = _aligned(tuple(stop - start for start, stop in bounds), entry.dtype)
        entry.fill(leaf, functools.partial(tensors.read, part=part), names)
        _check_finite(leaf, entry, tensors)
        shards += [jax.device_put(leaf, device) for device in devices]
    tensors.release()
    return jax.make_array_from_single_device_arrays(entry.shape, sharding, shards)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised array that begins where a CPU's device arrays do, so that JAX takes it over there without a copy."""
    size, alignment = math.prod(shape) * np.dtype(dtype).itemsize, 64
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)


def _check_finite(leaf: np.ndarray, entry: Entry, tensors: Tensors) -> None:
    """Raise a ValueError for NaN and infinite values, which make every output of a model NaN.

    The values are looked at some at a time, so that no mask of the leaf's size is made.
    """
    flat, some = leaf.reshape(-1), 2**20
    finite = sum(int(np.count_nonzero(np.isfinite(flat[start : start + some]))) for start in range(0, leaf.size, some))
    if finite < leaf.size:
        count = leaf.size - finite
        where, name = " and others" if len(entry.names) > 1 else "", next(iter(entry.names))
        raise ValueError(
            f"{tensors.file(name)}: {name}{where} holds {count:,} values of {leaf.size:,} that are NaN or infinite (as "
            f"{leaf.dtype}): the checkpoint is damaged, or its training diverged."
        )


def _initialise(entry: Entry, config: ModelConfig, key: jax.Array) -> jax.Array:
    """Return a fresh parameter as Hugging Face initialises it: kernels N(0, initializer_range²), scales of norms 1, biases 0."""
    last = entry.path.rsplit("/", 1)[-1]
    if last == "kernel":
        # The key depends on the path, so that the values do not depend on which other parameters are missing.
        key = jax.random.fold_in(key, zlib.crc32(entry.path.encode()))
        return (config.initializer_range * jax.random.normal(key, entry.shape, jnp.float32)).astype(entry.dtype)
    return jnp.full(entry.shape, 1 if last == "scale" else 0, entry.dtype)

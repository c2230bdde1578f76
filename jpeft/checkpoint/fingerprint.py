"""A fingerprint of parameters: exact, cheap, and the same on every device and sharding."""

import hashlib
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.tree.paths import Params, flatten


def fingerprint(params: Params, *, skip: frozenset[str] = frozenset(), exact_dtypes: bool = True) -> str:
    """A digest of the paths, shapes, dtypes and bits of all leaves.

    Each leaf's bits are summed with position-dependent odd weights modulo 2^32. Integer sums are exact and do not depend on their order,
    so the digest is the same however the leaf is sharded, and no host ever needs the whole of it.

    Args:
      params: Any pytree of arrays.
      skip: Paths to leave out, such as leaves that an adapter replaces.
      exact_dtypes: Whether a tree of the same numbers in a wider dtype is another tree. Without, half precision counts as float32.

    >>> import jax.numpy as jnp
    >>> fingerprint({"a": jnp.ones(3)}) == fingerprint({"a": jnp.ones(3)})
    True
    >>> fingerprint({"a": jnp.ones(3)}) == fingerprint({"a": jnp.zeros(3)})
    False
    """
    leaves = {path: lambda leaf=leaf: jnp.asarray(leaf) for path, leaf in flatten(params).items()}
    return fingerprint_of(leaves, skip=skip, exact_dtypes=exact_dtypes)


def fingerprint_of(leaves: Mapping[str, Callable[[], jax.Array]], *, skip: frozenset[str], exact_dtypes: bool) -> str:
    """Do what `fingerprint` does for leaves that are made one after the other."""
    sums, kinds = {}, {}
    for path in sorted(leaves.keys() - skip):
        leaf = leaves[path]()
        wide = not exact_dtypes and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
        sums[path] = _wide_digest(leaf) if wide else _digest(leaf)
        kinds[path] = f"{tuple(leaf.shape)} {'float32' if wide else leaf.dtype}"
    sums = jax.device_get(sums)
    lines = (f"{path} {kinds[path]} {int(sums[path]):08x}" for path in sums)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def leaf_table(tree: Any) -> dict[str, list[Any]]:
    """``{path: [shape, dtype]}`` of all leaves, for a checkpoint's own record."""
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in flatten(tree).items()}


def file_checksums(folder: Path, *, skip: str = "") -> dict[str, int]:
    """CRC-32 of every file below a folder, but the one called `skip`: what was cut short, lost or changed is found before it is opened."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != skip)
    return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in files}


def damaged_files(folder: Path, saved: Mapping[str, int], *, skip: str = "") -> list[str]:
    """The files of a folder that are not as they were saved, or are missing, or were not there."""
    found = file_checksums(folder, skip=skip)
    return sorted(name for name in saved.keys() | found.keys() if saved.get(name) != found.get(name))


@jax.jit
def _wide_digest(leaf: jax.Array) -> jax.Array:
    """The digest of the same numbers in float32, which are formed inside of the sum."""
    return _digest(leaf.astype(jnp.float32))


@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    flat = leaf.reshape(-1)
    if jnp.issubdtype(flat.dtype, jnp.complexfloating):
        flat = jnp.concatenate([flat.real, flat.imag])
    if flat.dtype == jnp.bool_:
        flat = flat.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[flat.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(flat, unsigned).astype(jnp.uint32)  # 8-byte values become two words each
    position = jax.lax.broadcasted_iota(jnp.uint32, (flat.size,), 0).reshape((-1,) + (1,) * (bits.ndim - 1))
    mixed = (position * jnp.uint32(2654435761)) ^ (position >> 15)
    return jnp.sum((bits + jnp.uint32(0x9E3779B9)) * (mixed | jnp.uint32(1)), dtype=jnp.uint32)

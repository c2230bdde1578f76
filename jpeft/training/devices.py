"""The devices of a run: JAX's default one, or a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jpeft import sharding
from jpeft.core.peft import Peft
from jpeft.training.config import Settings


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where a run keeps its arrays; without a mesh everything stays as it is."""

    mesh: Mesh | None = None
    # How the base is split over the mesh.
    rules: sharding.Rules = ()

    def put(self, peft: Peft) -> Peft:
        """Base and adapter in their places."""
        return peft if self.mesh is None else sharding.shard(peft, self.mesh, self.rules)

    def forward(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The model, its activations split by examples."""
        return fn if self.mesh is None else sharding.by_example(fn, self.mesh)

    def batch(self, batch: PyTree) -> PyTree:
        """A batch, split by examples."""
        return batch if self.mesh is None else sharding.shard_batch(batch, self.mesh)

    def rows(self, arrays: Mapping[str, np.ndarray], rows: np.ndarray) -> PyTree:
        """The batch of these rows, split by examples; of several processes each reads its own rows only."""
        if self.mesh is None:
            return {name: column[rows] for name, column in arrays.items()}
        return sharding.shard_rows(arrays, rows, self.mesh)

    def state(self, tx: optax.GradientTransformation, adapter: PyTree) -> PyTree:
        """A new optimizer state beside its adapter."""
        if self.mesh is None:
            return tx.init(adapter)
        return jax.jit(tx.init, out_shardings=sharding.state_shardings(jax.eval_shape(tx.init, adapter), adapter))(adapter)

    def places(self, *trees: PyTree) -> PyTree:
        """Where these are, for the first outputs of a jitted function that gives one more; None leaves it to XLA."""
        return None if self.mesh is None else (*jax.tree.map(lambda leaf: leaf.sharding, trees), None)


def find_mesh(settings: Settings) -> Mesh | None:
    """The mesh that the settings name; None for the default device.

    Raises:
        ValueError: if it does not fit the devices there are, or the batch does not fit it.
    """
    if settings.mesh is None:
        if jax.process_count() > 1:
            raise ValueError(
                f"{jax.process_count()} processes train one model on a mesh of all their devices: give one, e.g. mesh='data=-1'"
            )
        return None
    sizes: dict[str, Any] = sharding.parse_mesh(settings.mesh)
    mesh = sharding.make_mesh(**sizes)
    parts, rows = mesh.size // mesh.shape["tensor"], settings.batch_size // settings.grad_accum
    if rows % parts:
        what = "batch_size" if settings.grad_accum == 1 else "batch_size / grad_accum"
        raise ValueError(f"{what}={rows} cannot be split over data * fsdp = {parts} devices of the mesh {settings.mesh!r}")
    return mesh

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
    """Where a run keeps its arrays. Without a mesh, every method returns its argument.

    Attributes:
      mesh: The mesh; None for JAX's default device.
      rules: How the base is split over the mesh.
    """

    mesh: Mesh | None = None
    rules: sharding.Rules = ()

    def put(self, peft: Peft) -> Peft:
        """Put base and adapter onto the mesh."""
        return peft if self.mesh is None else sharding.shard(peft, self.mesh, self.rules)

    def forward(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return the model with its activations split by examples."""
        return fn if self.mesh is None else sharding.by_example(fn, self.mesh)

    def batch(self, batch: PyTree) -> PyTree:
        """Put a batch onto the mesh, split by examples."""
        return batch if self.mesh is None else sharding.shard_batch(batch, self.mesh)

    def rows(self, arrays: Mapping[str, np.ndarray], rows: np.ndarray) -> PyTree:
        """Return the batch of these rows, split by examples. Each of several processes reads the rows of its own devices only."""
        if self.mesh is None:
            return {name: column[rows] for name, column in arrays.items()}
        return sharding.shard_rows(arrays, rows, self.mesh)

    def state(self, tx: optax.GradientTransformation, adapter: PyTree) -> PyTree:
        """Return a new optimizer state, split like its adapter."""
        if self.mesh is None:
            return tx.init(adapter)
        return jax.jit(tx.init, out_shardings=sharding.state_shardings(jax.eval_shape(tx.init, adapter), adapter))(adapter)

    def out_shardings(self, *trees: PyTree) -> PyTree:
        """Return `out_shardings` of a jitted function whose first outputs are placed like `trees` and whose last one is free."""
        return None if self.mesh is None else (*jax.tree.map(lambda leaf: leaf.sharding, trees), None)


def find_mesh(settings: Settings) -> Mesh | None:
    """Return the mesh that the settings name; None for the default device.

    Raises:
      ValueError: if the mesh does not fit the devices, or the batch does not fit the mesh.
    """
    if settings.mesh is None:
        if jax.process_count() > 1:
            raise ValueError(
                f"{jax.process_count()} processes train one model on a mesh of all their devices: give one, e.g. mesh='data=-1'."
            )
        return None
    sizes: dict[str, Any] = sharding.parse_mesh(settings.mesh)
    mesh = sharding.make_mesh(**sizes)
    parts, rows = mesh.size // mesh.shape["tensor"], settings.batch_size // settings.grad_accum
    if rows % parts:
        what = "batch_size" if settings.grad_accum == 1 else "batch_size / grad_accum"
        raise ValueError(f"{what}={rows} cannot be split over data * fsdp = {parts} devices of the mesh {settings.mesh!r}.")
    return mesh

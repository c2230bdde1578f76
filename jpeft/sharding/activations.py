"""Activations on a mesh: split by examples, wherever they are."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ..hosts import linen
from .mesh import Mesh, batch_axes, batch_parts


def by_example(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A model whose layers' outputs stay split by examples over ``data`` and ``fsdp``; same arguments, same results.

    XLA chooses the placement of everything between inputs and outputs. A kernel whose inputs are split over ``fsdp`` may be gathered when
    its layer runs, which is what ``fsdp`` is for, or else the activations may be exchanged and summed, for every layer and token. This
    leaves no choice: the first axis of each output of each linen module is held in place, if it is as long as the batch. All other axes,
    ``tensor`` included, are XLA's as before.

    Args:
      fn: ``model.apply`` or `jpeft.wrap` of it, called with variables, then arrays whose first axis is the batch.
      mesh: As for the parameters.

    Returns:
      A function with the signature of `fn`. Of a function that runs no linen modules only the result is held.

    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from jpeft import sharding
    >>> model, x = nn.Dense(4), jnp.ones((8, 2))
    >>> forward = sharding.by_example(model.apply, sharding.make_mesh())
    >>> jax.jit(forward)(model.init(jax.random.key(0), x), x).shape
    (8, 4)
    """

    def forward(variables: Any, *args: Any, **kwargs: Any) -> Any:
        arrays = [leaf for leaf in jax.tree.leaves((args, kwargs)) if getattr(leaf, "ndim", 0)]
        if not arrays or arrays[0].shape[0] % batch_parts(mesh):
            return fn(variables, *args, **kwargs)
        examples = arrays[0].shape[0]

        def hold(leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array) or not leaf.ndim or leaf.shape[0] != examples:
                return leaf
            spec = P(batch_axes(mesh), *[P.UNCONSTRAINED] * (leaf.ndim - 1))
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

        return jax.tree.map(hold, linen.mapped(fn, lambda outputs: jax.tree.map(hold, outputs))(variables, *args, **kwargs))

    return forward

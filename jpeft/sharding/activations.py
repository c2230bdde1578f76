"""Activations and gradients on a mesh: split by examples, wherever they are."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpeft.hosts import linen
from jpeft.sharding.mesh import DATA, Mesh, batch_axes, batch_parts
from jpeft.tree.kernels import STACKED
from jpeft.tree.paths import flatten


def by_example(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A model whose layers' outputs stay split by examples over ``data`` and ``fsdp``; same arguments, same results.

    XLA chooses the placement of everything between inputs and outputs. A kernel whose inputs are split over ``fsdp`` may be gathered when
    its layer runs, which is what ``fsdp`` is for, or else the activations may be exchanged and summed, for every layer and token. This
    leaves no choice: the first axis of each output of each linen module is held in place, if it is as long as the batch. All other axes,
    ``tensor`` included, are XLA's as before.

    A method whose adapter's gradient is worked out of larger ones (`Method.reduces`) runs by itself on each part of the batch. Every part
    then has a gradient of the adapter, and these are summed, once for each leaf; XLA would sum the large ones and then reduce the sum. A
    weight that the adapter changes is then whole on every device, so if layers are stacked, which would be all of them at once, only the
    parts that ``data`` makes run by themselves. Each draws its own dropout masks, which here, and only here, depend on the number of parts.

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
    reduces = getattr(getattr(fn, "method", None), "reduces", False)

    def forward(variables: Any, *args: Any, **kwargs: Any) -> Any:
        arrays = [leaf for leaf in jax.tree.leaves((args, kwargs)) if getattr(leaf, "ndim", 0)]
        if not arrays or arrays[0].shape[0] % batch_parts(mesh):
            return fn(variables, *args, **kwargs)
        examples = arrays[0].shape[0]
        alone = _alone(variables["params"], mesh) if reduces else ()
        if alone and _by_example(jax.eval_shape(lambda variables: fn(variables, *args, **kwargs), variables), examples):
            return _each_part(fn, mesh, alone, examples)(variables, *args, **kwargs)
        return _held(fn, mesh, batch_axes(mesh), examples)(variables, *args, **kwargs)

    return forward


def _alone(params: Any, mesh: Mesh) -> tuple[str, ...]:
    """The axes whose parts of a batch run by themselves."""
    stacked = any(re.fullmatch(STACKED, path) for path in flatten(params))
    return tuple(name for name in batch_axes(mesh) if mesh.shape[name] > 1 and (name == DATA or not stacked))


def _by_example(tree: Any, examples: int) -> bool:
    """Whether all of a tree is arrays whose first axis is the batch."""
    return all(getattr(leaf, "ndim", 0) and leaf.shape[0] == examples for leaf in jax.tree.leaves(tree))


def _held(fn: Callable[..., Any], mesh: Mesh, axes: tuple[str, ...], examples: int) -> Callable[..., Any]:
    """`fn` with the first axis of its layers' outputs and of its own held on these axes of the mesh."""

    def hold(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or not leaf.ndim or leaf.shape[0] != examples:
            return leaf
        spec = P(axes, *[P.UNCONSTRAINED] * (leaf.ndim - 1))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    run = linen.mapped(fn, lambda outputs: jax.tree.map(hold, outputs))
    return lambda *args, **kwargs: jax.tree.map(hold, run(*args, **kwargs))


def _each_part(fn: Callable[..., Any], mesh: Mesh, axes: tuple[str, ...], examples: int) -> Callable[..., Any]:
    """`fn` mapped over the parts of a batch that these axes make; what is on the others stays XLA's.

    The adapter is repeated along the axis of parts, and that axis split, so that it is on every device as before. The transpose of that is
    a sum over the parts at this very place: of the adapter's gradients.
    """
    parts, rest = math.prod(mesh.shape[name] for name in axes), tuple(name for name in batch_axes(mesh) if name not in axes)

    def apart(leaf: jax.Array, *spec: Any) -> jax.Array:
        """The first axis split by parts."""
        spec = (*spec, *[P.UNCONSTRAINED] * (leaf.ndim - 1 - len(spec)))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P(axes, *spec)))

    def forward(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        rngs = kwargs.pop("rngs", None)
        keys = jax.tree.map(lambda key: jax.random.split(key, parts), rngs)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        split = [getattr(leaf, "ndim", 0) > 0 and leaf.shape[0] == examples for leaf in leaves]
        batch = [
            apart(leaf.reshape(parts, examples // parts, *leaf.shape[1:]), rest) for leaf, ours in zip(leaves, split, strict=True) if ours
        ]
        adapter = jax.tree.map(lambda leaf: apart(jnp.repeat(leaf[None], parts, 0)), {**variables, "params": {}})

        def part(adapter: Any, keys: Any, batch: list[Any]) -> Any:
            mine = iter(batch)
            args, kwargs = treedef.unflatten([next(mine) if ours else leaf for leaf, ours in zip(leaves, split, strict=True)])
            kwargs |= {} if rngs is None else {"rngs": keys}
            return _held(fn, mesh, rest, examples // parts)({**adapter, "params": variables["params"]}, *args, **kwargs)

        outputs = jax.vmap(part, spmd_axis_name=axes)(adapter, keys, batch)
        return jax.tree.map(lambda leaf: leaf.reshape(examples, *leaf.shape[2:]), outputs)

    return forward

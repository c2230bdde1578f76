"""Activations and gradients on a mesh: split by examples, wherever they are."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpeft.core.peft import Peft
from jpeft.hosts import registry as hosts
from jpeft.sharding.mesh import DATA, Mesh, batch_axes, batch_parts
from jpeft.tree.kernels import STACKED
from jpeft.tree.paths import flatten


def by_example(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A model whose layers' outputs stay split by examples over ``data`` and ``fsdp``; same arguments, same results.

    XLA chooses the placement of everything between inputs and outputs. A kernel whose inputs are split over ``fsdp`` may be gathered when
    its layer runs, which is what ``fsdp`` is for, or else the activations may be exchanged and summed, for every layer and token. This
    leaves no choice: the first axis of each output of each module is held in place, if it is as long as the batch. All other axes,
    ``tensor`` included, are XLA's as before.

    A method whose adapter's gradient is computed from larger gradients (`Method.reduce_grads_locally`) runs separately on each part of the
    batch. Every part then has a gradient of the adapter, and these are summed, once for each leaf; XLA would sum the large gradients and
    then reduce the sum. A weight that the adapter changes is then whole on every device. If layers are stacked, these would be the weights
    of all layers at once, so then only the parts along ``data`` run separately. Each part draws its own dropout masks, which here, and only
    here, depend on the number of parts.

    Args:
      fn: ``model.apply`` or `jpeft.wrap` of it, called with variables or a `Peft`, then with arrays whose first axis is the batch.
      mesh: As for the parameters.

    Returns:
      A function with the signature of `fn`. Of a function whose modules no host knows only the result is held.

    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from jpeft import sharding
    >>> model, x = nn.Dense(4), jnp.ones((8, 2))
    >>> forward = sharding.by_example(model.apply, sharding.make_mesh())
    >>> jax.jit(forward)(model.init(jax.random.key(0), x), x).shape
    (8, 4)
    """

    def forward(variables: Any, *args: Any, **kwargs: Any) -> Any:
        run, method = fn, getattr(fn, "method", None)
        if isinstance(variables, Peft):
            run, method = _of_variables(fn, variables), variables.method
            variables = {**(kwargs.pop("collections", None) or {}), **variables.variables}
        arrays = [leaf for leaf in jax.tree.leaves((args, kwargs)) if getattr(leaf, "ndim", 0)]
        if not arrays or arrays[0].shape[0] % batch_parts(mesh):
            return run(variables, *args, **kwargs)
        examples = arrays[0].shape[0]
        alone = _alone(variables["params"], mesh) if method is not None and method.reduce_grads_locally else ()
        if alone and _by_example(jax.eval_shape(lambda variables: run(variables, *args, **kwargs), variables), examples):
            return _each_part(run, mesh, alone, examples)(variables, *args, **kwargs)
        return _held(run, mesh, batch_axes(mesh), examples)(variables, *args, **kwargs)

    return forward


def _of_variables(fn: Callable[..., Any], peft: Peft) -> Callable[..., Any]:
    """A function of a `Peft` as a function of its variables, whose collections can be placed and mapped over one by one."""

    @functools.wraps(fn)
    def run(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        adapter = peft.method.from_collections(variables)
        own = {"params", *peft.method.to_collections(adapter)}
        others = {name: tree for name, tree in variables.items() if name not in own}
        return fn(peft.replace(params=variables["params"], adapter=adapter), *args, **({"collections": others} if others else {}), **kwargs)

    return run


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

    run = hosts.map_outputs(fn, lambda outputs: jax.tree.map(hold, outputs))
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

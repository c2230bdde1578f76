"""A method of a bound linen module as a pure function of the arrays that it reads.

linen modules cannot be called inside of JAX's own transformations, such as `jax.lax.scan` and `jax.vjp`. And what goes around layers, a
method of jpeft for one, is an interceptor of the thread, which is gone when a custom derivative is traced later, as it is in
``jax.grad(jax.jit(apply))``. So the method is traced at once, in a copy of the module that has the same path.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval
from jaxtyping import Array

DROPOUT = "dropout"  # name of the random stream


class TracedMethod(NamedTuple):
    """A traced method.

    Attributes:
      run: ``(reads, input, key) -> output``.
      reads: The arrays among the module's variables that the method reads.
      key: A key for dropout; None where the call draws no random numbers.
    """

    run: Callable[[tuple[Array, ...], Array, Array | None], Array]
    reads: tuple[Array, ...]
    key: Array | None


def trace_method(module: nn.Module, method: str, example: jax.ShapeDtypeStruct) -> TracedMethod:
    """Return a method of a bound module that takes one array, with whatever goes around its layers now.

    Args:
      module: The module; its parameters exist already.
      method: Name of the method.
      example: Shape and dtype of the input.
    """
    key = module.make_rng(DROPOUT) if module.has_rng(DROPOUT) else None
    leaves, structure = jax.tree.flatten(dict(module.variables))

    def apply(leaves: list[Array], x: Array, key: Array | None) -> Array:
        variables = {name: _nested(tree, module.path) for name, tree in structure.unflatten(leaves).items()}
        return flax.core.apply(lambda scope: _at(module, scope, method)(x))(variables, rngs=None if key is None else {DROPOUT: key})

    closed = jax.make_jaxpr(apply)(jax.tree.map(_shape, leaves), example, jax.tree.map(_shape, key))
    # Only what is read counts: a module's variables are all that is below it, such as the blocks of a decoder whose embedding is the head.
    others = [example] if key is None else [example, key]
    program, used = partial_eval.dce_jaxpr(closed.jaxpr, [True], [False] * len(leaves) + [True] * len(others))
    reads = tuple(leaf for leaf, is_read in zip(leaves, used) if is_read)
    # An array that a layer closes over is an argument too, so that it can be differentiated. Numbers of NumPy are constants.
    closed_over = {i: const for i, const in enumerate(closed.consts) if isinstance(const, jax.Array)}
    constants = {i: const for i, const in enumerate(closed.consts) if i not in closed_over}

    def run(reads: tuple[Array, ...], x: Array, key: Array | None) -> Array:
        consts = constants | dict(zip(closed_over, reads))
        inputs = [*reads[len(closed_over) :], x, *([] if key is None else [key])]
        (out,) = jaxpr_as_fun(ClosedJaxpr(program, [consts[i] for i in range(len(consts))]))(*inputs)
        return out

    return TracedMethod(run, (*closed_over.values(), *reads), key)


def _at(module: nn.Module, scope: flax.core.Scope, method: str) -> Callable[[Array], Array]:
    """Return a method of the module as it is at its path below a scope."""
    for name in module.path:
        scope = scope.push(name)
    return getattr(module.clone(parent=scope), method)


def _nested(tree: Any, path: tuple[str, ...]) -> Mapping[str, Any]:
    for name in reversed(path):
        tree = {name: tree}
    return tree


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

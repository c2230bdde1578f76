"""What a gradient costs, against what an adapter needs."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

from jpeft.core.flops import count_flops
from jpeft.hosts.check.subject import Subject
from jpeft.tree.kernels import axes_of
from jpeft.tree.paths import Params, flatten

# Full fine-tuning takes 3 forward passes where an adapter takes 2, so from here on the price is not an adapter's.
TOO_MUCH = 1.2


class GradientCost(NamedTuple):
    """Floating point operations, counted in the programs as they were traced.

    Attributes:
      forward: Of the model as it is.
      gradient: Of the model with the method, and of the adapter's gradient.
      needed: What an adapter needs: the forward pass with it, as much again for the gradients of activations (and for what the model
        recomputes), and 4 for each of its numbers and each position of the inputs.
      whole: Kernels whose whole gradient is formed on the way, as full fine-tuning forms it.
    """

    forward: float
    gradient: float
    needed: float
    whole: tuple[str, ...]

    @property
    def passes(self) -> float:
        """The price in forward passes."""
        return self.gradient / self.forward if self.forward else math.nan

    @property
    def is_high(self) -> bool:
        """Whether the gradient costs more than an adapter's, because whole gradients of kernels are formed."""
        return bool(self.whole)


def gradient_cost(subject: Subject) -> GradientCost:
    """Count it; nothing is computed."""
    params, adapter = subject.peft.params, subject.peft.adapter
    forward, with_method = (count_flops(program.jaxpr).all for program in (subject.base_program, subject.program))
    traced = subject.gradient_program.jaxpr
    positions = forward / max(1, 2 * _in_products(params))
    # A model that recomputes its activations runs once more.
    passes = 3 if any(name in ("checkpoint", "remat", "remat2") for name in _primitives(subject.program.jaxpr.jaxpr)) else 2
    needed = passes * max(forward, with_method) + 4 * positions * sum(leaf.size for leaf in flatten(adapter).values())
    gradient = count_flops(traced).all
    whole = _whole(traced, params, subject.places[1], positions) if gradient > TOO_MUCH * needed else ()
    return GradientCost(forward, gradient, needed, whole)


def _in_products(params: Params) -> int:
    """How many parameters are factors of products. Embeddings are looked up."""
    return sum(leaf.size for path, leaf in flatten(params).items() if leaf.ndim > 1 and not path.endswith("embedding"))


def _whole(traced: ClosedJaxpr, params: Params, beside: tuple[str, ...], positions: float) -> tuple[str, ...]:
    """The kernels with leaves beside them that a product over about all positions has the size of."""
    alive, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    sizes = {size for size, contracted in _products(alive) if contracted > positions / 2}
    base = flatten(params)
    return tuple(path for path in beside if _sizes(path, base[path]) & sizes)


def _sizes(path: str, kernel: Any) -> set[int]:
    """The size of a kernel, with its stack and of one layer alone."""
    try:
        stack = axes_of(path, kernel.shape).stack
    except ValueError:  # a layout that only the model knows
        stack = ()
    return {kernel.size, kernel.size // math.prod(kernel.shape[axis] for axis in stack)}


def _products(jaxpr: Jaxpr) -> Iterator[tuple[int, int]]:
    """Size and length of the sums of every product."""
    for equation in _equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            yield equation.outvars[0].aval.size, math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)


def _primitives(jaxpr: Jaxpr) -> Iterator[str]:
    return (equation.primitive.name for equation in _equations(jaxpr))


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """All equations, those in loops and functions inside too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, (ClosedJaxpr, Jaxpr))):
            if isinstance(value, (ClosedJaxpr, Jaxpr)):
                yield from _equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)

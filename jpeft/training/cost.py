"""The cost of a compiled function as XLA counts it, which unlike time is exact."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """The cost of one call.

    Attributes:
      flops: Floating point operations. XLA counts the body of a loop once, however often it runs.
      temporary_bytes: Peak of the memory that exists only during the call: activations and gradients, not arguments and results.
    """

    flops: float | None
    temporary_bytes: int | None


class StageCost(NamedTuple):
    """What one stage of a run did, and what its step cost.

    Attributes:
      name: Name of the stage; empty for the first.
      begin: Steps done before it.
      end: Steps done after it.
      trained: Scalars that the optimizer moved.
      flops: Floating point operations of a step. None with grad_accum or scan, because XLA counts the body of a loop once.
      temporary_bytes: Peak of a step's temporary memory.
    """

    name: str
    begin: int
    end: int
    trained: int
    flops: float | None
    temporary_bytes: int | None


def largest(stages: Iterable[StageCost], number: str) -> Any:
    """Return the largest value of a number over the stages that have it; None if none has.

    >>> largest([StageCost("", 0, 5, 40, None, 9), StageCost("fixed", 5, 10, 2, None, 7)], "trained")
    40
    """
    return max((value for stage in stages if (value := getattr(stage, number)) is not None), default=None)


def cost(compiled: Any) -> Cost:
    """Return the cost of ``jax.jit(fn).lower(...).compile()``; None for numbers that the backend does not report.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((8, 8))
    >>> cost(jax.jit(jnp.matmul).lower(x, x).compile()).flops
    1024.0
    """
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    flops = (analysis or {}).get("flops")
    return Cost(None if flops is None else float(flops), None if memory is None else int(memory.temp_size_in_bytes))

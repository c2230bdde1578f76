"""The cost of a compiled function, which unlike time is exact."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr

from jpeft.core.flops import count_flops


class Cost(NamedTuple):
    """The cost of one call.

    Attributes:
      flops: Floating point operations on one device.
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
      flops: Floating point operations of a step on one device.
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


def cost(compiled: Any, traced: ClosedJaxpr | None = None) -> Cost:
    """Return the cost of a compiled function; None for numbers that are not known.

    The operations are those that XLA counts in what it made of the program. XLA counts the body of a loop once, however often it runs, and
    on a GPU it does not see into the libraries that compute matrix products. There `count_flops` counts the program as it was traced.

    Args:
      compiled: ``jax.jit(fn).trace(...).lower().compile()``.
      traced: ``jax.jit(fn).trace(...).jaxpr``; None to take what XLA counts.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((8, 8))
    >>> traced = jax.jit(jnp.matmul).trace(x, x)
    >>> cost(traced.lower().compile(), traced.jaxpr).flops
    1024.0
    """
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    flops = (analysis or {}).get("flops")
    if traced is not None:
        counted = count_flops(traced)
        devices = jax.tree.leaves(compiled.input_shardings)[0].device_set
        if flops is None or counted.all > counted.once or any(device.platform == "gpu" for device in devices):
            flops = counted.all / len(devices)
    return Cost(None if flops is None else float(flops), None if memory is None else int(memory.temp_size_in_bytes))

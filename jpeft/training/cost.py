"""The cost of a compiled function as XLA counts it, which unlike time is exact."""

from __future__ import annotations

from typing import Any, NamedTuple


class Cost(NamedTuple):
    """The cost of one call.

    Attributes:
      flops: Floating point operations. XLA counts the body of a loop once, however often it runs.
      temporary_bytes: Peak of the memory that exists only during the call: activations and gradients, not arguments and results.
    """

    flops: float | None
    temporary_bytes: int | None


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

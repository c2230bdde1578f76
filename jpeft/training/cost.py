"""What a compiled function costs, by XLA's own account: exact and free of noise, unlike time."""

from __future__ import annotations

from typing import Any, NamedTuple


class Cost(NamedTuple):
    """The cost of one call.

    Attributes:
      flops: Floating point operations. The body of a loop counts once, however often it runs.
      temporary_bytes: Peak of the memory that exists only during the call: activations and gradients, not arguments and results.
    """

    flops: float | None
    temporary_bytes: int | None


def cost(compiled: Any) -> Cost:
    """The cost of ``jax.jit(fn).lower(...).compile()``; None for what the backend does not tell.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((8, 8))
    >>> cost(jax.jit(jnp.matmul).lower(x, x).compile()).flops
    1024.0
    """
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    flops = (analysis or {}).get("flops")
    return Cost(None if flops is None else float(flops), None if memory is None else int(memory.temp_size_in_bytes))

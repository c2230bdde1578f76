"""Adapters whose numbers are looked at."""

import jax
from jax.core import Tracer

from jpeft.core.peft import Peft
from jpeft.tree.finite import not_finite
from jpeft.tree.paths import first_few


def check_numbers(peft: Peft, what: str) -> None:
    """Refuse an adapter whose numbers are not known, or are none.

    Args:
      peft: The adapter.
      what: Who asks, and for which adapter.

    Raises:
      ValueError: inside of `jax.jit`, for an abstract adapter, or for one with numbers that are not finite.
    """
    if any(isinstance(leaf, Tracer | jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((peft.params, peft.adapter))):
        raise ValueError(f"{what} looks at numbers, and inside of jax.jit, or of an abstract adapter, there are none: call it outside.")
    if bad := not_finite(peft.adapter):
        raise ValueError(f"{what}: the adapter holds numbers that are not finite, in {first_few(bad)}.")

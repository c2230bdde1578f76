"""What the backward pass keeps of a changed layer where a model recomputes its blocks and stores the results of matrix products."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

# The name under which `jax.checkpoint` knows a changed layer's output.
CHANGED = "jpeft_changed"


def changed(output: jax.Array) -> jax.Array:
    """Mark a layer's output with a method's change as one array to store, for `save_products`.

    Without the mark the results of the products inside are stored, those of the layer and those of the method: twice the memory where one
    is added to the other.
    """
    return checkpoint_name(output, CHANGED)


def save_products() -> Callable[..., Any]:
    """Return the policy for `jax.checkpoint` that stores the results of matrix products, a changed layer's as one."""
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(policies.dots_saveable, policies.save_only_these_names(CHANGED))

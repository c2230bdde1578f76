"""The loss of predictions at single tokens, where not every token is to be predicted."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

IGNORE = -100  # the label where nothing is predicted


def losses(logits: Float[Array, "batch length classes"], batch: Mapping[str, Any]) -> Float[Array, " batch"]:
    """-log p of the labels, summed over each row."""
    label = jnp.asarray(batch["label"])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.maximum(label, 0))
    return jnp.where(label == IGNORE, 0.0, nll).sum(-1)


def counts(batch: Mapping[str, Any]) -> Float[Array, " batch"]:
    """How many labels there are in each row."""
    return (jnp.asarray(batch["label"]) != IGNORE).sum(-1).astype(jnp.float32)

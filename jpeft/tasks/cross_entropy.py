"""Cross entropy of integer labels, with label smoothing, and its sum over the labelled tokens of a row."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jpeft.models.common.token_loss import IGNORE as IGNORE


def cross_entropy(logits: Float[Array, "*rows classes"], labels: Int[Array, "*rows"], smoothing: float = 0.0) -> Float[Array, "*rows"]:
    """Return ``-sum_c q_c log p_c`` with ``q = (1 - smoothing) onehot(label) + smoothing / classes``, in float32.

    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    >>> cross_entropy(logits, jnp.array([0]), smoothing=0.3).round(4)
    Array([0.8318], dtype=float32)

    Reference: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2015, https://arxiv.org/abs/1512.00567.
    """
    logits = logits.astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return nll
    uniform = jax.nn.logsumexp(logits, -1) - logits.mean(-1)  # the cross entropy with equal probabilities
    return (1 - smoothing) * nll + smoothing * uniform


def token_losses(logits: Float[Array, "batch length classes"], batch: Mapping[str, Any], smoothing: float = 0.0) -> Float[Array, " batch"]:
    """Return the cross entropy summed over the tokens of each row that have a label."""
    label = jnp.asarray(batch["label"])
    losses = cross_entropy(logits, jnp.maximum(label, 0), smoothing)  # [batch, length]
    return jnp.where(label == IGNORE, 0.0, losses).sum(-1)


def token_counts(batch: Mapping[str, Any]) -> Float[Array, " batch"]:
    """Return the number of labels in each row."""
    return (jnp.asarray(batch["label"]) != IGNORE).sum(-1).astype(jnp.float32)

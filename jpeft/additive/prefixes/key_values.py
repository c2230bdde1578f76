"""Prefixes as data: keys and values for every layer, as an adapter, as rows of a network's output, in front of a layer's own keys.

A `Prefix` has the keys and values of each attention, flat [*stack, l, width], under the path of the attention core.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.additive.prefixes.attention_sites import AttentionSite
from jpeft.core.dropout import inverted_dropout
from jpeft.core.statistics import KeyValues
from jpeft.tree.adapters import ADDED

NAMES = ("key", "value")
Prefix = dict[str, dict[str, jax.Array]]  # core -> {"key": [*stack, l, width], "value": the same}


# --- as an adapter ------------------------------------------------------------------------------------------------------------------------


def to_adapter(sites: list[AttentionSite], prefix: Prefix) -> tree.Adapter:
    """A prefix as leaves that are added to the attention cores."""
    return tree.unflatten({f"{site.core}/{ADDED}/{name}": prefix[site.core][name] for site in sites for name in NAMES})


def from_statistics(stats: KeyValues | None, sites: list[AttentionSite], length: int) -> Prefix | None:
    """The keys and values to start from, checked against the model; None if there are none.

    Raises:
      ValueError: if one is missing or has another shape.
    """
    if stats is None:
        return None
    leaves = tree.flatten(stats.values)
    out: Prefix = {}
    for site in sites:
        for name in NAMES:
            path, shape = f"{site.core}/{ADDED}/{name}", (*site.stack, length, site.width)
            if path not in leaves or leaves[path].shape != shape:
                found = f"has the shape {leaves[path].shape}" if path in leaves else "is missing"
                raise ValueError(f"The given prefix does not fit: '{path}' {found} where {shape} is needed; length={length}.")
            out.setdefault(site.core, {})[name] = jnp.array(leaves[path], jnp.float32)
    return out


# --- as rows of a network's output --------------------------------------------------------------------------------------------------------
# Row i has the i-th key and value of all layers one after the other, in each layer the key first: HF PEFT's order.


def from_rows(sites: list[AttentionSite], rows: Float[Array, "l outputs"]) -> Prefix:
    """The prefix whose rows these are."""
    out: Prefix = {}
    start = 0
    for site in sites:
        size = 2 * site.layers * site.width
        part = rows[:, start : start + size].reshape(-1, *site.stack, 2, site.width)  # [l, *stack, 2, width]
        out[site.core] = {name: jnp.moveaxis(part[..., i, :], 0, len(site.stack)) for i, name in enumerate(NAMES)}
        start += size
    return out


def to_rows(sites: list[AttentionSite], prefix: Prefix) -> Float[Array, "l outputs"]:
    """The inverse of `from_rows`."""
    parts = []
    for site in sites:
        pair = [jnp.moveaxis(prefix[site.core][name], len(site.stack), 0) for name in NAMES]  # each [l, *stack, width]
        parts.append(jnp.stack(pair, -2).reshape(pair[0].shape[0], -1))  # [l, layers * 2 * width]
    return jnp.concatenate(parts, 1)


# --- in front of a layer's own keys and values --------------------------------------------------------------------------------------------


def prepend(
    prefix: Float[Array, "l width"],
    own: Float[Array, "*batch length heads head_dim"],
    *,
    dropout: float,
    rng: jax.Array | None,
) -> Float[Array, "*batch longer heads head_dim"]:
    """A layer's own keys (or values) with the prefix in front, in their heads, dtype and batch.

    Args:
      prefix: The prefix of this layer.
      own: The layer's keys or values.
      dropout: Probability with which a scalar of the prefix is dropped, separately for each example.
      rng: A random key, or None for no dropout.
    """
    rows = prefix.reshape(prefix.shape[0], *own.shape[-2:]).astype(own.dtype)  # [l, heads, head_dim]
    rows = jnp.broadcast_to(rows[(None,) * (own.ndim - 3)], (*own.shape[:-3], *rows.shape))  # [*batch, l, heads, head_dim]
    if rng is not None and dropout:
        rows = inverted_dropout(rng, rows, dropout)
    return jnp.concatenate([rows, own], axis=-3)


def widen_mask(mask: Any, length: int) -> Any:
    """A mask over keys with `length` keys in front that every query sees.

    A mask that is described by its structure says itself what it is with a prefix: `with_prefix`. Others are arrays [..., keys]. A boolean
    mask is True where a key is visible. A mask of numbers is added to the scores, so 0 leaves a key visible.
    """
    if hasattr(mask, "with_prefix"):
        return mask.with_prefix(length)
    visible = jnp.ones if jnp.issubdtype(mask.dtype, jnp.bool_) else jnp.zeros
    return jnp.concatenate([visible((*mask.shape[:-1], length), mask.dtype), mask], axis=-1)

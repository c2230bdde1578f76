"""Attention proper: the part without parameters, in one module for all families."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jpeft.core.dropout import inverted_dropout
from jpeft.models.common.attention_kernels import choose, run_kernel
from jpeft.models.common.config import ModelConfig
from jpeft.models.common.visible import Visible

Ids = Int[Array | np.ndarray, "batch length"]
Mask = Shaped[Array | np.ndarray, "batch length"]  # 1 or True: a token, 0 or False: padding

# From so many queries on XLA's attention goes in blocks of `BLOCK` queries, so that its memory does not grow with the square of the length.
LONG, BLOCK = 2048, 256
# From so many queries on, causal attention goes in parts, each with the keys that its last query may see: 5/8 of the operations.
SPLIT, PARTS = 512, 4


class AttentionCore(nn.Module):
    """softmax(Q Kᵀ / √d) V over the keys that a query may see.

    The module has no parameters and is named ``core`` in every family, so that methods can wrap it (see `jpeft.models.common.contract`).
    Keys and values may be longer than the queries if the mask says so. They may also have fewer heads than the queries; then each head of
    keys serves a group of neighbouring query heads.

    What a query may see is a `Visible` or a boolean mask. Described by a `Visible`, attention is left to a kernel of the device where there
    is one (`jpeft.models.common.attention_kernels`), which makes no array of queries × keys. XLA computes the rest.

    Attributes:
      dropout: Rate on the attention weights, which no kernel applies.
      kernel: "auto", "xla", or the kernel that must be used: "cudnn", "splash".
    """

    dropout: float = 0.0
    kernel: str = "auto"

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "batch queries heads head"],
        key: Float[Array, "batch keys groups head"],
        value: Float[Array, "batch keys groups head"],
        mask: Visible | Bool[Array, "#batch 1 #queries keys"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "batch queries heads head"]:
        """Return the context of each query.

        Raises:
          ValueError: if a kernel is forced that cannot compute this attention, with the reason.
        """
        drops = bool(self.dropout) and not deterministic
        kernel = choose(self.kernel, query, key, mask, drops=drops)
        if kernel != "xla":
            assert isinstance(mask, Visible)
            return run_kernel(kernel, query, key, value, mask)
        length = query.shape[1]
        if length >= SPLIT and not drops and isinstance(mask, Visible) and mask.causal and mask.slot is None:
            return attend_in_parts(query, key, value, mask)
        if length >= LONG:
            return attend_in_blocks(query, key, value, mask, dropout=self.dropout, rng=self.make_rng("dropout") if drops else None)
        drop = functools.partial(nn.Dropout(self.dropout), deterministic=deterministic)
        return attend(query, key, value, mask.dense(length, key.shape[1]) if isinstance(mask, Visible) else mask, drop)


def make_core(config: ModelConfig, dropout: float) -> AttentionCore:
    """Return the attention core of a family's layer."""
    return AttentionCore(dropout, config.attention, name="core")


def attend_in_parts(
    query: Float[Array, "batch queries heads head"],
    key: Float[Array, "batch keys groups head"],
    value: Float[Array, "batch keys groups head"],
    mask: Visible,
) -> Float[Array, "batch queries heads head"]:
    """Causal attention of a part of the queries after another, each without the keys that none of its queries may see."""
    length = query.shape[1]
    size = -(-length // PARTS)
    out = []
    for first in range(0, length, size):
        part = query[:, first : first + size]
        last = first + part.shape[1]
        keys, seen = mask.prefix + last, mask.up_to(last)
        if length >= LONG:
            out.append(attend_in_blocks(part, key[:, :keys], value[:, :keys], seen, first=first))
        else:
            out.append(attend(part, key[:, :keys], value[:, :keys], seen.rows(first, part.shape[1], keys)))
    return jnp.concatenate(out, axis=1)


def attend_in_blocks(
    query: Float[Array, "batch queries heads head"],
    key: Float[Array, "batch keys groups head"],
    value: Float[Array, "batch keys groups head"],
    mask: Visible | Bool[Array, "#batch 1 #queries keys"],
    *,
    first: int = 0,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
) -> Float[Array, "batch queries heads head"]:
    """Attention of a block of queries after another: memory grows with the keys, and not with queries × keys.

    Args:
      query: The queries.
      key: The keys.
      value: The values.
      mask: What each query may see.
      first: The place of the first of these queries in a `Visible`.
      dropout: Rate on the weights.
      rng: A random key for it, or None for none.
    """
    length, keys = query.shape[1], key.shape[1]
    count = -(-length // BLOCK)
    # The last block is filled up with queries that nobody reads.
    blocks = jnp.pad(query, [(0, 0), (0, count * BLOCK - length), (0, 0), (0, 0)])
    blocks = jnp.moveaxis(blocks.reshape(len(query), count, BLOCK, *query.shape[2:]), 1, 0)
    if isinstance(mask, Visible) and mask.query_segments is not None:
        mask = mask.replace(query_segments=jnp.pad(mask.query_segments, [(0, 0), (0, BLOCK)]))
    elif not isinstance(mask, Visible) and mask.shape[2] > 1:
        mask = jnp.pad(mask, [(0, 0), (0, 0), (0, count * BLOCK - length), (0, 0)])

    # Recomputed in the backward pass, which would otherwise keep the weights of all blocks.
    @jax.checkpoint
    def one(block: Array, index: Array, key: Array, value: Array, mask: Any) -> Array:
        if isinstance(mask, Visible):
            seen = mask.rows(first + index * BLOCK, BLOCK, keys)
        else:
            seen = mask if mask.shape[2] == 1 else jax.lax.dynamic_slice_in_dim(mask, index * BLOCK, BLOCK, 2)
        drop = lambda weights: weights if rng is None else inverted_dropout(jax.random.fold_in(rng, index), weights, dropout)
        return attend(block, key, value, seen, drop)

    _, out = jax.lax.scan(lambda _, part: (None, one(*part, key, value, mask)), None, (blocks, jnp.arange(count)))
    return jnp.moveaxis(out, 0, 1).reshape(len(query), count * BLOCK, *out.shape[3:])[:, :length]


def attend(
    query: Float[Array, "batch queries heads head"],
    key: Float[Array, "batch keys groups head"],
    value: Float[Array, "batch keys groups head"],
    mask: Bool[Array, "#batch 1 #queries keys"],
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "batch queries heads head"]:
    """Attention of all queries at once, with `drop` applied to the weights."""
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])  # [batch, queries, groups, heads of a group, head]
    scores = jnp.einsum("bqgrd,bkgd->bgrqk", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5  # [batch, groups, heads of a group, queries, keys], float32
    # The lowest finite number, not -inf: the softmax of a query that may attend to nothing stays finite.
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(value.dtype))
    return jnp.einsum("bgrqk,bkgd->bqgrd", weights, value).reshape(query.shape)

"""Where the rows of a soft prompt start: at embeddings of the vocabulary, drawn or chosen."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The first ids that are never drawn: BERT's vocabularies begin with a thousand unused ids, and single characters and word pieces follow.
SKIPPED_IDS = 2000


def draw_embeddings(key: jax.Array, table: Float[Array, "vocabulary width"], sample: int, count: int) -> Float[Array, "count width"]:
    """The embeddings of `count` different tokens, drawn from the `sample` most common ones.

    Raises:
      ValueError: if there are fewer tokens to draw from.
    """
    available = min(sample, len(table))
    first = SKIPPED_IDS if len(table) >= SKIPPED_IDS + sample else 0
    if count > available:
        raise ValueError(f"{count} different tokens cannot be drawn from {available} of the vocabulary: raise sample.")
    return _embed(table, first + jax.random.choice(key, available, (count,), replace=False))


def mean_embeddings(table: Float[Array, "vocabulary width"], labels: Sequence[Sequence[int]], count: int) -> list[Float[Array, "1 width"]]:
    """The mean embedding of the tokens of each class label.

    Raises:
      ValueError: if a label has no tokens, if there are more labels than the prompt has rows, or for a token beyond the vocabulary.
    """
    if not labels or not all(len(ids) for ids in labels):
        raise ValueError("init='labels' needs the token ids of each class label: labels=((2204,), (2919, 102)), or as stats=.")
    if len(labels) > count:
        raise ValueError(f"There are {len(labels)} labels and only {count} rows to start from them: raise length.")
    return [token_embeddings(table, ids).mean(0, keepdims=True) for ids in labels]


def token_embeddings(table: Float[Array, "vocabulary width"], ids: Sequence[int]) -> Float[Array, "count width"]:
    """The embeddings of some tokens.

    Raises:
      ValueError: for a token beyond the vocabulary.
    """
    if unknown := [i for i in ids if not 0 <= i < len(table)]:
        raise ValueError(f"There is no token {unknown[0]}: the vocabulary has {len(table)}.")
    return _embed(table, jnp.asarray(ids))


def _embed(table: Float[Array, "vocabulary width"], ids: Int[Array, " count"]) -> Float[Array, "count width"]:
    # A prompt is trained in float32, whatever the dtype of the base.
    return jnp.take(jnp.asarray(table), ids, axis=0).astype(jnp.float32)

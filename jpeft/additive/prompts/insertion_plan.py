"""Index arithmetic of inserted tokens: where each token stands in the longer text, and how arrays become longer and short again.

"The text" is what the model was given, [batch, length]. "The longer text" is [batch, longer] with ``longer = length + new``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from jpeft.additive.prompts.template import TextPlace, TokenBlock


class InsertionPlan(NamedTuple):
    """Where the tokens of each text and the inserted tokens stand in the longer text.

    The batch axis has size 1 where one plan serves all texts.

    Attributes:
      next_tokens: For each block, the index in the text of the token that follows it; `length` for a block at the very end.
      text_indices: For each token of the text, its index in the longer text.
      new_indices: For each inserted token, its index in the longer text.
      sizes: Number of tokens of each block.
      shared_index: The index in the text where all blocks stand in every text; None if there is no such index.
    """

    next_tokens: Int[Array, "#batch blocks"]
    text_indices: Int[Array, "#batch length"]
    new_indices: Int[Array, "#batch new"]
    sizes: tuple[int, ...]
    shared_index: int | None

    def lengthen(self, x: Shaped[Array, "batch length"], new: Shaped[Array, "... new"]) -> Shaped[Array, "batch longer"]:
        """Insert one entry for each new token."""
        new = jnp.broadcast_to(new, (len(x), self.new_indices.shape[1]))  # [batch, new]
        if self.shared_index is not None:
            return jnp.concatenate([x[:, : self.shared_index], new, x[:, self.shared_index :]], axis=1)
        # Entry i of `both` belongs at index `indices[i]`; sorting by these indices brings every entry to its place.
        indices = jnp.concatenate([self.text_indices, self.new_indices], axis=1)  # [#batch, longer]
        both = jnp.concatenate([x, new], axis=1)  # [batch, longer]
        return jnp.take_along_axis(both, jnp.argsort(indices, axis=1), axis=1)

    def lengthen_positions(self, x: Int[Array, "batch length"]) -> Int[Array, "batch longer"]:
        """The position of each token of the longer text, given those of the text: every inserted token counts as one position."""
        # A block begins at the position that the token behind it had. Behind the last token that is the next free position.
        extended = jnp.concatenate([x, x[:, -1:] + 1], axis=1)  # [batch, length + 1]
        begins = jnp.take_along_axis(extended, jnp.broadcast_to(self.next_tokens, (len(x), len(self.sizes))), axis=1)  # [batch, blocks]
        # How many inserted tokens stand in front of each inserted token, in its own block and in earlier ones.
        earlier = self.new_indices - self._for_each_token(self.next_tokens)  # [#batch, new]
        shift = self.text_indices - jnp.arange(x.shape[1])[None]  # [#batch, length]: inserted tokens in front of each token of the text
        return self.lengthen(x + shift, self._for_each_token(begins) + earlier)

    def _for_each_token(self, blocks: Int[Array, "#batch blocks"]) -> Int[Array, "#batch new"]:
        """Repeat one number a block for each token of the block."""
        return jnp.repeat(blocks, jnp.array(self.sizes), axis=1, total_repeat_length=sum(self.sizes))

    def shorten(self, x: Shaped[Array, "batch longer *rest"], *, causal: bool) -> Shaped[Array, "batch length *rest"]:
        """Keep one output for each token of the text.

        An output of a causal model says what comes after its token. Where a block follows the token, the output at the last token of the
        block says what comes after the block, so that output takes the place of the token's own.
        """
        # At index 0 nothing of the text stands in front of the block, so causal models need no special care there.
        if self.shared_index == 0 or (self.shared_index is not None and not causal):
            return jnp.concatenate([x[:, : self.shared_index], x[:, self.shared_index + sum(self.sizes) :]], axis=1)
        kept = jnp.broadcast_to(self.text_indices, (len(x), self.text_indices.shape[1]))  # [batch, length]
        if causal:
            # The output in front of the text's next token; for the last token, the last output.
            kept = jnp.concatenate([kept[:, 1:] - 1, jnp.full((len(x), 1), x.shape[1] - 1)], axis=1)
        take = lambda rows, kept: rows.at[kept].get(indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")
        return jax.vmap(take)(x, kept)


def plan_insertion(
    blocks: tuple[TokenBlock, ...], ids: Int[Array, "batch length"], mask: Shaped[Array, "#batch length"] | None, edges: Sequence[int]
) -> InsertionPlan:
    """The plan for a batch of texts.

    Args:
      blocks: What is inserted. Blocks at the same place keep their order.
      ids: The texts.
      mask: Zero at padding; None without padding.
      edges: How many tokens stay outside at the start and at the end of each text.
    """
    length, sizes = ids.shape[1], tuple(len(block.tokens) for block in blocks)
    # One plan serves all texts if all blocks stand at the start, and either nothing is padding or no token of the text comes first: in
    # front of everything, it does not matter whether padding follows.
    shared = all(block.place == "start" for block in blocks) and (mask is None or edges[0] == 0)
    real = jnp.ones((1, length), bool) if shared else jnp.broadcast_to(True if mask is None else mask != 0, ids.shape)
    next_tokens = jnp.stack([_next_token(block.place, ids, real, edges) for block in blocks], axis=1)  # [#batch, blocks]
    # A token of the text moves by the sizes of the blocks in front of it.
    in_front = next_tokens[:, None] <= jnp.arange(length)[None, :, None]  # [#batch, length, blocks]
    text_indices = jnp.arange(length)[None] + jnp.sum(jnp.where(in_front, jnp.array(sizes)[None, None], 0), axis=2)  # [#batch, length]
    # A block moves by the sizes of the blocks at earlier places, and of those listed before it at the same place.
    order = jnp.arange(len(sizes))
    same, listed_before = next_tokens[:, None] == next_tokens[:, :, None], (order[None] < order[:, None])[None]
    earlier = (next_tokens[:, None] < next_tokens[:, :, None]) | (same & listed_before)  # [#batch, blocks, blocks]
    begins = next_tokens + jnp.sum(jnp.where(earlier, jnp.array(sizes)[None, None], 0), axis=2)  # [#batch, blocks]
    new_indices = jnp.concatenate([begins[:, i, None] + jnp.arange(size)[None] for i, size in enumerate(sizes)], axis=1)  # [#batch, new]
    return InsertionPlan(next_tokens, text_indices, new_indices, sizes, min(edges[0], length) if shared else None)


def _next_token(
    place: TextPlace, ids: Int[Array, "batch length"], real: Bool[Array, "#batch length"], edges: Sequence[int]
) -> Int[Array, " #batch"]:
    """The index in each text of the token that a block at this place stands in front of."""
    stop = real.shape[1] - jnp.argmax(real[:, ::-1], axis=1)  # behind the last token that is not padding
    start = jnp.minimum(jnp.argmax(real, axis=1) + edges[0], stop)
    end = jnp.maximum(stop - edges[1], start)
    if isinstance(place, str):
        return start if place == "start" else end
    side, anchor = place
    found = (ids == anchor) & real  # [batch, length]
    # A text that was cut off in front of its anchor gets the block at its end.
    return jnp.where(found.any(1), jnp.argmax(found, axis=1) + int(side == "after"), end)

"""A decoder and a language model whose parts a family fills in."""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jpeft.models.common.attention import Ids, Mask
from jpeft.models.common.block_stack import Hidden, make_blocks, run_blocks
from jpeft.models.common.cache import CausalMask, View
from jpeft.models.common.decoder_config import DecoderConfig
from jpeft.models.common.layers import dense, embedding
from jpeft.models.common.lookup import look_up
from jpeft.models.common.positions import TokenPositions, check_positions
from jpeft.models.common.token_loss import TokenLoss, token_loss


class DecoderPositions(nn.Module):
    """Position ids and padding mask of a batch. No parameters."""

    config: DecoderConfig

    def __call__(
        self, input_ids: Ids, attention_mask: Mask | None, start: Int[Array, " batch"] | None, segment_ids: Ids | None = None
    ) -> TokenPositions:
        """Count the tokens of each row, or of each segment, from 0. Padding, on either side, is not counted.

        Args:
          input_ids: token ids of this call.
          attention_mask: 1 for tokens, 0 for padding; None if all are tokens.
          start: how many tokens the cache holds already; None where a sequence begins.
          segment_ids: of packed rows; None for one text a row.
        """
        mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
        position_ids = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        if segment_ids is not None:
            first = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
            # The position at which each segment begins is the largest so far.
            position_ids -= jax.lax.cummax(jnp.where(first, position_ids, 0), axis=1)
        if start is not None:
            position_ids += start[:, None]
        return TokenPositions(position_ids, None if attention_mask is None else mask[:, None, None, :])


@flax.struct.dataclass
class DecoderOutput:
    """Output of a decoder without a head. The class is a pytree, so under a transformation the fields may hold anything."""

    last_hidden_state: Any  # [batch, length, hidden]
    hidden_states: Any  # tuple of the embeddings, the output of each block but the last, and the normalised last output; or None


class Decoder(nn.Module):
    """A decoder without a head. A family subclasses it and names its parts."""

    config: Any  # the family's `DecoderConfig`

    BLOCK: ClassVar[type[nn.Module]]  # called as block(config)(hidden, view, deterministic)
    NORM: ClassVar[Callable[[Any], nn.Module]]  # makes the final norm, given the configuration
    NAMES: ClassVar[tuple[str, str, str]]  # of the word embedding, the blocks, the final norm

    def setup(self):
        """Make the parts here, not in a compact method: `attend` needs the embedding too."""
        config, (words, blocks, norm) = self.config, self.NAMES
        self.positions = DecoderPositions(config)
        self.causal = CausalMask(config)
        setattr(self, words, embedding(config, config.vocab_size))
        setattr(self, blocks, make_blocks(config, self.BLOCK))
        setattr(self, norm, self.NORM(config))

    def embed(self, input_ids: Array, view: View, deterministic: bool) -> Hidden:
        """Return the input of the first block."""
        del view, deterministic
        return look_up(getattr(self, self.NAMES[0]), input_ids)

    def extend_view(self, view: View) -> View:
        """Return the view with whatever else the family's blocks need, such as a rotation."""
        return view

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        *,
        deterministic: bool = True,
        cache_length: int | None = None,
        output_hidden_states: bool = False,
        segment_ids: Ids | None = None,
    ) -> DecoderOutput:
        """Run over a batch.

        Args:
          input_ids: token ids [batch, length].
          attention_mask: 1 for tokens, 0 for padding on either side; None if all are tokens.
          deterministic: True runs without dropout; False needs rngs={"dropout": key}.
          cache_length: make a cache for that many tokens, those of this call included (see `jpeft.models.common.cache`); needs
            mutable=["cache"].
          output_hidden_states: also return the embeddings and the output of every block.
          segment_ids: of rows that several texts are packed into [batch, length]: the texts do not see each other, and each counts its
            positions from 0. None for one text a row.

        Raises:
          ValueError: if segments are given with a cache, the mask does not have the shape of the ids, the cache has no room, the position
            table is too short, or an id has no row in the word embedding (`jpeft.models.common.lookup`).
        """
        input_ids = jnp.asarray(input_ids)
        if attention_mask is not None and jnp.shape(attention_mask) != input_ids.shape:
            raise ValueError(
                f"The mask has the shape {jnp.shape(attention_mask)}, but the ids {input_ids.shape}. Give the mask of the tokens of this "
                "call alone: the cache knows that of earlier tokens."
            )
        start = self.causal.count_cached_tokens()
        if segment_ids is not None:
            if start is not None or cache_length is not None:
                raise ValueError("segment_ids= are for packed rows, and a cache continues one text a row: give one of them.")
            segment_ids = jnp.asarray(segment_ids)
        positions = self.positions(input_ids, attention_mask, start, segment_ids)
        view = self.causal(positions, cache_length)
        if segment_ids is not None:
            view = view._replace(mask=view.mask.replace(query_segments=segment_ids, key_segments=segment_ids))
        view = self.extend_view(view)
        check_positions(positions.offset + (view.slots if view.slots is not None else input_ids).shape[1], self.config.position_rows)
        hidden = self.embed(input_ids, view, deterministic)
        _, blocks, norm = (getattr(self, name) for name in self.NAMES)
        hidden, states = run_blocks(
            blocks,
            self.config,
            hidden,
            view,
            deterministic,
            output_hidden_states=output_hidden_states,
            flags=self.config.uses_window,
            select_context=View.for_layer,
        )
        hidden = norm(hidden)
        if start is not None and view.slot is not None and view.slots is not None:
            # A full cache would overwrite older tokens without an error. NaN shows it, as for a lookup past the end of a table.
            hidden = jnp.where(view.slot + input_ids.shape[1] > view.slots.shape[1], jnp.nan, hidden)
        return DecoderOutput(hidden, (*states, hidden) if output_hidden_states else None)

    def attend(self, hidden: Hidden) -> Float[Array, "batch length vocab"]:
        """Return the scores of every word of the vocabulary, with the word embedding as the head."""
        return getattr(self, self.NAMES[0]).attend(hidden)


class LanguageModel(nn.Module):
    """The next word at each position: a decoder and a head, which is the word embedding where they are tied."""

    config: Any  # the family's `DecoderConfig`

    BODY: ClassVar[type[Decoder]]
    NAME: ClassVar[str]  # of the body

    def setup(self):
        """Make the parts here, not in a compact method: `score` needs the body too."""
        setattr(self, self.NAME, self.BODY(self.config))
        if not self.config.tie_word_embeddings:
            self.lm_head = dense(self.config, self.config.vocab_size, bias=False)

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        *,
        deterministic: bool = True,
        cache_length: int | None = None,
        logits_at: Int[Array | np.ndarray, " batch"] | None = None,
        labels: Shaped[Array | np.ndarray, "..."] | None = None,
        label_smoothing: float = 0.0,
        segment_ids: Ids | None = None,
    ) -> Float[Array, "batch positions vocab"] | TokenLoss:
        """Return float32 logits; with labels, the loss of each token in their place.

        Args:
          input_ids: As in `Decoder`.
          attention_mask: As in `Decoder`.
          deterministic: As in `Decoder`.
          cache_length: As in `Decoder`.
          logits_at: The index of the one token of each row to score.
          labels: The token that each position predicts, [batch, length]: that of the next position, as a rule; -100 where nothing is
            predicted. The logits of the whole batch are never held (`jpeft.models.common.token_loss`).
          label_smoothing: Of the loss.
          segment_ids: As in `Decoder`.

        Raises:
          ValueError: As `Decoder`; for labels that are no words, or of another shape than the ids.
        """
        output = getattr(self, self.NAME)(
            input_ids, attention_mask, deterministic=deterministic, cache_length=cache_length, segment_ids=segment_ids
        )
        if labels is None:
            return self.score(select_tokens(output.last_hidden_state, logits_at))
        if logits_at is not None:
            raise ValueError("labels= asks for the loss of all tokens and logits_at= for the scores of one: give one of them.")
        return token_loss(self, "score", output.last_hidden_state, labels, self.config.vocab_size, label_smoothing)

    def score(self, hidden: Hidden) -> Float[Array, "batch length vocab"]:
        """Return the float32 logits of hidden states."""
        body = getattr(self, self.NAME)
        logits = body.attend(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)
        return logits.astype(jnp.float32)


def select_tokens(
    hidden: Float[Array, "batch length hidden"], index: Int[Array | np.ndarray, " batch"] | None
) -> Float[Array, "batch positions hidden"]:
    """Return the hidden state of the token at `index` of each row, [batch, 1, hidden]; all tokens if `index` is None."""
    return hidden if index is None else jnp.take_along_axis(hidden, jnp.asarray(index)[:, None, None], axis=1)

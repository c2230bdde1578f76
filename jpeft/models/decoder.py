"""What decoders share: positions, the causal mask, the cache of keys and values, and the models that a family fills in.

Two modules without parameters are there to be wrapped, as in `bert_encoder`: `Positions` (position ids and the padding
mask of the tokens of this call) and `attention.AttentionCore` (queries, keys, values and mask to context). Whoever puts keys in front
of a layer's own wraps the one to move the tokens behind them, and the other to lengthen keys, values and mask.

A cache is made by calling a model with `cache_length=` and `mutable=["cache"]`; passed on among the variables, it is
continued by the next call. A call that it has no room for is an error, or gives NaN where it is compiled.

>>> from jpeft.models import GPT2Config, GPT2LMHeadModel
>>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
>>> ids = jnp.array([[3, 5, 2, 7]])
>>> variables = model.init(jax.random.key(0), ids)
>>> whole = model.apply(variables, ids)
>>> first, cache = model.apply(variables, ids[:, :3], cache_length=8, mutable=["cache"])
>>> last, cache = model.apply(variables | cache, ids[:, 3:], mutable=["cache"])
>>> bool(jnp.allclose(jnp.concatenate([first, last], 1), whole, atol=1e-6))
True
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jpeft.models.attention import Ids, Mask
from jpeft.models.decoder_config import DecoderConfig
from jpeft.models.layers import dense, embed
from jpeft.models.rope import Rotation
from jpeft.models.stack import Hidden, run_stack, stack

Heads = Float[Array, "batch length heads head"]


# --- what may be seen ---


class Layout(NamedTuple):
    """Where each token of this call is, and whether it is one."""

    position_ids: Array  # int [batch, length]
    mask: Array  # bool [batch, 1, 1, length], over the keys of this call: False is padding
    offset: int = 0  # how many positions are left free in front of the first one


class Positions(nn.Module):
    """Position ids and padding mask of a batch. No parameters."""

    config: DecoderConfig

    def __call__(self, input_ids: Ids, attention_mask: Mask | None, start: Int[Array, " batch"] | None) -> Layout:
        """Count tokens from 0, padding on either side left out.

        Args:
          input_ids: token ids of this call.
          attention_mask: 1 for tokens, 0 for padding; all tokens if None.
          start: how many tokens the cache holds already; None where a sequence begins.
        """
        mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
        position_ids = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        if start is not None:
            position_ids += start[:, None]
        return Layout(position_ids, mask[:, None, None, :])


class View(NamedTuple):
    """What the queries of this call look at."""

    position_ids: Array  # int [batch, length]
    mask: Array  # bool [batch, 1, length, keys]: causal, without padding
    windowed: Array | None  # the same within the sliding window; None without one
    slot: Array | None  # int []: where in the cache the keys of this call go; None without a cache
    rotation: Rotation | None = None  # of the positions, in families that rotate

    def of(self, slides: bool | Array) -> "View":
        """What a layer looks at that does or does not slide."""
        if self.windowed is None or slides is False:
            return self
        return self._replace(mask=self.windowed if slides is True else jnp.where(slides, self.windowed, self.mask))


class Causal(nn.Module):
    """Causal mask over the tokens of this call and those in the cache. No parameters.

    With a cache it keeps which slots hold tokens, and how many are filled. Order is that of the slots. The window counts
    tokens, so padding between a prompt and its continuation does not narrow it.
    """

    config: DecoderConfig

    def seen(self) -> Int[Array, " batch"] | None:
        """How many tokens the cache holds; None without a cache, or before there is one."""
        return self.get_variable("cache", "tokens").sum(-1, dtype=jnp.int32) if self.has_variable("cache", "tokens") else None

    @nn.compact
    def __call__(self, layout: Layout, cache_length: int | None) -> View:
        """Make the mask, and write the tokens of this call into the cache.

        Args:
          layout: of this call.
          cache_length: make a cache of that many slots, those of this call included.

        Raises:
          ValueError: if the cache has no room for this call and that can be known: compiled, a cache does not say how full it is.
        """
        tokens, slot = layout.mask[:, 0, 0, :], None
        batch, length = tokens.shape
        queries = jnp.arange(length)
        slots = cache_length
        if self.has_variable("cache", "tokens"):
            slots = self.get_variable("cache", "tokens").shape[1]
        if slots is not None:
            if length > slots:
                raise ValueError(f"{length} positions do not fit into a cache of {slots}")
            held = self.variable("cache", "tokens", jnp.zeros, (batch, slots), bool)
            filled = self.variable("cache", "filled", jnp.zeros, (), jnp.int32)
            slot = filled.value
            if not isinstance(slot, Tracer) and slot + length > slots:
                raise ValueError(f"{length} positions behind {slot} do not fit into a cache of {slots}")
            tokens = jax.lax.dynamic_update_slice_in_dim(held.value, tokens, slot, 1)
            held.value, filled.value = tokens, slot + length
            queries = queries + slot
        mask = tokens[:, None, None, :] & (jnp.arange(tokens.shape[1])[None, :] <= queries[:, None])[None, None]
        windowed = None
        if self.config.window is not None:
            count = jnp.cumsum(tokens, axis=1, dtype=jnp.int32)  # [batch, keys]
            own = jax.lax.dynamic_slice_in_dim(count, 0 if slot is None else slot, length, 1)
            windowed = mask & (own[:, None, :, None] - count[:, None, None, :] < self.config.window)
        return View(layout.position_ids, mask, windowed, slot)


class KeyValueCache(nn.Module):
    """Keys and values of all calls so far, one slot each. No parameters."""

    @nn.compact
    def __call__(self, key: Heads, value: Heads, view: View) -> tuple[Array, Array]:
        """Those of this call, or with a cache of all slots."""
        if view.slot is None:
            return key, value
        slots = view.mask.shape[-1]
        return self._append("key", key, slots, view.slot), self._append("value", value, slots, view.slot)

    def _append(self, name: str, new: Array, slots: int, slot: Array) -> Array:
        held = self.variable("cache", name, jnp.zeros, (new.shape[0], slots, *new.shape[2:]), new.dtype)
        held.value = jax.lax.dynamic_update_slice_in_dim(held.value, new, slot, 1)
        return held.value


# --- models ---


@flax.struct.dataclass
class DecoderOutput:
    """What a decoder without a head returns: a pytree, so the fields hold whatever a transformation puts there."""

    last_hidden_state: Any  # [batch, length, hidden]
    hidden_states: Any  # tuple of the embeddings, each block's output but the last one's, and the normalised last one; or None


class Decoder(nn.Module):
    """A decoder without a head. A family says what its parts are, and more where it has more."""

    config: Any  # the family's `DecoderConfig`

    BLOCK: ClassVar[type[nn.Module]]  # block(config)(hidden, view, deterministic)
    NORM: ClassVar[Callable[[Any], nn.Module]]  # the last norm, given the configuration
    NAMES: ClassVar[tuple[str, str, str]]  # of the word embedding, the blocks, the last norm

    def setup(self):
        """Setup rather than compact: `attend` needs the embedding too."""
        config, (words, blocks, norm) = self.config, self.NAMES
        self.positions = Positions(config)
        self.causal = Causal(config)
        setattr(self, words, embed(config, config.vocab_size))
        setattr(self, blocks, stack(config, self.BLOCK))
        setattr(self, norm, self.NORM(config))

    def embedded(self, input_ids: Array, view: View, deterministic: bool) -> Hidden:
        """What goes into the first block."""
        del view, deterministic
        return getattr(self, self.NAMES[0])(input_ids)

    def viewed(self, view: View) -> View:
        """The view with what the family's blocks need besides."""
        return view

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        *,
        deterministic: bool = True,
        cache_length: int | None = None,
        output_hidden_states: bool = False,
    ) -> DecoderOutput:
        """Run over a batch.

        Args:
          input_ids: token ids [batch, length].
          attention_mask: 1 for tokens, 0 for padding on either side; all tokens if None.
          deterministic: without dropout; False needs rngs={"dropout": key}.
          cache_length: make a cache for that many tokens, those of this call included (see `jpeft.models.decoder`); needs
            mutable=["cache"].
          output_hidden_states: also return the embeddings and the output of every block.

        Raises:
          ValueError: if the mask does not have the shape of the ids, the cache has no room, or the position table is too short.
        """
        input_ids = jnp.asarray(input_ids)
        if attention_mask is not None and jnp.shape(attention_mask) != input_ids.shape:
            raise ValueError(
                f"the mask has the shape {jnp.shape(attention_mask)}, but the ids {input_ids.shape}: it is for "
                "the tokens of this call alone, the cache knows those of earlier ones"
            )
        start = self.causal.seen()
        layout = self.positions(input_ids, attention_mask, start)
        view = self.viewed(self.causal(layout, cache_length))
        length, rows = layout.offset + view.mask.shape[-1], self.config.position_rows
        if rows is not None and length > rows:  # a lookup past the table's end would give NaN, silently
            raise ValueError(f"{length} positions, but the position table holds {rows}; truncate the input")
        hidden = self.embedded(input_ids, view, deterministic)
        _, blocks, norm = (getattr(self, name) for name in self.NAMES)
        hidden, states = run_stack(
            blocks,
            self.config,
            hidden,
            view,
            deterministic,
            output_hidden_states=output_hidden_states,
            kinds=self.config.slides,
            pick=View.of,
        )
        hidden = norm(hidden)
        if start is not None and view.slot is not None:
            # Past its end the cache would write over older tokens, silently: NaN instead, as of a lookup past the end of a table.
            hidden = jnp.where(view.slot + input_ids.shape[1] > view.mask.shape[-1], jnp.nan, hidden)
        return DecoderOutput(hidden, (*states, hidden) if output_hidden_states else None)

    def attend(self, hidden: Hidden) -> Float[Array, "batch length vocab"]:
        """Scores of every word of the vocabulary: the word embedding, used a second time."""
        return getattr(self, self.NAMES[0]).attend(hidden)


class LanguageModel(nn.Module):
    """The next word at each position: a decoder and a head, which is the word embedding where they are tied."""

    config: Any  # the family's `DecoderConfig`

    BODY: ClassVar[type[Decoder]]
    NAME: ClassVar[str]  # of the body

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        *,
        deterministic: bool = True,
        cache_length: int | None = None,
        logits_at: Int[Array | np.ndarray, " batch"] | None = None,
    ) -> Float[Array, "batch positions vocab"]:
        """float32 logits; arguments as in `Decoder`, and `logits_at`, the one token of each row to give logits for."""
        config = self.config
        body = self.BODY(config, name=self.NAME)
        output = body(input_ids, attention_mask, deterministic=deterministic, cache_length=cache_length)
        hidden = at_tokens(output.last_hidden_state, logits_at)
        logits = body.attend(hidden) if config.tie_word_embeddings else dense(config, config.vocab_size, "lm_head", bias=False)(hidden)
        return logits.astype(jnp.float32)


def at_tokens(hidden: Float[Array, "batch length hidden"], index: Int[Array | np.ndarray, " batch"] | None) -> Array:
    """The hidden state of one token of each row, given by its place in the row; all if `index` is None."""
    return hidden if index is None else jnp.take_along_axis(hidden, jnp.asarray(index)[:, None, None], axis=1)

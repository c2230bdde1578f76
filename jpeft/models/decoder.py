"""What decoders share: positions, the causal mask, the cache of keys and values, attention, a stack of blocks.

Two modules without parameters are there to be wrapped, as in `bert_encoder`: `Positions` (position ids and the padding
mask of the tokens of this call) and `AttentionCore` (queries, keys, values and mask to context). Whoever lengthens the
sequence or the keys changes what goes into or comes out of these. What is behind them takes its lengths from its inputs:
`Causal` makes the causal mask of however many positions there are, and the cache holds what `Positions` let through.

A cache is made by calling a model with `cache_length=` and `mutable=["cache"]`; passed on among the variables, it is
continued by the next call. Its length counts token ids: whatever `Positions` puts in front of them gets slots of its own.

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

from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from .decoder_config import DecoderConfig

Ids = Int[Array | np.ndarray, "batch length"]
Mask = Shaped[Array | np.ndarray, "batch length"]  # 1 or True: a token, 0 or False: padding
Hidden = Float[Array, "batch length hidden"]
Heads = Float[Array, "batch length heads head"]


# --- layers with a configuration's dtypes and initialisers ---


def dense(config: DecoderConfig, features: int, name: str | None = None, *, bias: bool = True) -> nn.Dense:
    """A Dense layer."""
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, use_bias=bias, dtype=config.dtype, param_dtype=config.param_dtype, kernel_init=init, name=name)


def embed(config: DecoderConfig, rows: int) -> nn.Embed:
    """An embedding of the hidden size."""
    init = nn.initializers.normal(config.initializer_range)
    return nn.Embed(rows, config.hidden_size, dtype=config.dtype, param_dtype=config.param_dtype, embedding_init=init)


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
    def __call__(self, layout: Layout, room: int | None) -> View:
        """Make the mask, and write the tokens of this call into the cache.

        Args:
          layout: of this call.
          room: make a cache, with that many slots free after this call.
        """
        tokens, slot = layout.mask[:, 0, 0, :], None
        batch, length = tokens.shape
        queries = jnp.arange(length)
        slots = None if room is None else length + room
        if self.has_variable("cache", "tokens"):
            slots = self.get_variable("cache", "tokens").shape[1]
        if slots is not None:
            if length > slots:
                raise ValueError(f"{length} positions do not fit into a cache of {slots}")
            held = self.variable("cache", "tokens", jnp.zeros, (batch, slots), bool)
            filled = self.variable("cache", "filled", jnp.zeros, (), jnp.int32)
            slot = filled.value
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


class AttentionCore(nn.Module):
    """softmax(Q Kᵀ / √d) V over the keys whose mask is True: the part of attention that has no parameters.

    Keys and values may have fewer heads than queries, which share them in groups, and may be longer than the queries,
    with a mask as long as the keys.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "batch queries heads head"],
        key: Float[Array, "batch keys groups head"],
        value: Float[Array, "batch keys groups head"],
        mask: Bool[Array, "#batch 1 #queries keys"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "batch queries heads head"]:
        """Context of each query."""
        grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])
        scores = jnp.einsum("bqgrd,bkgd->bgrqk", grouped, key, preferred_element_type=jnp.float32)
        scores = scores * query.shape[-1] ** -0.5  # [batch, groups, heads of a group, queries, keys], float32
        # The lowest finite number, not -inf: a row with nothing to attend to stays finite.
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        weights = nn.Dropout(self.config.attention_dropout)(weights, deterministic=deterministic)
        return jnp.einsum("bgrqk,bkgd->bqgrd", weights, value).reshape(query.shape)


# --- the stack of blocks ---


class Blocks(nn.Module):
    """The blocks one after another, named "0", "1", ..."""

    config: DecoderConfig
    block: type[nn.Module]

    @nn.compact
    def __call__(self, hidden: Hidden, view: View, deterministic: bool) -> list[Hidden]:
        """Output of every block."""
        outputs = []
        for index, slides in enumerate(self.config.slides):
            hidden = self.block(self.config, name=str(index))(hidden, view.of(slides), deterministic)
            outputs.append(hidden)
        return outputs


def stack(config: DecoderConfig, block: type[nn.Module]) -> nn.Module:
    """What holds the parameters of all blocks: `Blocks`, or one block to be scanned. `block(config)(hidden, view, deterministic)`."""
    if config.remat:
        # Argument 3 is `deterministic` (0 is self). Inside a scan nothing can be merged, so no barrier is needed.
        block = nn.remat(block, static_argnums=(3,), prevent_cse=not config.scan)
    return block(config) if config.scan else Blocks(config, block)


def run_stack(
    blocks: Any, config: DecoderConfig, hidden: Array, view: View, deterministic: bool, output_hidden_states: bool
) -> tuple[Array, tuple[Array, ...]]:
    """Run what `stack` made: the output of the last block, and the input and the outputs of all blocks but the last if asked for."""
    if config.scan:

        def body(block: nn.Module, hidden: Array, view: View, slides: Array) -> tuple[Array, Array | None]:
            out = block(hidden, view.of(slides), deterministic)
            return out, hidden if output_hidden_states else None

        scan = nn.scan(
            body,
            variable_axes={"params": 0, "cache": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            length=config.num_hidden_layers,
        )
        hidden, stacked = scan(blocks, hidden, view, jnp.array(config.slides))
        return hidden, () if stacked is None else tuple(stacked)
    outputs: list[Array] = blocks(hidden, view, deterministic)
    return outputs[-1], (hidden, *outputs[:-1])


# --- what the models return ---


@flax.struct.dataclass
class DecoderOutput:
    """What a decoder without a head returns: a pytree, so the fields hold whatever a transformation puts there."""

    last_hidden_state: Any  # [batch, length, hidden]
    hidden_states: Any  # tuple of the embeddings, each block's output but the last one's, and the normalised last one; or None


def at_tokens(hidden: Float[Array, "batch positions hidden"], input_ids: Ids, index: Int[Array | np.ndarray, " batch"] | None) -> Array:
    """The hidden state of one token of each row, given by its place in `input_ids`; all if `index` is None."""
    if index is None:
        return hidden
    # Whatever was put in front of the sequence moves its tokens back.
    place = jnp.asarray(index) + (hidden.shape[1] - input_ids.shape[1])
    return jnp.take_along_axis(hidden, place[:, None, None], axis=1)

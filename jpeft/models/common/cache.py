"""What a decoder's tokens may attend to: the causal mask, and the cache of keys and values.

A cache is made by calling a model with `cache_length=` and `mutable=["cache"]`. Passed on among the variables, the next call continues it.
A call for which it has no room raises an error, or returns NaN where the call is compiled.

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

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jpeft.models.common.decoder_config import DecoderConfig
from jpeft.models.common.positions import TokenPositions
from jpeft.models.common.rope import Rotation

Heads = Float[Array, "batch length heads head"]


class View(NamedTuple):
    """What the queries of this call may attend to."""

    position_ids: Array  # int [batch, length]
    mask: Array  # bool [batch, 1, length, keys]: causal, without padding
    window_mask: Array | None  # the same within the sliding window; None without a window
    slot: Array | None  # int []: the cache's first slot for the keys of this call; None without a cache
    rotation: Rotation | None = None  # of the positions, in families with rotary embeddings

    def for_layer(self, uses_window: bool | Array) -> "View":
        """Return the view with the sliding-window mask for a layer that uses one, else with the full causal mask."""
        if self.window_mask is None or uses_window is False:
            return self
        return self._replace(mask=self.window_mask if uses_window is True else jnp.where(uses_window, self.window_mask, self.mask))


class CausalMask(nn.Module):
    """Causal mask over the tokens of this call and those in the cache. No parameters.

    With a cache the module stores which slots hold tokens and how many slots are filled. Slots are in the order of the calls. The window
    counts tokens, so padding between a prompt and its continuation does not narrow it.
    """

    config: DecoderConfig

    def count_cached_tokens(self) -> Int[Array, " batch"] | None:
        """Return how many tokens of each row the cache holds; None if there is no cache yet."""
        return self.get_variable("cache", "tokens").sum(-1, dtype=jnp.int32) if self.has_variable("cache", "tokens") else None

    @nn.compact
    def __call__(self, positions: TokenPositions, cache_length: int | None) -> View:
        """Make the mask, and write the tokens of this call into the cache.

        Args:
          positions: of the tokens of this call.
          cache_length: make a cache of that many slots, those of this call included.

        Raises:
          ValueError: if the cache has no room for this call and that can be known: inside `jit` it is not known how full a cache is.
        """
        tokens, slot = positions.mask[:, 0, 0, :], None  # bool [batch, length]
        length = tokens.shape[1]
        query_slots = jnp.arange(length)
        slots = cache_length
        if self.has_variable("cache", "tokens"):
            slots = self.get_variable("cache", "tokens").shape[1]
        if slots is not None:
            tokens, slot = self._append(tokens, slots)  # tokens: bool [batch, slots] from here on
            query_slots = query_slots + slot
        causal = jnp.arange(tokens.shape[1])[None, :] <= query_slots[:, None]  # [length, keys]
        mask = tokens[:, None, None, :] & causal[None, None]
        window_mask = None
        if self.config.window is not None:
            # The distance of two tokens is the number of tokens between them, not of slots: some slots hold padding.
            count = jnp.cumsum(tokens, axis=1, dtype=jnp.int32)  # [batch, keys]
            query_count = jax.lax.dynamic_slice_in_dim(count, 0 if slot is None else slot, length, 1)  # [batch, length]
            window_mask = mask & (query_count[:, None, :, None] - count[:, None, None, :] < self.config.window)
        return View(positions.position_ids, mask, window_mask, slot)

    def _append(self, tokens: Bool[Array, "batch length"], slots: int) -> tuple[Bool[Array, "batch slots"], Int[Array, ""]]:
        """Write the tokens into the cache; return all slots, and the first slot that was written."""
        batch, length = tokens.shape
        if length > slots:
            raise ValueError(f"{length} positions do not fit into a cache of {slots}. Make it with a larger cache_length=.")
        held = self.variable("cache", "tokens", jnp.zeros, (batch, slots), bool)
        filled = self.variable("cache", "filled", jnp.zeros, (), jnp.int32)
        slot = filled.value
        if not isinstance(slot, Tracer) and slot + length > slots:
            raise ValueError(
                f"{length} positions behind {slot} do not fit into a cache of {slots}. Make the cache with a larger cache_length=."
            )
        held.value, filled.value = jax.lax.dynamic_update_slice_in_dim(held.value, tokens, slot, 1), slot + length
        return held.value, slot


class KeyValueCache(nn.Module):
    """Keys and values of all calls so far, one slot for each position. No parameters."""

    @nn.compact
    def __call__(self, key: Heads, value: Heads, view: View) -> tuple[Array, Array]:
        """Return the keys and values of this call, or with a cache those of all slots."""
        if view.slot is None:
            return key, value
        slots = view.mask.shape[-1]
        return self._append("key", key, slots, view.slot), self._append("value", value, slots, view.slot)

    def _append(self, name: str, new: Heads, slots: int, slot: Array) -> Float[Array, "batch slots heads head"]:
        """Write the keys or values of this call into the cache, and return all slots."""
        held = self.variable("cache", name, jnp.zeros, (new.shape[0], slots, *new.shape[2:]), new.dtype)
        held.value = jax.lax.dynamic_update_slice_in_dim(held.value, new, slot, 1)
        return held.value

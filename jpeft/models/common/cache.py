"""What a decoder's tokens may attend to: those before them, and the cache of keys and values.

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
from jpeft.models.common.visible import Visible

Heads = Float[Array, "batch length heads head"]


class View(NamedTuple):
    """What the queries of this call may attend to."""

    position_ids: Array  # int [batch, length]
    mask: Visible  # causal, without padding, within the sliding window if there is one
    slot: Array | None  # int []: the cache's first slot for the keys of this call; None without a cache
    slots: Array | None  # bool [batch, slots]: those of the cache that hold tokens; None without a cache
    rotation: Rotation | None = None  # of the positions, in families with rotary embeddings

    def for_layer(self, uses_window: bool | Array) -> "View":
        """Return the view of a layer with a sliding window, or of one without."""
        return self._replace(mask=self.mask.for_layer(uses_window))


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
        batch, length = positions.position_ids.shape
        tokens = None if positions.mask is None else jnp.broadcast_to(positions.mask[:, 0, 0, :], (batch, length))
        begins, slots = not self.has_variable("cache", "tokens"), cache_length
        if not begins:
            slots = self.get_variable("cache", "tokens").shape[1]
        # A window as long as all there is to see is none.
        window, seen = self.config.window, length if begins or slots is None else slots
        mask = Visible(tokens, causal=True, window=None if window is None or window >= seen else window)
        if slots is None:
            return View(positions.position_ids, mask, None, None)
        held, slot = self._append(jnp.ones((batch, length), bool) if tokens is None else tokens, slots)
        # The call that makes a cache sees nothing but its own tokens, so it needs no empty slots. Later calls see what the cache holds.
        return View(positions.position_ids, mask if begins else mask.replace(keys=held, slot=slot), slot, held)

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
        """Return the keys and values of this call; once there is a cache, those of all slots."""
        if view.slot is None or view.slots is None:
            return key, value
        slots = view.slots.shape[1]
        held = self._append("key", key, slots, view.slot), self._append("value", value, slots, view.slot)
        return held if view.mask.slot is not None else (key, value)

    def _append(self, name: str, new: Heads, slots: int, slot: Array) -> Float[Array, "batch slots heads head"]:
        """Write the keys or values of this call into the cache, and return all slots."""
        held = self.variable("cache", name, jnp.zeros, (new.shape[0], slots, *new.shape[2:]), new.dtype)
        held.value = jax.lax.dynamic_update_slice_in_dim(held.value, new, slot, 1)
        return held.value

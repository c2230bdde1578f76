"""Which keys each query of an attention may see, described by structure and not by an array of queries × keys."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Visible(flax.struct.PyTreeNode):
    """A query sees a key that is a token, is not behind it if `causal`, is in its window and in its segment; and all keys of a prefix.

    The class is a pytree, so under a transformation the fields may hold anything.

    Attributes:
      keys: bool [batch, keys]: which keys are tokens; None if all are. The keys of a prefix are not among them.
      causal: Whether a query sees only the keys up to its own.
      window: How many tokens, itself included, a query may see; None for all. The window counts tokens, so padding does not narrow it.
      uses_window: bool []: whether the window applies, where one traced layer stands for layers with and without one; None if it does.
      slot: int []: the place of the first query among the keys, which a cache holds; None for 0.
      query_segments: int [batch, queries]: of packed rows, whose texts do not see each other; None for one text a row.
      key_segments: The same of the keys.
      prefix: Number of keys in front of all others that every query sees.

    >>> Visible(causal=True).dense(2, 2)[0, 0].tolist()
    [[True, False], [True, True]]
    >>> Visible(causal=True).with_prefix(1).dense(2, 3)[0, 0].tolist()
    [[True, True, False], [True, True, True]]
    """

    keys: Any = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    uses_window: Any = None
    slot: Any = None
    query_segments: Any = None
    key_segments: Any = None
    prefix: int = flax.struct.field(pytree_node=False, default=0)

    def with_prefix(self, length: int) -> "Visible":
        """Return the description with so many more keys in front."""
        return self.replace(prefix=self.prefix + length)

    def up_to(self, count: int) -> "Visible":
        """Return the description for the first keys alone, so many beside those of the prefix."""
        cut = lambda x: None if x is None else x[:, :count]
        return self.replace(keys=cut(self.keys), key_segments=cut(self.key_segments))

    def for_layer(self, uses_window: bool | Bool[Array, ""]) -> "Visible":
        """Return the description for a layer with the window, or for one without."""
        if self.window is None or uses_window is True:
            return self
        return self.replace(window=None) if uses_window is False else self.replace(uses_window=uses_window)

    def dense(self, queries: int, keys: int) -> Bool[Array, "#batch 1 #queries keys"]:
        """Return the boolean mask of all queries, for that many keys with those of the prefix."""
        return self.rows(0, queries, keys)

    def rows(self, first: int | Int[Array, ""], queries: int, keys: int) -> Bool[Array, "#batch 1 #queries keys"]:
        """Return the boolean mask of so many queries from the given one on, for that many keys with those of the prefix."""
        own = keys - self.prefix
        mask = jnp.ones((1, 1, own), bool) if self.keys is None else self.keys[:, None]  # [batch, queries, keys]
        places = (0 if self.slot is None else self.slot) + first + jnp.arange(queries)  # of the queries among the keys
        if self.causal:
            mask = mask & (jnp.arange(own)[None, None] <= places[None, :, None])
        if self.query_segments is not None:
            segments = jax.lax.dynamic_slice_in_dim(self.query_segments, first, queries, 1)
            mask = mask & (segments[:, :, None] == self.key_segments[:, None])
        if self.window is not None:
            # The distance of two tokens is the number of tokens between them, not of slots: some slots hold padding.
            count = jnp.arange(own)[None] if self.keys is None else jnp.cumsum(self.keys, axis=1, dtype=jnp.int32)  # [batch, keys]
            at_query = jnp.take(count, places, axis=1, mode="clip")  # [batch, queries]
            near = at_query[:, :, None] - count[:, None] < self.window
            mask = mask & (near if self.uses_window is None else near | ~self.uses_window)
        if self.prefix:
            mask = jnp.concatenate([jnp.ones((*mask.shape[:2], self.prefix), bool), mask], axis=-1)
        return mask[:, None]

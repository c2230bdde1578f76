"""Attention proper: the part without parameters, in one module for all families."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

Ids = Int[Array | np.ndarray, "batch length"]
Mask = Shaped[Array | np.ndarray, "batch length"]  # 1 or True: a token, 0 or False: padding


class AttentionCore(nn.Module):
    """softmax(Q Kᵀ / √d) V over the keys whose mask is True.

    The module has no parameters and is named ``core`` in every family, so that methods can wrap it (see `jpeft.models.common.contract`).
    Keys and values may be longer than the queries if the mask is as long as the keys. They may also have fewer heads than the queries; then
    each head of keys serves a group of neighbouring query heads.
    """

    dropout: float = 0.0  # on the attention weights

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
        """Return the context of each query."""
        grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])  # [batch, queries, groups, heads of a group, head]
        scores = jnp.einsum("bqgrd,bkgd->bgrqk", grouped, key, preferred_element_type=jnp.float32)
        scores = scores * query.shape[-1] ** -0.5  # [batch, groups, heads of a group, queries, keys], float32
        # The lowest finite number, not -inf: the softmax of a query that may attend to nothing stays finite.
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        weights = nn.Dropout(self.dropout)(weights, deterministic=deterministic)
        return jnp.einsum("bgrqk,bkgd->bqgrd", weights, value).reshape(query.shape)

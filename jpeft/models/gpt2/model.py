"""GPT-2's blocks, decoder and language model."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from jpeft.models.common.activations import ACTIVATIONS
from jpeft.models.common.attention import make_core
from jpeft.models.common.block_stack import Hidden
from jpeft.models.common.cache import KeyValueCache, View
from jpeft.models.common.decoder import Decoder, LanguageModel
from jpeft.models.common.layers import dense, embedding, layer_norm
from jpeft.models.gpt2.config import GPT2Config


class GPT2Attention(nn.Module):
    """Causal self-attention. One kernel makes queries, keys and values."""

    config: GPT2Config

    @nn.compact
    def __call__(self, hidden: Hidden, view: View, deterministic: bool) -> Hidden:
        """Attend to the tokens so far."""
        config = self.config
        split = (*hidden.shape[:-1], config.num_attention_heads, config.head_size)
        qkv = dense(config, 3 * config.hidden_size, "c_attn")(hidden)  # [batch, length, 3 hidden]
        # Each third is [batch, length, hidden] -> [batch, length, heads, head].
        query, key, value = (part.reshape(split) for part in jnp.split(qkv, 3, axis=-1))
        # With a cache, key and value are those of all slots: [batch, slots, heads, head].
        key, value = KeyValueCache(name="cache")(key, value, view)
        context = make_core(config, config.attention_dropout)(query, key, value, view.mask, deterministic=deterministic)
        return dense(config, config.hidden_size, "c_proj")(context.reshape(hidden.shape))


class GPT2MLP(nn.Module):
    """W2 act(W1 x + b1) + b2."""

    config: GPT2Config

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        """Return the second half of a block, without its residual."""
        config = self.config
        inner = dense(config, config.intermediate_size or 4 * config.hidden_size, "c_fc")(hidden)
        return dense(config, config.hidden_size, "c_proj")(ACTIVATIONS[config.hidden_act](inner))


class GPT2Block(nn.Module):
    """A pre-norm block: x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x))."""

    config: GPT2Config

    @nn.compact
    def __call__(self, hidden: Hidden, view: View, deterministic: bool) -> Hidden:
        """Apply the block."""
        dropout = nn.Dropout(self.config.hidden_dropout)
        context = GPT2Attention(self.config, name="attn")(layer_norm(self.config, "ln_1")(hidden), view, deterministic)
        hidden = hidden + dropout(context, deterministic=deterministic)
        inner = GPT2MLP(self.config, name="mlp")(layer_norm(self.config, "ln_2")(hidden))
        return hidden + dropout(inner, deterministic=deterministic)


class GPT2Model(Decoder):
    """The decoder without a head.

    >>> from jpeft.models import abstract_params
    >>> model = GPT2Model(GPT2Config.gpt2(num_hidden_layers=1))
    >>> jax.eval_shape(model.apply, {"params": abstract_params(model)}, jnp.ones((2, 5), int)).last_hidden_state.shape
    (2, 5, 768)
    """

    BLOCK = GPT2Block
    NORM = staticmethod(layer_norm)
    NAMES = ("wte", "h", "ln_f")  # as in Hugging Face's checkpoints

    def setup(self):
        """Add the position table to the parts of a decoder."""
        super().setup()
        self.wpe = embedding(self.config, self.config.max_position_embeddings)
        self.dropout = nn.Dropout(self.config.embedding_dropout)

    def embed(self, input_ids: Array, view: View, deterministic: bool) -> Hidden:
        """Return the sum of word and position embeddings."""
        hidden = super().embed(input_ids, view, deterministic) + self.wpe(view.position_ids)
        return self.dropout(hidden, deterministic=deterministic)


class GPT2LMHeadModel(LanguageModel):
    """The next word at each position."""

    BODY = GPT2Model
    NAME = "transformer"

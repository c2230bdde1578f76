"""The encoder of the BERT family: embeddings, attention, blocks.

Post-norm transformer blocks over the sum of word, position and token-type embeddings. Two modules without parameters
are there to be wrapped: `Positions` (position ids, token types and the attention mask) and `attention.AttentionCore`
(queries, keys, values and mask to context). Whoever puts keys in front of a layer's own wraps the one to move the tokens behind
them, and the other to lengthen keys, values and mask.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jpeft.models.activations import ACTIVATIONS
from jpeft.models.attention import AttentionCore, Ids, Mask
from jpeft.models.bert_config import BertConfig
from jpeft.models.layers import dense, embed, layer_norm
from jpeft.models.stack import Hidden, run_stack, stack

# --- embeddings ---


class Layout(NamedTuple):
    """Where each position is and what it may look at."""

    position_ids: Array  # int [batch or 1, length]
    token_type_ids: Array  # int [batch, length]
    mask: Array  # bool [batch, 1, 1, length], over keys: True may be attended to
    offset: int = 0  # how many positions are left free in front of the first one


class Positions(nn.Module):
    """Position ids, token types and attention mask of a batch. No parameters."""

    config: BertConfig

    def __call__(self, input_ids: Ids, attention_mask: Mask | None, token_type_ids: Ids | None) -> Layout:
        """Count positions from 0, or as RoBERTa does: from pad_token_id + 1, over the ids that are not padding."""
        input_ids = jnp.asarray(input_ids)
        if self.config.model_type == "roberta":
            real = (input_ids != self.config.pad_token_id).astype(jnp.int32)
            position_ids = jnp.cumsum(real, axis=1) * real + self.config.pad_token_id
        else:
            position_ids = jnp.arange(input_ids.shape[1])[None]
        types = jnp.zeros_like(input_ids) if token_type_ids is None else jnp.asarray(token_type_ids)
        mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
        return Layout(position_ids, types, mask[:, None, None, :])


class Embeddings(nn.Module):
    """LayerNorm(word + position + token type)."""

    config: BertConfig

    def setup(self):
        """Setup rather than compact: the masked-LM head reads `word_embeddings` again."""
        config = self.config
        self.word_embeddings = embed(config, config.vocab_size)
        self.position_embeddings = embed(config, config.max_position_embeddings)
        if config.type_vocab_size:
            self.token_type_embeddings = embed(config, config.type_vocab_size)
        self.LayerNorm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def __call__(self, input_ids: Ids, layout: Layout, deterministic: bool) -> Float[Array, "batch positions hidden"]:
        """Embed; ValueError if there are more positions than rows in the position table."""
        length = layout.offset + layout.position_ids.shape[-1]
        if length > self.config.max_length:  # a lookup past the table's end would give NaN, silently
            raise ValueError(f"{length} positions, but the position table holds {self.config.max_length}; truncate the input")
        hidden = self.word_embeddings(jnp.asarray(input_ids)) + self.position_embeddings(layout.position_ids)
        if self.config.type_vocab_size:
            hidden += self.token_type_embeddings(layout.token_type_ids)
        return self.dropout(self.LayerNorm(hidden), deterministic=deterministic)


# --- blocks ---


KeyMask = Bool[Array, "#batch 1 1 keys"]


class SelfAttention(nn.Module):
    """Query, key and value projections around the attention core, and an output projection where `output` names one."""

    config: BertConfig
    names: tuple[str, str, str] = ("query", "key", "value")
    output: str | None = None

    @nn.compact
    def __call__(self, hidden: Hidden, mask: KeyMask, deterministic: bool) -> Hidden:
        """Attend over the sequence itself."""
        size, heads = self.config.hidden_size, self.config.num_attention_heads
        split = (*hidden.shape[:-1], heads, size // heads)
        query, key, value = (dense(self.config, size, name)(hidden).reshape(split) for name in self.names)
        context = AttentionCore(self.config.attention_probs_dropout_prob, name="core")(query, key, value, mask, deterministic=deterministic)
        context = context.reshape(hidden.shape)
        return context if self.output is None else dense(self.config, size, self.output)(context)


class ResidualOutput(nn.Module):
    """LayerNorm(residual + dropout(W x + b)): how both halves of a BERT block end."""

    config: BertConfig

    @nn.compact
    def __call__(self, inputs: Float[Array, "batch length inputs"], residual: Hidden, deterministic: bool) -> Hidden:
        """Project `inputs` to the hidden size, add and normalise."""
        hidden = dense(self.config, self.config.hidden_size, "dense")(inputs)
        hidden = nn.Dropout(self.config.hidden_dropout_prob)(hidden, deterministic=deterministic)
        return layer_norm(self.config, "LayerNorm")(hidden + residual)


class BertAttention(nn.Module):
    """Self-attention and its residual output, under the names `self` and `output`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden, mask: KeyMask, deterministic: bool) -> Hidden:
        """First half of a block."""
        context = SelfAttention(self.config, name="self")(hidden, mask, deterministic)
        return ResidualOutput(self.config, name="output")(context, hidden, deterministic)


class Intermediate(nn.Module):
    """act(W x + b), the wide layer of a BERT block."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Float[Array, "batch length inner"]:
        """Widen to the intermediate size."""
        return ACTIVATIONS[self.config.hidden_act](dense(self.config, self.config.intermediate_size, "dense")(hidden))


class BertLayer(nn.Module):
    """One block of BERT and RoBERTa."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden, mask: KeyMask, deterministic: bool) -> Hidden:
        """Attention, then feed-forward, each with residual and LayerNorm after it."""
        hidden = BertAttention(self.config, name="attention")(hidden, mask, deterministic)
        inner = Intermediate(self.config, name="intermediate")(hidden)
        return ResidualOutput(self.config, name="output")(inner, hidden, deterministic)


class FeedForward(nn.Module):
    """dropout(W2 act(W1 x + b1) + b2), under the names `lin1` and `lin2`: the other half of a DistilBERT block."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden, deterministic: bool) -> Hidden:
        """Second half of a block."""
        inner = ACTIVATIONS[self.config.hidden_act](dense(self.config, self.config.intermediate_size, "lin1")(hidden))
        outer = dense(self.config, self.config.hidden_size, "lin2")(inner)
        return nn.Dropout(self.config.hidden_dropout_prob)(outer, deterministic=deterministic)


class DistilBertLayer(nn.Module):
    """One block of DistilBERT: a BERT block under other names, without dropout after the attention."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden, mask: KeyMask, deterministic: bool) -> Hidden:
        """Attention, then feed-forward, each with residual and LayerNorm after it."""
        attention = SelfAttention(self.config, ("q_lin", "k_lin", "v_lin"), "out_lin", name="attention")
        hidden = layer_norm(self.config, "sa_layer_norm")(hidden + attention(hidden, mask, deterministic))
        inner = FeedForward(self.config, name="ffn")(hidden, deterministic)
        return layer_norm(self.config, "output_layer_norm")(hidden + inner)


class Encoder(nn.Module):
    """All blocks, under the name `layer`: unrolled (layer/0/..., layer/1/...) or scanned (layer/..., stacked)."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, hidden: Hidden, mask: KeyMask, deterministic: bool, output_hidden_states: bool = False
    ) -> tuple[Hidden, tuple[Hidden, ...] | None]:
        """Last hidden state, and on request the input followed by the output of every block."""
        layer = stack(self.config, DistilBertLayer if self.config.model_type == "distilbert" else BertLayer, "layer")
        hidden, states = run_stack(layer, self.config, hidden, mask, deterministic, output_hidden_states=output_hidden_states)
        return hidden, (*states, hidden) if output_hidden_states else None

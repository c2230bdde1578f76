"""BERT's encoder: embeddings, attention, blocks.

The blocks are post-norm transformer blocks over the sum of word, position and token-type embeddings. Two modules without parameters exist
so that methods can wrap them (see `jpeft.models.common.contract`): `positions` and the `core` of each attention.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jpeft.models.bert.config import BertConfig
from jpeft.models.common.activations import ACTIVATIONS
from jpeft.models.common.attention import Ids, Mask, make_core
from jpeft.models.common.block_stack import Hidden, make_blocks, run_blocks
from jpeft.models.common.layers import dense, embedding, layer_norm
from jpeft.models.common.lookup import look_up
from jpeft.models.common.positions import TokenPositions, check_positions
from jpeft.models.common.visible import Visible

# --- embeddings ---


class BertPositions(nn.Module):
    """Position ids, token types and attention mask of a batch. No parameters."""

    config: BertConfig

    def __call__(self, input_ids: Ids, attention_mask: Mask | None, token_type_ids: Ids | None) -> TokenPositions:
        """Count all positions from 0. RoBERTa counts from pad_token_id + 1, and only the ids that are not padding."""
        input_ids = jnp.asarray(input_ids)
        if self.config.architecture == "roberta":
            # RoBERTa was trained in fairseq, whose position table has a row for padding at pad_token_id. Padding keeps that row.
            is_token = (input_ids != self.config.pad_token_id).astype(jnp.int32)
            position_ids = jnp.cumsum(is_token, axis=1) * is_token + self.config.pad_token_id
        else:
            position_ids = jnp.arange(input_ids.shape[1])[None]  # [1, length]: the same for all rows
        types = jnp.zeros_like(input_ids) if token_type_ids is None else jnp.asarray(token_type_ids)
        mask = None if attention_mask is None else (jnp.asarray(attention_mask) != 0)[:, None, None, :]
        return TokenPositions(position_ids, mask, token_type_ids=types)


class Embeddings(nn.Module):
    """LayerNorm(word + position + token type)."""

    config: BertConfig

    def setup(self):
        """Make the tables here, not in a compact method: the masked-LM head uses `word_embeddings` too."""
        config = self.config
        width = config.embedding_width
        self.word_embeddings = embedding(config, config.vocab_size, width=width)
        self.position_embeddings = embedding(config, config.max_position_embeddings, width=width)
        if config.type_vocab_size:
            self.token_type_embeddings = embedding(config, config.type_vocab_size, width=width)
        self.LayerNorm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def __call__(self, input_ids: Ids, positions: TokenPositions, deterministic: bool) -> Float[Array, "batch positions width"]:
        """Embed a batch; raise a ValueError if there are more positions than rows in the position table, or for an id without a row."""
        check_positions(positions.offset + positions.position_ids.shape[-1], self.config.max_length)
        hidden = look_up(self.word_embeddings, input_ids) + self.position_embeddings(positions.position_ids)
        if self.config.type_vocab_size:
            hidden += look_up(self.token_type_embeddings, jnp.asarray(positions.token_type_ids), "token_type_ids")
        return self.dropout(self.LayerNorm(hidden), deterministic=deterministic)


# --- blocks ---


Seen = Visible | Bool[Array, "#batch 1 #length keys"]


class SelfAttention(nn.Module):
    """Query, key and value projections, the attention core, and an output projection if `output` names one."""

    config: BertConfig
    names: tuple[str, str, str] = ("query", "key", "value")
    output: str | None = None

    @nn.compact
    def __call__(self, hidden: Hidden, mask: Seen, deterministic: bool) -> Hidden:
        """Attend over the sequence itself."""
        size, heads = self.config.hidden_size, self.config.num_attention_heads
        split = (*hidden.shape[:-1], heads, size // heads)
        # [batch, length, hidden] -> [batch, length, heads, head]
        query, key, value = (dense(self.config, size, name)(hidden).reshape(split) for name in self.names)
        context = make_core(self.config, self.config.attention_probs_dropout_prob)(query, key, value, mask, deterministic=deterministic)
        context = context.reshape(hidden.shape)  # [batch, length, heads, head] -> [batch, length, hidden]
        return context if self.output is None else dense(self.config, size, self.output)(context)


class ResidualOutput(nn.Module):
    """LayerNorm(residual + dropout(W x + b)): the end of both halves of a BERT block."""

    config: BertConfig

    @nn.compact
    def __call__(self, inputs: Float[Array, "batch length inputs"], residual: Hidden, deterministic: bool) -> Hidden:
        """Project `inputs` to the hidden size, add the residual and normalise."""
        hidden = dense(self.config, self.config.hidden_size, "dense")(inputs)
        hidden = nn.Dropout(self.config.hidden_dropout_prob)(hidden, deterministic=deterministic)
        return layer_norm(self.config, "LayerNorm")(hidden + residual)


class BertAttention(nn.Module):
    """Self-attention and its residual output, under the names `self` and `output`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden, mask: Seen, deterministic: bool) -> Hidden:
        """Return the first half of a block."""
        context = SelfAttention(self.config, name="self")(hidden, mask, deterministic)
        return ResidualOutput(self.config, name="output")(context, hidden, deterministic)


class Intermediate(nn.Module):
    """act(W x + b), the wide layer of a BERT block."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Float[Array, "batch length inner"]:
        """Project to the intermediate size and apply the activation."""
        return ACTIVATIONS[self.config.hidden_act](dense(self.config, self.config.intermediate_size, "dense")(hidden))


class BertLayer(nn.Module):
    """One block of all but DistilBERT."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden, mask: Seen, deterministic: bool) -> Hidden:
        """Apply attention and the feed-forward network, each followed by its residual and LayerNorm."""
        hidden = BertAttention(self.config, name="attention")(hidden, mask, deterministic)
        inner = Intermediate(self.config, name="intermediate")(hidden)
        return ResidualOutput(self.config, name="output")(inner, hidden, deterministic)


class FeedForward(nn.Module):
    """dropout(W2 act(W1 x + b1) + b2) with the layers `lin1` and `lin2`: the second half of a DistilBERT block."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden, deterministic: bool) -> Hidden:
        """Return the second half of a block, without its residual."""
        inner = ACTIVATIONS[self.config.hidden_act](dense(self.config, self.config.intermediate_size, "lin1")(hidden))
        outer = dense(self.config, self.config.hidden_size, "lin2")(inner)
        return nn.Dropout(self.config.hidden_dropout_prob)(outer, deterministic=deterministic)


class DistilBertLayer(nn.Module):
    """One block of DistilBERT: a BERT block under other names, without dropout after the attention."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden, mask: Seen, deterministic: bool) -> Hidden:
        """Apply attention and the feed-forward network, each followed by its residual and LayerNorm."""
        attention = SelfAttention(self.config, ("q_lin", "k_lin", "v_lin"), "out_lin", name="attention")
        hidden = layer_norm(self.config, "sa_layer_norm")(hidden + attention(hidden, mask, deterministic))
        inner = FeedForward(self.config, name="ffn")(hidden, deterministic)
        return layer_norm(self.config, "output_layer_norm")(hidden + inner)


class Encoder(nn.Module):
    """All blocks, in the module `layer`: unrolled (layer/0/..., layer/1/...) or scanned (layer/..., with stacked parameters)."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, hidden: Hidden, mask: Seen, deterministic: bool, output_hidden_states: bool = False
    ) -> tuple[Hidden, tuple[Hidden, ...] | None]:
        """Return the last hidden state and, on request, the input and the output of every block."""
        layer = make_blocks(self.config, DistilBertLayer if self.config.architecture == "distilbert" else BertLayer, "layer")
        hidden, states = run_blocks(layer, self.config, hidden, mask, deterministic, output_hidden_states=output_hidden_states)
        return hidden, (*states, hidden) if output_hidden_states else None

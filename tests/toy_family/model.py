"""The toy encoder-decoder: post-norm blocks without positional information."""

import flax.linen as nn
import jax.numpy as jnp

from jpeft.models.common.attention import AttentionCore
from jpeft.models.common.block_stack import make_blocks, run_blocks
from jpeft.models.common.layers import dense, embedding, layer_norm
from jpeft.models.common.positions import TokenPositions
from toy_family.config import ToyConfig


class Positions(nn.Module):
    """Padding is not told apart from tokens here."""

    @nn.compact
    def __call__(self, ids):
        return TokenPositions(jnp.arange(ids.shape[1])[None], jnp.ones((len(ids), 1, 1, ids.shape[1]), bool))


class Attention(nn.Module):
    """Attention of one text to another, or to itself."""

    config: ToyConfig

    @nn.compact
    def __call__(self, hidden, source, mask):
        config = self.config
        split = lambda x: x.reshape(*x.shape[:-1], config.num_attention_heads, config.head_size)
        query, key, value = (
            split(dense(config, config.hidden_size, name, bias=False)(x)) for name, x in (("q", hidden), ("k", source), ("v", source))
        )
        context = AttentionCore(name="core")(query, key, value, mask)
        return layer_norm(config, "norm")(hidden + dense(config, config.hidden_size, "o", bias=False)(context.reshape(hidden.shape)))


class FeedForward(nn.Module):
    """A ReLU network."""

    config: ToyConfig

    @nn.compact
    def __call__(self, hidden):
        config = self.config
        inner = nn.relu(dense(config, config.intermediate_size, "wi", bias=False)(hidden))
        return layer_norm(config, "norm")(hidden + dense(config, config.hidden_size, "wo", bias=False)(inner))


class EncoderBlock(nn.Module):
    """Self-attention, feed-forward network."""

    config: ToyConfig

    @nn.compact
    def __call__(self, hidden, mask, deterministic):
        return FeedForward(self.config, name="mlp")(Attention(self.config, name="attention")(hidden, hidden, mask))


class DecoderBlock(nn.Module):
    """Self-attention, attention to the encoder's output, feed-forward network."""

    config: ToyConfig

    @nn.compact
    def __call__(self, hidden, context, deterministic):
        causal, encoded, mask = context
        hidden = Attention(self.config, name="attention")(hidden, hidden, causal)
        return FeedForward(self.config, name="mlp")(Attention(self.config, name="cross")(hidden, encoded, mask))


class Encoder(nn.Module):
    """The first stack."""

    config: ToyConfig

    @nn.compact
    def __call__(self, hidden, mask, deterministic):
        return run_blocks(make_blocks(self.config, EncoderBlock, "block"), self.config, hidden, mask, deterministic)[0]


class Decoder(nn.Module):
    """The second stack."""

    config: ToyConfig

    @nn.compact
    def __call__(self, hidden, context, deterministic):
        blocks = make_blocks(self.config, DecoderBlock, "block")
        return run_blocks(blocks, self.config, hidden, context, deterministic, num_layers=self.config.num_decoder_layers)[0]


class ToyModel(nn.Module):
    """The body."""

    config: ToyConfig

    def setup(self):
        self.shared = embedding(self.config, self.config.vocab_size)
        self.positions = Positions()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(self, input_ids, decoder_input_ids, *, deterministic=True):
        source, target = self.positions(input_ids), self.positions(decoder_input_ids)
        encoded = self.encoder(self.shared(input_ids), source.mask, deterministic)
        causal = target.mask & jnp.tri(decoder_input_ids.shape[1], dtype=bool)[None, None]
        return self.decoder(self.shared(decoder_input_ids), (causal, encoded, source.mask), deterministic)

    def attend(self, hidden):
        return self.shared.attend(hidden)


class ToyForConditionalGeneration(nn.Module):
    """The next word of the second text at each of its positions."""

    config: ToyConfig

    @nn.compact
    def __call__(self, input_ids, decoder_input_ids, *, deterministic=True):
        body = ToyModel(self.config, name="transformer")
        return body.attend(body(input_ids, decoder_input_ids, deterministic=deterministic)).astype(jnp.float32)

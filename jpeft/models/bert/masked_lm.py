"""BERT's head for masked language modelling: a transformation of the hidden states, the word embedding as the decoder, and a bias.

A checkpoint may hold a decoder of its own (`tie_word_embeddings` is false then).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.models.bert.config import BertConfig
from jpeft.models.bert.model import BertModel
from jpeft.models.common.activations import ACTIVATIONS
from jpeft.models.common.attention import Ids, Mask
from jpeft.models.common.block_stack import Hidden
from jpeft.models.common.layers import dense, layer_norm

# What a head returns: hidden states for the word embedding to score, or the scores of an own decoder; and the decoder's bias.
Decodable = tuple[Float[Array, "batch length features"], Float[Array, " vocab"]]


def _vocab_bias(module: nn.Module) -> Float[Array, " vocab"]:
    """Return the decoder's bias, a parameter of the given module."""
    return module.param("bias", nn.initializers.zeros, (module.config.vocab_size,), module.config.param_dtype)


def _transform(config: BertConfig, hidden: Array, dense_name: str, norm_name: str) -> Array:
    """Return LayerNorm(act(W h + b)), with both layers in the calling module and under the given names."""
    # The heads of RoBERTa and ELECTRA always use gelu.
    activation = "gelu" if config.architecture in ("roberta", "electra") else config.hidden_act
    hidden = ACTIVATIONS[activation](dense(config, config.embedding_width, dense_name)(hidden))
    return layer_norm(config, norm_name)(hidden)


def _decode(config: BertConfig, hidden: Array) -> Array:
    """Return the scores of the calling module's own `decoder`; the hidden states as they are if the word embedding decodes them."""
    return hidden if config.tie_word_embeddings else dense(config, config.vocab_size, "decoder", bias=False)(hidden)


class VocabBias(nn.Module):
    """The last layer of DistilBERT and ELECTRA where the word embedding is the decoder: only the bias."""

    config: BertConfig

    @nn.compact
    def __call__(self) -> Float[Array, " vocab"]:
        """Return one number for each word of the vocabulary."""
        return _vocab_bias(self)


def _project(config: BertConfig, hidden: Array, name: str) -> Decodable:
    """Return scores or hidden states, and the bias, of the calling module's last layer, under the given name."""
    if config.tie_word_embeddings:
        return hidden, VocabBias(config, name=name)()
    scores = dense(config, config.vocab_size, name)(hidden)
    return scores, jnp.zeros(config.vocab_size, scores.dtype)


class Transform(nn.Module):
    """BERT's `transform` and ELECTRA's `generator_predictions`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Float[Array, "batch length width"]:
        """Return LayerNorm(act(W h + b))."""
        return _transform(self.config, hidden, "dense", "LayerNorm")


class Predictions(nn.Module):
    """BERT's `predictions`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Decodable:
        """Return scores or hidden states, and the bias."""
        hidden = Transform(self.config, name="transform")(hidden)
        return _decode(self.config, hidden), _vocab_bias(self)


class BertHeads(nn.Module):
    """BERT's `cls`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Decodable:
        """Return scores or hidden states, and the bias."""
        return Predictions(self.config, name="predictions")(hidden)


class RobertaLMHead(nn.Module):
    """RoBERTa's `lm_head`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Decodable:
        """Return scores or hidden states, and the bias."""
        hidden = _transform(self.config, hidden, "dense", "layer_norm")
        return _decode(self.config, hidden), _vocab_bias(self)


class BertForMaskedLM(nn.Module):
    """One word for each position. The decoder is the word embedding, or a layer of its own where the configuration says so."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        token_type_ids: Ids | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "batch length vocab"]:
        """Return float32 logits; arguments as in `BertModel`."""
        config, family = self.config, self.config.architecture
        body = BertModel(config, pooling=False, name=family)
        hidden = body(input_ids, attention_mask, token_type_ids, deterministic=deterministic).last_hidden_state
        if family == "bert":
            hidden, bias = BertHeads(config, name="cls")(hidden)
        elif family == "roberta":
            hidden, bias = RobertaLMHead(config, name="lm_head")(hidden)
        elif family == "electra":
            hidden = Transform(config, name="generator_predictions")(hidden)
            hidden, bias = _project(config, hidden, "generator_lm_head")
        else:
            hidden = _transform(config, hidden, "vocab_transform", "vocab_layer_norm")
            hidden, bias = _project(config, hidden, "vocab_projector")
        # [batch, length, width] · [vocab, width]ᵀ -> [batch, length, vocab]; the bias is added in float32.
        scores = body.attend(hidden) if config.tie_word_embeddings else hidden
        return scores.astype(jnp.float32) + bias.astype(jnp.float32)[None, None]

"""BERT's head for masked language modelling: a transformation of the hidden states, the word embedding as the decoder, and a bias."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.models.bert.config import BertConfig
from jpeft.models.bert.model import BertModel
from jpeft.models.common.activations import ACTIVATIONS
from jpeft.models.common.attention import Ids, Mask
from jpeft.models.common.block_stack import Hidden
from jpeft.models.common.layers import dense, layer_norm

# What a head returns: hidden states for the decoder, and the decoder's bias.
Decodable = tuple[Hidden, Float[Array, " vocab"]]


def _vocab_bias(module: nn.Module) -> Float[Array, " vocab"]:
    """Return the decoder's bias, a parameter of the given module."""
    return module.param("bias", nn.initializers.zeros, (module.config.vocab_size,), module.config.param_dtype)


def _transform(config: BertConfig, hidden: Array, dense_name: str, norm_name: str) -> Array:
    """Return LayerNorm(act(W h + b)), with both layers in the calling module and under the given names."""
    activation = "gelu" if config.model_type == "roberta" else config.hidden_act  # RoBERTa's head always uses gelu
    hidden = ACTIVATIONS[activation](dense(config, config.hidden_size, dense_name)(hidden))
    return layer_norm(config, norm_name)(hidden)


class VocabBias(nn.Module):
    """DistilBERT's `vocab_projector`, which holds only the bias of the decoder."""

    config: BertConfig

    @nn.compact
    def __call__(self) -> Float[Array, " vocab"]:
        """Return one number for each word of the vocabulary."""
        return _vocab_bias(self)


class Transform(nn.Module):
    """BERT's `transform`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        """Return LayerNorm(act(W h + b))."""
        return _transform(self.config, hidden, "dense", "LayerNorm")


class Predictions(nn.Module):
    """BERT's `predictions`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Decodable:
        """Return the transformed hidden states and the bias."""
        return Transform(self.config, name="transform")(hidden), _vocab_bias(self)


class BertHeads(nn.Module):
    """BERT's `cls`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Decodable:
        """Return the transformed hidden states and the bias."""
        return Predictions(self.config, name="predictions")(hidden)


class RobertaLMHead(nn.Module):
    """RoBERTa's `lm_head`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Decodable:
        """Return the transformed hidden states and the bias."""
        return _transform(self.config, hidden, "dense", "layer_norm"), _vocab_bias(self)


class BertForMaskedLM(nn.Module):
    """One word for each position. The decoder is the word embedding."""

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
        config, family = self.config, self.config.model_type
        body = BertModel(config, pooling=False, name=family)
        hidden = body(input_ids, attention_mask, token_type_ids, deterministic=deterministic).last_hidden_state
        if family == "bert":
            hidden, bias = BertHeads(config, name="cls")(hidden)
        elif family == "roberta":
            hidden, bias = RobertaLMHead(config, name="lm_head")(hidden)
        else:
            hidden = _transform(config, hidden, "vocab_transform", "vocab_layer_norm")
            bias = VocabBias(config, name="vocab_projector")()
        # [batch, length, hidden] · [vocab, hidden]ᵀ -> [batch, length, vocab]; the bias is added in float32.
        return body.attend(hidden).astype(jnp.float32) + bias.astype(jnp.float32)[None, None]

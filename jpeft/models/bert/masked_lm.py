"""BERT's head for masked language modelling: a transformation of the hidden states, the word embedding as the decoder, and a bias.

A checkpoint may hold a decoder of its own (`tie_word_embeddings` is false then).
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jpeft.models.bert.config import BertConfig
from jpeft.models.bert.model import BertModel
from jpeft.models.common.activations import ACTIVATIONS
from jpeft.models.common.attention import Ids, Mask
from jpeft.models.common.block_stack import Hidden
from jpeft.models.common.layers import dense, layer_norm
from jpeft.models.common.token_loss import TokenLoss, token_loss

Logits = Float[Array, "batch length vocab"]
# What the decoder is given.
Features = Float[Array, "batch length features"]


class VocabBias(nn.Module):
    """The last layer of DistilBERT and ELECTRA where the word embedding is the decoder: only the bias."""

    config: BertConfig

    @nn.compact
    def __call__(self) -> Float[Array, " vocab"]:
        """Return one number for each word of the vocabulary."""
        return _vocab_bias(self)


class Transform(nn.Module):
    """BERT's `transform` and ELECTRA's `generator_predictions`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Features:
        """Return LayerNorm(act(W h + b))."""
        return _transform(
            self.config, dense(self.config, self.config.embedding_width, "dense"), layer_norm(self.config, "LayerNorm"), hidden
        )


class Predictions(nn.Module):
    """BERT's `predictions`."""

    config: BertConfig

    def setup(self):
        """Make the parts here, not in a compact method: `score` needs the decoder."""
        self.transform = Transform(self.config)
        self.decoder = _own_decoder(self.config, bias=False)
        self.bias = _vocab_bias(self)

    def __call__(self, hidden: Hidden) -> Features:
        """Return what the decoder is given."""
        return self.transform(hidden)

    def score(self, hidden: Features, attend: Callable[[Features], Logits]) -> Logits:
        """Return float32 logits."""
        return _biased((self.decoder or attend)(hidden), self.bias)


class BertHeads(nn.Module):
    """BERT's `cls`."""

    config: BertConfig

    def setup(self):
        """Make the one part."""
        self.predictions = Predictions(self.config)

    def __call__(self, hidden: Hidden) -> Features:
        """Return what the decoder is given."""
        return self.predictions(hidden)

    def score(self, hidden: Features, attend: Callable[[Features], Logits]) -> Logits:
        """Return float32 logits."""
        return self.predictions.score(hidden, attend)


class RobertaLMHead(nn.Module):
    """RoBERTa's `lm_head`."""

    config: BertConfig

    def setup(self):
        """Make the parts here, not in a compact method: `score` needs the decoder."""
        self.dense = dense(self.config, self.config.embedding_width)
        self.layer_norm = layer_norm(self.config)
        self.decoder = _own_decoder(self.config, bias=False)
        self.bias = _vocab_bias(self)

    def __call__(self, hidden: Hidden) -> Features:
        """Return what the decoder is given."""
        return _transform(self.config, self.dense, self.layer_norm, hidden)

    def score(self, hidden: Features, attend: Callable[[Features], Logits]) -> Logits:
        """Return float32 logits."""
        return _biased((self.decoder or attend)(hidden), self.bias)


class BertForMaskedLM(nn.Module):
    """One word for each position. The decoder is the word embedding, or a layer of its own where the configuration says so."""

    config: BertConfig

    def setup(self):
        """Make the parts here, not in a compact method: `score` needs the body too. The names are those of Hugging Face's checkpoints."""
        config, family = self.config, self.config.architecture
        setattr(self, family, BertModel(config, pooling=False))
        if family == "bert":
            self.cls = BertHeads(config)
        elif family == "roberta":
            self.lm_head = RobertaLMHead(config)
        elif family == "electra":
            self.generator_predictions = Transform(config)
            self.generator_lm_head = _own_decoder(config) or VocabBias(config)
        else:
            self.vocab_transform = dense(config, config.embedding_width)
            self.vocab_layer_norm = layer_norm(config)
            self.vocab_projector = _own_decoder(config) or VocabBias(config)

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        token_type_ids: Ids | None = None,
        *,
        deterministic: bool = True,
        labels: Shaped[Array | np.ndarray, "..."] | None = None,
        label_smoothing: float = 0.0,
    ) -> Logits | TokenLoss:
        """Return float32 logits; with labels, the loss of each token in their place.

        Args:
          input_ids: As in `BertModel`.
          attention_mask: As in `BertModel`.
          token_type_ids: As in `BertModel`.
          deterministic: As in `BertModel`.
          labels: The word at each position, [batch, length]; -100 where none is asked for. The logits of the whole batch are never held
            (`jpeft.models.common.token_loss`).
          label_smoothing: Of the loss.

        Raises:
          ValueError: for labels that are no words, or of another shape than the ids.
        """
        body = getattr(self, self.config.architecture)
        hidden = body(input_ids, attention_mask, token_type_ids, deterministic=deterministic).last_hidden_state
        hidden = self._transformed(hidden)
        if labels is None:
            return self.score(hidden)
        return token_loss(self, "score", hidden, labels, self.config.vocab_size, label_smoothing)

    def score(self, hidden: Features) -> Logits:
        """Return the float32 logits of hidden states that the head has transformed."""
        attend, family = getattr(self, self.config.architecture).attend, self.config.architecture
        if family in ("bert", "roberta"):
            return (self.cls if family == "bert" else self.lm_head).score(hidden, attend)
        last = self.generator_lm_head if family == "electra" else self.vocab_projector
        return _biased(attend(hidden), last()) if isinstance(last, VocabBias) else last(hidden).astype(jnp.float32)

    def _transformed(self, hidden: Hidden) -> Features:
        """Return what the decoder is given."""
        if self.config.architecture == "bert":
            return self.cls(hidden)
        if self.config.architecture == "roberta":
            return self.lm_head(hidden)
        if self.config.architecture == "electra":
            return self.generator_predictions(hidden)
        return _transform(self.config, self.vocab_transform, self.vocab_layer_norm, hidden)


def _vocab_bias(module: nn.Module) -> Float[Array, " vocab"]:
    """Return the decoder's bias, a parameter of the given module."""
    return module.param("bias", nn.initializers.zeros, (module.config.vocab_size,), module.config.param_dtype)


def _own_decoder(config: BertConfig, *, bias: bool = True) -> nn.Dense | None:
    """Return a decoder; None where the word embedding is the decoder."""
    return None if config.tie_word_embeddings else dense(config, config.vocab_size, bias=bias)


def _transform(config: BertConfig, layer: nn.Dense, norm: nn.LayerNorm, hidden: Hidden) -> Features:
    """Return LayerNorm(act(W h + b))."""
    # The heads of RoBERTa and ELECTRA always use gelu.
    activation = "gelu" if config.architecture in ("roberta", "electra") else config.hidden_act
    return norm(ACTIVATIONS[activation](layer(hidden)))


def _biased(scores: Logits, bias: Float[Array, " vocab"]) -> Logits:
    """Return the scores with the bias added in float32."""
    return scores.astype(jnp.float32) + bias.astype(jnp.float32)[None, None]

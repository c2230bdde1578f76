"""BERT, RoBERTa, DistilBERT and everything with their layout (MiniLM, ...), in plain linen.

One encoder and its heads. The three families differ in the names of their parameters (Hugging Face's own, so that a
checkpoint loads by name), in how positions are counted, and in their heads. Nothing here knows of parameter-efficient
fine-tuning.

References: Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2018; Liu et al., `RoBERTa
<https://arxiv.org/abs/1907.11692>`_, 2019; Sanh et al., `DistilBERT <https://arxiv.org/abs/1910.01108>`_, 2019.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.models.activations import ACTIVATIONS
from jpeft.models.attention import Ids, Mask
from jpeft.models.bert_config import BertConfig
from jpeft.models.bert_encoder import Embeddings, Encoder, Positions
from jpeft.models.layers import dense, layer_norm
from jpeft.models.stack import Hidden


class Pooler(nn.Module):
    """tanh(W h + b) of the first position."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Float[Array, "batch hidden"]:
        """One vector a sequence."""
        return jnp.tanh(dense(self.config, self.config.hidden_size, "dense")(hidden[:, 0]))


@flax.struct.dataclass
class BertOutput:
    """What `BertModel` returns: a pytree, so the fields hold whatever a transformation puts there."""

    last_hidden_state: Any  # [batch, length, hidden]
    pooled: Any  # [batch, hidden]; None without a pooler
    hidden_states: Any  # tuple of the embeddings, then each block's output; None unless asked for


class BertModel(nn.Module):
    """The encoder without a head.

    >>> from jpeft.models import abstract_params
    >>> model = BertModel(BertConfig.bert_base_cased(num_hidden_layers=1))
    >>> jax.eval_shape(model.apply, {"params": abstract_params(model)}, jnp.ones((2, 5), int)).pooled.shape
    (2, 768)
    """

    config: BertConfig
    pooling: bool = True  # DistilBERT has no pooler either way

    def setup(self):
        """Setup rather than compact: `attend` needs the embeddings too."""
        distilbert = self.config.model_type == "distilbert"
        self.positions = Positions(self.config)
        self.embeddings = Embeddings(self.config)
        self.encoder = Encoder(self.config, name="transformer" if distilbert else "encoder")
        self.pooler = Pooler(self.config) if self.pooling and not distilbert else None

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        token_type_ids: Ids | None = None,
        *,
        deterministic: bool = True,
        output_hidden_states: bool = False,
    ) -> BertOutput:
        """Encode a batch.

        Args:
          input_ids: token ids [batch, length].
          attention_mask: 1 for tokens, 0 for padding; all tokens if None.
          token_type_ids: 0 for the first, 1 for the second text; all 0 if None; unused by a model without token types.
          deterministic: without dropout; False needs rngs={"dropout": key}.
          output_hidden_states: also return the embeddings and the output of every block.
        """
        layout = self.positions(input_ids, attention_mask, token_type_ids)
        hidden = self.embeddings(input_ids, layout, deterministic)
        hidden, states = self.encoder(hidden, layout.mask, deterministic, output_hidden_states)
        return BertOutput(hidden, None if self.pooler is None else self.pooler(hidden), states)

    def attend(self, hidden: Hidden) -> Float[Array, "batch length vocab"]:
        """Scores of every word of the vocabulary: the word embedding, used a second time."""
        return self.embeddings.word_embeddings.attend(hidden)


# --- classification ---


def _head_dropout(config: BertConfig) -> nn.Dropout:
    rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    return nn.Dropout(rate)


class RobertaClassificationHead(nn.Module):
    """RoBERTa's two-layer classifier over the first position."""

    config: BertConfig
    num_labels: int

    @nn.compact
    def __call__(self, hidden: Float[Array, "batch hidden"], deterministic: bool) -> Float[Array, "batch labels"]:
        """Unnormalised scores of the labels."""
        dropout = _head_dropout(self.config)
        hidden = dropout(hidden, deterministic=deterministic)
        hidden = jnp.tanh(dense(self.config, self.config.hidden_size, "dense")(hidden))
        hidden = dropout(hidden, deterministic=deterministic)
        return dense(self.config, self.num_labels, "out_proj")(hidden)


class BertForSequenceClassification(nn.Module):
    """A label for each text (or pair of texts)."""

    config: BertConfig
    num_labels: int

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        token_type_ids: Ids | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "batch labels"]:
        """float32 logits; arguments as in `BertModel`."""
        config, family = self.config, self.config.model_type
        body = BertModel(config, pooling=family == "bert", name=family)
        output = body(input_ids, attention_mask, token_type_ids, deterministic=deterministic)
        hidden = output.pooled if family == "bert" else output.last_hidden_state[:, 0]
        if family == "roberta":
            logits = RobertaClassificationHead(config, self.num_labels, name="classifier")(hidden, deterministic)
        else:
            if family == "distilbert":
                hidden = nn.relu(dense(config, config.hidden_size, "pre_classifier")(hidden))
            hidden = _head_dropout(config)(hidden, deterministic=deterministic)
            logits = dense(config, self.num_labels, "classifier")(hidden)
        return logits.astype(jnp.float32)


class BertForTokenClassification(nn.Module):
    """A label for each token."""

    config: BertConfig
    num_labels: int

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        token_type_ids: Ids | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "batch length labels"]:
        """float32 logits; arguments as in `BertModel`."""
        config, family = self.config, self.config.model_type
        body = BertModel(config, pooling=False, name=family)
        hidden = body(input_ids, attention_mask, token_type_ids, deterministic=deterministic).last_hidden_state
        # DistilBERT's classifier dropout is for sequences only.
        dropout = nn.Dropout(config.hidden_dropout_prob) if family == "distilbert" else _head_dropout(config)
        hidden = dropout(hidden, deterministic=deterministic)
        return dense(config, self.num_labels, "classifier")(hidden).astype(jnp.float32)


# --- masked language modelling: hidden states made ready for the tied decoder, and the decoder's bias ---

Decodable = tuple[Hidden, Float[Array, " vocab"]]


def _vocab_bias(module: nn.Module) -> Array:
    return module.param("bias", nn.initializers.zeros, (module.config.vocab_size,), module.config.param_dtype)


def _transform(config: BertConfig, hidden: Array, dense_name: str, norm_name: str) -> Array:
    """LayerNorm(act(W h + b)), in the calling module's scope, under the given names."""
    activation = "gelu" if config.model_type == "roberta" else config.hidden_act  # RoBERTa's head is always gelu
    hidden = ACTIVATIONS[activation](dense(config, config.hidden_size, dense_name)(hidden))
    return layer_norm(config, norm_name)(hidden)


class VocabBias(nn.Module):
    """The decoder's bias alone: DistilBERT's `vocab_projector`."""

    config: BertConfig

    @nn.compact
    def __call__(self) -> Float[Array, " vocab"]:
        """One number for each word of the vocabulary."""
        return _vocab_bias(self)


class Transform(nn.Module):
    """BERT's `transform`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        """LayerNorm(act(W h + b))."""
        return _transform(self.config, hidden, "dense", "LayerNorm")


class Predictions(nn.Module):
    """BERT's `predictions`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Decodable:
        """Transformed hidden states and bias."""
        return Transform(self.config, name="transform")(hidden), _vocab_bias(self)


class BertHeads(nn.Module):
    """BERT's `cls`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Decodable:
        """Transformed hidden states and bias."""
        return Predictions(self.config, name="predictions")(hidden)


class RobertaLMHead(nn.Module):
    """RoBERTa's `lm_head`."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Decodable:
        """Transformed hidden states and bias."""
        return _transform(self.config, hidden, "dense", "layer_norm"), _vocab_bias(self)


class BertForMaskedLM(nn.Module):
    """A word for each position; the decoder is the word embedding."""

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
        """float32 logits; arguments as in `BertModel`."""
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
        return body.attend(hidden).astype(jnp.float32) + bias.astype(jnp.float32)[None, None]

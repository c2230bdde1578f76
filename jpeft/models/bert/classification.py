"""BERT's heads with labels: one label for a text, or one for each token."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.models.bert.config import BertConfig
from jpeft.models.bert.model import BertModel
from jpeft.models.common.activations import ACTIVATIONS
from jpeft.models.common.attention import Ids, Mask
from jpeft.models.common.layers import dense


def _head_dropout(config: BertConfig) -> nn.Dropout:
    """Return the dropout before the last layer of a head."""
    rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    return nn.Dropout(rate)


class TwoLayerHead(nn.Module):
    """The classifier of RoBERTa (tanh) and ELECTRA (gelu): two layers over the first position."""

    config: BertConfig
    num_labels: int

    @nn.compact
    def __call__(self, hidden: Float[Array, "batch hidden"], deterministic: bool) -> Float[Array, "batch labels"]:
        """Return the unnormalised scores of the labels."""
        dropout = _head_dropout(self.config)
        hidden = dropout(hidden, deterministic=deterministic)
        activation = ACTIVATIONS["gelu" if self.config.architecture == "electra" else "tanh"]
        hidden = activation(dense(self.config, self.config.hidden_size, "dense")(hidden))
        hidden = dropout(hidden, deterministic=deterministic)
        return dense(self.config, self.num_labels, "out_proj")(hidden)


class BertForSequenceClassification(nn.Module):
    """One label for each text or pair of texts."""

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
        """Return float32 logits; arguments as in `BertModel`."""
        config, family = self.config, self.config.architecture
        body = BertModel(config, pooling=family == "bert", name=family)
        output = body(input_ids, attention_mask, token_type_ids, deterministic=deterministic)
        # Only BERT classifies the pooler's output; the others classify the first position. [batch, hidden]
        hidden = output.pooled if family == "bert" else output.last_hidden_state[:, 0]
        if family in ("roberta", "electra"):
            logits = TwoLayerHead(config, self.num_labels, name="classifier")(hidden, deterministic)
        else:
            if family == "distilbert":
                hidden = nn.relu(dense(config, config.hidden_size, "pre_classifier")(hidden))
            hidden = _head_dropout(config)(hidden, deterministic=deterministic)
            logits = dense(config, self.num_labels, "classifier")(hidden)
        return logits.astype(jnp.float32)


class BertForTokenClassification(nn.Module):
    """One label for each token."""

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
        """Return float32 logits; arguments as in `BertModel`."""
        config, family = self.config, self.config.architecture
        body = BertModel(config, pooling=False, name=family)
        hidden = body(input_ids, attention_mask, token_type_ids, deterministic=deterministic).last_hidden_state
        # DistilBERT uses `classifier_dropout` only to classify sequences.
        dropout = nn.Dropout(config.hidden_dropout_prob) if family == "distilbert" else _head_dropout(config)
        hidden = dropout(hidden, deterministic=deterministic)
        return dense(config, self.num_labels, "classifier")(hidden).astype(jnp.float32)

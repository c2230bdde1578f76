"""BERT's encoder without a head."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.models.bert.config import BertConfig
from jpeft.models.bert.encoder import BertPositions, Embeddings, Encoder
from jpeft.models.common.attention import Ids, Mask
from jpeft.models.common.block_stack import Hidden
from jpeft.models.common.layers import dense
from jpeft.models.common.visible import Visible


class Pooler(nn.Module):
    """tanh(W h + b) of the first position."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Float[Array, "batch hidden"]:
        """Return one vector for each sequence."""
        return jnp.tanh(dense(self.config, self.config.hidden_size, "dense")(hidden[:, 0]))  # [CLS] stands first


@flax.struct.dataclass
class BertOutput:
    """Output of `BertModel`. The class is a pytree, so under a transformation the fields may hold anything."""

    last_hidden_state: Any  # [batch, length, hidden]
    pooled: Any  # [batch, hidden]; None for a model without a pooler
    hidden_states: Any  # tuple of the embeddings and the output of each block; None unless asked for


class BertModel(nn.Module):
    """The encoder without a head.

    >>> from jpeft.models import abstract_params
    >>> model = BertModel(BertConfig.bert_base_cased(num_hidden_layers=1))
    >>> jax.eval_shape(model.apply, {"params": abstract_params(model)}, jnp.ones((2, 5), int)).pooled.shape
    (2, 768)
    """

    config: BertConfig
    pooling: bool = True  # ignored for DistilBERT and ELECTRA, which have no pooler

    def setup(self):
        """Make the parts here, not in a compact method: `attend` needs the embeddings too."""
        architecture, distilbert = self.config.architecture, self.config.architecture == "distilbert"
        self.positions = BertPositions(self.config)
        self.embeddings = Embeddings(self.config)
        if self.config.embedding_width != self.config.hidden_size:
            self.embeddings_project = dense(self.config, self.config.hidden_size)
        # The names are those of Hugging Face's checkpoints.
        self.encoder = Encoder(self.config, name="transformer" if distilbert else "encoder")
        self.pooler = Pooler(self.config) if self.pooling and architecture in ("bert", "roberta") else None

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
          attention_mask: 1 for tokens, 0 for padding; None if all are tokens.
          token_type_ids: 0 for the first text, 1 for the second; None for all 0. Models without token types ignore them.
          deterministic: True runs without dropout; False needs rngs={"dropout": key}.
          output_hidden_states: also return the embeddings and the output of every block.
        """
        positions = self.positions(input_ids, attention_mask, token_type_ids)
        hidden = self.embeddings(input_ids, positions, deterministic)
        if self.config.embedding_width != self.config.hidden_size:
            hidden = self.embeddings_project(hidden)
        # Every query of a row may attend to the same keys: all that are tokens.
        seen = Visible(
            None if positions.mask is None else jnp.broadcast_to(positions.mask[:, 0, 0], (len(input_ids), positions.mask.shape[-1]))
        )
        hidden, states = self.encoder(hidden, seen, deterministic, output_hidden_states)
        return BertOutput(hidden, None if self.pooler is None else self.pooler(hidden), states)

    def attend(self, hidden: Float[Array, "batch length width"]) -> Float[Array, "batch length vocab"]:
        """Return the scores of every word of the vocabulary, with the word embedding as the decoder."""
        return self.embeddings.word_embeddings.attend(hidden)

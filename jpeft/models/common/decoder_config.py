"""The configuration that all decoders share."""

import dataclasses

from jpeft.models.common.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """The fields of `ModelConfig` and those that every decoder adds."""

    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    attention_dropout: float = 0.0  # on the attention weights
    tie_word_embeddings: bool = True  # the head uses the word embedding a second time
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values; groups of query heads share one."""
        return self.num_attention_heads

    @property
    def position_rows(self) -> int | None:
        """Number of rows of the position table; None without a table."""
        return None

    @property
    def window(self) -> int | None:
        """How many tokens, itself included, a token may attend to in the layers that `uses_window` marks; None for all."""
        return None

    @property
    def uses_window(self) -> tuple[bool, ...]:
        """For each layer, whether its attention is limited to the window."""
        return (False,) * self.num_hidden_layers


# The fields that Hugging Face calls alike in every family of decoders.
COMMON_FIELDS = {
    name: name for name in ("vocab_size", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
}

"""What the configurations of all decoders have in common."""

import dataclasses

from jpeft.models.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """The fields of `ModelConfig`, and what every decoder has besides."""

    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    attention_dropout: float = 0.0  # on the attention weights
    tie_word_embeddings: bool = True  # the head is the word embedding, used a second time
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values; query heads share them in groups."""
        return self.num_attention_heads

    @property
    def position_rows(self) -> int | None:
        """How many positions a table of them holds; None without one."""
        return None

    @property
    def window(self) -> int | None:
        """How many tokens, itself included, a token looks back on in the layers that `slides` marks."""
        return None

    @property
    def slides(self) -> tuple[bool, ...]:
        """For each layer, whether its attention is confined to the window."""
        return (False,) * self.num_hidden_layers


# The fields that Hugging Face has under the same name in every family.
COMMON = {name: name for name in ("vocab_size", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")}

"""The configuration of GPT-2."""

import dataclasses
from typing import Any, ClassVar

from jpeft.models.common.config import check_divides
from jpeft.models.common.decoder_config import COMMON_FIELDS, DecoderConfig


@dataclasses.dataclass(frozen=True)
class GPT2Config(DecoderConfig):
    """Shape and numerics of a GPT-2: the fields of `DecoderConfig` and these.

    >>> GPT2Config.gpt2(num_hidden_layers=2).hidden_size
    768
    """

    HF_FIELDS: ClassVar[dict[str, dict[str, str]]] = {
        "gpt2": COMMON_FIELDS
        | {
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "hidden_act": "activation_function",
            "max_position_embeddings": "n_positions",
            "hidden_dropout": "resid_pdrop",
            "embedding_dropout": "embd_pdrop",
            "attention_dropout": "attn_pdrop",
            "layer_norm_eps": "layer_norm_epsilon",
        }
    }

    model_type: str = "gpt2"
    vocab_size: int = 50257
    hidden_act: str = "gelu_new"
    intermediate_size: int | None = None  # None: four times the hidden size
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1  # on the output of each half of a block, before the residual is added
    embedding_dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256

    def __post_init__(self):
        super().__post_init__()
        check_divides(self, "hidden_size", "num_attention_heads")

    @property
    def position_rows(self) -> int:
        """Number of rows of the position table."""
        return self.max_position_embeddings

    @classmethod
    def _special_fields(cls, config: Any) -> dict[str, Any]:
        for name, supported in {"add_cross_attention": False, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}.items():
            if getattr(config, name, supported) != supported:
                raise ValueError(f"This configuration has {name}={not supported}; only {name}={supported} is supported.")
        return {}

    @classmethod
    def gpt2(cls, **overrides: Any) -> "GPT2Config":
        """Return the configuration of gpt2: 124,439,808 parameters."""
        return cls(**overrides)

    @classmethod
    def gpt2_medium(cls, **overrides: Any) -> "GPT2Config":
        """Return the configuration of gpt2-medium: 354,823,168 parameters."""
        medium: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        return cls(**medium | overrides)

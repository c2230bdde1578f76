"""The configuration of the toy encoder-decoder."""

import dataclasses
from typing import ClassVar

from jpeft.models.common.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ToyConfig(ModelConfig):
    """The fields of `ModelConfig` and these."""

    HF_FIELDS: ClassVar[dict[str, dict[str, str]]] = {
        "toy": {
            "vocab_size": "vocab_size",
            "hidden_size": "d_model",
            "num_hidden_layers": "num_layers",
            "num_decoder_layers": "num_decoder_layers",
            "num_attention_heads": "num_heads",
            "intermediate_size": "d_ff",
            "layer_norm_eps": "layer_norm_eps",
            "initializer_range": "initializer_range",
        }
    }

    model_type: str = "toy"
    num_decoder_layers: int = 12
    intermediate_size: int = 2048
    layer_norm_eps: float = 1e-6

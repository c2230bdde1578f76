"""The configuration of Skeleton."""

import dataclasses
from typing import ClassVar

from jpeft.models.common.config import check_divides
from jpeft.models.common.decoder_config import COMMON_FIELDS, DecoderConfig
from jpeft.models.common.rope import Rope


@dataclasses.dataclass(frozen=True)
class SkeletonConfig(DecoderConfig):
    """Shape and numerics of a Skeleton: the fields of `DecoderConfig` and these.

    Raises:
      ValueError: as `DecoderConfig`, or if the number of heads does not divide the hidden size.

    >>> SkeletonConfig(hidden_size=64, num_attention_heads=4).head_size
    16
    """

    # Model type -> our field -> its name in config.json. `_special_fields` and `to_hf` handle fields that are not merely renamed.
    HF_FIELDS: ClassVar[dict[str, dict[str, str]]] = {
        "skeleton": COMMON_FIELDS
        | {
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "d_ff",
            "hidden_act": "activation",
            "max_position_embeddings": "max_position_embeddings",
            "rms_norm_eps": "rms_norm_eps",
        }
    }

    model_type: str = "skeleton"
    hidden_act: str = "gelu"
    intermediate_size: int = 3072
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        check_divides(self, "hidden_size", "num_attention_heads")

    @property
    def rope(self) -> Rope:
        """Base and scaling of the rotary positions, the same for all models of the family."""
        return Rope()

"""The configuration of Llama, Mistral, Qwen2 and Qwen3."""

import dataclasses
from typing import Any, ClassVar

from jpeft.models.common.config import check_divides
from jpeft.models.common.decoder_config import COMMON_FIELDS, DecoderConfig
from jpeft.models.common.rope import Rope

_SAME = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "attention_dropout",
    "rms_norm_eps",
    "sliding_window",
)
_FIELDS = COMMON_FIELDS | {name: name for name in _SAME}
# The model types whose config.json has each of these fields. A value that config.json cannot hold would be lost when the model is saved.
_MODEL_TYPES = {
    "sliding_window": ("mistral", "qwen2", "qwen3"),
    "layer_types": ("qwen2", "qwen3"),
    "attention_bias": ("llama", "qwen3"),
    "mlp_bias": ("llama",),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Shape and numerics of a Llama, Mistral, Qwen2 or Qwen3: the fields of `DecoderConfig` and these.

    Raises:
      ValueError: as `DecoderConfig`; if the numbers of heads do not divide; if there is not one of `layer_types` for each layer; or if a
        field is set that the `config.json` of this model type does not have.

    >>> LlamaConfig(model_type="qwen3", head_dim=128).head_size
    128
    """

    HF_FIELDS: ClassVar[dict[str, dict[str, str]]] = {
        "llama": {name: hf for name, hf in _FIELDS.items() if name != "sliding_window"}
        | {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        "mistral": _FIELDS,
        "qwen2": _FIELDS,
        "qwen3": _FIELDS | {"attention_bias": "attention_bias"},
    }

    model_type: str = "llama"
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: num_attention_heads
    head_dim: int | None = None  # width of a head; None: hidden_size / num_attention_heads
    intermediate_size: int = 11008
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    rope: Rope = dataclasses.field(default_factory=Rope)
    attention_bias: bool = False  # on all four projections of attention; Qwen2 always has biases on the first three
    mlp_bias: bool = False
    sliding_window: int | None = None  # how many tokens, itself included, a token may attend to; None for all
    # "sliding_attention" or "full_attention" for each layer; None: all layers use the window if there is one.
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, types in _MODEL_TYPES.items():
            if self.model_type not in types and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: the config.json of a {self.model_type} cannot say so; that of {', '.join(types)} can."
                )
        if self.head_dim is None:
            check_divides(self, "hidden_size", "num_attention_heads")
        if self.num_key_value_heads is not None:
            check_divides(self, "num_attention_heads", "num_key_value_heads")
        if self.head_size % 2:
            raise ValueError(
                f"Heads of width {self.head_size}: the width must be even, because rotary positions rotate pairs of coordinates."
            )
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
            if len(self.layer_types) != self.num_hidden_layers:
                raise ValueError(
                    f"{len(self.layer_types)} layer_types for num_hidden_layers={self.num_hidden_layers}; give one for each layer."
                )
            if unknown := set(self.layer_types) - {"sliding_attention", "full_attention"}:
                raise ValueError(f"Unknown layer_types {sorted(unknown)}; supported: sliding_attention, full_attention.")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values; groups of query heads share one."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def window(self) -> int | None:
        """How many tokens, itself included, a token may attend to in the layers that `uses_window` marks; None for all."""
        return self.sliding_window

    @property
    def uses_window(self) -> tuple[bool, ...]:
        """For each layer, whether its attention is limited to the window."""
        if self.sliding_window is None or self.layer_types is None:
            return (self.sliding_window is not None,) * self.num_hidden_layers
        return tuple(kind == "sliding_attention" for kind in self.layer_types)

    @classmethod
    def _special_fields(cls, config: Any) -> dict[str, Any]:
        head_dim = getattr(config, "head_dim", None)
        fields: dict[str, Any] = {"rope": Rope.from_hf(config.rope_parameters)}
        fields["head_dim"] = None if head_dim == config.hidden_size // config.num_attention_heads else head_dim
        if config.num_key_value_heads == config.num_attention_heads:
            fields["num_key_value_heads"] = None
        if config.model_type in _MODEL_TYPES["layer_types"] and config.sliding_window is not None:
            fields["layer_types"] = tuple(config.layer_types)
        return fields

    def to_hf(self) -> dict[str, Any]:
        """Return the fields under the names of Hugging Face's configuration of this model type; the inverse of `from_hf`."""
        fields = super().to_hf() | {"rope_parameters": self.rope.to_hf(), "head_dim": self.head_size, "num_key_value_heads": self.kv_heads}
        if self.model_type in _MODEL_TYPES["layer_types"]:
            kinds = ["sliding_attention" if windowed else "full_attention" for windowed in self.uses_window]
            fields |= {"use_sliding_window": self.sliding_window is not None, "layer_types": kinds}
        return fields

    @classmethod
    def llama_3_1_8b(cls, **overrides: Any) -> "LlamaConfig":
        """Return the configuration of Llama-3.1-8B: 8,030,261,248 parameters."""
        rope = Rope(5e5, "llama3", factor=8.0, original_max_position_embeddings=8192)
        sizes: dict[str, Any] = {"num_key_value_heads": 8, "intermediate_size": 14336, "rope": rope}
        return cls(**_LLAMA_3 | sizes | overrides)

    @classmethod
    def llama_3_2_1b(cls, **overrides: Any) -> "LlamaConfig":
        """Return the configuration of Llama-3.2-1B: 1,235,814,400 parameters; the head is the word embedding."""
        rope = Rope(5e5, "llama3", factor=32.0, original_max_position_embeddings=8192)
        sizes: dict[str, Any] = {"hidden_size": 2048, "num_hidden_layers": 16, "num_key_value_heads": 8, "intermediate_size": 8192}
        return cls(**_LLAMA_3 | sizes | {"rope": rope, "tie_word_embeddings": True} | overrides)

    @classmethod
    def mistral_7b(cls, **overrides: Any) -> "LlamaConfig":
        """Return the configuration of Mistral-7B-v0.1, with a window of 4096 tokens: 7,241,732,096 parameters."""
        sizes: dict[str, Any] = {"num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096}
        fields: dict[str, Any] = {"model_type": "mistral", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
        fields |= {"bos_token_id": 1, "eos_token_id": 2}
        return cls(**fields | sizes | overrides)

    @classmethod
    def qwen2_0_5b(cls, **overrides: Any) -> "LlamaConfig":
        """Return the configuration of Qwen2-0.5B: 494,032,768 parameters; the head is the word embedding."""
        sizes: dict[str, Any] = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 4864}
        fields: dict[str, Any] = {"model_type": "qwen2", "max_position_embeddings": 131072, "tie_word_embeddings": True}
        return cls(**_QWEN3 | fields | sizes | overrides)

    @classmethod
    def qwen3_8b(cls, **overrides: Any) -> "LlamaConfig":
        """Return the configuration of Qwen3-8B: 8,190,735,360 parameters."""
        sizes: dict[str, Any] = {"num_hidden_layers": 36, "num_key_value_heads": 8, "intermediate_size": 12288}
        return cls(**_QWEN3 | sizes | overrides)

    @classmethod
    def qwen3_4b(cls, **overrides: Any) -> "LlamaConfig":
        """Return the configuration of Qwen3-4B: 4,022,468,096 parameters; the head is the word embedding."""
        sizes: dict[str, Any] = {"hidden_size": 2560, "head_dim": 128, "intermediate_size": 9728, "tie_word_embeddings": True}
        return cls.qwen3_8b(**sizes | overrides)


_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope": Rope(1e6),
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

"""What the configurations of all families have in common."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from jpeft.models.activations import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a transformer. A subclass adds what is its own, and says how Hugging Face calls each field.

    Raises:
      ValueError: if the model type or the activation is unknown.
    """

    # Our field -> the name in Hugging Face's configuration, by model type.
    HF_FIELDS: ClassVar[dict[str, dict[str, str]]] = {}

    model_type: str = ""
    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    dtype: Any = jnp.float32  # of the computation; softmax and the statistics of norms are always float32
    param_dtype: Any = jnp.float32
    # Recompute each block in the backward pass instead of storing its activations: all of it, or with "dots" what lies between the products
    # of matrices, which are stored. That costs next to no time, and saves less.
    remat: bool | Literal["dots"] = False
    scan: bool = False  # one traced block over parameters stacked on axis 0, instead of `num_hidden_layers` blocks

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        if self.model_type not in self.HF_FIELDS:
            raise ValueError(f"unknown model_type {self.model_type!r}; supported: {', '.join(self.HF_FIELDS)}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"unknown hidden_act {self.hidden_act!r}; supported: {', '.join(ACTIVATIONS)}")
        if self.remat not in (False, True, "dots"):
            raise ValueError(f"remat={self.remat!r} is not one of False, True, 'dots'")

    @property
    def max_length(self) -> int:
        """Longest sequence that positions are defined for."""
        return self.max_position_embeddings

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, config: Any, **overrides: Any) -> "ModelConfig":
        """From a `transformers` configuration of one of the supported model types; `overrides` win.

        Raises:
          ValueError: for another model type, or an option that is not supported.
        """
        if config.model_type not in cls.HF_FIELDS:
            raise ValueError(f"unsupported model_type {config.model_type!r}; supported: {', '.join(cls.HF_FIELDS)}")
        fields = {field: getattr(config, hf) for field, hf in cls.HF_FIELDS[config.model_type].items() if hasattr(config, hf)}
        for name, value in fields.items():
            if name.endswith(("_prob", "_dropout")) and value is not None:
                fields[name] = float(value)
            elif isinstance(value, list):
                fields[name] = tuple(value)
        return cls(**{"model_type": config.model_type} | fields | cls._own_fields(config) | overrides)

    @classmethod
    def _own_fields(cls, config: Any) -> dict[str, Any]:
        """Fields that are no mere renaming; ValueError for what is not supported."""
        del config
        return {}

    def to_hf(self) -> dict[str, Any]:
        """The fields as Hugging Face's configuration of this model type calls them; inverse of `from_hf`."""
        fields = {hf: getattr(self, field) for field, hf in self.HF_FIELDS[self.model_type].items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def check_divides(config: ModelConfig, dividend: str, divisor: str) -> None:
    """ValueError unless one field is a multiple of another."""
    if getattr(config, dividend) % getattr(config, divisor):
        raise ValueError(f"{dividend} {getattr(config, dividend)} is not a multiple of {divisor} {getattr(config, divisor)}")

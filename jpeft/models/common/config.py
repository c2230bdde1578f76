"""The configuration that all families share."""

import dataclasses
import typing
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from jpeft.models.common.activations import ACTIVATIONS
from jpeft.models.common.attention_kernels import KERNELS
from jpeft.models.common.checks import check_value


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a transformer.

    A family subclasses this, adds its fields, and says in `HF_FIELDS` how Hugging Face's configuration calls each field.

    Raises:
      ValueError: if the model type, the activation or `remat` is unknown, or a number is none that a model can have.
    """

    # Model type -> our field -> the field of Hugging Face's configuration.
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
    # Recompute the activations of each block in the backward pass instead of storing them. True recomputes everything. "dots" stores the
    # results of matrix products and recomputes the rest, which costs little time and saves less memory.
    remat: bool | Literal["dots"] = False
    # Who computes attention: "auto" takes the device's kernel where it can (`jpeft.models.common.attention_kernels`), else XLA.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    scan: bool = False  # trace one block over parameters stacked on axis 0, instead of `num_hidden_layers` blocks

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        if self.model_type not in self.HF_FIELDS:
            raise ValueError(f"Unknown model_type {self.model_type!r}; supported: {', '.join(self.HF_FIELDS)}.")
        for field in dataclasses.fields(self):
            check_value(field.name, field.name, field.type, getattr(self, field.name))
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"Unknown hidden_act {self.hidden_act!r}; supported: {', '.join(ACTIVATIONS)}.")
        if self.remat not in (False, True, "dots"):
            raise ValueError(f"remat={self.remat!r} is not one of False, True, 'dots'.")
        if self.attention not in KERNELS:
            raise ValueError(f"attention={self.attention!r} is not one of {', '.join(map(repr, KERNELS))}.")

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
        """Return the configuration that says what a `transformers` configuration says; `overrides` win.

        Raises:
          ValueError: for a model type of another family, or an option that is not supported.
        """
        if config.model_type not in cls.HF_FIELDS:
            raise ValueError(f"Unsupported model_type {config.model_type!r}; supported: {', '.join(cls.HF_FIELDS)}.")
        fields = {field: getattr(config, hf) for field, hf in cls.HF_FIELDS[config.model_type].items() if hasattr(config, hf)}
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        for name, value in fields.items():
            check_value(cls.HF_FIELDS[config.model_type][name], name, types[name], value)
            if isinstance(value, list):
                fields[name] = tuple(value)
            elif isinstance(value, int) and _is_float(types[name]):
                fields[name] = float(value)  # JSON has 0 where a dropout rate is 0.0
        return cls(**{"model_type": config.model_type} | fields | cls._special_fields(config) | overrides)

    @classmethod
    def _special_fields(cls, config: Any) -> dict[str, Any]:
        """Return the fields that are not merely renamed; raise a ValueError for options that are not supported."""
        del config
        return {}

    def to_hf(self) -> dict[str, Any]:
        """Return the fields under the names of Hugging Face's configuration of this model type; the inverse of `from_hf`."""
        fields = {hf: getattr(self, field) for field, hf in self.HF_FIELDS[self.model_type].items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def check_divides(config: ModelConfig, dividend: str, divisor: str) -> None:
    """Raise a ValueError unless one field is a multiple of another."""
    if getattr(config, dividend) % getattr(config, divisor):
        raise ValueError(f"{dividend} {getattr(config, dividend)} is not a multiple of {divisor} {getattr(config, divisor)}.")


def _is_float(annotation: Any) -> bool:
    """Return whether a field is annotated as ``float`` or ``float | None``."""
    options = set(typing.get_args(annotation) or (annotation,)) - {type(None)}
    return options == {float}

"""Rotary position embeddings, and how they are scaled to texts longer than those of pretraining.

Coordinates j and j + d/2 of a query or key at position p are rotated by the angle ``p · f_j`` with ``f_j = theta^(-2j/d)``. The score of a
query and a key then depends only on the distance of the two tokens.

References: Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, 2021; Peng et al., `YaRN <https://arxiv.org/abs/2309.00071>`_, 2023.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jpeft.models.common.checks import check_value

# The fields that each type reads besides `rope_theta`; names as in Hugging Face's `rope_parameters`.
_OPTIONS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Base and scaling of the frequencies; field names as in Hugging Face's `rope_parameters`.

    - ``default``: ``f_j`` as above.
    - ``linear``: ``f_j / factor``.
    - ``dynamic``: the base grows once a batch has a position beyond the model's length. As in `transformers`, the longest text of the batch
      sets the base for all its texts. Keys in a cache keep the angles of the call that wrote them.
    - ``llama3``: ``f_j / factor`` for frequencies with fewer than `low_freq_factor` periods in the original length, ``f_j`` for those with
      more than `high_freq_factor` periods, and an interpolation between the two for the others.
    - ``yarn``: the same idea between `beta_slow` and `beta_fast` periods, with an interpolation that is linear in j. Queries and keys are
      also multiplied by a factor.

    Raises:
      ValueError: if the type is unknown, or the original length is missing.

    >>> Rope(rope_type="linear", factor=4.0).to_hf()
    {'rope_theta': 10000.0, 'rope_type': 'linear', 'factor': 4.0}
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = (
        None  # None: 0.1 log(factor) + 1, or the quotient of two such terms if mscale and mscale_all_dim are given
    )
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.rope_type not in _OPTIONS:
            raise ValueError(f"Unknown rope_type {self.rope_type!r}; supported: {', '.join(_OPTIONS)}.")
        if "original_max_position_embeddings" in _OPTIONS[self.rope_type] and self.original_max_position_embeddings is None:
            raise ValueError(f"rope_type {self.rope_type!r} needs original_max_position_embeddings, the length of pretraining.")
        for field in dataclasses.fields(self):
            check_value(f"{field.name} of the rotary positions", field.name, field.type, getattr(self, field.name))
        if self.rope_theta <= 0 or self.factor <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} and factor={self.factor} of the rotary positions must be positive.")

    @classmethod
    def from_hf(cls, parameters: dict[str, Any]) -> "Rope":
        """Read the `rope_parameters` of a configuration. Entries that the type does not use are ignored.

        Raises:
          ValueError: for parameters that are no numbers, or a type that needs others.
        """
        if not isinstance(parameters, dict):
            raise ValueError(f"rope_parameters must be an object of names and values, not {parameters!r}.")
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported, only 1.0.")
        kind = parameters.get("rope_type", "default")
        if not isinstance(kind, str):
            raise ValueError(f"rope_type must be text, not {kind!r}.")
        given: dict[str, Any] = {name: parameters[name] for name in _OPTIONS.get(kind, ()) if parameters.get(name) is not None}
        if "factor" in _OPTIONS.get(kind, ()) and "factor" not in given:
            raise ValueError(f"rope_type {kind!r} needs a factor, and the rope_parameters are {parameters}.")
        given["rope_theta"] = parameters.get("rope_theta")
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        for name, value in given.items():
            check_value(f"{name} of the rotary positions", name, types[name], value)
            given[name] = float(value) if isinstance(value, int) and types[name] in (float, float | None) else value
        return cls(rope_type=kind, **given)

    def to_hf(self) -> dict[str, Any]:
        """Return Hugging Face's `rope_parameters`; the inverse of `from_hf`."""
        fields = {name: getattr(self, name) for name in ("rope_theta", "rope_type", *_OPTIONS[self.rope_type])}
        return {name: value for name, value in fields.items() if value is not None}


class Rotation(NamedTuple):
    """Cosines and sines of the angles of some positions, float32 [batch, length, 1, head_size / 2]."""

    cos: Array
    sin: Array

    @classmethod
    def at(cls, position_ids: Int[Array, "batch length"], rope: Rope, head_size: int, max_length: int) -> "Rotation":
        """Return the rotation of these positions, in a model that was trained on texts of up to `max_length` tokens."""
        if rope.rope_type == "dynamic":
            length = jnp.maximum(position_ids.max() + 1, max_length) / max_length  # relative to the length of training, at least 1
            theta = rope.rope_theta * (rope.factor * length - (rope.factor - 1)) ** (head_size / (head_size - 2))
            inverse = theta ** -jnp.asarray(_exponents(head_size), jnp.float32)
        else:
            inverse = jnp.asarray(frequencies(rope, head_size), jnp.float32)
        angles = position_ids.astype(jnp.float32)[:, :, None, None] * inverse[None, None, None]  # [batch, length, 1, half]
        scale = _scale(rope)
        return cls(jnp.cos(angles) * scale, jnp.sin(angles) * scale)

    def __call__(self, heads: Float[Array, "batch length heads head"]) -> Float[Array, "batch length heads head"]:
        """Rotate queries or keys; computed in float32."""
        # Coordinate j is paired with j + d/2, not with its neighbour: the layout of Hugging Face's checkpoints.
        first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
        rotated = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)


def _exponents(head_size: int) -> Float[np.ndarray, " half"]:
    """Return 2j/d for each pair of coordinates j."""
    return np.arange(0, head_size, 2) / head_size


def frequencies(rope: Rope, head_size: int) -> Float[np.ndarray, " half"]:
    """Return the angle by which each pair of coordinates is rotated from one token to the next, for all types but "dynamic".

    >>> frequencies(Rope(), 4).tolist()
    [1.0, 0.01]
    """
    plain = rope.rope_theta ** -_exponents(head_size)
    original = rope.original_max_position_embeddings
    if rope.rope_type == "linear":
        return plain / rope.factor
    if rope.rope_type == "llama3":
        assert original is not None
        periods = original * plain / (2 * math.pi)  # within the original length, for each frequency
        # 1 for frequencies that stay as they are, 0 for those that are divided by the factor.
        kept = np.clip((periods - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
        return plain * kept + plain / rope.factor * (1 - kept)
    if rope.rope_type == "yarn":
        assert original is not None
        # The j whose frequency has that many periods in the original length.
        low, high = (
            head_size * math.log(original / (periods * 2 * math.pi)) / (2 * math.log(rope.rope_theta))
            for periods in (rope.beta_fast, rope.beta_slow)
        )
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_size - 1)
        kept = 1 - np.clip((np.arange(head_size // 2) - low) / max(high - low, 0.001), 0, 1)
        return plain * kept + plain / rope.factor * (1 - kept)
    return plain


def _scale(rope: Rope) -> float:
    """Return the factor of queries and keys."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    growth = lambda weight: 0.1 * weight * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
    if rope.mscale and rope.mscale_all_dim:
        return growth(rope.mscale) / growth(rope.mscale_all_dim)
    return growth(1.0)

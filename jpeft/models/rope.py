"""Rotary position embeddings, and how they are stretched to texts longer than those of pretraining.

Coordinate j and coordinate j + d/2 of a query or key at position p are turned by the angle ``p · f_j``, ``f_j = theta^(-2j/d)``, so that
a score depends on the distance of two tokens alone.

References: Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, 2021; Peng et al., `YaRN <https://arxiv.org/abs/2309.00071>`_, 2023.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# What each type reads besides the base; as in Hugging Face's `rope_parameters`.
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
    """Base and stretching of the frequencies; field names as in Hugging Face's `rope_parameters`.

    - ``default``: ``f_j`` as above.
    - ``linear``: ``f_j / factor``.
    - ``dynamic``: a larger base, once a batch has a position beyond the model's length; by the longest text of the batch, as in
      `transformers`. What a cache holds keeps the angles it was given.
    - ``llama3``: ``f_j / factor`` where less than `low_freq_factor` turns fit into the original length, ``f_j`` where more than
      `high_freq_factor` do, a mixture between.
    - ``yarn``: likewise, between `beta_slow` and `beta_fast` turns, linear in j; queries and keys are scaled besides.

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
    attention_factor: float | None = None  # None: 0.1 log(factor) + 1, or a quotient of such if mscale and mscale_all_dim are given
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.rope_type not in _OPTIONS:
            raise ValueError(f"unknown rope_type {self.rope_type!r}; supported: {', '.join(_OPTIONS)}")
        if "original_max_position_embeddings" in _OPTIONS[self.rope_type] and self.original_max_position_embeddings is None:
            raise ValueError(f"rope_type {self.rope_type!r} needs original_max_position_embeddings, the length of pretraining")

    @classmethod
    def from_hf(cls, parameters: dict[str, Any]) -> "Rope":
        """From the `rope_parameters` of a configuration; what its type does not read is left out."""
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported, only 1.0")
        kind = parameters.get("rope_type", "default")
        given: dict[str, Any] = {name: parameters[name] for name in _OPTIONS.get(kind, ()) if parameters.get(name) is not None}
        if "factor" in _OPTIONS.get(kind, ()) and "factor" not in given:
            raise ValueError(f"rope_type {kind!r} needs a factor, and the rope_parameters are {parameters}")
        for name in given.keys() - {"truncate", "original_max_position_embeddings"}:
            given[name] = float(given[name])
        return cls(rope_theta=float(parameters["rope_theta"]), rope_type=kind, **given)

    def to_hf(self) -> dict[str, Any]:
        """Hugging Face's `rope_parameters`; inverse of `from_hf`."""
        fields = {name: getattr(self, name) for name in ("rope_theta", "rope_type", *_OPTIONS[self.rope_type])}
        return {name: value for name, value in fields.items() if value is not None}


class Rotation(NamedTuple):
    """Cosines and sines of the angles of some positions, float32 [batch, length, 1, head_size / 2]."""

    cos: Array
    sin: Array

    @classmethod
    def at(cls, position_ids: Int[Array, "batch length"], rope: Rope, head_size: int, max_length: int) -> "Rotation":
        """Of these positions, in a model whose texts are `max_length` long."""
        if rope.rope_type == "dynamic":
            length = jnp.maximum(position_ids.max() + 1, max_length) / max_length
            theta = rope.rope_theta * (rope.factor * length - (rope.factor - 1)) ** (head_size / (head_size - 2))
            inverse = theta ** -jnp.asarray(_exponents(head_size), jnp.float32)
        else:
            inverse = jnp.asarray(frequencies(rope, head_size), jnp.float32)
        angles = position_ids[:, :, None, None] * inverse[None, None, None]
        scale = _scale(rope)
        return cls(jnp.cos(angles) * scale, jnp.sin(angles) * scale)

    def __call__(self, heads: Float[Array, "batch length heads head"]) -> Float[Array, "batch length heads head"]:
        """Turn queries or keys; computed in float32."""
        first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
        turned = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        return jnp.concatenate(turned, axis=-1).astype(heads.dtype)


def _exponents(head_size: int) -> Float[np.ndarray, " half"]:
    return np.arange(0, head_size, 2) / head_size


def frequencies(rope: Rope, head_size: int) -> Float[np.ndarray, " half"]:
    """The angle by which each pair of coordinates turns from a token to the next, for all types but "dynamic".

    >>> frequencies(Rope(), 4).tolist()
    [1.0, 0.01]
    """
    plain = rope.rope_theta ** -_exponents(head_size)
    original = rope.original_max_position_embeddings
    if rope.rope_type == "linear":
        return plain / rope.factor
    if rope.rope_type == "llama3":
        assert original is not None
        turns = original * plain / (2 * math.pi)
        kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
        return plain * kept + plain / rope.factor * (1 - kept)
    if rope.rope_type == "yarn":
        assert original is not None
        # The j at which so many turns fit into the original length.
        low, high = (
            head_size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        )
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_size - 1)
        kept = 1 - np.clip((np.arange(head_size // 2) - low) / max(high - low, 0.001), 0, 1)
        return plain * kept + plain / rope.factor * (1 - kept)
    return plain


def _scale(rope: Rope) -> float:
    """What queries and keys are multiplied with."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    grown = lambda weight: 0.1 * weight * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
    if rope.mscale and rope.mscale_all_dim:
        return grown(rope.mscale) / grown(rope.mscale_all_dim)
    return grown(1.0)

"""Llama, Mistral, Qwen2 and Qwen3, in plain linen.

One decoder: the four differ in which projections have biases, in whether queries and keys are normalised, in how far back a
layer looks, and in their defaults. Parameters have Hugging Face's names, so that a checkpoint loads by name. Nothing here knows of
parameter-efficient fine-tuning.

References: Touvron et al., `LLaMA <https://arxiv.org/abs/2302.13971>`_, 2023; Jiang et al., `Mistral 7B
<https://arxiv.org/abs/2310.06825>`_, 2023; Yang et al., `Qwen2 <https://arxiv.org/abs/2407.10671>`_, 2024, and `Qwen3
<https://arxiv.org/abs/2505.09388>`_, 2025.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn

from jpeft.models.activations import ACTIVATIONS
from jpeft.models.attention import AttentionCore
from jpeft.models.decoder import Decoder, Hidden, KeyValueCache, LanguageModel, View
from jpeft.models.decoder_config import COMMON, DecoderConfig
from jpeft.models.layers import dense, rms_norm
from jpeft.models.model_config import check_divides
from jpeft.models.rope import Rope, Rotation

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
_FIELDS = COMMON | {name: name for name in _SAME}
# Fields that not all families have: what a checkpoint cannot say would be lost when it is saved.
_ONLY = {
    "sliding_window": ("mistral", "qwen2", "qwen3"),
    "layer_types": ("qwen2", "qwen3"),
    "attention_bias": ("llama", "qwen3"),
    "mlp_bias": ("llama",),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Shape and numerics of a Llama, Mistral, Qwen2 or Qwen3; the fields of `DecoderConfig` and these.

    Raises:
      ValueError: as `DecoderConfig`, if the heads do not divide, there is not one `layer_types` for each layer, or a field
        is set that the `config.json` of this model type does not have.

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
    num_key_value_heads: int | None = None  # None: as many as for queries
    head_dim: int | None = None  # width of a head; None: hidden_size / num_attention_heads
    intermediate_size: int = 11008
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    rope: Rope = dataclasses.field(default_factory=Rope)
    attention_bias: bool = False  # on all four projections of attention; Qwen2 has them on three of them whatever this says
    mlp_bias: bool = False
    sliding_window: int | None = None  # how many tokens, itself included, a token looks back on
    layer_types: tuple[str, ...] | None = (
        None  # "sliding_attention" or "full_attention", layer by layer; None: all slide if there is a window
    )

    def __post_init__(self):
        super().__post_init__()
        for name, types in _ONLY.items():
            if self.model_type not in types and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: the config.json of a {self.model_type} cannot say so; that of {', '.join(types)} can"
                )
        if self.head_dim is None:
            check_divides(self, "hidden_size", "num_attention_heads")
        if self.num_key_value_heads is not None:
            check_divides(self, "num_attention_heads", "num_key_value_heads")
        if self.head_size % 2:
            raise ValueError(f"heads of width {self.head_size}, but rotary positions turn pairs of coordinates: it must be even")
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
            if len(self.layer_types) != self.num_hidden_layers:
                raise ValueError(f"{len(self.layer_types)} layer_types for num_hidden_layers={self.num_hidden_layers}")
            if unknown := set(self.layer_types) - {"sliding_attention", "full_attention"}:
                raise ValueError(f"unknown layer_types {sorted(unknown)}; supported: sliding_attention, full_attention")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values; query heads share them in groups."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def window(self) -> int | None:
        """How many tokens, itself included, a token looks back on in the layers that `slides` marks."""
        return self.sliding_window

    @property
    def slides(self) -> tuple[bool, ...]:
        """For each layer, whether its attention is confined to the window."""
        if self.sliding_window is None or self.layer_types is None:
            return (self.sliding_window is not None,) * self.num_hidden_layers
        return tuple(kind == "sliding_attention" for kind in self.layer_types)

    @classmethod
    def _own_fields(cls, config: Any) -> dict[str, Any]:
        head_dim = getattr(config, "head_dim", None)
        own: dict[str, Any] = {"rope": Rope.from_hf(config.rope_parameters)}
        own["head_dim"] = None if head_dim == config.hidden_size // config.num_attention_heads else head_dim
        if config.num_key_value_heads == config.num_attention_heads:
            own["num_key_value_heads"] = None
        if config.model_type.startswith("qwen") and config.sliding_window is not None:
            own["layer_types"] = tuple(config.layer_types)
        return own

    def to_hf(self) -> dict[str, Any]:
        """The fields as Hugging Face's configuration of this model type calls them; inverse of `from_hf`."""
        fields = super().to_hf() | {"rope_parameters": self.rope.to_hf(), "head_dim": self.head_size, "num_key_value_heads": self.kv_heads}
        if self.model_type.startswith("qwen"):
            kinds = ["sliding_attention" if slides else "full_attention" for slides in self.slides]
            fields |= {"use_sliding_window": self.sliding_window is not None, "layer_types": kinds}
        return fields

    @classmethod
    def llama_3_1_8b(cls, **overrides: Any) -> "LlamaConfig":
        """8,030,261,248 parameters."""
        stretch = Rope(5e5, "llama3", factor=8.0, original_max_position_embeddings=8192)
        sizes: dict[str, Any] = {"num_key_value_heads": 8, "intermediate_size": 14336, "rope": stretch}
        return cls(**_LLAMA_3 | sizes | overrides)

    @classmethod
    def llama_3_2_1b(cls, **overrides: Any) -> "LlamaConfig":
        """1,235,814,400 parameters; the head is the word embedding."""
        stretch = Rope(5e5, "llama3", factor=32.0, original_max_position_embeddings=8192)
        sizes: dict[str, Any] = {"hidden_size": 2048, "num_hidden_layers": 16, "num_key_value_heads": 8, "intermediate_size": 8192}
        return cls(**_LLAMA_3 | sizes | {"rope": stretch, "tie_word_embeddings": True} | overrides)

    @classmethod
    def mistral_7b(cls, **overrides: Any) -> "LlamaConfig":
        """7,241,732,096 parameters; version 0.1, with a window of 4096."""
        sizes: dict[str, Any] = {"num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096}
        own: dict[str, Any] = {"model_type": "mistral", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
        own |= {"bos_token_id": 1, "eos_token_id": 2}
        return cls(**own | sizes | overrides)

    @classmethod
    def qwen2_0_5b(cls, **overrides: Any) -> "LlamaConfig":
        """494,032,768 parameters; the head is the word embedding."""
        sizes: dict[str, Any] = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 4864}
        own: dict[str, Any] = {"model_type": "qwen2", "max_position_embeddings": 131072, "tie_word_embeddings": True}
        return cls(**_QWEN | own | sizes | overrides)

    @classmethod
    def qwen3_8b(cls, **overrides: Any) -> "LlamaConfig":
        """8,190,735,360 parameters."""
        sizes: dict[str, Any] = {"num_hidden_layers": 36, "num_key_value_heads": 8, "intermediate_size": 12288}
        return cls(**_QWEN | sizes | overrides)

    @classmethod
    def qwen3_4b(cls, **overrides: Any) -> "LlamaConfig":
        """4,022,468,096 parameters; the head is the word embedding."""
        sizes: dict[str, Any] = {"hidden_size": 2560, "head_dim": 128, "intermediate_size": 9728, "tie_word_embeddings": True}
        return cls.qwen3_8b(**sizes | overrides)


_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_QWEN: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope": Rope(1e6),
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions; groups of query heads share a head of keys and values."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, hidden: Hidden, view: View, deterministic: bool) -> Hidden:
        """Attend over the tokens so far."""
        config, rotate = self.config, view.rotation
        assert rotate is not None, "LlamaModel makes the rotation"
        bias = config.attention_bias or config.model_type == "qwen2"

        def project(name: str, heads: int) -> Any:
            return dense(config, heads * config.head_size, name, bias=bias)(hidden).reshape(*hidden.shape[:-1], heads, config.head_size)

        query, key = project("q_proj", config.num_attention_heads), project("k_proj", config.kv_heads)
        value = project("v_proj", config.kv_heads)
        if config.model_type == "qwen3":
            query, key = rms_norm(config, "q_norm")(query), rms_norm(config, "k_norm")(key)
        key, value = KeyValueCache(name="cache")(rotate(key), value, view)
        context = AttentionCore(config.attention_dropout, name="core")(rotate(query), key, value, view.mask, deterministic=deterministic)
        return dense(config, config.hidden_size, "o_proj", bias=config.attention_bias)(context.reshape(*hidden.shape[:-1], -1))


class LlamaMLP(nn.Module):
    """W_down (act(W_gate x) * W_up x)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        """The second half of a block, without its residual."""
        config = self.config
        gate, up = (dense(config, config.intermediate_size, name, bias=config.mlp_bias)(hidden) for name in ("gate_proj", "up_proj"))
        return dense(config, config.hidden_size, "down_proj", bias=config.mlp_bias)(ACTIVATIONS[config.hidden_act](gate) * up)


class LlamaBlock(nn.Module):
    """Attention, then feed-forward, each behind an RMSNorm and added to its input."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, hidden: Hidden, view: View, deterministic: bool) -> Hidden:
        """One block."""
        config = self.config
        hidden = hidden + LlamaAttention(config, name="self_attn")(rms_norm(config, "input_layernorm")(hidden), view, deterministic)
        return hidden + LlamaMLP(config, name="mlp")(rms_norm(config, "post_attention_layernorm")(hidden))


class LlamaModel(Decoder):
    """The decoder without a head.

    >>> from jpeft.models import abstract_params
    >>> model = LlamaModel(LlamaConfig.llama_3_2_1b(scan=True))
    >>> jax.eval_shape(model.apply, {"params": abstract_params(model)}, jnp.ones((2, 5), int)).last_hidden_state.shape
    (2, 5, 2048)
    """

    BLOCK = LlamaBlock
    NORM = staticmethod(rms_norm)
    NAMES = ("embed_tokens", "layers", "norm")

    def viewed(self, view: View) -> View:
        """The view with cosines and sines, which all layers share."""
        config = self.config
        rotation = Rotation.at(view.position_ids, config.rope, config.head_size, config.max_position_embeddings)
        return view._replace(rotation=rotation)


class LlamaForCausalLM(LanguageModel):
    """The next word at each position.

    >>> from jpeft.models import abstract_params
    >>> sorted(abstract_params(LlamaForCausalLM(LlamaConfig.qwen3_8b(num_hidden_layers=1))))
    ['lm_head', 'model']
    """

    BODY = LlamaModel
    NAME = "model"

"""GPT-2 and everything with its layout (DistilGPT-2, DialoGPT, ...), in plain linen.

Parameters have Hugging Face's names, so that a checkpoint loads by name. Nothing here knows of parameter-efficient
fine-tuning.

Reference: Radford et al., `Language Models are Unsupervised Multitask Learners
<https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>`_, 2019.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from jpeft.models.activations import ACTIVATIONS
from jpeft.models.attention import AttentionCore
from jpeft.models.decoder import Decoder, Hidden, KeyValueCache, LanguageModel, View
from jpeft.models.decoder_config import COMMON, DecoderConfig
from jpeft.models.layers import dense, embed, layer_norm
from jpeft.models.model_config import check_divides


@dataclasses.dataclass(frozen=True)
class GPT2Config(DecoderConfig):
    """Shape and numerics of a GPT-2; the fields of `DecoderConfig` and these.

    >>> GPT2Config.gpt2(num_hidden_layers=2).hidden_size
    768
    """

    HF_FIELDS: ClassVar[dict[str, dict[str, str]]] = {
        "gpt2": COMMON
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
    hidden_dropout: float = 0.1  # on what each half of a block adds
    embedding_dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256

    def __post_init__(self):
        super().__post_init__()
        check_divides(self, "hidden_size", "num_attention_heads")

    @property
    def position_rows(self) -> int:
        """How many positions the table holds."""
        return self.max_position_embeddings

    @classmethod
    def _own_fields(cls, config: Any) -> dict[str, Any]:
        for name, supported in {"add_cross_attention": False, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}.items():
            if getattr(config, name, supported) != supported:
                raise ValueError(f"this configuration has {name}={not supported}; only {name}={supported} is supported")
        return {}

    @classmethod
    def gpt2(cls, **overrides: Any) -> "GPT2Config":
        """124,439,808 parameters."""
        return cls(**overrides)

    @classmethod
    def gpt2_medium(cls, **overrides: Any) -> "GPT2Config":
        """354,823,168 parameters."""
        medium: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        return cls(**medium | overrides)


class GPT2Attention(nn.Module):
    """Causal self-attention; one kernel makes queries, keys and values."""

    config: GPT2Config

    @nn.compact
    def __call__(self, hidden: Hidden, view: View, deterministic: bool) -> Hidden:
        """Attend over the tokens so far."""
        config = self.config
        split = (*hidden.shape[:-1], config.num_attention_heads, config.head_size)
        qkv = dense(config, 3 * config.hidden_size, "c_attn")(hidden)
        query, key, value = (part.reshape(split) for part in jnp.split(qkv, 3, axis=-1))
        key, value = KeyValueCache(name="cache")(key, value, view)
        context = AttentionCore(config.attention_dropout, name="core")(query, key, value, view.mask, deterministic=deterministic)
        return dense(config, config.hidden_size, "c_proj")(context.reshape(hidden.shape))


class GPT2MLP(nn.Module):
    """W2 act(W1 x + b1) + b2."""

    config: GPT2Config

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        """The second half of a block, without its residual."""
        config = self.config
        inner = dense(config, config.intermediate_size or 4 * config.hidden_size, "c_fc")(hidden)
        return dense(config, config.hidden_size, "c_proj")(ACTIVATIONS[config.hidden_act](inner))


class GPT2Block(nn.Module):
    """Attention, then feed-forward, each behind a LayerNorm and added to its input."""

    config: GPT2Config

    @nn.compact
    def __call__(self, hidden: Hidden, view: View, deterministic: bool) -> Hidden:
        """One block."""
        dropout = nn.Dropout(self.config.hidden_dropout)
        context = GPT2Attention(self.config, name="attn")(layer_norm(self.config, "ln_1")(hidden), view, deterministic)
        hidden = hidden + dropout(context, deterministic=deterministic)
        inner = GPT2MLP(self.config, name="mlp")(layer_norm(self.config, "ln_2")(hidden))
        return hidden + dropout(inner, deterministic=deterministic)


class GPT2Model(Decoder):
    """The decoder without a head.

    >>> from jpeft.models import abstract_params
    >>> model = GPT2Model(GPT2Config.gpt2(num_hidden_layers=1))
    >>> jax.eval_shape(model.apply, {"params": abstract_params(model)}, jnp.ones((2, 5), int)).last_hidden_state.shape
    (2, 5, 768)
    """

    BLOCK = GPT2Block
    NORM = staticmethod(layer_norm)
    NAMES = ("wte", "h", "ln_f")

    def setup(self):
        """Positions have a table of their own."""
        super().setup()
        self.wpe = embed(self.config, self.config.max_position_embeddings)
        self.dropout = nn.Dropout(self.config.embedding_dropout)

    def embedded(self, input_ids: Array, view: View, deterministic: bool) -> Hidden:
        """Words and positions."""
        hidden = super().embedded(input_ids, view, deterministic) + self.wpe(view.position_ids)
        return self.dropout(hidden, deterministic=deterministic)


class GPT2LMHeadModel(LanguageModel):
    """The next word at each position."""

    BODY = GPT2Model
    NAME = "transformer"

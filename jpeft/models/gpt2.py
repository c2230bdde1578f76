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
import numpy as np
from jaxtyping import Array, Float, Int

from .activations import ACTIVATIONS
from .decoder import (
    AttentionCore,
    Causal,
    DecoderOutput,
    Hidden,
    Ids,
    KeyValueCache,
    Mask,
    Positions,
    View,
    at_tokens,
    dense,
    embed,
    run_stack,
    stack,
)
from .decoder_config import COMMON, DecoderConfig


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
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")

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


def layer_norm(config: GPT2Config, name: str | None = None) -> nn.LayerNorm:
    """A LayerNorm."""
    # The "fast" variance E[x^2] - E[x]^2 cancels where the mean is large; torch does not use it either.
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        use_fast_variance=False,
        name=name,
    )


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
        context = AttentionCore(config, name="core")(query, key, value, view.mask, deterministic=deterministic)
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


class GPT2Model(nn.Module):
    """The decoder without a head.

    >>> from jpeft.models import abstract_params
    >>> model = GPT2Model(GPT2Config.gpt2(num_hidden_layers=1))
    >>> jax.eval_shape(model.apply, {"params": abstract_params(model)}, jnp.ones((2, 5), int)).last_hidden_state.shape
    (2, 5, 768)
    """

    config: GPT2Config

    def setup(self):
        """Setup rather than compact: `attend` needs the embedding too."""
        config = self.config
        self.positions = Positions(config)
        self.causal = Causal(config)
        self.wte = embed(config, config.vocab_size)
        self.wpe = embed(config, config.max_position_embeddings)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.h = stack(config, GPT2Block)
        self.ln_f = layer_norm(config)

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        *,
        deterministic: bool = True,
        cache_length: int | None = None,
        output_hidden_states: bool = False,
    ) -> DecoderOutput:
        """Run over a batch.

        Args:
          input_ids: token ids [batch, length].
          attention_mask: 1 for tokens, 0 for padding on either side; all tokens if None.
          deterministic: without dropout; False needs rngs={"dropout": key}.
          cache_length: make a cache for that many tokens, those of this call included (see `jpeft.models.decoder`); needs
            mutable=["cache"].
          output_hidden_states: also return the embeddings and the output of every block.
        """
        layout = self.positions(jnp.asarray(input_ids), attention_mask, self.causal.seen())
        view = self.causal(layout, None if cache_length is None else cache_length - jnp.shape(input_ids)[1])
        length = layout.offset + view.mask.shape[-1]
        if length > self.config.max_position_embeddings:  # a lookup past the table's end would give NaN, silently
            raise ValueError(f"{length} positions, but the position table holds {self.config.max_position_embeddings}; truncate the input")
        hidden = self.wte(jnp.asarray(input_ids)) + self.wpe(view.position_ids)
        hidden = self.dropout(hidden, deterministic=deterministic)
        hidden, states = run_stack(self.h, self.config, hidden, view, deterministic, output_hidden_states)
        hidden = self.ln_f(hidden)
        return DecoderOutput(hidden, (*states, hidden) if output_hidden_states else None)

    def attend(self, hidden: Hidden) -> Float[Array, "batch length vocab"]:
        """Scores of every word of the vocabulary: the word embedding, used a second time."""
        return self.wte.attend(hidden)


class GPT2LMHeadModel(nn.Module):
    """The next word at each position."""

    config: GPT2Config

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        *,
        deterministic: bool = True,
        cache_length: int | None = None,
        logits_at: Int[Array | np.ndarray, " batch"] | None = None,
    ) -> Float[Array, "batch positions vocab"]:
        """float32 logits; arguments as in `GPT2Model`, and `logits_at`, the one token of each row to give logits for."""
        config = self.config
        body = GPT2Model(config, name="transformer")
        output = body(input_ids, attention_mask, deterministic=deterministic, cache_length=cache_length)
        hidden = at_tokens(output.last_hidden_state, input_ids, logits_at)
        logits = body.attend(hidden) if config.tie_word_embeddings else dense(config, config.vocab_size, "lm_head", bias=False)(hidden)
        return logits.astype(jnp.float32)

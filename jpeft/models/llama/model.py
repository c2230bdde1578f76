"""The blocks, decoder and language model of Llama, Mistral, Qwen2 and Qwen3."""

import flax.linen as nn
from jaxtyping import Array, Float

from jpeft.models.common.activations import ACTIVATIONS
from jpeft.models.common.attention import make_core
from jpeft.models.common.block_stack import Hidden
from jpeft.models.common.cache import KeyValueCache, View
from jpeft.models.common.decoder import Decoder, LanguageModel
from jpeft.models.common.layers import dense, rms_norm
from jpeft.models.common.rope import Rotation
from jpeft.models.llama.config import LlamaConfig


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions. Groups of query heads share a head of keys and values."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, hidden: Hidden, view: View, deterministic: bool) -> Hidden:
        """Attend to the tokens so far."""
        config, rotate = self.config, view.rotation
        assert rotate is not None, "LlamaModel.extend_view adds the rotation"
        # Qwen2 has biases on the first three projections, and no field in its config.json that says so.
        bias = config.attention_bias or config.model_type == "qwen2"

        def project(name: str, heads: int) -> Float[Array, "batch length heads head"]:
            return dense(config, heads * config.head_size, name, bias=bias)(hidden).reshape(*hidden.shape[:-1], heads, config.head_size)

        query, key = project("q_proj", config.num_attention_heads), project("k_proj", config.kv_heads)
        value = project("v_proj", config.kv_heads)
        if config.model_type == "qwen3":
            # Each head is normalised alone, over its last axis.
            query, key = rms_norm(config, "q_norm")(query), rms_norm(config, "k_norm")(key)
        # Keys are rotated before they enter the cache, so that a cached key need not know its position.
        key, value = KeyValueCache(name="cache")(rotate(key), value, view)
        context = make_core(config, config.attention_dropout)(rotate(query), key, value, view.mask, deterministic=deterministic)
        return dense(config, config.hidden_size, "o_proj", bias=config.attention_bias)(context.reshape(*hidden.shape[:-1], -1))


class LlamaMLP(nn.Module):
    """W_down (act(W_gate x) * W_up x)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        """Return the second half of a block, without its residual."""
        config = self.config
        gate, up = (dense(config, config.intermediate_size, name, bias=config.mlp_bias)(hidden) for name in ("gate_proj", "up_proj"))
        return dense(config, config.hidden_size, "down_proj", bias=config.mlp_bias)(ACTIVATIONS[config.hidden_act](gate) * up)


class LlamaBlock(nn.Module):
    """A pre-norm block: x + attention(RMSNorm(x)), then x + MLP(RMSNorm(x))."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, hidden: Hidden, view: View, deterministic: bool) -> Hidden:
        """Apply the block."""
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
    NAMES = ("embed_tokens", "layers", "norm")  # as in Hugging Face's checkpoints

    def extend_view(self, view: View) -> View:
        """Return the view with the cosines and sines of its positions, which all layers share."""
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

"""Skeleton's blocks, decoder and language model. The names of modules are those of the tensors in checkpoints."""

import flax.linen as nn
from jpeft.models.skeleton.config import SkeletonConfig

from jpeft.models.common.activations import ACTIVATIONS
from jpeft.models.common.attention import make_core
from jpeft.models.common.block_stack import Hidden
from jpeft.models.common.cache import KeyValueCache, View
from jpeft.models.common.decoder import Decoder, LanguageModel
from jpeft.models.common.layers import dense, rms_norm
from jpeft.models.common.rope import Rotation


class SkeletonAttention(nn.Module):
    """Causal self-attention with rotary positions."""

    config: SkeletonConfig

    @nn.compact
    def __call__(self, hidden: Hidden, view: View, deterministic: bool) -> Hidden:
        """Attend to the tokens so far."""
        config, rotate = self.config, view.rotation
        assert rotate is not None, "SkeletonModel.extend_view adds the rotation"
        split = (*hidden.shape[:-1], config.num_attention_heads, config.head_size)
        query, key, value = (
            dense(config, config.hidden_size, name, bias=False)(hidden).reshape(split) for name in ("q_proj", "k_proj", "v_proj")
        )
        key, value = KeyValueCache(name="cache")(rotate(key), value, view)
        # Methods wrap the module `core`: keep its name and the order of its arguments (see jpeft.models.common.contract).
        context = make_core(config, config.attention_dropout)(rotate(query), key, value, view.mask, deterministic=deterministic)
        return dense(config, config.hidden_size, "o_proj", bias=False)(context.reshape(hidden.shape))


class SkeletonMLP(nn.Module):
    """W_down act(W_up x)."""

    config: SkeletonConfig

    @nn.compact
    def __call__(self, hidden: Hidden) -> Hidden:
        """Return the second half of a block, without its residual."""
        inner = ACTIVATIONS[self.config.hidden_act](dense(self.config, self.config.intermediate_size, "up_proj", bias=False)(hidden))
        return dense(self.config, self.config.hidden_size, "down_proj", bias=False)(inner)


class SkeletonBlock(nn.Module):
    """A pre-norm block: x + attention(RMSNorm(x)), then x + MLP(RMSNorm(x))."""

    config: SkeletonConfig

    @nn.compact
    def __call__(self, hidden: Hidden, view: View, deterministic: bool) -> Hidden:
        """Apply the block."""
        config = self.config
        hidden = hidden + SkeletonAttention(config, name="self_attn")(rms_norm(config, "input_norm")(hidden), view, deterministic)
        return hidden + SkeletonMLP(config, name="mlp")(rms_norm(config, "output_norm")(hidden))


class SkeletonModel(Decoder):
    """The decoder without a head.

    >>> from jpeft.models import abstract_params
    >>> model = SkeletonModel(SkeletonConfig(num_hidden_layers=1))
    >>> jax.eval_shape(model.apply, {"params": abstract_params(model)}, jnp.ones((2, 5), int)).last_hidden_state.shape
    (2, 5, 768)
    """

    BLOCK = SkeletonBlock
    NORM = staticmethod(rms_norm)
    NAMES = ("embed_tokens", "layers", "norm")

    def extend_view(self, view: View) -> View:
        """Return the view with the cosines and sines of its positions, which all layers share."""
        config = self.config
        rotation = Rotation.at(view.position_ids, config.rope, config.head_size, config.max_position_embeddings)
        return view._replace(rotation=rotation)


class SkeletonForCausalLM(LanguageModel):
    """The next word at each position."""

    BODY = SkeletonModel
    NAME = "model"

"""The Flax models of transformers 4.57, the last version that has them."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from third_party.built import IDS, RANDOM, Built, Maker

ENCODER = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def _clip_with_old_names() -> None:
    """T5 names the bounds of `jnp.clip` as older versions of jax did."""
    clip = jnp.clip

    def clip_(x: Any, *bounds: Any, a_min: Any = None, a_max: Any = None, **more: Any) -> Any:
        named = {"min": a_min, "max": a_max}
        return clip(x, *bounds, **{name: bound for name, bound in named.items() if bound is not None}, **more)

    jnp.clip = clip_


def _make(name: str, config: str, *inputs: Any, keywords: dict[str, Any] | None = None, shape: Any = (1, 6), **sizes: Any) -> Maker:
    def make() -> Built:
        import transformers

        _clip_with_old_names()
        model = getattr(transformers, name)(getattr(transformers, config)(**sizes), input_shape=shape)
        return Built(model, model.params, inputs, keywords or {})

    return make


IMAGES = RANDOM.standard_normal((2, 3, 8, 8)).astype(np.float32)
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
VIT = {name: value for name, value in ENCODER.items() if name != "vocab_size"} | {"image_size": 8, "patch_size": 4}
LLAMA = {**ENCODER, "num_key_value_heads": 2, "max_position_embeddings": 32}

MODELS: dict[str, Maker] = {
    "BERT": _make("FlaxBertForSequenceClassification", "BertConfig", IDS, **ENCODER, max_position_embeddings=32),
    "GPT-2": _make("FlaxGPT2LMHeadModel", "GPT2Config", IDS, **GPT2),
    "Llama": _make("FlaxLlamaForCausalLM", "LlamaConfig", IDS, **LLAMA),
    "T5": _make("FlaxT5ForConditionalGeneration", "T5Config", IDS, keywords={"decoder_input_ids": IDS[:, :4]}, **T5),
    "ViT": _make("FlaxViTForImageClassification", "ViTConfig", IMAGES, shape=(1, 8, 8, 3), **VIT),
}

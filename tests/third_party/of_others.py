"""Other packages on PyPI with Flax models: gemma, tunix, flaxdiff, jax_resnet."""

import dataclasses
import importlib.machinery
import sys
import types
from typing import Any

import jax.numpy as jnp

from third_party.built import IDS, RANDOM, Built, Maker, linen, nnx

IMAGES = jnp.asarray(RANDOM.standard_normal((2, 8, 8, 3)), jnp.float32)


class _Absent(types.ModuleType):
    """Stands in for a package that is imported and not used."""

    __path__: list[str] = []
    __spec__ = importlib.machinery.ModuleSpec("absent", None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _gemma() -> Built:
    # Its trainer wants tensorflow for plots; the models do not.
    sys.modules.setdefault("tensorflow", _Absent("tensorflow"))
    from gemma.gm.nn import _config, _modules, _transformer  # pyright: ignore[reportMissingImports]

    kinds = _modules.AttentionType
    config = _config.TransformerConfig(
        num_embed=32,
        embed_dim=16,
        hidden_dim=32,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        sliding_window_size=4,
        use_qk_norm=True,
    )
    made = linen(_transformer.Transformer(config=config, dtype=jnp.float32), IDS)
    return dataclasses.replace(made, target=".*(einsum/w|gating_einsum|mlp/linear)", asks=True)


def _tunix() -> Built:
    from flax import nnx as flax_nnx
    from tunix.models.qwen3 import model  # pyright: ignore[reportMissingImports]

    config = model.ModelConfig(
        num_layers=2,
        vocab_size=32,
        embed_dim=16,
        hidden_dim=32,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        rope_theta=10000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (2, 6, 6))
    made = nnx(model.Qwen3(config, rngs=flax_nnx.Rngs(0)), IDS, positions, None, mask)
    return dataclasses.replace(made, target=".*(kernel|proj/w)", asks=True)


def _flaxdiff() -> Built:
    from flaxdiff.models.simple_vit import UViT  # pyright: ignore[reportMissingImports]

    model = UViT(patch_size=4, emb_features=16, num_layers=2, num_heads=2, dropout_rate=0.0, norm_groups=0)
    return dataclasses.replace(linen(model, IMAGES, jnp.array([0.3, 0.6]), None), asks=True)


def _jax_resnet() -> Built:
    import jax_resnet  # pyright: ignore[reportMissingImports]

    return linen(jax_resnet.ResNet(jax_resnet.ResNetBlock, stage_sizes=(1, 1), hidden_sizes=(8, 16), n_classes=4), IMAGES)


MODELS: dict[str, Maker] = {
    "gemma": _gemma,
    "tunix Qwen3 (nnx)": _tunix,
    "flaxdiff UViT": _flaxdiff,
    "jax_resnet": _jax_resnet,
}

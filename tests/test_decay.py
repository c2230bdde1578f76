"""Weight decay: what it acts on, in the leaves of every kind of method and in a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import base, case

import jpeft
from jpeft.training.schedule import clipped_adamw

# Leaves of the adapters below that do not decay, as the end of their paths.
WITHOUT = ("bias", "scale", "bias/values", "scale/values", "bias/indices", "scale/indices", "bias/w", "scale/w")


@pytest.mark.parametrize(
    ("name", "model"),
    [("freeze", "bert-scan"), ("bitfit", "bert"), ("pfeiffer-lin", "bert"), ("lora", "bert"), ("fish_mask", "bert-remat")],
)
def test_biases_and_normalisations_do_not_decay(name, model):
    """With gradients of zero, AdamW only decays: the leaves that move are those of the mask."""
    peft = case(name, model).noisy
    tx = jpeft.optimizer(optax.adamw(0.1, weight_decay=0.5, mask=jpeft.decay_mask), peft)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, peft.adapter), tx.init(peft.adapter), peft.adapter)
    labels = jpeft.flatten(peft.method.labels(peft.adapter))
    moved = {path: bool(np.any(update)) for path, update in jpeft.flatten(updates).items() if labels[path] != "freeze"}
    assert moved == {path: not path.endswith(WITHOUT) for path in moved}
    assert any(moved.values())
    assert not all(moved.values())


@pytest.mark.parametrize(
    ("path", "decays"),
    [
        ("layers/0/input_layernorm/weight", False),  # of transformers' Flax Llama
        ("decoder/layers/pre_self_attention_layer_norm/scale", False),  # of t5x
        ("encoder/encoderblock_0/LayerNorm_0/scale", False),
        ("self_attn/q_norm/weight", False),
        ("transformer/h/0/ln_1/scale", False),
        ("attn/q_bias", False),
        ("batch_norm/scale", False),
        ("output/LayerNorm/+/down/kernel", True),  # a bottleneck in a normalisation
        ("output/LayerNorm/+/down/bias", False),
        ("attn/query/kernel/b", True),  # LoRA's B
        ("embeddings/word_embeddings/embedding", True),
        ("part/mlp/kernel/magnitude", True),
        ("biased/kernel", True),
    ],
)
def test_names_of_many_families(path, decays):
    assert jpeft.flatten(jpeft.decay_mask(jpeft.unflatten({path: jnp.ones(2)}))) == {path: decays}


def test_the_trainer_decays_biases_only_if_asked():
    peft = jpeft.apply(base("bert"), method="bitfit")
    zeros = jax.tree.map(jnp.zeros_like, peft.adapter)
    for decay_biases in (False, True):
        tx = clipped_adamw(optax.constant_schedule(0.1), weight_decay=0.5, decay_biases=decay_biases)
        ones = jax.tree.map(jnp.ones_like, peft.adapter)
        updates, _ = tx.update(zeros, tx.init(ones), ones)
        assert np.allclose(updates["classifier"]["kernel"], -0.05)
        assert np.allclose(updates["classifier"]["bias"], -0.05 * decay_biases)

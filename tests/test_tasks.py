"""What tasks share: cross entropy with label smoothing, beside optax and torch, and its way from the flag to the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from tiny_text import make_base

from jpeft.tasks.cross_entropy import IGNORE, cross_entropy, token_losses
from jpeft.tasks.task import find_task
from jpeft.training.config import TrainConfig
from jpeft.training.train import train

SETTINGS = TrainConfig(model="m", data="d", output="o", label_smoothing=0.2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_that_of_optax_and_torch(key, smoothing):
    logits, labels = 3 * jax.random.normal(key, (5, 7)), jnp.array([0, 6, 3, 3, 1])
    got = cross_entropy(logits, labels, smoothing)
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, 7), smoothing)
    np.testing.assert_allclose(got, optax.softmax_cross_entropy(logits, smooth), rtol=1e-5)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(np.array(logits)), torch.tensor(np.array(labels), dtype=torch.long), label_smoothing=smoothing, reduction="none"
    )
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5)


def test_tokens_without_a_label_are_left_out(key):
    logits, label = jax.random.normal(key, (2, 3, 7)), jnp.array([[1, IGNORE, 2], [IGNORE, IGNORE, 6]])
    expected = cross_entropy(logits, jnp.maximum(label, 0), 0.2)
    got = token_losses(logits, {"label": label}, 0.2)
    np.testing.assert_allclose(got, [expected[0, 0] + expected[0, 2], expected[1, 2]], rtol=1e-6)


@pytest.mark.parametrize("name", ["sequence-classification", "token-classification", "generation"])
def test_settings_reach_the_training_loss_alone(key, name):
    task = find_task(name)
    shape = (4, 5) if name == "sequence-classification" else (4, 3, 5)
    logits, batch = jax.random.normal(key, shape), {"label": jnp.ones(shape[:-1], jnp.int32)}
    plain, smooth = task.losses(logits, batch), task.losses(logits, batch, SETTINGS)
    assert jnp.abs(plain - smooth).max() > 1e-2
    np.testing.assert_array_equal(plain, task.losses(logits, batch, dataclasses.replace(SETTINGS, label_smoothing=0.0)))


def test_label_smoothing_changes_what_is_trained(tmp_path):
    config = TrainConfig(**make_base(tmp_path, train=40, validation=8), output=str(tmp_path / "a"), batch_size=8, steps=2, log_every=1)
    plain = train(config)
    smooth = train(dataclasses.replace(config, label_smoothing=0.3, output=str(tmp_path / "b")))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), plain.peft.adapter, smooth.peft.adapter)
    assert max(map(float, jax.tree.leaves(moved))) > 1e-6

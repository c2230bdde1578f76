"""The NNX host against linen: the same weights, every method, whatever lifts the blocks."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from nnx_models import linen, linen_params, nnx_model
from tables import METHODS, NEED_STATS, batch, noised

import jpeft
from jpeft.stats import Movement, fisher

CELLS = [
    *[("lora", twin) for twin in ("jit", "scan-remat", "scan-mha", "einsum")],
    *[("adapter", twin) for twin in ("jit", "scan-remat")],
    ("lora-two-view", "einsum"),
    ("lora-factored", "scan-remat"),
    ("dora", "scan-mha"),
    ("lora-pissa", "scan-mha"),
    ("lora-fa", "einsum"),
    ("adalora", "scan-mha"),
    ("ia3", "einsum"),
    ("loha", "einsum"),
    ("lokr", "scan-mha"),
    ("oft", "einsum"),
    ("hra", "scan-mha"),
    ("vera", "scan-remat"),
    ("miss", "einsum"),
    ("boft", "scan-mha"),
    ("shira", "scan-remat"),
    ("bitfit", "scan-remat"),
    ("freeze", "remat"),
    ("ln_tuning", "remat"),
    ("trainable_tokens", "plain"),
    ("far-learners", "remat"),
    ("pfeiffer", "remat"),
    ("compacter", "scan-mha"),
    *[(method, "core-scan") for method in ("prompt_tuning", "multitask_prompt_tuning", "prefix_tuning")],
    *[(method, "core") for method in ("p_tuning", "p_tuning_v2")],
    ("adaption_prompt", "core-scan"),
    ("chain", "scan-remat"),
    ("chain-sparse", "scan"),
    ("chain-mergeable", "einsum"),
]


@functools.cache
def information(twin):
    def losses(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(linen(twin).apply({"params": params}, batch["x"]), batch["y"])

    found = fisher(losses, linen_params(twin), [batch()], chunk=5)
    return [found, Movement(found.values)]


@pytest.mark.parametrize(("name", "twin"), CELLS, ids=["-".join(cell) for cell in CELLS])
@jax.numpy_dtype_promotion("strict")
def test_equals_linen(name, twin):
    """Outputs, gradients and merged weights, of one and the same adapter."""
    method, x = METHODS[name], batch()["x"]
    stats = information(twin) if name in NEED_STATS else None
    model = nnx_model(twin)
    ours = jpeft.apply(model, method=method, key=jax.random.key(7), stats=stats)
    theirs, adapter = jpeft.Peft(linen_params(twin), ours.adapter, ours.method), noised(ours.adapter)

    def run(peft, forward):
        def loss(adapter):
            logits = forward(peft.replace(adapter=adapter), x)
            return jnp.sum(jnp.sin(logits)), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter)

    (_, got), grads = run(ours, jpeft.wrap(model))
    (_, want), expected = run(theirs, jpeft.wrap(linen(twin).apply))
    chex.assert_trees_all_close(got, want, atol=1e-5)
    chex.assert_trees_all_close(grads, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = ours.replace(adapter=adapter), theirs.replace(adapter=adapter)
    try:
        merged = jpeft.merge(theirs)
    except ValueError as error:
        with pytest.raises(ValueError, match="Cannot merge") as mine:
            jpeft.merge(ours)
        assert str(mine.value) == str(error)
        return
    chex.assert_trees_all_close(jpeft.flatten(jpeft.merge(ours)), jpeft.flatten(merged), atol=1e-6)

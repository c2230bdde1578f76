"""What LoRA's relatives leave out in training: only with an rng, and what the option says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tables import noised

import jpeft

X = jax.random.normal(jax.random.key(1), (5, 8))


def outputs(method: jpeft.Method):
    """Of the base, of the adapted layer, and of it with an rng, without the bias."""
    model = nn.Dense(12)
    params = noised(model.init(jax.random.key(0), X)["params"])
    peft = jpeft.apply(params, method)
    peft = peft.replace(adapter=noised(peft.adapter, 0.5))
    run = jax.jit(jpeft.wrap(model.apply))
    drawn = run(peft, X, rngs={"dropout": jax.random.key(4)})
    chex.assert_trees_all_equal(drawn, run(peft, X, rngs={"dropout": jax.random.key(4)}))
    return params, peft, model.apply({"params": params}, X), run(peft, X), drawn


@pytest.mark.parametrize(
    ("method", "rescale"), [(jpeft.loha(rank=2, rank_dropout=0.5), True), (jpeft.lokr(rank=2, rank_dropout=0.5), False)]
)
def test_outputs_of_an_update(method, rescale):
    _, _, base, whole, drawn = outputs(method)
    share = np.asarray((drawn - base) / (whole - base))
    kept = np.abs(share).max(axis=0) > 1e-3
    assert 0 < kept.sum() < 12
    np.testing.assert_allclose(share[:, kept], 12 / kept.sum() if rescale else 1.0, rtol=1e-3)


def test_a_whole_update():
    _, _, base, whole, drawn = outputs(jpeft.lokr(rank=2, module_dropout=0.999))
    assert jnp.abs(whole - base).max() > 1e-2
    chex.assert_trees_all_close(drawn, base, atol=1e-6)


THINNED = {name: jpeft.make({"method": name, "rank": 3, "dropout": 0.5}) for name in ("vera", "miss", "dora")}


@pytest.mark.parametrize("method", THINNED.values(), ids=THINNED)
def test_inputs_of_an_update(method):
    """The change is that of inputs of which each is zero or twice itself."""
    params, peft, base, _, drawn = outputs(method)
    change = jpeft.merge(peft)["kernel"] - params["kernel"]
    possible = [np.array([(i >> bit) & 1 for bit in range(8)]) * 2 for i in range(256)]
    for x, got in zip(np.asarray(X), np.asarray(drawn - base), strict=True):
        assert min(np.abs((x * mask) @ np.asarray(change) - got).max() for mask in possible) < 1e-4


def test_blocks_of_rotations():
    """Half of the blocks of a layer do not turn; of several factors, half of the blocks of one."""
    for method, count in ((jpeft.oft(block_size=2, block_dropout=0.5), 2), (jpeft.boft(block_size=2, block_dropout=0.5), 2)):
        _, peft, base, whole, drawn = outputs(method)
        assert jnp.abs(drawn - whole).max() > 1e-2
        leaf = {"oft": "q", "boft": "r"}[method.name]
        near = []
        for i in range(16):
            mask = jnp.array([(i >> bit) & 1 for bit in range(4)], float)
            leaves = dict(peft.adapter["kernel"])
            shape = (4, 1) if leaf == "q" else (1, 4, 1, 1)
            leaves[leaf] = leaves[leaf] * mask.reshape(shape)
            one = jpeft.wrap(nn.Dense(12).apply)(peft.replace(adapter={"kernel": leaves}), X)
            near += [int(mask.sum())] if jnp.abs(one - drawn).max() < 1e-4 else []
        assert near == [count]
        assert base.shape == drawn.shape


def test_what_has_no_inputs_of_its_own():
    with pytest.raises(ValueError, match="miss: dropout is on the inputs of the update, and variant='bat' changes the kernel"):
        jpeft.miss(variant="bat", dropout=0.1)

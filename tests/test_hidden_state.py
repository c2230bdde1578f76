"""Bottlenecks in blocks that return more than their hidden state, in any order and container."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from host_checks import noisy

import jpeft

KEY = jax.random.key(0)
D = 8
X = jax.random.normal(KEY, (2, 5, D))

# How a block returns its hidden state h, and how the model takes it out again.
RETURNS = {
    "alone": (lambda h: h, lambda out: out),
    "first": (lambda h: (h, h.mean()), lambda out: out[0]),
    "behind a cache": (lambda h: ({"k": h[..., :4]}, h), lambda out: out[1]),
    "behind wide weights": (lambda h: (jnp.ones((2, 3, D, D)), h), lambda out: out[1]),
    "behind a vector": (lambda h: [h.mean(1), h], lambda out: out[1]),
    "in a dict": (lambda h: {"aux": None, "hidden": h, "pooled": h[:, 0]}, lambda out: out["hidden"]),
    "nested": (lambda h: ((jnp.zeros((2, 5), bool), h), None), lambda out: out[0][1]),
    "twice": (lambda h: (h, h), lambda out: out[0] / 2 + out[1] / 2),
    "beside another dtype": (lambda h: (h.astype(jnp.float16), h), lambda out: out[1]),
}


def net(returns, takes):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return returns(x + nn.Dense(D, name="down")(nn.gelu(nn.Dense(D, name="up")(x))))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x = takes(Block(name=f"layer_{i}")(x))
            return x

    return Net()


TARGET = r"(?P<block>layer_\d+)/down/kernel"


@pytest.mark.parametrize("kind", RETURNS)
@pytest.mark.parametrize("method", [jpeft.pfeiffer(size=2, target=TARGET), jpeft.parallel_adapter(size=2, target=TARGET)])
def test_the_hidden_state_is_found(kind, method):
    plain, model = net(*RETURNS["alone"]), net(*RETURNS[kind])
    peft = noisy(plain.init(KEY, X)["params"], method)
    want = jpeft.wrap(plain.apply)(peft, X)
    assert jnp.abs(want - plain.apply({"params": peft.params}, X)).max() > 1e-2
    chex.assert_trees_all_close(jpeft.wrap(model.apply)(peft, X), want, atol=1e-5)


@pytest.mark.parametrize("name", ["adapter", "compacter", "pfeiffer", "parallel_adapter"])
def test_two_that_may_be_it(name):
    model = net(lambda h: {"one": jnp.ones_like(h), "two": h}, lambda out: out["two"])
    options = {"size": 4, "target": TARGET}
    params = model.init(KEY, X)["params"]
    with pytest.raises(ValueError, match=rf"{name}: 'layer_0' returns several arrays.*'one' float32.*Say which: hidden_state='two'"):
        jpeft.wrap(model.apply)(noisy(params, name, **options), X)
    peft = noisy(params, name, **options, hidden_state="two")
    plain = net(*RETURNS["alone"])
    want = jpeft.wrap(plain.apply)(noisy(params, name, **options), X)
    chex.assert_trees_all_close(jpeft.wrap(model.apply)(peft, X), want, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"hidden_state='three' should name one output that is 8 wide; it returns 'one' float32\[2, 5, 8\]"
    ):
        jpeft.wrap(model.apply)(noisy(params, name, **options, hidden_state="three"), X)


def test_none_that_may_be_it():
    model = net(lambda h: (h[..., :4], h.sum()), lambda out: jnp.concatenate([out[0]] * 2, -1))
    with pytest.raises(ValueError, match=r"'layer_0' returns nothing that is 8 wide.*'0' float32\[2, 5, 4\].*target="):
        jpeft.wrap(model.apply)(noisy(model.init(KEY, X)["params"], "pfeiffer", size=2, target=TARGET), X)

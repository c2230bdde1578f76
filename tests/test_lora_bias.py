"""LoRA with a bias of its own: on layers that have a bias, and on those that have none."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from tables import noised
from test_lora_layers import Net, NNXNet

import jpeft

KEY = jax.random.key(0)
S = 1.5


class Foreign(nn.Module):
    """A layer of a class that jpeft does not know."""

    has_bias: bool

    @nn.compact
    def __call__(self, x):
        y = jnp.tanh(x) @ self.param("kernel", nn.initializers.normal(), (4, 6))
        return y + self.param("bias", nn.initializers.normal(), (6,))[None] if self.has_bias else y


LAYERS = {
    "dense": lambda has_bias: Net(nn.Dense(6, use_bias=has_bias)),
    "nnx": lambda has_bias: NNXNet(nnx.Linear(4, 6, use_bias=has_bias, rngs=nnx.Rngs(0))),
    "foreign": lambda has_bias: Net(Foreign(has_bias)),
}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_bias(name, has_bias):
    model, x = LAYERS[name](has_bias), jax.random.normal(KEY, (3, 4))
    params = nnx.state(model, nnx.Param) if name == "nnx" else model.init(KEY, x)["params"]
    peft = jpeft.apply(params, method=jpeft.lora(rank=2, alpha=3.0, lora_bias=True))
    assert not jpeft.flatten(peft.adapter)["layer/kernel/bias"].any()
    peft = peft.replace(adapter=noised(peft.adapter))
    leaves, base = jpeft.flatten(peft.adapter), jpeft.flatten(peft.params)
    a, b, c = (np.asarray(leaves[f"layer/kernel/{leaf}"]) for leaf in ("a", "b", "bias"))
    kernel, bias = np.asarray(base["layer/kernel"]), np.asarray(base.get("layer/bias", 0))
    inputs = np.tanh(x) if name == "foreign" else x
    expected = np.asarray(inputs) @ (kernel + S * a @ b) + S * c + bias
    forward = jpeft.wrap(model if name == "nnx" else model.apply)
    got, pull = jax.vjp(lambda adapter: forward(peft.replace(adapter=adapter), x), peft.adapter)
    chex.assert_trees_all_close(got, expected, atol=1e-5)
    (grads,) = pull(jnp.ones_like(got))
    chex.assert_trees_all_close(jpeft.flatten(grads)["layer/kernel/bias"], jnp.full(6, S * 3), atol=1e-5)
    if has_bias:
        chex.assert_trees_all_close(jpeft.flatten(jpeft.merge(peft))["layer/bias"], base["layer/bias"] + S * c, atol=1e-6)
        chex.assert_trees_all_close(jpeft.merge(jpeft.to_lora(peft, rank=2)), jpeft.merge(peft), atol=1e-5)
    else:
        with pytest.raises(ValueError, match="that layer has none to take it up"):
            jpeft.merge(peft)


def test_tables_have_none():
    with pytest.raises(ValueError, match="is a table of embeddings"):
        jpeft.apply({"wte": {"embedding": jnp.ones((4, 2))}}, method=jpeft.lora(target=["wte"], lora_bias=True))


def test_stacked_layers_must_all_have_one(tmp_path):
    """Zeros are no bias that stays as it is, and a magnitude of zero is a layer without outputs."""
    names = {r"blocks_(\d)/q/kernel": r"layers.\1.q.weight", r"blocks/q/kernel": r"layers.*.q.weight"}
    single = {f"blocks_{i}": {"q": {"kernel": jnp.ones((4, 4))}} for i in range(2)}
    for i, method in enumerate((jpeft.lora(target="blocks_1/.*", lora_bias=True), jpeft.dora(target="blocks_1/.*"))):
        peft = jpeft.apply(single, method=method)
        jpeft.save_hf(tmp_path / str(i), peft.replace(adapter=noised(peft.adapter)), names=names)
        with pytest.raises(ValueError, match="scan=False"):
            jpeft.load_hf(tmp_path / str(i), {"blocks": {"q": {"kernel": jnp.ones((2, 4, 4))}}}, names=names)

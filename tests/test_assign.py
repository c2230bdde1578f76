"""`jpeft.assign`: an index for each example, as a leaf of the adapter."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jpeft
from jpeft.core.index import as_leaf, repeated, rows_of
from jpeft.tree.adapters import ADDED


class Shift(jpeft.Method):
    """Adds one of four vectors to the outputs of a layer, by example."""

    name = "shift"
    takes_index = True

    def init(self, key, params, *, stats=None):
        return {"dense": {ADDED: {"table": jax.random.normal(key, (4, params["dense"]["kernel"].shape[1]))}}}

    def assign(self, adapter, index):
        leaf = as_leaf(index, low=0, high=3, what="rows 0 to 3")
        return {"dense": {ADDED: {**adapter["dense"][ADDED], "index": leaf}}}

    def assigned(self, adapter):
        return adapter["dense"][ADDED].get("index")

    def labels(self, adapter):
        return jax.tree_util.tree_map_with_path(lambda path, _: "freeze" if path[-1].key == "index" else "train", adapter)

    def call(self, layer, inputs, leaves, rng):
        own = leaves[ADDED]
        return layer(*inputs) + own["table"][rows_of(own["index"], len(inputs[0]), layer.path)]


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="dense")(x)


@pytest.fixture(scope="module")
def peft():
    return jpeft.apply(Model().init(jax.random.key(0), jnp.ones((1, 2)))["params"], method=Shift())


def test_each_example_has_its_own(peft):
    """One compilation for any index, also a traced one; the gradient is that of the rows that were chosen."""
    model, x = Model(), jax.random.normal(jax.random.key(1), (5, 2))
    run = jpeft.wrap(model.apply)
    forward = jax.jit(chex.assert_max_traces(lambda peft, x: run(peft, x), n=1))
    table = peft.adapter["dense"][ADDED]["table"]
    for index in ([0, 1, 2, 3, 3], np.array([3, 3, 3, 3, 0], np.int8), jnp.zeros(5, jnp.int32)):
        expected = model.apply({"params": peft.params}, x) + table[np.asarray(index)]
        chex.assert_trees_all_close(forward(jpeft.assign(peft, index), x), expected, atol=1e-6)
    traced = jax.jit(lambda index: jpeft.wrap(model.apply)(jpeft.assign(peft, index), x))
    chex.assert_trees_all_close(traced(jnp.array([0, 1, 2, 3, 3])), forward(jpeft.assign(peft, [0, 1, 2, 3, 3]), x), atol=1e-6)
    one = jpeft.assign(peft, [1, 1, 1, 2, 2])
    grad = jax.grad(lambda adapter: jpeft.wrap(model.apply)(one.replace(adapter=adapter), x).sum())(one.adapter)["dense"][ADDED]
    chex.assert_trees_all_close(grad, {"table": jnp.tile(jnp.array([0.0, 3, 2, 0])[:, None], (1, 3)), "index": jnp.zeros(5)})
    labels = one.labels["shift"]["dense"][ADDED]
    assert labels == {"table": "train", "index": "freeze"}


def test_a_chain_passes_it_on(peft):
    x = jnp.ones((2, 2))
    chained = jpeft.apply(peft.params, jpeft.chain(lora=jpeft.lora(rank=1, head=None), shift=Shift()), key=jax.random.key(5))
    out = jpeft.wrap(Model().apply)(jpeft.assign(chained, [2, 0]), x)
    table = chained.adapter["shift"]["dense"][ADDED]["table"]
    chex.assert_trees_all_close(out, Model().apply({"params": peft.params}, x) + table[jnp.array([2, 0])], atol=1e-6)
    assert repeated(jpeft.assign(chained, [2, 0]).variables, chained.method, 2)["shift"]["dense"][ADDED]["index"].tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 4], r"The index of example 1 is 4. There are rows 0 to 3\."),
        ([-1, 0], r"The index of example 0 is -1\."),
        ([0.0, 1.0], r"holds a whole number for each example, such as \[0, 2, 0\], and was \[0\.0, 1\.0\]"),
        (3, "and was 3"),
        ("en", "and was 'en'"),
        ([], r"and was \[\]"),
        ([[0, 1]], "holds a whole number"),
        ([[0], [1, 2]], "holds a whole number"),
        ([True, False], "holds a whole number"),
        (jnp.zeros((2, 2), jnp.int32), r"was an array of int32 of shape \(2, 2\)"),
    ],
)
def test_an_index_that_is_none(peft, index, message):
    with pytest.raises(ValueError, match=message):
        jpeft.assign(peft, index)


def test_an_index_that_does_not_fit(peft):
    forward, x = jpeft.wrap(Model().apply), jnp.ones((4, 2))
    with pytest.raises(ValueError, match=r"shift needs an index for each example of the batch: peft = jpeft\.assign"):
        forward(peft, x)
    with pytest.raises(ValueError, match=r"The batch has 4 examples and the index 2"):
        forward(jpeft.assign(peft, [0, 1]), x)
    with pytest.raises(ValueError, match=r"lora takes no index"):
        jpeft.assign(jpeft.apply(peft.params, method="lora", head=None), [0])
    with pytest.raises(ValueError, match=r"no part takes an index"):
        jpeft.assign(jpeft.apply(peft.params, jpeft.chain(lora=jpeft.lora(head=None))), [0])
    with pytest.raises(ValueError, match=r"'layer' is given an array of 3 rows and the index has 2 entries"):
        rows_of(jnp.zeros(2), 3, "layer")
    assert rows_of(jnp.array([2.0, 0.0]), 4, "layer").tolist() == [2, 2, 0, 0]

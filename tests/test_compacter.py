"""Compacter: Kronecker products by NumPy, one A for all layers, starting point, counts, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import base, batch, encoder, noised

import jpeft
from jpeft.additive.bottlenecks.compacter import with_kernels
from jpeft.models import BertConfig, BertModel, abstract_params

KEY = jax.random.key(0)


def kernel(rule, leaves):
    """Σ A_i ⊗ (S_i T_i)."""
    return sum(np.kron(a, s @ t) for a, s, t in zip(rule, leaves["left"], leaves["right"], strict=True))


@pytest.mark.parametrize(("division", "rank"), [(4, 1), (2, 3)])
def test_equation(division, rank):
    """h + W_up gelu(W_down h + b_down) + b_up, both kernels of the shared A."""
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="down")(x)

    model, x = Net(), jax.random.normal(KEY, (5, 6))
    params = model.init(KEY, x)["params"]
    peft = jpeft.apply(params, method="compacter", size=4, division=division, rank=rank)
    peft = peft.replace(adapter=noised(peft.adapter, 0.5))
    rule, leaves = np.asarray(peft.adapter["+"]["rule"]), jax.tree.map(np.asarray, peft.adapter["down"]["+"])
    assert kernel(rule, leaves["down"]).shape == (8, 4)
    h = np.asarray(model.apply({"params": params}, x))
    inner = np.asarray(jax.nn.gelu(h @ kernel(rule, leaves["down"]) + leaves["down"]["bias"], approximate=True))
    want = h + inner @ kernel(rule, leaves["up"]) + leaves["up"]["bias"]
    np.testing.assert_allclose(jpeft.wrap(model.apply, peft.method)(peft.variables, x), want, atol=1e-5)


def unstacked(tree):
    """Parameters, or an adapter, of scanned layers as those of layers one by one."""
    layers = tree["bert"]["encoder"]["layer"]
    split = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(2)}
    return tree | {"bert": tree["bert"] | {"encoder": {"layer": split}}}


def test_one_rule_for_all_layers_and_under_scan():
    """Plain and scanned layers with the same leaves agree, and so do their gradients: that of A is the sum over all layers."""
    results, peft = [], jpeft.apply(base("bert-scan"), method="compacter", size=4, head=None)
    peft = peft.replace(adapter=noised(peft.adapter, 0.3))
    for model, now in ((encoder(scan=True), peft), (encoder(), jpeft.Peft(unstacked(peft.params), unstacked(peft.adapter), peft.method))):
        forward = jpeft.wrap(model.apply, peft.method)
        loss = lambda a, now=now, forward=forward: jnp.sin(forward(now.replace(adapter=a).variables, batch()["x"])).sum()
        value, grads = jax.jit(jax.value_and_grad(loss))(now.adapter)
        results.append((float(value), np.asarray(grads["+"]["rule"])))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    assert np.abs(results[0][1]).max() > 1e-2
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-4)


def test_starting_point():
    """A is N(0, 1e-4²), S and T Glorot-uniform with gain √2, biases zero."""
    params = {"mlp": {"down": {"kernel": jnp.zeros((4, 1024))}}}
    adapter = jpeft.apply(params, method="compacter").adapter
    assert np.std(adapter["+"]["rule"]) == pytest.approx(1e-4, rel=0.3)
    leaves = adapter["mlp"]["down"]["+"]
    assert leaves["down"]["left"].shape == (4, 256, 1)
    assert leaves["up"]["left"].shape == (4, 8, 1)
    for side, at, width in (("down", "left", 256 + 1), ("up", "right", 256 + 1), ("up", "left", 8 + 1)):
        bound = 2**0.5 * (6 / width) ** 0.5
        assert 0.8 * bound < np.abs(leaves[side][at]).max() <= bound
    assert not np.any(leaves["down"]["bias"])
    assert np.abs(with_kernels(adapter)["mlp"]["down"]["+"]["down"]["kernel"]).max() < 1e-3


def test_each_kernel_has_leaves_of_its_own():
    leaves = jpeft.flatten(jpeft.apply(base("bert-scan"), method="compacter", size=4, head=None).adapter)
    drawn = [np.asarray(leaf).ravel()[:3] for path, leaf in leaves.items() if path.endswith(("left", "right"))]
    assert len(drawn) == 8
    assert len({tuple(part) for part in drawn}) == 8


def counted(params, **options) -> int:
    return jpeft.summary(jax.eval_shape(lambda p: jpeft.apply(p, method="compacter", **options), params)).trained


def test_count_of_one_adapter():
    """d = 768, m = 24, n = 4: 2 (d + m) + m + d."""
    params = {"mlp": {"down": {"kernel": jnp.zeros((8, 768))}}}
    assert counted(params) - 4**3 == 2_376


def test_counts_on_t5_base():
    """The paper's 0.047 % and 0.073 %. There is no T5 here: these are the names and shapes of its blocks, as the method sees them."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    norm = {"layer_norm": {"scale": shape(768)}}
    attention = {name: {"kernel": shape(768, 768)} for name in "qkvo"}
    feed = norm | {"DenseReluDense": {"wi": {"kernel": shape(768, 3072)}, "wo": {"kernel": shape(3072, 768)}}}
    own, cross = norm | {"SelfAttention": attention}, norm | {"EncDecAttention": attention}
    stack = lambda *parts: {
        "block": {str(i): {"layer": {str(j): part for j, part in enumerate(parts)}} for i in range(12)},
        "final_layer_norm": {"scale": shape(768)},
    }
    params = {"shared": {"embedding": shape(32128, 768)}, "encoder": stack(own, feed), "decoder": stack(own, cross, feed)}
    assert counted(params, train_norms=False) == 48 * 2_376 + 64
    assert counted(params) == 161_728
    assert counted(params, plus_plus=True) == 104_704


def test_count_on_bert_base():
    """24 adapters, or 12 without those behind attention; 25 LayerNorms; 64 numbers in A."""
    for scan in (False, True):
        params = abstract_params(BertModel(BertConfig.bert_base_cased(scan=scan)))
        assert counted(params) == 24 * 2_376 + 25 * 2 * 768 + 64
        assert counted(params, plus_plus=True) == 12 * 2_376 + 25 * 2 * 768 + 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "compacter: size=0 must be a whole number of at least 1"),
        ({"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ({"activation": "swish"}, "activation='swish' must be one of 'gelu', 'gelu_new', 'relu', 'silu', 'tanh'"),
        ({"size": 6}, "division=4 must divide the width 8 of 'down/kernel' and the bottleneck's 6"),
        ({"division": 3}, "division=3 must divide the width 8"),
        ({"plus_plus": True, "target": ["down"]}, "plus_plus=True chooses the feed-forward layers"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.apply({"down": {"kernel": jnp.zeros((4, 8))}}, method="compacter", **options)

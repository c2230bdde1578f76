"""BOFT against its equation and HF PEFT; counts, cost and errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hf_layers import assert_equals_hf, hf_layer
from tables import added_flops, noised

import jpeft


def rotation(r, permutations):
    """The equation: ``B_m ... B_1``."""
    ins, whole = r.shape[1] * r.shape[2], np.eye(r.shape[1] * r.shape[2])
    for factor, p in zip(r, permutations, strict=True):
        b = np.zeros((ins, ins))
        for i, block in enumerate(factor):
            q = (block - block.T) / 2
            at = slice(i * len(q), (i + 1) * len(q))
            b[at, at] = (np.eye(len(q)) - q) @ np.linalg.inv(np.eye(len(q)) + q)
        whole = p @ b @ p.T @ whole
    return whole


@pytest.mark.filterwarnings(
    "ignore:Failed to load the CUDA extension:UserWarning", "ignore:Setting boft_n_butterfly_factor to 1:UserWarning"
)
def test_equals_its_equation_and_hf_peft():
    hf = pytest.importorskip("peft")
    found = hf_layer(hf.BOFTConfig(boft_block_size=6, target_modules=["1"]))
    r, s = found.tensors["boft_R"], found.tensors["boft_s"]
    np.testing.assert_allclose(found.x @ rotation(r, [np.eye(24)]) @ found.kernel * s.T + found.bias, found.y, atol=1e-5)
    leaves = lambda tensors: {"r": tensors["boft_R"], "s": tensors["boft_s"][:, 0]}
    assert_equals_hf(jpeft.boft(block_size=6), found, leaves)
    assert_equals_hf(jpeft.boft(block_num=4), found, leaves)


@pytest.mark.parametrize(("size", "factors"), [(4, 2), (2, 4), (6, 3)])
def test_several_factors_are_their_equation(size, factors):
    """With the permutations of HF PEFT, whose own product needs CUDA."""
    layer = pytest.importorskip("peft.tuners.boft.layer").BOFTLayer
    model, ins = nn.Dense(5), 24 if size == 6 else 16
    count = ins // size
    params = noised(model.init(jax.random.key(0), jnp.ones((1, ins)))["params"])
    peft = jpeft.apply(params, "boft", block_size=size, n_butterfly_factor=factors, head=None)
    peft = peft.replace(adapter=noised(peft.adapter, 0.5))
    permutations = [
        layer.perm2mat(None, layer.block_butterfly_perm(None, ins, count // 2**i, size // 2, factors - 1)).numpy() for i in range(factors)
    ]
    leaves, x = jax.tree.map(np.array, peft.adapter["kernel"]), jax.random.normal(jax.random.key(1), (3, ins))
    turned = np.array(x) @ rotation(leaves["r"], permutations)
    want = turned @ np.array(params["kernel"]) * leaves["s"] + np.array(params["bias"])
    np.testing.assert_allclose(jpeft.wrap(model.apply)(peft, x), want, atol=2e-5)
    np.testing.assert_allclose(model.apply({"params": jpeft.merge(peft)}, x), want, atol=2e-5)


def test_counts_and_errors():
    params = {"query": {"kernel": jax.ShapeDtypeStruct((768, 12, 64), jnp.float32)}}
    count = lambda **options: jpeft.summary(jax.eval_shape(lambda p: jpeft.apply(p, "boft", **options), params)).trained
    assert count() == 4 * 768 + 768
    assert count(block_size=8, n_butterfly_factor=3) == 3 * 8 * 768 + 768
    for options, message in [
        ({"block_size": 5}, "boft: block_size=5 does not divide the 768 inputs of 'query/kernel'"),
        ({"block_num": 7}, "boft: block_num=7 does not divide the 768 inputs"),
        ({"block_size": 3, "n_butterfly_factor": 2}, "n_butterfly_factor=2 asks for blocks of an even size.* into 256 blocks of 3"),
        (
            {"block_size": 4, "n_butterfly_factor": 8},
            "2^7 divides; block_size=4 cuts the 768 inputs of 'query/kernel' into 192 blocks of 4",
        ),
        ({"n_butterfly_factor": 1000}, "n_butterfly_factor=1000"),
        ({"block_num": 768}, "boft: block_num=768 cuts the 768 inputs of 'query/kernel' into blocks of 1, which cannot turn"),
    ]:
        with pytest.raises(ValueError, match=message.replace("^", r"\^")):
            count(**options)


def test_the_scale_leaves_biases_alone():
    """Also one that another method in between changes."""
    model, x = nn.Dense(6), jax.random.normal(jax.random.key(1), (3, 8))
    params = noised(model.init(jax.random.key(0), x)["params"])
    parts = {"bias": jpeft.bitfit(head=None), "ia3": jpeft.ia3(target="kernel", feedforward=None, head=None)}
    peft = jpeft.apply(params, jpeft.chain(**parts, boft=jpeft.boft(head=None)))
    peft = peft.replace(adapter=noised(peft.adapter, 0.5))
    chex.assert_trees_all_close(jpeft.wrap(model.apply)(peft, x), model.apply({"params": jpeft.merge(peft)}, x), atol=1e-5)


def test_a_step_rotates_inputs():
    rows, width = 1024, 128
    two = added_flops("boft", block_size=8, n_butterfly_factor=2)
    assert two < 1.6 * 2 * 3 * 2 * 8 * rows * width

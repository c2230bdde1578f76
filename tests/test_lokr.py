"""LoKr against its equation and HF PEFT; counts, cost and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_layers import assert_equals_hf, hf_layer
from tables import added_flops

import jpeft
from jpeft.reparameterized.lokr import factorization


def named(tensors):
    return {name.removeprefix("lokr_"): leaf for name, leaf in tensors.items()}


@pytest.mark.parametrize(
    ("options", "leaves"),
    [
        ({"rank": 2}, {"w1", "w2_a", "w2_b"}),
        ({"rank": 1, "decompose_both": True, "decompose_factor": 4}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
        ({"rank": 8, "decompose_both": True}, {"w1", "w2"}),
    ],
)
def test_equals_its_equation_and_hf_peft(options, leaves):
    hf = pytest.importorskip("peft")
    given = {"r" if name == "rank" else name: value for name, value in options.items()}
    found = hf_layer(hf.LoKrConfig(**given, alpha=3, target_modules=["1"]))
    t = named(found.tensors)
    assert set(t) == leaves
    w1, w2 = (t[w] if w in t else t[f"{w}_a"] @ t[f"{w}_b"] for w in ("w1", "w2"))
    delta = 3 / options["rank"] * np.kron(w1, w2)
    np.testing.assert_allclose(found.x @ (found.kernel + delta.T) + found.bias, found.y, atol=1e-5)
    assert_equals_hf(jpeft.lokr(**options, alpha=3), found, named)


@pytest.mark.parametrize(("rank", "effective"), [(1, False), (1, True), (8, False)])
def test_convolutions_equal_hf_peft(rank, effective):
    hf = pytest.importorskip("peft")
    config = hf.LoKrConfig(r=rank, alpha=3, target_modules=["1"], use_effective_conv2d=effective)
    found = hf_layer(config, ins=4, outs=6, window=(3, 3))

    def leaves(tensors):
        out = named(tensors)
        if rank == 8:
            out["w2_conv"] = out.pop("w2").reshape(3, 2, 9)
        elif effective:
            out |= {"w2_a": out["w2_a"].T, "t2": out["t2"].reshape(1, 1, 9)}
        else:
            out["w2_b_conv"] = out.pop("w2_b").reshape(1, 2, 9)
        return out

    assert_equals_hf(jpeft.lokr(rank=rank, alpha=3, effective_conv=effective), found, leaves)


def test_factorization_equals_hf_peft():
    layer = pytest.importorskip("peft.tuners.lokr.layer")
    for size in (1, 7, 16, 24, 36, 96, 127, 128, 768, 3072):
        for factor in (-1, 1, 2, 3, 5, 8, 16, 64, 1000):
            assert factorization(size, factor) == layer.factorization(size, factor), (size, factor)


def test_counts():
    """BERT-base's query: (24, 32) in both directions, of which the larger is of rank 8; heads make no difference."""
    params = {"query": {"kernel": jax.ShapeDtypeStruct((768, 12, 64), jnp.float32)}}
    peft = jax.eval_shape(lambda p: jpeft.apply(p, method="lokr"), params)
    assert jpeft.summary(peft).trained == 24 * 24 + 8 * (32 + 32)


def test_a_step_costs_two_small_products():
    """128 = 8 x 16: 2 (8 + 16) FLOPs an input for each of the three products through the branch, and the kernel's sums."""
    rows, width = 1024, 128
    assert added_flops("lokr", rank=64) < 1.2 * 3 * 2 * rows * width * (8 + 16)


def test_bad_options():
    with pytest.raises(ValueError, match="lokr: decompose_factor=0 must be -1, for the square root, or at least 1"):
        jpeft.lokr(decompose_factor=0)

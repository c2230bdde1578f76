"""MiSS against its equation and HF PEFT; counts, cost and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_layers import assert_equals_hf, hf_layer
from tables import added_flops

import jpeft


@pytest.mark.parametrize(
    ("options", "of_hf", "leaf"),
    [
        ({"rank": 4}, {"r": 4}, "d"),
        ({"rank": 7}, {"r": 7}, "d"),  # 24 = 3 * 7 + 3
        ({"rank": 8, "variant": "bat"}, {"r": 8, "init_weights": "bat"}, "d_bat"),
        ({"rank": 5, "variant": "mini", "mini_rank": 4}, {"r": 5, "init_weights": "mini", "mini_r": 4}, "d_mini"),
    ],
)
def test_equals_its_equation_and_hf_peft(options, of_hf, leaf):
    hf = pytest.importorskip("peft")
    found = hf_layer(hf.MissConfig(**of_hf, target_modules=["1"]))
    d, kernel = found.tensors["miss_block"], found.kernel.copy()
    for i in range(24):
        for o in range(16):
            if leaf == "d_bat":
                column = found.kernel[i - i % 8 : i - i % 8 + 8, o]
                kernel[i, o] += column @ d[o // 8][:, i % 8] + d[o // 8, o % 8, i % 8]
            else:
                kernel[i, o] += d[i % len(d), o % d.shape[1]]
    np.testing.assert_allclose(found.x @ kernel + found.bias, found.y, atol=1e-5)
    assert_equals_hf(jpeft.miss(**options), found, lambda tensors: {leaf: tensors["miss_block"]})


def test_counts_and_errors():
    params = {"query": {"kernel": jax.ShapeDtypeStruct((768, 12, 64), jnp.float32)}}
    count = lambda **options: jpeft.summary(jax.eval_shape(lambda p: jpeft.apply(p, "miss", **options), params)).trained
    assert [count(), count(variant="bat"), count(variant="mini", mini_rank=32)] == [64 * 768, 64 * 768, 64 * 32]
    for options, message in [
        ({"rank": 1000}, "miss: rank=1000 is more than the 768 inputs of 'query/kernel'"),
        ({"rank": 100, "variant": "bat"}, "miss: variant='bat' cuts kernels into blocks of 100 x 100, which 'query/kernel', 768 x 768"),
        ({"variant": "mini", "mini_rank": 5}, "miss: mini_rank=5 does not divide the 768 outputs of 'query/kernel'"),
    ]:
        with pytest.raises(ValueError, match=message):
            count(**options)


def test_a_step_sums_its_inputs():
    """One addition a number of x, and one product through the rank, for the gradient of D alone: half of LoRA's."""
    rows, width, rank = 1024, 128, 16
    assert added_flops("miss", rank=rank) < 1.2 * rows * (2 * rank * width + width) + 4 * width * width

"""HRA against its equation and HF PEFT; counts, cost and errors."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_layers import assert_equals_hf, hf_layer
from tables import added_flops

import jpeft


@pytest.mark.parametrize(("rank", "apply_gs"), [(4, False), (3, False), (4, True)])
@pytest.mark.filterwarnings("ignore:.*The symmetric initialization can NOT:UserWarning", "ignore:hra. .*never the identity:UserWarning")
def test_equals_its_equation_and_hf_peft(rank, apply_gs):
    hf = pytest.importorskip("peft")
    found = hf_layer(hf.HRAConfig(r=rank, apply_GS=apply_gs, target_modules=["1"]))
    u, x = found.tensors["hra_u"], found.x
    if apply_gs:
        u = np.linalg.qr(u)[0]
    for i in reversed(range(rank)):
        x = x - 2 * np.outer(x @ u[:, i], u[:, i]) / (u[:, i] @ u[:, i])
    np.testing.assert_allclose(x @ found.kernel + found.bias, found.y, atol=2e-5)
    assert_equals_hf(jpeft.hra(rank=rank, apply_gs=apply_gs), found, lambda tensors: {"u": tensors["hra_u"]}, atol=2e-5)


def test_counts_and_the_beginning():
    """r numbers an input; only an even number of reflections begins as the base, and an odd one says so."""
    params = {"query": {"kernel": jax.ShapeDtypeStruct((768, 12, 64), jnp.float32)}}
    count = lambda **options: jpeft.summary(jax.eval_shape(lambda p: jpeft.apply(p, "hra", **options), params)).trained
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count() == 8 * 768
    with pytest.warns(UserWarning, match="hra: rank=3 makes an odd number of reflections, which is never the identity"):
        assert count(rank=3) == 3 * 768
    with pytest.warns(UserWarning, match="hra: apply_gs=True makes a reflection"):
        count(apply_gs=True)
    assert [jpeft.hra(rank=r).begins_within for r in (2, 3, {"query": 2, ".*": 5})] == [0.0, None, None]
    with pytest.raises(ValueError, match="hra: rank=1000 is more than the 768 inputs of 'query/kernel'"):
        count(rank=1000)


def test_a_step_reflects_inputs():
    """4 r FLOPs a number of x for each of three passes, whatever the width of the outputs."""
    rows, width, rank = 1024, 128, 4
    assert added_flops("hra", rank=rank) < 1.4 * 3 * 4 * rank * rows * width

"""LoHa against its equation and HF PEFT; counts, cost and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_layers import assert_equals_hf, hf_layer
from tables import added_flops

import jpeft


def transposed(tensors):
    return {name.removeprefix("hada_"): leaf.T for name, leaf in tensors.items()}


@pytest.mark.parametrize("rank", [2, 8])  # as a product of rank 4, and as a dense one
def test_equals_its_equation_and_hf_peft(rank):
    hf = pytest.importorskip("peft")
    found = hf_layer(hf.LoHaConfig(r=rank, alpha=3, target_modules=["1"]))
    t = found.tensors
    delta = 3 / rank * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    np.testing.assert_allclose(found.x @ (found.kernel + delta.T) + found.bias, found.y, atol=1e-5)
    assert_equals_hf(jpeft.loha(rank=rank, alpha=3), found, transposed)


@pytest.mark.parametrize("effective", [False, True])
def test_convolutions_equal_hf_peft(effective):
    hf = pytest.importorskip("peft")
    found = hf_layer(hf.LoHaConfig(r=3, alpha=3, target_modules=["1"], use_effective_conv2d=effective), ins=4, outs=6, window=(3, 3))

    def leaves(tensors):
        out = {}
        for i in (1, 2):
            a, b = tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"]
            if effective:
                out |= {f"t{i}": tensors[f"hada_t{i}"].reshape(3, 3, 9), f"w{i}_a": a, f"c{i}": b.T}
            else:
                out |= {f"w{i}_a": a.T, f"w{i}_b": b.reshape(3, 4, 3, 3).transpose(2, 3, 1, 0)}
        return out

    # Of a core HF PEFT's own backward pass gives the gradient of the other factor.
    assert_equals_hf(jpeft.loha(rank=3, alpha=3, effective_conv=effective), found, leaves, grads=not effective)


def test_counts_and_rules():
    """2 r (in + out) a kernel, whatever heads it has."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    params = {"query": {"kernel": shape(64, 4, 8)}, "down": {"kernel": shape(128, 64)}}
    method = jpeft.loha(rank={"query": 4, ".*": 2})
    peft = jax.eval_shape(lambda p: jpeft.apply(p, method=method), params)
    assert jpeft.summary(peft).trained == 2 * 4 * (64 + 32) + 2 * 2 * (128 + 64)


def test_a_step_forms_no_gradient_of_the_kernel():
    """Rank 2 costs a step what LoRA of rank 4 costs, and four small products for the kernel."""
    assert added_flops("loha", rank=2) < added_flops("lora", rank=4) * 1.1


def test_bad_options():
    with pytest.raises(ValueError, match="loha: rank=0 must be"):
        jpeft.loha(rank=0)
    with pytest.raises(ValueError, match="'lora_alpha' is called 'alpha'"):
        jpeft.make("loha", lora_alpha=3)

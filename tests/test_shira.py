"""SHiRA against its equation and HF PEFT; counts, the places of entries, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_layers import assert_equals_hf, hf_layer

import jpeft
from jpeft.selective.indices import decode


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_equals_its_equation_and_hf_peft():
    """HF's entries, sorted by their places in the kernel."""
    hf = pytest.importorskip("peft")
    found = hf_layer(hf.ShiraConfig(r=2, random_seed=3, target_modules=["1"]))
    outputs, inputs = found.tensors["shira_indices"]
    kernel = found.kernel.copy()
    kernel[inputs, outputs] += found.tensors["shira_weight"]
    np.testing.assert_allclose(found.x @ kernel + found.bias, found.y, atol=1e-5)
    flat = inputs * 16 + outputs
    order = np.argsort(flat)

    def leaves(tensors):
        # Gradients have no indices, and those of the indices are zero.
        indices = {"indices": flat[order][None].astype(np.float32) * ("shira_indices" in tensors)}
        return {"values": tensors["shira_weight"][order]} | indices

    assert_equals_hf(jpeft.shira(rank=2), found, leaves)


def test_counts():
    """r (in + out) entries of each layer; the head whole."""
    shape = lambda *sizes: {"kernel": jax.ShapeDtypeStruct(sizes, jnp.float32)}
    params = {"query": shape(768, 12, 64), "classifier": shape(768, 2)}
    s = jpeft.summary(jax.eval_shape(lambda p: jpeft.apply(p, "shira"), params))
    assert (s.trained, s.changed) == (32 * 1536 + 1536, 32 * 1536 + 1536)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((8, 6), ((), (0,), (1,))), ((3, 8, 6), ((0,), (1,), (2,))), ((8, 3, 2, 3), ((1,), (0,), (2, 3))), ((2, 4, 6), ((), (0, 1), (2,)))],
)
def test_each_matrix_has_its_own_entries(shape, axes):
    """As many in each layer of a stack, each once, drawn by the seed alone."""
    axes = jpeft.KernelAxes(*axes)
    make = lambda seed, key: jpeft.apply({"w": jnp.zeros(shape)}, "shira", rank=2, seed=seed, target="w", axes=(("w", axes),), key=key)
    leaves = make(0, jax.random.key(1)).adapter["w"]
    index = np.asarray(decode(leaves["indices"]))
    assert (np.diff(index) > 0).all()
    mask = np.zeros(shape, int)
    mask.reshape(-1)[index] = 1
    assert (mask.sum(axis=axes.inputs + axes.outputs) == 2 * (8 + 6)).all()
    chex.assert_trees_all_equal(make(0, jax.random.key(2)).adapter["w"], leaves)
    assert (make(1, None).adapter["w"]["indices"] != leaves["indices"]).any()


def test_entries_of_a_large_kernel():
    index = np.asarray(decode(jpeft.apply({"w": jnp.zeros((1024, 1024))}, "shira", target="w", rank=100).adapter["w"]["indices"]))
    assert (np.diff(index) > 0).all()
    assert (index.size, index[0] >= 0, index[-1] < 2**20) == (204_800, True, True)
    # In each eighth as many as in any other, up to chance: 25,600 with a deviation of 135.
    assert np.abs(np.bincount(index // 2**17) - 25_600).max() < 700


def test_order_in_a_chain():
    """Entries of the kernel itself come before what computes with the kernel; beside what adds to it they may stand anywhere."""
    params, parts = {"w": jnp.ones((8, 6))}, {"shira": jpeft.shira(rank=1, target="w"), "dora": jpeft.dora(rank=1, target="w")}
    parts |= {"lora": jpeft.lora(rank=1, target="w"), "bat": jpeft.miss(rank=2, variant="bat", target="w")}
    for before in ("dora", "bat"):
        chain = jpeft.chain(**{name: parts[name] for name in (before, "shira")})
        with pytest.raises(ValueError, match=f"chain: 'shira' changes 'w' itself.* List 'shira' before '{before}'"):
            jpeft.apply(params, chain)
        jpeft.apply(params, jpeft.chain(**{name: parts[name] for name in ("shira", before)}))
    jpeft.apply(params, jpeft.chain(lora=parts["lora"], shira=parts["shira"]))


def test_errors(tmp_path):
    params = {"w": jnp.zeros((8, 6))}
    with pytest.raises(ValueError, match="shira: rank=32 asks for 448 entries of 'w', 8 x 6, which has 48"):
        jpeft.apply(params, "shira", target="w")
    with pytest.raises(ValueError, match="'query'"):
        jpeft.apply(params, "shira", target="w", rank={"query": 2, ".*": 1})
    peft = jpeft.apply(params, "shira", target="w", rank=1)
    leaves = peft.adapter["w"]
    beyond = peft.replace(adapter={"w": {**leaves, "indices": leaves["indices"] + 20}})
    with pytest.raises(ValueError, match="The adapter changes entry .* of 'w', which has 48"):
        jpeft.save(tmp_path / "out", beyond)
        jpeft.load(tmp_path / "out", params)

"""An adapter saved on numbered blocks loads onto stacked ones, and back, for every method, to the bit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import LAYERS, MERGES, METHODS, NEED_STATS, base, noised

import jpeft
from jpeft.checkpoint.adapter import WrongBaseError
from jpeft.checkpoint.forms import Blocks, convert, other_form
from jpeft.stats import Movement

# Methods that meet a decoder too: what stands in its blocks has other names and shapes.
IN_DECODERS = ("freeze", "far-learners", "fish_mask", "prefix_tuning", "chain-mergeable")
NOT_HERE = ("lora-eva",)  # the leaves of lora, which begin by the kernels' inputs
CELLS = [(name, "bert") for name in METHODS if name not in NOT_HERE] + [(name, "llama") for name in IN_DECODERS]


def stacked(params):
    """The parameters with their blocks stacked."""
    _, leaves, _ = other_form(params)
    return jpeft.unflatten({path: leaf() for path, leaf in leaves.items()})


@functools.cache
def stacked_base(model):
    return stacked(base(model))


def converted(peft, params):
    """The adapter on the base in its other form, as loading converts it."""
    shapes, _, blocks = other_form(params)
    return peft.replace(params=params, adapter=convert(peft.adapter, peft.method, shapes, params, blocks))


def scores(params):
    """A score for each parameter, all different, for methods that choose entries."""
    return Movement(noised(jax.tree.map(jnp.zeros_like, params)))


@pytest.mark.parametrize(("name", "model"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_an_adapter_has_either_form(name, model):
    params, method = base(model), METHODS[name]
    stats = scores(params) if name in NEED_STATS else None
    if name in ("fish_mask", "chain-sparse"):
        stats = jpeft.stats.Fisher(stats.values)
    peft = jpeft.apply(params, method=method, stats=stats)
    # Integers that are stored as floats must stay what they are.
    labels = jpeft.flatten(method.labels(peft.adapter))
    noisy = jpeft.flatten(noised(peft.adapter)) | {
        path: leaf for path, leaf in jpeft.flatten(peft.adapter).items() if labels[path] == "freeze"
    }
    peft = peft.replace(adapter=jpeft.unflatten(noisy))
    there = converted(peft, stacked_base(model))
    back = converted(there, params)
    chex.assert_trees_all_equal(back.adapter, peft.adapter)
    chex.assert_trees_all_equal_shapes_and_dtypes(back.adapter, peft.adapter)
    if name not in MERGES:
        chex.assert_trees_all_equal(jpeft.merge(there), stacked(jpeft.merge(peft)))


@pytest.mark.parametrize("name", ["lora", "freeze", "chain"])
def test_a_file_of_one_form_is_read_in_the_other(name, tmp_path):
    peft = jpeft.apply(base("bert"), method=METHODS[name])
    jpeft.save(tmp_path / "numbered", peft)
    jpeft.save(tmp_path / "stacked", jpeft.load(tmp_path / "numbered", stacked_base("bert")))
    chex.assert_trees_all_equal(jpeft.load(tmp_path / "stacked", peft.params).adapter, peft.adapter)


def test_blocks_are_found_in_either_form():
    leaves = jpeft.flatten(base("bert"))
    assert Blocks.of(leaves).counts == {"bert/encoder/layer": LAYERS}
    assert Blocks.of(jpeft.flatten(stacked(base("bert")))).stacked
    # Blocks that are not alike have one form only.
    other = {**leaves, "bert/encoder/layer/0/extra/kernel": jnp.zeros((2, 2))}
    assert not Blocks.of(other).counts


def test_what_stacked_blocks_cannot_hold_is_refused(tmp_path):
    params = base("bert")
    for name, method in {
        "one": jpeft.lora(rank=2, target=r".*layer/0/.*query/kernel"),
        "ranks": jpeft.lora(rank={r".*layer/0/.*": 2, ".*": 3}, target=r".*query/kernel"),
    }.items():
        jpeft.save(tmp_path / name, jpeft.apply(params, method=method))
        with pytest.raises(WrongBaseError, match="scan=False"):
            jpeft.load(tmp_path / name, stacked(params))


def test_another_base_is_refused_in_either_form(tmp_path):
    jpeft.save(tmp_path / "out", jpeft.apply(base("bert"), method="lora", rank=2))
    with pytest.raises(WrongBaseError, match="another base"):
        jpeft.load(tmp_path / "out", noised(stacked(base("bert"))))
    assert jpeft.load(tmp_path / "out", noised(stacked(base("bert"))), check_base=False)


def test_the_same_numbers_in_half_precision_are_the_same_base(tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base("bert"))
    whole = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    jpeft.save(tmp_path / "out", jpeft.apply(whole, method="lora", rank=2))
    assert jpeft.load(tmp_path / "out", half).params is half
    assert jpeft.load(tmp_path / "out", stacked(half))
    with pytest.raises(WrongBaseError, match="another base"):
        jpeft.load(tmp_path / "out", base("bert"))


def test_a_stack_of_more_than_ten_blocks_keeps_its_order(tmp_path):
    block = lambda i: {"up": {"kernel": jnp.full((4, 6), float(i)), "bias": jnp.full(6, float(i))}}
    params = {"layer": {str(i): block(i) for i in range(12)}}
    peft = jpeft.apply(params, method="bitfit", head=None)
    jpeft.save(tmp_path / "out", peft)
    there = jpeft.load(tmp_path / "out", stacked(params))
    np.testing.assert_array_equal(there.adapter["layer"]["up"]["bias"][:, 0], np.arange(12))

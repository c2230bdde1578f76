"""Learning rates by path: which leaves a rule of `jpeft.optimizer(lr_scale=...)` chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import base, case

import jpeft
from jpeft.core.lr_scale import scale_leaves


def factors(peft: jpeft.Peft, lr_scale, over="adapter") -> dict[str, float]:
    """How much faster each leaf moves."""
    tree = peft.adapter if over == "adapter" else peft.variables
    tx = jpeft.optimizer(optax.sgd(1.0), peft, over=over, lr_scale=lr_scale)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
    return {path: -float(np.mean(update)) for path, update in jpeft.flatten(updates).items()}


@pytest.mark.parametrize("rule", ["@head", "classifier", "classifier/.*", ("classifier",)])
def test_a_head_is_chosen_by_role_regex_or_name(rule):
    found = factors(case("lora", "bert").peft, {rule: 5.0})
    assert found == {path: 5.0 if path.startswith("classifier/") else 1.0 for path in found}


def test_what_stands_beside_a_leaf_is_chosen_by_its_own_name_or_by_the_leafs():
    found = factors(case("lora", "bert").peft, {".*/b": 16.0, "query": 2.0, "@ffn_in": 3.0})
    assert {factor for path, factor in found.items() if path.endswith("/b")} == {16.0}  # LoRA+; the first rule counts
    assert {factor for path, factor in found.items() if path.endswith("query/kernel/a")} == {2.0}
    assert {factor for path, factor in found.items() if path.endswith("intermediate/dense/kernel/a")} == {3.0}
    assert {factor for path, factor in found.items() if path.endswith("value/kernel/a")} == {1.0}


@pytest.mark.parametrize("over", ["adapter", "variables"])
def test_rules_ignore_the_names_of_parts_and_collections(over):
    peft = jpeft.apply(base("bert"), method=jpeft.chain(low=jpeft.lora(rank=2), bias=jpeft.bitfit()))
    found = factors(peft, {"@head": 5.0, "low/.*": 2.0}, over)
    heads = {path: factor for path, factor in found.items() if "classifier/" in path and not path.startswith("params/")}
    assert heads
    assert set(heads.values()) == {5.0}
    assert all(factor == 2.0 for path, factor in found.items() if path.startswith("low/") and "classifier" not in path)
    assert all(factor == 0.0 for path, factor in found.items() if path.startswith("params/"))


@pytest.mark.parametrize(
    ("lr_scale", "message"),
    [({"pooler": 2.0}, "'pooler' chooses none"), ({"@head": 0}, "must be a positive number"), ({"@head": float("nan")}, "positive number")],
)
def test_bad_rules_are_refused(lr_scale, message):
    with pytest.raises(ValueError, match=message):
        factors(case("lora", "gpt2").peft, lr_scale)


def test_a_new_head_learns_faster():
    """`scale_leaves` multiplies the updates of the named leaves alone, in a plain adapter and within a chain's part."""
    for adapter in ({"classifier": {"bias": np.ones(2)}, "a": np.ones(2)}, {"part": {"classifier": {"bias": np.ones(2)}}, "a": np.ones(2)}):
        tx = scale_leaves(optax.sgd(0.1), adapter, {"classifier/bias"}, 5.0)
        updates, _ = tx.update(adapter, tx.init(adapter), adapter)
        flat = jpeft.flatten(updates)
        assert [round(float(flat[path][0]), 6) for path in sorted(flat)] == [-0.1, -0.5]

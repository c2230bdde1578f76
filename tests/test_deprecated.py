"""Old spellings of public names: each works as before and says its new name."""

import importlib
import sys

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from tables import base, base_logits, batch, case, noised

import jpeft
from jpeft.core.statistics import Fisher


def again(module: str):
    """Import a module as if for the first time."""
    sys.modules.pop(module, None)
    return importlib.import_module(module)


@pytest.mark.parametrize(("old", "new"), [("method", "core.method"), ("select", "tree.select"), ("stages", "core.stages")])
def test_old_modules(old, new):
    with pytest.warns(DeprecationWarning, match=rf"jpeft\.{old} is now called jpeft\.{new}"):
        module = again(f"jpeft.{old}")
    assert {"method": "Method", "select": "select", "stages": "plan"}[old] in dir(module)


def test_the_method_of_the_old_guide():
    """A factory of closures, as docs/adding_a_method.md had it, trains, saves its options and chains."""
    with pytest.warns(DeprecationWarning):
        old = again("jpeft.method")
    with pytest.warns(DeprecationWarning, match="factory"):

        @old.factory
        def scale(*, target=("key", "value"), head="auto"):
            def init_fn(key, params, *, stats=None):
                leaves = old.not_head(params, head)
                kernels = {path: leaf for path, leaf in leaves.items() if path.endswith("/kernel") and path.split("/")[-2] in target}
                return jpeft.unflatten({f"{path}/l": jnp.ones(leaf.shape[-1:]) for path, leaf in kernels.items()})

            def call_fn(layer, inputs, leaves, rng):
                return layer(*inputs) * leaves["kernel"]["l"][None, None]

            return old.Method(init=old.with_head(init_fn, head), call=call_fn)

    with pytest.warns(DeprecationWarning, match=r"jpeft\.Method\(init=\.\.\., \.\.\.\) is now called a subclass"):
        method = scale(target=["key"])
    assert method.config() == {"method": "scale", "target": ["key"], "head": "auto"}
    peft = jpeft.apply(base("plain"), method=method)
    cell = case("lora", "plain")
    forward = jpeft.wrap(cell.model.apply)
    chex.assert_trees_all_close(forward(peft, batch()["x"]), base_logits("plain"), atol=1e-5)
    assert jnp.abs(forward(peft.replace(adapter=noised(peft.adapter)), batch()["x"]) - base_logits("plain")).max() > 1e-3
    chained = jpeft.apply(base("plain"), method=jpeft.chain(scale=method, lora=jpeft.lora(rank=2)))
    chex.assert_trees_all_close(forward(chained, batch()["x"]), base_logits("plain"), atol=1e-5)


def test_a_method_made_of_functions():
    def init(key, params, *, stats=None):
        return {"dense": {"bias": params["dense"]["bias"] + 0}}

    with pytest.warns(DeprecationWarning):
        method = jpeft.Method(name="one_bias", init=init, merge=jpeft.tree.graft, needs="fisher")
    with pytest.warns(DeprecationWarning):
        same, other = jpeft.Method(name="one_bias", init=init, merge=jpeft.tree.graft, needs="fisher"), method.replace(name="two")
    assert method == same != other
    assert method.requires_stats == (Fisher,)
    params = nn.Dense(4, name="dense").init(jax.random.key(0), jnp.ones((1, 8)))
    peft = jpeft.apply({"dense": params["params"]}, method=method)
    assert jpeft.merge(peft)["dense"]["bias"].shape == (4,)
    with pytest.raises(ValueError, match="was made by hand and has no configuration"):
        method.config()


def test_old_fields():
    with pytest.warns(DeprecationWarning, match=r"Group\(rate=\.\.\.\) is now called lr_scale="):
        group = jpeft.Group(rate=0.5)
    assert group == jpeft.Group(lr_scale=0.5)
    with pytest.warns(DeprecationWarning, match=r"Group.constant is now called Group.fixed_lr"):
        assert group.constant is None
    with pytest.warns(DeprecationWarning, match=r"Stage\(needs=\.\.\.\)"):
        stage = jpeft.Stage("bias", 0.4, lambda *_, **__: None, needs="fisher")
    assert stage.requires_stats == (Fisher,)
    with pytest.warns(DeprecationWarning, match="MethodInfo.head_rate"):
        assert jpeft.methods()["bitfit"].head_rate == 20


def test_old_functions_of_trees():
    with pytest.warns(DeprecationWarning, match=r"jpeft\.tree\.fold is now called jpeft\.tree\.merge_leaves"):
        assert jpeft.tree.fold is jpeft.tree.merge_leaves
    with pytest.warns(DeprecationWarning, match=r"jpeft\.tree\.fold_in is now called jpeft\.tree\.key_for"):
        assert jpeft.tree.fold_in is jpeft.tree.key_for
    with pytest.raises(AttributeError):
        _ = jpeft.tree.grow

"""The protocol of stages and parameter groups, on methods of the test's own: nothing here knows a method by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import Group, Method, Stage
from jpeft.core.stages import plan
from jpeft.core.statistics import find
from jpeft.stats import Fisher, Movement

PARAMS = {"a": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}


class Last(Method):
    name = "last"
    why_no_merge = None

    def init(self, key, params, *, stats=None):
        return {"a": {"bias": jnp.array(params["a"]["bias"], copy=True), "kernel": jnp.array(params["a"]["kernel"], copy=True)}}


class Staged(Last):
    name = "staged"

    @property
    def stages(self):
        return (Stage("bias", 0.4, only_bias),)


class Choosy(Last):
    name = "choosy"

    @property
    def stages(self):
        return (Stage("bias", 0.4, only_bias, requires_stats=(Fisher,)),)


def only_bias(params, adapter, *, key, stats=None):
    found = find(stats, Fisher)
    noise = 0.0 if found is None else found.values * jax.random.normal(key, (2,))
    return last, {"a": {"bias": adapter["a"]["bias"] + noise}}


last, staged, choosy = Last(), Staged(), Choosy()


def test_advance_continues_from_the_trained_adapter():
    peft = jpeft.apply(PARAMS, method=staged)
    peft = peft.replace(adapter=jax.tree.map(lambda leaf: leaf + 1.0, peft.adapter))
    after = jpeft.advance(peft)
    assert after.method is last
    assert after.params is peft.params
    np.testing.assert_array_equal(after.adapter["a"]["bias"], [1.0, 1.0])
    with pytest.raises(ValueError, match="has no further stage"):
        jpeft.advance(after)


def test_advance_asks_for_statistics_and_is_a_function_of_its_key():
    peft = jpeft.apply(PARAMS, method=choosy)
    with pytest.raises(ValueError, match="stage 'bias' of choosy requires Fisher statistics of the current model"):
        jpeft.advance(peft)
    draws = [jpeft.advance(peft, key=jax.random.key(i), stats=Fisher(1.0)).adapter["a"]["bias"] for i in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).min() > 1e-3
    # A plain value serves as the kind that the stage requires. Another kind does not.
    np.testing.assert_array_equal(jpeft.advance(peft, key=jax.random.key(0), stats=1.0).adapter["a"]["bias"], draws[0])
    with pytest.raises(ValueError, match="requires Fisher"):
        jpeft.advance(peft, stats=Movement(1.0))


# --- the plan of a run ---------------------------------------------------------------------------------------------------------------


def stages(*shares, restarts=()):
    return tuple(Stage(f"s{i}", share, only_bias, restart_schedule=i in restarts) for i, share in enumerate(shares))


def test_a_method_without_stages_takes_all_steps():
    assert [tuple(s) for s in plan((), 7)] == [("", 0, 7, (0, 7))]
    # Nothing to train is no error: a frozen base is evaluated as it is.
    assert [tuple(s) for s in plan((), 0)] == [("", 0, 0, (0, 0))]


def test_shares_become_steps():
    segments = plan(stages(0.3, 0.25), 101, first="begin")
    assert [(s.name, s.begin, s.end) for s in segments] == [("begin", 0, 46), ("s0", 46, 76), ("s1", 76, 101)]
    assert {s.schedule_span for s in segments} == {(0, 101)}


def test_every_stage_gets_a_step():
    assert [(s.begin, s.end) for s in plan(stages(0.01, 0.5), 5)] == [(0, 2), (2, 3), (3, 5)]
    with pytest.raises(ValueError, match="2 steps are too few for 3 stages, .* s0 0.01, s1 0.5"):
        plan(stages(0.01, 0.5), 2)


def test_a_restart_divides_the_schedule_of_the_learning_rate():
    assert [s.schedule_span for s in plan(stages(0.2, 0.2, 0.2, restarts={1}), 100)] == [(0, 60), (0, 60), (60, 100), (60, 100)]


def test_the_old_names_still_work():
    with pytest.warns(DeprecationWarning, match="restart_schedule"):
        stage = Stage("s", 0.5, only_bias, restart=True)
    assert stage == Stage("s", 0.5, only_bias, restart_schedule=True)
    with pytest.warns(DeprecationWarning, match="lr_scale"):
        assert Group(rate=0.5) == Group(lr_scale=0.5)


# --- chains --------------------------------------------------------------------------------------------------------------------------


def test_a_chain_moves_its_staged_part_on():
    chain = jpeft.chain(staged=staged, lora=jpeft.lora(rank=1, target="nothing|a/other"))
    assert [(s.name, s.share) for s in chain.stages] == [("bias", 0.4)]
    adapter = {"staged": staged.init(None, PARAMS), "lora": {}}
    after = jpeft.advance(jpeft.Peft(PARAMS, adapter, chain))
    assert after.method == jpeft.chain(staged=last, lora=chain.parts[1][1])
    assert jpeft.flatten(after.adapter).keys() == {"staged/a/bias"}
    assert after.method.stages == ()


def test_only_one_part_of_a_chain_has_stages():
    with pytest.raises(ValueError, match="training of 'x' and of 'z' takes stages, and the steps of a run are divided among"):
        jpeft.chain(x=staged, y=jpeft.bitfit(), z=choosy)


# --- parameter groups ----------------------------------------------------------------------------------------------------------------


class Grouped(Last):
    name = "grouped"

    def labels(self, adapter):
        return {"a": {"bias": "slow", "kernel": "own"}}

    @property
    def groups(self):
        return (("slow", Group(lr_scale=0.25)), ("own", Group(fixed_lr=0.1, clip=1.0)))


grouped = Grouped()


def updates(tx, peft, grads):
    return tx.update(grads, tx.init(peft.adapter), peft.adapter)[0]


def test_a_group_is_optimised_as_the_method_says():
    """`slow` at a quarter of the common rate; `own` by Adam at 0.1, clipped by itself, neither decayed nor on the common schedule."""
    peft = jpeft.apply(PARAMS, method=grouped)
    grads = {"a": {"bias": jnp.array([1.0, -2.0]), "kernel": jnp.full((3, 2), 100.0)}}
    common = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(lambda count: 0.8 / (1 + count)))
    got = updates(jpeft.optimizer(common, peft), peft, grads)["a"]
    np.testing.assert_allclose(got["bias"], [-0.2, 0.4], rtol=1e-6)
    np.testing.assert_allclose(got["kernel"], -0.1 * np.ones((3, 2)), rtol=1e-5)


def test_the_user_may_say_otherwise():
    peft = jpeft.apply(PARAMS, method=grouped)
    grads = jax.tree.map(jnp.ones_like, peft.adapter)
    got = updates(jpeft.optimizer({"own": optax.sgd(3.0), "slow": optax.sgd(1.0)}, peft), peft, grads)["a"]
    assert float(got["kernel"][0, 0]) == -3.0
    assert float(got["bias"][0]) == -1.0
    with pytest.raises(ValueError, match=r"no optimizer for \['slow'\]"):
        jpeft.optimizer({"own": optax.sgd(3.0)}, peft)
    with pytest.raises(ValueError, match=r"no leaf is labelled \['other'\]"):
        jpeft.optimizer({"slow": optax.sgd(1.0), "other": optax.sgd(3.0)}, peft)


def test_groups_of_a_chain_keep_apart():
    chain = jpeft.chain(x=grouped, y=grouped)
    peft = jpeft.Peft(PARAMS, {"x": grouped.init(None, PARAMS), "y": grouped.init(None, PARAMS)}, chain)
    assert set(jax.tree.leaves(chain.labels(peft.adapter))) == {"x/slow", "x/own", "y/slow", "y/own"}
    got = updates(
        jpeft.optimizer({"x/own": optax.sgd(3.0), "train": optax.sgd(1.0)}, peft), peft, jax.tree.map(jnp.ones_like, peft.adapter)
    )
    assert [float(got[part]["a"][name].reshape(-1)[0]) for part in "xy" for name in ("bias", "kernel")] == pytest.approx(
        [-0.25, -3.0, -0.25, -0.1], rel=1e-5
    )

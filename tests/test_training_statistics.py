"""Statistics that the trainer makes for methods: one maker for each kind, functions of seed and data."""

import dataclasses

import jax
import numpy as np
import pytest
from test_train import bits
from tiny_text import make_base

import jpeft
from jpeft.core.statistics import Fisher, InputMoments, KeyValues, LabelTokens, Movement, Prompt
from jpeft.training.config import TrainConfig
from jpeft.training.prepare import prepare
from jpeft.training.run import load_run
from jpeft.training.statistics import MAKERS, check_statistics, movement_steps
from jpeft.training.train import train

# Methods that begin with their last stage, which takes how far each parameter moves; options for a model of 5000 parameters.
MOVED = {"far": ("stage=learners",), "diff_pruning": ("stage=mask", "sparsity=0.1")}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A short run."""
    folder = tmp_path_factory.mktemp("base")
    return TrainConfig(**make_base(folder, train=64, validation=8), output=str(folder / "run"), batch_size=8, steps=20)


@pytest.fixture(scope="module")
def setup(config):
    return prepare(config)


def statistic(setup, kind, **changes):
    """The statistics of one kind of the base with its adapter."""
    setup = dataclasses.replace(setup, config=dataclasses.replace(setup.config, **changes))
    forward = jpeft.wrap(setup.loaded.model.apply, setup.peft.method)
    (made,) = setup.statistics((kind,), setup.peft, forward)
    assert type(made) is kind
    return made


def test_every_kind_has_a_maker():
    assert MAKERS.keys() == {Fisher, Movement, InputMoments, KeyValues, LabelTokens}
    with pytest.raises(ValueError, match="far requires the statistics Prompt, which the trainer cannot make; it makes Fisher, Movement"):
        check_statistics((Prompt,), "far")


@pytest.mark.parametrize("kind", [Fisher, Movement])
def test_statistics_of_parameters_depend_on_seed_and_data_alone(setup, kind):
    first = statistic(setup, kind).values
    assert jax.tree.structure(first) == jax.tree.structure(setup.peft.params)
    assert all(leaf.dtype == np.float32 and (leaf >= 0).all() for leaf in jax.tree.leaves(first))
    assert sum(float(leaf.sum()) for leaf in jax.tree.leaves(first)) > 0
    assert bits(statistic(setup, kind).values) == bits(first)


def test_movement_is_that_of_full_fine_tuning(setup):
    # Adam moves a parameter by at most about its learning rate in a step.
    few, many = (statistic(setup, Movement, movement_steps=steps).values for steps in (1, 8))
    largest = [max(float(leaf.max()) for leaf in jax.tree.leaves(tree)) for tree in (few, many)]
    assert 1e-4 < largest[0] < 2.1e-4 < largest[1] < 1.7e-3
    assert bits(statistic(setup, Movement, seed=1).values) != bits(statistic(setup, Movement).values)


def test_the_steps_of_movement(config, setup):
    arrays = setup.splits["train"]
    assert movement_steps(config, arrays) == 2
    assert movement_steps(dataclasses.replace(config, steps=3), arrays) == 1
    assert movement_steps(dataclasses.replace(config, movement_steps=7), arrays) == 7


def test_label_tokens_are_those_of_the_tokenizer(setup):
    ids = statistic(setup, LabelTokens).ids
    tokenizer = setup.loaded.tokenizer
    assert [list(label) for label in ids] == [tokenizer(name, add_special_tokens=False)["input_ids"] for name in setup.labels]


@pytest.mark.parametrize("method", sorted(MOVED))
def test_training_may_begin_with_the_stage_that_takes_movement(config, tmp_path, method):
    config = dataclasses.replace(config, method=method, options=MOVED[method], output=str(tmp_path / "run"))
    result = train(config)
    assert result.peft.method.stages == ()
    assert 0 < result.trained < jpeft.tree.size(result.peft.params) / 2
    assert bits(load_run(result.path).peft.adapter) == bits(result.peft.adapter)
    # The same run again, and one whose choice is made by longer fine-tuning.
    again = train(dataclasses.replace(config, output=str(tmp_path / "again")))
    assert bits(again.peft.adapter) == bits(result.peft.adapter)
    longer = train(dataclasses.replace(config, output=str(tmp_path / "longer"), movement_steps=15))
    assert bits(longer.peft.adapter) != bits(result.peft.adapter)

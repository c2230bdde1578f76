"""The trainer drives the stages of any method: shapes, rates and records change where they should, and a run resumes in each."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from test_train import bits, records
from tiny_text import make_base

import jpeft
from jpeft.training.config import TrainConfig
from jpeft.training.run import load_run
from jpeft.training.run_folder import RunFolder
from jpeft.training.snapshot import Snapshots
from jpeft.training.train import prepare, train

# Each method of several stages, with options for a model of 5000 parameters.
STAGED = {"diff_pruning": ("sparsity=0.1", "l0=1e-5"), "far": (), "fish_mask": ("sparsity=0.1", "refresh=2")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Fields of a configuration."""
    fields = make_base(tmp_path_factory.mktemp("base"), train=64, validation=8, test=8)
    return {**fields, "batch_size": 8, "steps": 20, "log_every": 4, "checkpoint_every": 1, "eval_every": 6, "keep": 50}


@pytest.fixture(scope="module", params=sorted(STAGED))
def config(base, tmp_path_factory, request):
    return TrainConfig(**base, method=request.param, options=STAGED[request.param], output=str(tmp_path_factory.mktemp("run") / "run"))


@pytest.fixture(scope="module")
def result(config):
    return train(config)


def test_a_run_goes_through_all_stages(config, result):
    first = prepare(config).peft.method
    assert result.steps == 20
    assert result.peft.method.stages == ()
    entered = [line for line in records(result.path) if line["split"] == "stage"]
    assert [line["stage"] for line in entered] == [stage.name for stage in first.stages]
    assert entered[-1]["trained"] == result.stages[-1]["trained"] == jpeft.summary(result.peft).trained
    assert result.trained == max(stage["trained"] for stage in result.stages)
    lengths = np.diff([0, *(line["step"] for line in entered), 20])
    assert lengths[1:].tolist() == [round(20 * stage.share) for stage in first.stages]
    # What a stage leaves is logged and evaluated: no line of the log mixes two stages.
    seen = {(line["step"], line["split"]) for line in records(result.path)}
    assert all({(line["step"], "train"), (line["step"], "validation")} <= seen for line in entered)


def test_the_last_method_is_what_is_saved(config, result):
    run = load_run(result.path)
    assert run.peft.method == result.peft.method
    assert bits(run.peft.adapter) == bits(result.peft.adapter)
    assert json.loads(RunFolder(config.output).config.read_text())["method"] == prepare(config).peft.method.config()


# The trainer asks no method for its name: one will do here, and DiffPruning is killed in each stage in test_resume.py.
@pytest.mark.parametrize("config", ["far"], indirect=True, scope="module")
def test_it_resumes_from_every_checkpoint_bit_for_bit(config, result, tmp_path):
    """From one in each stage, and from the one that each stage begins with."""
    entered = [line["step"] for line in records(result.path) if line["split"] == "stage"]
    steps = sorted(int(p.name) for p in RunFolder(config.output).checkpoints.iterdir())
    assert set(entered) <= set(steps)
    for step in {max(s for s in steps if s < entered[0]), *entered, max(s for s in steps if s < 20)}:
        again = dataclasses.replace(config, output=str(tmp_path / str(step)), resume=True)
        folder = RunFolder(again.output)
        folder.path.mkdir()
        for name in ("config.json", "metrics.jsonl"):
            (folder.path / name).write_text((result.path / name).read_text())
        for earlier in (s for s in steps if s <= step):
            shutil.copytree(result.path / "checkpoints" / str(earlier), folder.checkpoints / str(earlier))
        resumed = train(again)
        assert bits(resumed.peft.adapter) == bits(result.peft.adapter)
        assert records(resumed.path) == records(result.path)
        assert (resumed.validation, resumed.test, resumed.best) == (result.validation, result.test, result.best)


def test_a_checkpoint_records_its_stage(config, result):
    snapshots = Snapshots(RunFolder(config.output).checkpoints, keep=50)
    entered = [line["step"] for line in records(result.path) if line["split"] == "stage"]
    found = {step: snapshots.progress(step) for step in (1, *entered, 20)}
    assert [found[step].stage for step in (1, *entered)] == list(range(len(entered) + 1))
    assert jpeft.make(found[20].method) == result.peft.method


def test_the_rate_goes_on_or_begins_anew(config, result):
    """`restart` is the stage's own word; within a course the rate falls in one line."""
    first = prepare(config).peft.method
    rates = {line["step"]: line["learning_rate"] for line in records(result.path) if line["split"] == "train"}
    entered = [line["step"] for line in records(result.path) if line["split"] == "stage"]
    for stage, step in zip(first.stages, entered, strict=True):
        after = min(s for s in rates if s > step)
        assert (rates[after] > rates[step]) == stage.restart_schedule


# The trainer asks no method for its name: one will do here, and DiffPruning is killed in each stage in test_resume.py.
@pytest.mark.parametrize("config", ["far"], indirect=True, scope="module")
def test_patience_and_the_best_count_from_the_last_stage(config, tmp_path):
    slow = {"learning_rate": 1e-12, "patience": 2, "eval_every": 2, "steps": 40, "checkpoint_every": 40}
    result = train(dataclasses.replace(config, output=str(tmp_path / "run"), **slow))
    begin = max(line["step"] for line in records(result.path) if line["split"] == "stage")
    assert begin < result.best_step < result.steps < 40
    assert result.peft.method.stages == ()


def test_too_few_steps_are_refused(config, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(ValueError, match="1 steps are too few for"):
        train(dataclasses.replace(config, steps=1, output=str(output)))
    assert not output.exists()

"""Adapters on the command line: written from a run, trained on, evaluated and predicted with, without the run."""

import json
import shutil

import numpy as np
import pytest
from tiny_text import make_model, make_rows, write_csv

import jpeft
from jpeft.cli import main
from jpeft.training.config import TrainConfig
from jpeft.training.prepare import prepare
from jpeft.training.run import load_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, data, a trained run of DoRA, and its adapter as HF PEFT has it."""
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    write_csv(folder / "data.csv", make_rows(90))
    assert main(train_flags(folder, folder / "run", "--method", "dora", "rank=2")) == 0
    assert main(["export", str(folder / "run"), str(folder / "peft")]) == 0
    return folder


def train_flags(world, output, *more):
    flags = ["--model", str(world / "model"), "--data", str(world / "data.csv"), "--output", str(output)]
    return ["train", *flags, "--max-length", "8", "--steps", "3", "--batch-size", "8", "--progress", "none", *map(str, more)]


def shown(capfd, *command):
    capfd.readouterr()
    assert main([str(argument) for argument in command]) == 0
    return capfd.readouterr().out


def test_an_exported_adapter_evaluates_and_predicts_as_its_run(world, capfd):
    adapter = ("--adapter", world / "peft", "--model", world / "model", "--max-length", 8)
    data = ("--data", world / "data.csv", "--split", "test")
    assert shown(capfd, "eval", *adapter, *data) == shown(capfd, "eval", world / "run", *data)
    texts = ("--text", "the apple here", "old iron")
    assert shown(capfd, "predict", *adapter, *texts) == shown(capfd, "predict", world / "run", *texts)


@pytest.mark.parametrize("form", ["peft", "jpeft"])
def test_a_folder_is_exported_again_from_the_adapter_alone(world, tmp_path, form):
    assert main(["export", str(world / "run"), str(tmp_path / "one"), "--format", form, "--base-name", "tiny"]) == 0
    assert main(["export", str(tmp_path / "one"), str(tmp_path / "two"), "--model", str(world / "model"), "--base-name", "tiny"]) == 0
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["use_dora"]) == ("tiny", True)
    run = load_run(world / "run")
    again = jpeft.load_hf(tmp_path / "two", run.loaded.params, model=run.model)
    for path, leaf in jpeft.flatten(run.peft.adapter).items():
        np.testing.assert_array_equal(jpeft.flatten(again.adapter)[path], leaf)


def test_a_merged_model_is_exported_too(world, tmp_path):
    assert main(["export", str(world / "run"), str(tmp_path / "merged"), "--format", "merged"]) == 0
    merged, run = jpeft.models.load(tmp_path / "merged"), load_run(world / "run")
    for path, leaf in jpeft.flatten(run.merged()).items():
        np.testing.assert_allclose(jpeft.flatten(merged.params)[path], leaf, rtol=1e-6)


def test_training_goes_on_from_an_adapter(world, tmp_path, capfd, fails):
    """In one go, and killed and resumed: the same adapter, which has moved from the one that it began with."""
    more = ("--adapter", world / "peft", "--checkpoint-every", 1, "--keep", 5)
    assert main(train_flags(world, tmp_path / "run", *more)) == 0
    run, before = load_run(tmp_path / "run"), load_run(world / "run")
    assert run.peft.method.name == "dora"
    assert run.labels == before.labels
    leaves, old = jpeft.flatten(run.peft.adapter), jpeft.flatten(before.peft.adapter)
    assert leaves.keys() == old.keys()
    distances = [float(np.abs(np.asarray(leaves[path]) - np.asarray(old[path])).max()) for path in old]
    assert all(0 < distance < 0.1 for distance in distances)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["run"]["method"] == "dora"
    assert config["run"]["adapter"] == str(world / "peft")

    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for name in ("result.json", "adapter", "checkpoints/3"):
        path = tmp_path / "again" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(train_flags(world, tmp_path / "again", *more[2:], "--resume")) == 0
    for path, leaf in jpeft.flatten(load_run(tmp_path / "again").peft.adapter).items():
        np.testing.assert_array_equal(leaf, leaves[path])

    for name in ("result.json", "adapter"):
        path = tmp_path / "again" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    other = ("--adapter", tmp_path / "run", "--checkpoint-every", 1, "--keep", 5, "--resume")
    assert "its adapter changed" in fails(*train_flags(world, tmp_path / "again", *other))


def test_a_new_head_is_trained_along(world, tmp_path):
    """The adapter has none, as one of a language model has none, and the base has one with other labels."""
    run = load_run(world / "run")
    own = {path: leaf for path, leaf in jpeft.flatten(run.peft.adapter).items() if "classifier" not in path}
    bare = jpeft.Peft(run.peft.params, jpeft.unflatten(own), run.peft.method.replace(head=None))
    jpeft.save_hf(tmp_path / "bare", bare, model=run.model)
    places = {"model": str(world / "model"), "data": str(world / "data.csv"), "output": "", "adapter": str(tmp_path / "bare")}
    setup = prepare(TrainConfig(**places, max_length=8, fresh_head=True))
    peft = setup.peft
    assert "classifier/kernel" in setup.new
    assert prepare(TrainConfig(**places | {"adapter": str(world / "peft")}, max_length=8)).new == frozenset()
    leaves = jpeft.flatten(peft.adapter)
    assert leaves.keys() == jpeft.flatten(run.peft.adapter).keys()
    for path, leaf in own.items():
        np.testing.assert_array_equal(leaves[path], leaf)
    assert peft.method == run.peft.method.replace(target=peft.method.target)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("eval",), "Give either the folder of a run, or --adapter with --model."),
        (("eval", "RUN", "--adapter", "PEFT"), "Give either the folder of a run, or --adapter with --model."),
        (("eval", "--adapter", "PEFT"), "needs its base: give it with --model."),
        (("eval", "--adapter", "PEFT", "--model", "MODEL"), "has no data of its own: give some with --data."),
        (("predict", "--adapter", "PEFT", "--model", "MODEL", "--split", "test"), "has no data of its own: give some with --data."),
        (("predict", "RUN", "--text", "a", "--max-length", "8"), "--max-length is for an adapter without a run"),
        (("predict", "RUN", "--text", "a", "--labels", "x"), "--labels is for an adapter without a run"),
        (("predict", "--adapter", "MODEL", "--model", "MODEL", "--text", "a"), "is not the configuration of a training run"),
        (("predict", "--adapter", "nowhere/at/all", "--model", "MODEL", "--text", "a"), "There is no folder nowhere/at/all"),
        (("predict", "--adapter", "PEFT", "--model", "MODEL", "--text", "a", "--task", "generation", "--labels", "x"), "has no labels"),
        (("predict", "--adapter", "PEFT", "--model", "MODEL", "--text", "a", "--labels", "x", "y"), "classifier"),
        (("export", "RUN", "MODEL"), "is in use"),
        (("export", "RUN", "OUT", "--task", "generation"), "--task is for an adapter without a run"),
        (("export", "RUN", "OUT", "--format", "adapters"), "this is dora: write it for HF PEFT"),
        (("export", "RUN", "OUT", "--max-shard-size", "1 GiB"), "--max-shard-size must be a number of bytes above 0"),
        (("export", "PEFT", "OUT"), "is not the folder of a training run"),
    ],
)
def test_errors(world, tmp_path, fails, command, message):
    places = {"RUN": world / "run", "PEFT": world / "peft", "MODEL": world / "model", "OUT": tmp_path / "out"}
    assert message in fails(*(places.get(part, part) for part in command))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--adapter", "PEFT", "--method", "bitfit"), "is one of dora, and method=bitfit: leave out --method."),
        (("--adapter", "PEFT", "--method", "dora", "rank=4"), "brings its method and options: leave out --options."),
        (("--adapter", "PEFT", "--add-tokens", "<x>"), "brings its method and options: leave out --add-tokens."),
        (("--adapter", "nowhere/at/all"), "There is no folder nowhere/at/all"),
    ],
)
def test_errors_of_training(world, tmp_path, fails, flags, message):
    assert message in fails(*train_flags(world, tmp_path / "out", *(world / "peft" if flag == "PEFT" else flag for flag in flags)))
    assert not (tmp_path / "out").exists()

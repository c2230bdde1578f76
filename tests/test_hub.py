"""Models and data sets of the hub: the real `huggingface_hub` and `datasets` download them from a local server."""

import json
import os
import subprocess
import sys

import hub
import pytest
from tiny_text import make_model, make_rows, shard, write_csv

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A hub with a sharded model and a data set, and a function that runs the command against it with an empty cache."""
    root, cache = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("cache")
    model = make_model(root / "models" / "acme" / "tiny")
    weights = shard(model)
    (model / "pytorch_model.bin").write_bytes(b"not to be downloaded")
    reviews = root / "datasets" / "acme" / "reviews"
    reviews.mkdir(parents=True)
    write_csv(reviews / "train.csv", make_rows(90))
    write_csv(reviews / "test.csv", make_rows(30, seed=5))
    with hub.serve(root) as (address, requests):
        # Both are read when the packages are imported, and this process has long done that.
        env = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}

        def run(*arguments, **more):
            command = [sys.executable, "-m", "jpeft", *map(str, arguments)]
            return subprocess.run(command, capture_output=True, text=True, env=env | more)

        yield run, requests, weights


FLAGS = ("--max-length", 8, "--steps", 3, "--batch-size", 8, "--progress", "none")


def test_a_model_and_a_data_set_of_the_hub(served, tmp_path):
    run, requests, weights = served
    done = run("train", "--model", "acme/tiny", "--data", "hub:acme/reviews", "--output", tmp_path / "run", *FLAGS)
    assert done.returncode == 0, done.stderr
    fetched = {request.rsplit("/", 1)[-1] for request in requests if request.startswith("GET") and "/resolve/" in request}
    assert {*weights, "tokenizer.json", "train.csv", "test.csv"} <= fetched
    assert "pytorch_model.bin" not in fetched
    # What has been downloaded is good for a machine without a network: the same model and the same texts.
    offline = run("eval", tmp_path / "run", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert offline.returncode == 0, offline.stderr
    test = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    names, values = (line.split() for line in offline.stdout.splitlines()[-2:])
    assert values == ["test", *(f"{test[name]:.4f}" for name in names[1:])]


def test_a_revision_of_the_hub_is_part_of_the_run(served, tmp_path):
    run, requests, _ = served
    flags = ("--model", "acme/tiny", "--data", "hub:acme/reviews", "--output", tmp_path / "run", *FLAGS)
    done = run("train", *flags, "--revision", "v1.0")
    assert done.returncode == 0, done.stderr
    assert any("models/acme/tiny/revision/v1.0" in request for request in requests)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["revision"] == "v1.0"
    again = run("train", *flags, "--revision", "v2.0", "--resume")
    assert again.returncode == 2
    assert "revision ('v1.0' before, 'v2.0' now)" in again.stderr


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("acme/missing", "hub:acme/reviews", "There is no folder acme/missing, and the hub did not give it either"),
        ("acme/tiny", "hub:acme/missing", "hub:acme/missing: the hub gave no such data set"),
    ],
)
def test_what_the_hub_does_not_have(served, tmp_path, model, data, message):
    run, *_ = served
    done = run("train", "--model", model, "--data", data, "--output", tmp_path / "run", *FLAGS)
    assert done.returncode == 2
    assert message in done.stderr
    assert any(line.startswith("error: ") for line in done.stderr.splitlines())  # a data set may show its progress first
    assert not (tmp_path / "run").exists()

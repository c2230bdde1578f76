"""Finished runs as a server uses them: `jpeft.load_run`, and runs whose base or data has moved."""

import functools
import inspect
import json
import os
import re
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_text import make_decoder, make_model, make_rows, write_csv

import jpeft
from jpeft.cli import main
from jpeft.data import Table
from jpeft.tasks.sequence_classification import classify
from jpeft.training.buckets import batches, fit_length
from jpeft.training.config import TrainConfig
from jpeft.training.run import Run
from jpeft.training.train import train

SHORT = {"max_length": 24, "steps": 3, "batch_size": 8, "progress": "none"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A project: models, data, two runs of LoRA, and a run that generates text."""
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    write_csv(folder / "data.csv", make_rows(90))
    for seed in (0, 1):
        places = {"model": str(folder / "model"), "data": str(folder / "data.csv"), "output": str(folder / f"run-{seed}")}
        train(TrainConfig(**places, options=("rank=2",), seed=seed, learning_rate=3e-2, **SHORT))
    make_decoder(folder / "decoder")
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"text": text, "target": label}) + "\n" for text, label in make_rows(40)))
    places = {"model": str(folder / "decoder"), "data": str(folder / "pairs.jsonl"), "output": str(folder / "writer")}
    train(TrainConfig(**places, task="generation", target="target", options=("rank=2",), **SHORT))
    return folder


@pytest.fixture(scope="module")
def run(world):
    """The first run, loaded."""
    return jpeft.load_run(world / "run-0")


# --- predict ----------------------------------------------------------------------------------------------------------

TEXTS = ["the apple here", "old iron", "some rain now", "the plum " * 8]


def test_what_a_run_holds(run, world):
    assert (run.task.name, run.labels, run.config.model) == ("sequence-classification", ("fruit", "metal", "water"), str(world / "model"))
    assert run.peft.method == jpeft.lora(rank=2, head=run.peft.method.head)
    inputs = run.task.model_inputs(run.encode(run.table(TEXTS)))
    merged = run.model.apply({"params": run.merged()}, **inputs)
    np.testing.assert_allclose(merged, jpeft.wrap(run.model.apply)(run.peft, **inputs), atol=1e-5)


def test_predictions_do_not_depend_on_the_batch(run):
    together = run.predict(TEXTS)
    assert [set(answer) for answer in together] == [{"label", "probabilities"}] * 4
    for text, answer in zip(TEXTS, together, strict=True):
        alone = run.predict(text)
        assert alone["label"] == answer["label"]
        assert alone["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-5)
    assert run.predict([]) == []
    assert run.predict(text for text in TEXTS[:1])[0]["label"] == together[0]["label"]
    many = run.predict(TEXTS * 20)
    assert [answer["label"] for answer in many] == [answer["label"] for answer in together] * 20
    json.dumps(many)


def test_a_shape_is_compiled_once(world):
    run = jpeft.load_run(world / "run-0", batch_size=4)
    before = classify._cache_size()
    for count in range(1, 10):
        run.predict([" ".join(["the"] * length) for length in range(1, count + 1)])
    # One or four rows, 16 or 24 tokens.
    assert classify._cache_size() - before <= 4
    again = classify._cache_size()
    run.predict(["a new text"] * 7)
    assert classify._cache_size() == again


def test_shapes_of_batches():
    mask = np.zeros((5, 100), np.int32)
    mask[:, :20] = 1
    arrays = {"input_ids": mask, "attention_mask": mask, "label": np.arange(5)}
    assert fit_length(arrays)["input_ids"].shape == (5, 32)
    assert fit_length({name: column[..., :20] for name, column in arrays.items()}, 28)["attention_mask"].shape == (5, 28)
    assert fit_length(arrays)["label"].shape == (5,)
    assert fit_length({"pixels": mask})["pixels"].shape == (5, 100)
    left = {"attention_mask": mask[:, ::-1]}  # padding in front stays
    np.testing.assert_array_equal(fit_length(left)["attention_mask"], mask[:, ::-1])
    assert [len(batch["label"]) for batch in batches(arrays, 4)] == [4, 1]
    assert [len(batch["label"]) for batch in batches(arrays, 64)] == [16]


def test_threads_share_a_run(run):
    """A tokenizer of `transformers` may not be used by two threads at once."""
    expected, found, errors = run.predict(TEXTS), [], []

    def ask():
        try:
            found.extend(run.predict(TEXTS) for _ in range(5))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found == [expected] * 40


def test_what_is_not_a_text_is_named(run):
    predict = functools.partial(inspect.unwrap(Run.predict), run)  # without the tests' own check of types
    for texts, message in (
        (["a", 5], r"texts\[1\] must be a text, not 5"),
        ([["a", "b"]], r"texts\[0\] must be a text, not \['a', 'b'\]"),
        ([None], r"texts\[0\]"),
        (7, "texts must be a list of texts, not 7"),
        ({"text": "a"}, "texts must be a list of texts"),
        (b"a", "texts must be a list of texts"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(texts)
    with pytest.raises(ValueError, match="single texts, without pairs: got 1 texts and 1 second texts"):
        predict("a", "b")
    with pytest.raises(ValueError, match="`max_new_tokens`: only for a model that generates text"):
        predict("a", max_new_tokens=3)


def test_generated_text(world):
    run = jpeft.load_run(world / "writer", batch_size=2)
    texts = ["the apple", "a", "old iron seen by some lake"]
    answers = run.predict(texts, max_new_tokens=3)
    assert [set(answer) for answer in answers] == [{"generated"}] * 3
    for text, answer in zip(texts, answers, strict=True):
        assert run.predict(text, max_new_tokens=3) == answer
    drawn = run.predict(texts, max_new_tokens=3, seed=1, temperature=5.0)
    assert drawn == run.predict(texts, max_new_tokens=3, seed=1, temperature=5.0)
    # Filled up to 16 tokens, this text and its continuation would take more positions than there are.
    assert set(run.predict("a", max_new_tokens=30)) == {"generated"}
    for options, message in (
        ({"temperature": 2.0}, "only for tokens drawn at random"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number, not '5'"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, not True"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 60}, "position"),
        ({"seed": 0, "top_p": "x"}, "top_p must be a number, not 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(Run.predict)(run, "a", **options)


def test_runs_share_a_base(world, run, tmp_path):
    other = jpeft.load_run(world / "run-1", base=run)
    leaves = zip(jax.tree.leaves(other.peft.params), jax.tree.leaves(run.peft.params), strict=True)
    assert all(mine is base for mine, base in leaves)
    alone = jpeft.load_run(world / "run-1").predict(TEXTS)
    for one, two in zip(other.predict(TEXTS), alone, strict=True):
        assert one["probabilities"] == pytest.approx(two["probabilities"], abs=1e-6)
    assert [answer["probabilities"] for answer in alone] != [answer["probabilities"] for answer in run.predict(TEXTS)]
    with pytest.raises(ValueError, match=r"cannot share the base of .*run-0: they differ in task"):
        jpeft.load_run(world / "writer", base=run)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        jpeft.load_run(world / "run-0", batch_size=0)


def test_metrics_are_those_of_the_run(run, world):
    rows = make_rows(12, seed=9)
    table = Table([text for text, _ in rows], None, [label for _, label in rows])
    answers = run.predict(table.text)
    assert run.metrics(table)["accuracy"] == pytest.approx(np.mean([a["label"] == b for a, (_, b) in zip(answers, rows)]))


# --- runs that have moved ---------------------------------------------------------------------------------------------


@pytest.fixture
def moved(world, tmp_path):
    """The first run alone in another folder, its base and its data renamed; the old places hold nothing."""
    for name in ("model", "data.csv", "run-0"):
        (shutil.copytree if (world / name).is_dir() else shutil.copy)(world / name, tmp_path / f"new-{name}")
    config = tmp_path / "new-run-0" / "config.json"
    config.write_text(config.read_text().replace(str(world), str(tmp_path / "gone")))
    return {name: str(tmp_path / f"new-{name}") for name in ("model", "data.csv", "run-0")}


def unmoved(world):
    """The metrics of the run where it was made, as `eval` prints them."""
    result = json.loads((world / "run-0" / "result.json").read_text())["test"]
    return [f"{value:.4f}" for value in result.values()]


def test_a_base_elsewhere_is_found_with_a_flag(world, moved, tmp_path, capfd, fails):
    run, model, source = moved["run-0"], moved["model"], moved["data.csv"]
    out = str(tmp_path / "merged")
    commands = (["eval", run, "--data", source, "--split", "test"], ["predict", run, "--text", "a"], ["merge", run, out], ["summary", run])
    for command in commands:
        message = fails(*command)
        assert f"was in {tmp_path / 'gone' / 'model'}, and there is nothing now" in message
        assert "--model" in message
        assert main([*command, "--model", model]) == 0
        shutil.rmtree(out, ignore_errors=True)
        another = str(tmp_path / "another")
        if not os.path.exists(another):
            make_model(tmp_path / "another", seed=1)
        assert "another is not the base of the run" in fails(*command, "--model", another)
        assert not os.path.exists(out)
    capfd.readouterr()
    assert main([*commands[0], "--model", model]) == 0
    assert capfd.readouterr().out.splitlines()[1].split()[1:] == unmoved(world)
    assert jpeft.load_run(run, model=model).predict("a") == jpeft.load_run(world / "run-0").predict("a")


@pytest.mark.filterwarnings("default::UserWarning")
def test_data_elsewhere(world, moved, tmp_path, capfd, fails):
    run, source = ["--model", moved["model"], moved["run-0"]], moved["data.csv"]
    assert "was in" in (message := fails("eval", *run))
    assert "--data" in message
    # All of the run's own rows are another question than its test split.
    capfd.readouterr()
    assert main(["eval", *run, "--data", source]) == 0
    out, err = capfd.readouterr()
    assert "those of training among them" in err
    assert out.splitlines()[1].split()[1:] != unmoved(world)
    other = write_csv(tmp_path / "other.csv", make_rows(60, seed=4))
    for command in (["merge", moved["run-0"], tmp_path / "out"], ["summary", moved["run-0"]]):
        arguments = [*map(str, command), "--model", moved["model"], "--data"]
        assert "is not the data of the run" in fails(*arguments, other)
        assert main([*arguments, source]) == 0
    # Predictions for a split, of the run's data or of other data.
    capfd.readouterr()
    assert main(["predict", *run, "--data", source, "--split", "test"]) == 0
    assert main(["predict", str(world / "run-0"), "--split", "test"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert "Give either texts" in fails("predict", *run, "--text", "a", "--data", source)
    assert "--input is a file" in fails("predict", *run, "--input", source, "--split", "test")


@pytest.mark.filterwarnings("default::UserWarning")
def test_changed_data_is_said(world, moved, capfd):
    write_csv(Path(moved["data.csv"]), make_rows(90, seed=3))
    config = Path(moved["run-0"], "config.json")
    about = json.loads(config.read_text())
    about["run"]["data"] = moved["data.csv"]
    config.write_text(json.dumps({name: value for name, value in about.items() if name != "checksum"}))
    capfd.readouterr()
    assert main(["eval", moved["run-0"], "--model", moved["model"]]) == 0
    assert "has changed since the run was trained" in capfd.readouterr().err


@pytest.mark.parametrize("relative", [False, True])
def test_a_project_moves_as_a_whole(world, tmp_path, capfd, relative, monkeypatch):
    """Models, data and run lie to each other as before; the paths of earlier versions may be relative."""
    project = tmp_path / "project"
    for name in ("model", "data.csv", "run-0"):
        (project / "runs").mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (world / name).is_dir() else shutil.copy
        copy(world / name, project / ("runs/0" if name == "run-0" else name))
    config = project / "runs" / "0" / "config.json"
    about = json.loads(config.read_text())
    root = "" if relative else str(tmp_path / "before") + "/"
    about["run"] |= {"model": f"{root}model", "data": f"{root}data.csv", "output": f"{root}runs/0"}
    config.write_text(json.dumps({name: value for name, value in about.items() if name != "checksum"}))
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert main(["eval", "project/runs/0"]) == 0
    assert capfd.readouterr().out.splitlines()[1].split()[1:] == unmoved(world)


def test_a_run_is_continued_from_elsewhere(world, moved, tmp_path, capfd, fails):
    def flags(**places):
        places = {"model": moved["model"], "data": moved["data.csv"], "output": moved["run-0"]} | places
        named = [f"--{name}={place}" for name, place in places.items()]
        return [
            "train",
            *named,
            "--learning-rate",
            "3e-2",
            "--max-length",
            "24",
            "--steps",
            "3",
            "--batch-size",
            "8",
            "--progress",
            "none",
            "--resume",
            "rank=2",
        ]

    assert main(flags()) == 0
    another = make_model(tmp_path / "another", seed=1)
    other = write_csv(tmp_path / "other.csv", make_rows(60, seed=4))
    assert "not the base of the run" in fails(*flags(model=another))
    assert "is not the data of the run" in fails(*flags(data=other))
    # As if it had been killed before its end.
    for name in ("result.json", "adapter"):
        (shutil.rmtree if name == "adapter" else os.remove)(os.path.join(moved["run-0"], name))
    assert "its base changed" in fails(*flags(model=another))
    assert main(flags()) == 0
    assert jpeft.load_run(moved["run-0"], model=moved["model"]).predict("a") == jpeft.load_run(world / "run-0").predict("a")


def test_a_report_of_runs_with_one_base_in_two_places(world, moved, tmp_path, fails):
    shutil.copytree(world / "run-1", tmp_path / "runs" / "1")
    shutil.copytree(moved["run-0"], tmp_path / "runs" / "0")
    assert main(["report", str(tmp_path / "runs")]) == 0
    config = tmp_path / "runs" / "0" / "config.json"
    about = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in about.items() if name != "checksum"} | {"pretrained": "another"}))
    assert "they differ in model" in fails("report", tmp_path / "runs")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_on_inference(world, tmp_path, monkeypatch):
    """Every block runs, in order, as a reader would type them, beside runs of these names."""
    (tmp_path / "run").symlink_to(world / "run-0")
    (tmp_path / "run-1").symlink_to(world / "run-1")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "inference.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    start, server, flax, torch, many, switch, ensemble = (block.replace('"127.0.0.1", 8000', '"127.0.0.1", 0') for block in blocks)
    expected = jpeft.load_run("run").predict(["Not bad at all.", "Awful."])

    exec(start, {})
    scope = {}
    exec(server, scope)
    thread = threading.Thread(target=scope["server"].serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{scope['server'].server_port}"
        ask = lambda body: json.loads(urllib.request.urlopen(address, data=body).read())
        assert ask(b'{"texts": ["Not bad at all.", "Awful."]}') == {"answers": expected}
        assert ask(b'{"texts": []}') == {"answers": []}
        for body in (b"{}", b"no JSON", b'{"texts": [5]}', b'{"texts": 5}'):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                ask(body)
    finally:
        scope["server"].shutdown()
        scope["server"].server_close()
        thread.join()
    labels = [answer["label"] for answer in expected]
    for block in (flax, torch):
        exec(block, scope := {})
        assert scope["labels"] == labels
    exec(many, scope := {})
    assert scope["answers"]["reviews"]["label"] == labels[0]
    exec(switch, scope := {})
    exec(ensemble, scope)
    assert scope["votes"].shape == (2, 1, 3)
    np.testing.assert_allclose(scope["votes"][1], scope["logits"]["run-1"], atol=1e-5)

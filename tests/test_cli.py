"""The command line, in this process: what each subcommand prints, and one clear line for each bad input."""

import inspect
import json
import pkgutil
import re
import shutil
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from tiny_text import make_model, make_rows, write_csv

import jpeft.cli
import jpeft.models
from jpeft.cli import main
from jpeft.cli.docstrings import parse_docstring
from jpeft.cli.flags import rename_old_flags
from jpeft.cli.main import COMMANDS
from jpeft.cli.predict import PredictArgs
from jpeft.training.config import TrainConfig
from jpeft.training.run import load_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, data, and a trained run of LoRA and of bottleneck adapters."""
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    write_csv(folder / "data.csv", make_rows(90))
    for method, options in (("lora", ["rank=2"]), ("adapter", [])):
        assert main(train_flags(folder, folder / method, "--method", method, *options)) == 0
    return folder


def train_flags(world, output, *more):
    """A run of a few steps."""
    flags = ["--model", str(world / "model"), "--data", str(world / "data.csv"), "--output", str(output)]
    return ["train", *flags, "--max-length", "8", "--steps", "3", "--batch-size", "8", "--progress", "none", *more]


# --- good input -------------------------------------------------------------------------------------------------------


def test_methods(capfd):
    assert main(["methods"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "family", "learning", "rate", "what", "it", "does"]
    assert [line.split()[0] for line in lines[1:]] == list(jpeft.methods())


def test_a_page_for_each_method(capfd):
    for name, info in jpeft.methods().items():
        assert main(["methods", name]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        assert out.startswith(f"{name}: {info.summary}\n")
        declared = re.findall(r"^  (\w+)", out, flags=re.MULTILINE)
        assert sorted(declared) == sorted(inspect.signature(info.factory).parameters)
        assert "Args:" not in out
        assert ">>>" not in out
    assert main(["methods", "lora"]) == 0
    out = capfd.readouterr().out
    assert "W' = W + s a b" in out
    assert "  rslora = False  (True or False)\n      `s = alpha / sqrt(r)`" in out
    assert "Reference: Hu et al." in out


def test_every_option_of_a_method_is_explained():
    for name, info in jpeft.methods().items():
        arguments = parse_docstring(inspect.getdoc(info.factory) or "").arguments
        assert not set(inspect.signature(info.factory).parameters) - arguments.keys(), name


def test_version(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"jpeft {jpeft.__version__}\n"


def test_every_command_is_in_a_file_of_its_name():
    for command in COMMANDS:
        assert import_module(f"jpeft.cli.{command.name}").COMMAND is command
    files = {module.name for module in pkgutil.iter_modules(jpeft.cli.__path__)}
    with_command = {name for name in files if hasattr(import_module(f"jpeft.cli.{name}"), "COMMAND")}
    assert with_command == {command.name for command in COMMANDS}


def test_the_skeleton_of_a_command(tmp_path, monkeypatch, capfd, fails):
    spec = spec_from_file_location("command_skeleton", Path(__file__).parents[1] / "docs" / "skeletons" / "command.py")
    assert spec is not None
    assert spec.loader is not None
    skeleton = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, skeleton)  # the parser reads the help texts from the source
    spec.loader.exec_module(skeleton)
    monkeypatch.setattr(import_module("jpeft.cli.main"), "COMMANDS", (*COMMANDS, skeleton.COMMAND))
    path = str(write_csv(tmp_path / "data.csv", make_rows(90)))
    capfd.readouterr()
    for label in ("label", "none"):
        assert main(["rows", path, "--label", label]) == 0
        head, *rows = capfd.readouterr().out.splitlines()
        assert head.split() == ["split", "rows"]
        assert sum(int(row.split()[1]) for row in rows) == 90
    assert "no column 'body'" in fails("rows", path, "--text", "body")
    assert "The data has no split 'tset'" in fails("rows", path, "--split", "tset")
    assert main(["rows", "--help"]) == 0
    assert "Label column; none for data without labels." in " ".join(capfd.readouterr().out.replace("│", " ").split())


def test_old_flags_work_with_a_warning(world, tmp_path, capfd):
    flags = train_flags(world, tmp_path / "run", "--accumulate=4", "--head_rate", "2")
    capfd.readouterr()
    assert main(flags) == 0
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")] == [
        "warning: --accumulate is now called --grad-accum",
        "warning: --head_rate is now called --head-lr-scale",
    ]
    run = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    assert (run["grad_accum"], run["head_lr_scale"]) == (4, 2.0)
    # Only flags are renamed, and only those of commands that have the new one.
    assert rename_old_flags(["train", "--text", "accumulate"], TrainConfig) == ["train", "--text", "accumulate"]
    assert rename_old_flags(["predict", "--accumulate"], PredictArgs) == ["predict", "--accumulate"]
    assert capfd.readouterr().err == ""


def test_help_explains_every_flag(capfd):
    assert main(["train", "--help"]) == 0
    out = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "Largest global norm of the gradient over the trained parameters" in out
    assert "NAME=VALUE" in out
    assert "--- " not in out  # the configuration's section banners are not help


def test_none_may_be_written_small(world, tmp_path):
    flags = train_flags(world, tmp_path / "run", "--clip", "none", "--eval_every", "none", "--pair", "none")
    assert main(flags) == 0
    run = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    assert (run["clip"], run["eval_every"], run["pair"], run["progress"]) == (None, None, None, "none")


def test_unknown_flag(capfd):
    assert main(["train", "--lerning-rate", "1"]) == 2
    assert "lerning-rate" in capfd.readouterr().err


def test_train_prints_lines_and_metrics(world, tmp_path, capfd):
    assert main([*train_flags(world, tmp_path / "run"), "--progress", "lines", "--log-every", "1", "--eval-every", "1"]) == 0
    out = capfd.readouterr().out
    assert "step 3/3  loss" in out
    assert re.search(r"step 3/3  loss \d\.\d{4}  validation accuracy ", out)
    assert re.match(
        r"method   lora\n"
        r"device   cpu\n"
        r"rows     train \d+, validation \d+, test \d+\n"
        r"steps    3 \(\S+ epochs\), each of 8 x 8 tokens\n"
        r"rate     0.003 \(the method's default\), 0.015 for the new head; linear, with 6 % warmup\n"
        r"trained  [\d,]+ parameters, \S+ % of [\d,]+\n"
        r"labels   .*; the head for them is new\n",
        out,
    )
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (about["run"]["learning_rate"], about["run"]["head_lr_scale"], about["head_learning_rate"]) == (0.003, 5.0, 0.015)
    assert "samples/s" in out
    assert "0 s left" in out
    assert [line.split()[0] for line in out.splitlines()[-4:-1]] == ["split", "validation", "test"]
    assert "trained parameters, 3 steps" in out


def test_bar(world, tmp_path, capfd):
    assert main([*train_flags(world, tmp_path / "run"), "--progress", "bar", "--log-every", "1"]) == 0
    assert "3/3" in capfd.readouterr().out


def test_eval(world, capfd):
    capfd.readouterr()
    assert main(["eval", str(world / "lora")]) == 0
    head, row = capfd.readouterr().out.splitlines()
    assert head.split() == ["split", "loss", "accuracy", "macro_f1"]
    result = json.loads((world / "lora" / "result.json").read_text())
    assert row.split() == ["test", *(f"{result['test'][name]:.4f}" for name in head.split()[1:])]


def test_eval_of_a_file_takes_all_of_it(world, tmp_path, capfd):
    # Two halves of a file, weighted by their rows, are the whole.
    rows = make_rows(30, seed=5)
    accuracies = []
    for name, part in (("a", rows[:10]), ("b", rows[10:]), ("all", rows)):
        path = write_csv(tmp_path / f"{name}.csv", part)
        capfd.readouterr()
        assert main(["eval", str(world / "lora"), "--data", str(path), "--batch-size", "7"]) == 0
        accuracies.append(float(capfd.readouterr().out.splitlines()[1].split()[-2]))
    assert accuracies[2] == pytest.approx((10 * accuracies[0] + 20 * accuracies[1]) / 30, abs=2e-4)


def test_predict(world, tmp_path, capfd):
    texts = ["the apple here", "old iron"]
    assert main(["predict", str(world / "lora"), "--text", *texts]) == 0
    shown = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["text"] for line in shown] == texts
    for line in shown:
        assert set(line["probabilities"]) == {"fruit", "metal", "water"}
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)

    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output = tmp_path / "out.jsonl"
    assert main(["predict", str(world / "lora"), "--input", str(tmp_path / "in.jsonl"), "--output", str(output)]) == 0
    assert [json.loads(line) for line in output.read_text().splitlines()] == shown


def test_merge_gives_the_same_predictions(world, tmp_path):
    assert main(["merge", str(world / "lora"), str(tmp_path / "merged"), "--max-shard-size", "5KB"]) == 0
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    merged, run = jpeft.models.load(tmp_path / "merged"), load_run(world / "lora")
    assert merged.labels == run.labels
    inputs = dict(merged.tokenizer(["the apple here", "old iron"], padding=True, return_tensors="np"))
    inputs = {name: np.asarray(inputs[name]) for name in ("input_ids", "attention_mask")}
    expected = jpeft.wrap(run.loaded.model.apply, run.peft.method)(run.peft.variables, **inputs)
    np.testing.assert_allclose(merged.model.apply({"params": merged.params}, **inputs), expected, atol=1e-5)
    # Training has moved the adapter, or this test would pass on the base.
    untouched = run.loaded.model.apply({"params": run.loaded.params}, **inputs)
    assert np.abs(np.asarray(untouched) - np.asarray(expected)).max() > 1e-4


def test_summary_of_a_run_and_of_a_method(world, capfd):
    capfd.readouterr()
    assert main(["summary", str(world / "lora")]) == 0
    of_run = capfd.readouterr().out
    arguments = ["--model", str(world / "model"), "--labels", "3", "--method", "lora", "rank=2"]
    assert main(["summary", *arguments]) == 0
    assert capfd.readouterr().out == of_run
    assert f"{jpeft.summary(load_run(world / 'lora').peft).trained:,}" in of_run


def test_overwrite_starts_anew(world, tmp_path):
    flags = train_flags(world, tmp_path / "run")
    assert main(flags) == 0
    (tmp_path / "run" / "merged").mkdir()
    assert main([*flags, "--overwrite"]) == 0
    assert not (tmp_path / "run" / "merged").exists()
    assert (tmp_path / "run" / "result.json").exists()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "lroa"], "no method 'lroa'"),
        (["--method", "lora", "rnak=8"], "rnak"),
        (["--method", "lora", "rank"], "not of the form NAME=VALUE"),
        (["--method", "lora", "target=.*nowhere.*"], "nowhere"),
        (["--text", "sentence"], "no column 'sentence'"),
        (["--label", "class"], "no column 'class'"),
        (["--data", "nothere.csv"], "no such file"),
        (["--model", "/no/where"], "no folder /no/where"),
        (["--max-length", "64"], "--max-length=64"),
        (["--batch-size", "8", "--grad-accum", "3"], "does not divide"),
    ],
)
def test_bad_flags_leave_nothing(world, tmp_path, fails, flags, message):
    assert message in fails(*train_flags(world, tmp_path / "run", *flags))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\n", "no rows"),
        ("", "no rows"),
        ("text,label\napple,fruit\niron,\n", "no label in column 'label' of row 2"),
        ("text,label\napple,fruit\npear,fruit\n", "different texts"),
    ],
)
def test_bad_data_leaves_nothing(world, tmp_path, fails, content, message):
    path = tmp_path / "data.csv"
    path.write_text(content)
    assert message in fails(*train_flags(world, tmp_path / "run", "--data", path))
    assert [p.name for p in tmp_path.iterdir()] == ["data.csv"]


def test_corrupt_weights(world, tmp_path, fails):
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in fails(*train_flags(world, tmp_path / "run", "--model", model))
    weights.write_bytes(b"not tensors")
    assert "model.safetensors" in fails(*train_flags(world, tmp_path / "run", "--model", model))
    (model / "config.json").unlink()
    assert "has no config.json" in fails(*train_flags(world, tmp_path / "run", "--model", model))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_output_folder_in_use(world, tmp_path, fails):
    (tmp_path / "precious").write_text("")
    assert "is in use" in fails(*train_flags(world, tmp_path))
    # Not a run: neither continued nor deleted.
    assert "not the folder of a training run" in fails(*train_flags(world, tmp_path, "--overwrite"))
    assert "not the folder of a training run" in fails(*train_flags(world, tmp_path, "--resume"))
    # A model's folder has a config.json too.
    shutil.copytree(world / "model", tmp_path / "model")
    assert "was a model's folder given" in fails(*train_flags(world, tmp_path / "model", "--overwrite"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "precious"]
    assert "give one of them" in fails(*train_flags(world, tmp_path / "new", "--overwrite", "--resume"))


def test_bad_input_deletes_nothing_with_overwrite(world, tmp_path, fails):
    shutil.copytree(world / "lora", tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    fails(*train_flags(world, tmp_path / "run", "--overwrite", "--method", "lora", "target=.*nowhere.*"))
    assert sorted(tmp_path.rglob("*")) == before


def test_eval_errors(world, tmp_path, fails):
    rows = [*make_rows(6, seed=3), ("the cow", "animal")]
    path = write_csv(tmp_path / "data.csv", rows)
    assert "Unknown label 'animal'" in fails("eval", world / "lora", "--data", path)
    assert "no split 'tset'" in fails("eval", world / "lora", "--split", "tset")
    assert "not the folder of a training run" in fails("eval", tmp_path)
    assert "was a model's folder given" in fails("eval", world / "model")


def test_unfinished_run(world, tmp_path, fails):
    shutil.copytree(world / "lora", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert "is not finished" in fails("predict", tmp_path / "run", "--text", "a")


def test_predict_errors(world, tmp_path, fails):
    assert "Give either texts" in fails("predict", world / "lora")
    assert "without --pair" in fails("predict", world / "lora", "--text", "a", "--pair", "b")
    path = write_csv(tmp_path / "in.csv", [("a", "b")], header=("sentence", "label"))
    output = tmp_path / "out.jsonl"
    assert "no column 'text'" in fails("predict", world / "lora", "--input", path, "--output", output)
    assert not output.exists()
    output.write_text("kept")
    write_csv(path, [("a", "b")])
    assert "is there already" in fails("predict", world / "lora", "--input", path, "--output", output)
    assert output.read_text() == "kept"


def test_adapter_of_another_base(world, tmp_path, fails):
    for name in ("data.csv", "lora"):
        (shutil.copytree if (world / name).is_dir() else shutil.copy)(world / name, tmp_path / name)
    make_model(tmp_path / "model", seed=1)
    config = tmp_path / "lora" / "config.json"
    config.write_text(config.read_text().replace(str(world), str(tmp_path)))
    assert "another base" in fails("predict", tmp_path / "lora", "--text", "apple")


def test_damaged_adapter(world, tmp_path, fails):
    shutil.copytree(world / "lora", tmp_path / "run")
    for file in (tmp_path / "run" / "adapter").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-20])
    assert "damaged" in fails("predict", tmp_path / "run", "--text", "apple")


def test_merge_errors(world, tmp_path, fails):
    assert "nonlinear layer of its own" in fails("merge", world / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "is in use" in fails("merge", world / "lora", world / "model")
    assert "--max-shard-size must be a number of bytes above 0" in fails(
        "merge", world / "lora", tmp_path / "out", "--max-shard-size", "5 GiB"
    )


def test_unknown_method(fails):
    assert "There is no method 'loar'. Did you mean 'lora'?" in fails("methods", "loar")


def test_summary_errors(world, fails):
    for arguments in ([], [world / "lora", "rank=2"], ["--data", world / "data.csv"]):
        assert "Give the folder of one run" in fails("summary", *arguments)
    assert "--labels is for a model without a run" in fails("summary", world / "lora", "--model", world / "model", "--labels", "3")


def test_debug_shows_the_traceback(world, tmp_path, monkeypatch):
    monkeypatch.setenv("JPEFT_DEBUG", "1")
    with pytest.raises(ValueError, match="no method"):
        main(train_flags(world, tmp_path / "run", "--method", "lroa"))

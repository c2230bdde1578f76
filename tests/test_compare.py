"""Several methods on one task: runs, failures, continuation, and what the table and the picture say."""

import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from tiny_text import make_decoder, make_model, make_rows, write_csv

import jpeft.comparison.compare
from jpeft import registry
from jpeft.cli import main
from jpeft.comparison.compare import _run_config
from jpeft.comparison.report import collect, run_folders
from jpeft.comparison.rows import BASELINES, Row, parse_row, parse_rows
from jpeft.comparison.scatter import Line, Point, plot_scatter
from jpeft.training.config import CompareConfig
from jpeft.training.train import train

ROWS = ("head-only", "lora rank=2", "bitfit")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model and data, as fields of a configuration with few steps."""
    folder = tmp_path_factory.mktemp("base")
    make_model(folder / "model")
    write_csv(folder / "data.csv", make_rows(90))
    fields = {"model": str(folder / "model"), "data": str(folder / "data.csv"), "max_length": 8, "progress": "none"}
    return fields | {"steps": 4, "batch_size": 8, "log_every": 2}


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    """A comparison of three rows with two seeds, and the configuration that made it."""
    config = CompareConfig(**base, output=str(tmp_path_factory.mktemp("compare") / "out"), methods=ROWS, seeds=(0, 1))
    return config, jpeft.comparison.compare.compare(config, say=lambda line: None)


def flags(config, *more):
    """The configuration as flags."""
    names = ("model", "data", "max_length", "progress", "steps", "batch_size", "log_every", "output")
    pairs = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
    return ["compare", *pairs, "--methods", *config.methods, "--seeds", *map(str, config.seeds), *more]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_is_a_method_with_options_and_a_rate():
    row = parse_row("lora  rank=4 target=['query', 'value'] learning_rate=3e-4")
    assert row == Row("lora", ("rank=4", "target=['query', 'value']"), 3e-4)
    assert row.label == "lora rank=4 target=query,value learning_rate=0.0003"
    assert parse_row("lora").learning_rate == jpeft.methods()["lora"].learning_rate
    assert parse_row("lora", 0.5).learning_rate == 0.5
    assert parse_row("lora learning_rate=0.1", 0.5).learning_rate == 0.1
    assert [parse_row(name).label for name in BASELINES] == ["head only", "full fine-tuning"]


def test_all_rows_are_the_baselines_and_every_method():
    rows = parse_rows(["all"])
    assert [row.label for row in rows] == ["head only", *jpeft.methods(), "full fine-tuning"]
    assert {row.family for row in rows} == {"baseline", "selective", "additive", "reparameterized"}
    # Beside rows of one's own, each in its place.
    more = [row.label for row in parse_rows(["lora rank=2", "bitfit", "all"])]
    labels = [row.label for row in rows]
    assert more == [*labels[: labels.index("lora") + 1], "lora rank=2", *labels[labels.index("lora") + 1 :]]


def test_folders_of_different_rows_differ():
    texts = ("lora", "lora rank=4", "lora target=.*query/kernel", "lora target=.*query.kernel", "lora learning_rate=1e-5")
    names = [parse_row(text).folder(seed) for text in texts for seed in (0, 1)]
    assert len(set(names)) == len(names)
    # A program that takes brackets for a pattern must not be able to lose a run.
    names.append(parse_row("lora rank=4 target=['query','value'] dropout=0.1").folder(0))
    assert all(re.fullmatch(r"[A-Za-z0-9=.,+_-]+", name) for name in names)


def test_the_folder_of_an_earlier_version_is_continued(tmp_path):
    row = parse_row("lora target=['query','value']")
    config = CompareConfig(model="m", data="d", output=str(tmp_path))
    assert Path(_run_config(config, row, 1).output).name == row.folder(1)
    (tmp_path / row.former_folder(1)).mkdir()
    assert row.former_folder(1) == "lora-target=['query','value']-0.003-1"
    assert Path(_run_config(config, row, 1).output).name == row.former_folder(1)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_every_row_and_seed_is_an_ordinary_run(done):
    config, comparison = done
    folders = run_folders(config.output)
    assert len(folders) == 6
    assert [entry.row.label for entry in comparison.entries] == ["head only", "lora rank=2", "bitfit"]
    for entry in comparison.entries:
        assert sorted(entry.results) == [0, 1]
        for seed, name in entry.folders.items():
            about = json.loads((Path(config.output) / name / "config.json").read_text())
            assert (about["run"]["method"], about["run"]["seed"]) == (entry.row.method, seed)
            assert about["learning_rate"] == entry.row.learning_rate


def test_the_table_is_what_the_runs_say(done):
    config, comparison = done
    head, body = comparison.table()
    assert head[:6] == ["method", "test accuracy", "validation accuracy", "trained", "stored", "changed"]
    cells = {row[0]: dict(zip(head, row)) for row in body}
    for entry in comparison.entries:
        results = [json.loads((Path(config.output) / name / "result.json").read_text()) for name in entry.folders.values()]
        row = cells[entry.row.label]
        for split in ("test", "validation"):
            scores = [result[split]["accuracy"] for result in results]
            assert row[f"{split} accuracy"] == f"{statistics.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}"
        for name in ("trained", "stored", "changed"):
            assert row[name] == f"{results[0][name]:,}"
        assert row["GFLOP/step"] == f"{results[0]['flops'] * 1e-9:,.4g}"
        seconds = statistics.median(result["step_seconds"] for result in results)
        assert float(row["ms/step"]) == pytest.approx(1e3 * seconds, abs=0.51)
    # The head of three classes alone, and all that it changes.
    assert cells["head only"]["trained"] == cells["head only"]["changed"] == str(16 * 3 + 3)


def test_the_files_say_the_same(done):
    config, comparison = done
    output = Path(config.output)
    values = json.loads((output / "results.json").read_text())
    assert values == json.loads(json.dumps(comparison.to_json()))
    for row, entry in zip(values["rows"], comparison.entries):
        assert row["mean"] == pytest.approx(np.mean(entry.scores("test", "accuracy")))
        assert [run["seed"] for run in row["runs"]] == [0, 1]
    assert values["settings"]["batch_size"] == 8
    head, body = comparison.table()
    lines = (output / "table.md").read_text().splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:5])] == [head, *body]
    assert "4 steps, batches of 8 × 8 tokens; mean ± standard deviation over seeds 0, 1" in lines[6]
    height, width, _ = imread(output / "compare.png").shape
    assert width > height > 500


def test_columns_can_be_chosen(done):
    _, comparison = done
    assert comparison.markdown(["method", "trained"]).splitlines()[:2] == ["| method | trained |", "| --- | ---: |"]
    with pytest.raises(ValueError, match=r"no columns \['cost'\]; it has \['method'"):
        comparison.table(["method", "cost"])


def test_again_trains_nothing_and_another_seed_only_what_is_missing(done, monkeypatch, capfd):
    config, _ = done
    trained = []
    monkeypatch.setattr(jpeft.comparison.compare, "train", lambda run: trained.append(run) or train(run))
    assert main(flags(config)) == 0
    assert trained == []
    out = capfd.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["method", "head", "lora", "bitfit", "results.json,"]
    assert main(["report", config.output, "--output", f"{config.output}-report"]) == 0
    assert trained == []
    # The same numbers from the folders alone, and the head and the methods in their own order.
    again = [json.loads((Path(folder) / "results.json").read_text()) for folder in (config.output, f"{config.output}-report")]
    assert [row["label"] for row in again[1]["rows"]] == ["head only", "bitfit", "lora rank=2"]
    assert sorted(again[0]["rows"], key=str) == sorted(again[1]["rows"], key=str)


def test_another_configuration_is_refused_before_anything_runs(done, monkeypatch, capfd):
    config, _ = done
    monkeypatch.setattr(jpeft.comparison.compare, "train", None)
    assert main(flags(config, "--weight-decay", "0.5")) == 2
    err = capfd.readouterr().err
    assert "Cannot resume" in err
    assert "--weight-decay (0.01 before, 0.5 now)" in err


def test_runs_of_different_settings_are_not_put_in_one_table(done, base, tmp_path):
    config, comparison = done
    entry = comparison.entries[0]
    first = Path(config.output) / entry.folders[0]
    other = tmp_path / "other"
    other.mkdir()
    about = json.loads((first / "config.json").read_text())
    del about["checksum"]  # of these contents; without one, a record of an earlier version
    (other / "result.json").write_text((first / "result.json").read_text())
    (other / "config.json").write_text(json.dumps(about | {"run": about["run"] | {"max_length": 4}}))
    with pytest.raises(ValueError, match=r"cannot be compared: they differ in max_length \(8 and 4\)"):
        collect([first, other])
    (other / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="are the same run: head only, seed 0"):
        collect([first, other])
    # Other data under the same name is told, because it may be meant.
    changed = about | {"run": about["run"] | {"seed": 7}, "data": about["data"] | {"train": "0"}}
    (other / "config.json").write_text(json.dumps(changed))
    assert "not all runs have seen the same data" in collect([first, other]).notes[0]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_one_failed_method_does_not_lose_the_others(base, tmp_path, capfd):
    # Refused by the model (there are two layers), and a loss that is not finite.
    rows = ("freeze top=9", "lora rank=2 learning_rate=1e30", "bitfit")
    config = CompareConfig(**base | {"clip": None}, output=str(tmp_path / "out"), methods=rows, seeds=(0,))
    assert main(flags(config, "--clip", "none")) == 1
    out = capfd.readouterr().out
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    by_label = {row["label"]: row for row in values["rows"]}
    assert set(by_label) == {"freeze top=9", "lora rank=2 learning_rate=1e+30", "bitfit"}
    assert by_label["bitfit"]["errors"] == []
    assert 0 <= by_label["bitfit"]["mean"] <= 1
    for label, message in (("freeze top=9", "the model has 2 layers"), ("lora rank=2 learning_rate=1e+30", "training diverged")):
        assert by_label[label]["mean"] is None
        assert message in by_label[label]["errors"][0]["error"]
        assert f"{label}, seed 0 failed: " in (tmp_path / "out" / "table.md").read_text()
        assert any(line.startswith(f"{label}  ") and " failed  " in line for line in out.splitlines())


def test_what_does_not_apply_is_left_out_of_all_methods(base, tmp_path, monkeypatch):
    # Half a percent of a model this small is less than its head: fish_mask refuses.
    keep = {name: registry.methods()[name] for name in ("fish_mask", "bitfit")}
    monkeypatch.setattr(jpeft, "methods", lambda: keep)
    comparison = jpeft.comparison.compare.compare(CompareConfig(**base, output=str(tmp_path / "out"), seeds=(0,)), say=lambda line: None)
    assert [entry.row.label for entry in comparison.entries] == ["head only", "bitfit", "full fine-tuning"]
    assert comparison.failures == ()
    assert [row.label for row in comparison.left_out] == ["fish_mask"]
    assert comparison.notes[0].startswith("fish_mask does not apply: ")
    full = comparison.entries[-1].results[0]
    assert full["trained"] == full["changed"] > 10 * comparison.entries[1].results[0]["trained"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "lroa"], "no method 'lroa'"),
        (["--methods", "lora rnak=3"], "rnak"),
        (["--methods", "lora", "lora"], "The row 'lora' is given twice"),
        (["--methods", "lora learning_rate=fast"], "not a positive number"),
        (["--seeds", "1", "1"], "different numbers"),
        (["--label", "class"], "no column 'class'"),
        (["--model", "/no/where"], "no folder /no/where"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(base, tmp_path, capfd, more, message):
    config = CompareConfig(**base, output=str(tmp_path / "out"), methods=("bitfit", "lora"), seeds=(0,))
    assert main(flags(config, *more)) == 2
    err = capfd.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_report_needs_runs(tmp_path, capfd):
    assert main(["report", str(tmp_path)]) == 2
    assert "no finished runs" in capfd.readouterr().err


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(base, tmp_path):
    """Ctrl-C leaves a table of what is finished; kill -9 leaves the runs; the same command then does the rest."""
    output = tmp_path / "out"
    config = CompareConfig(**base | {"steps": 60}, output=str(output), methods=("bitfit", "lora rank=2"), seeds=(0,))
    arguments = flags(config, "--checkpoint-every", "2")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def stop(signum, row):
        command = [sys.executable, "-m", "jpeft", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        deadline = time.monotonic() + 300
        while not list(output.glob(f"{row}*/checkpoints/*/checksums.json")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=120)
        return process.returncode, errors

    code, _ = stop(signal.SIGKILL, "bitfit")
    assert code == -signal.SIGKILL
    code, errors = stop(signal.SIGINT, "lora")
    assert code == 130
    assert "continue with: jpeft compare" in errors
    assert "'lora rank=2'" in errors
    assert "--resume" not in errors
    assert [row["label"] for row in json.loads((output / "results.json").read_text())["rows"]] == ["bitfit"]
    assert main(arguments) == 0
    assert [row["label"] for row in json.loads((output / "results.json").read_text())["rows"]] == ["bitfit", "lora rank=2"]
    # Continued, not begun again: no step is logged twice, none is missing.
    for run in run_folders(output):
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
        assert steps == list(range(2, 61, 2))


def test_text_generation_is_measured_by_the_frozen_base(tmp_path, base):
    make_decoder(tmp_path / "model")
    rows = [json.dumps({"text": text, "target": f"some {kind}"}) for text, kind in make_rows(90)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    fields = base | {"model": str(tmp_path / "model"), "data": str(tmp_path / "pairs.jsonl"), "max_length": 12, "steps": 20}
    methods = ("head-only", "lora learning_rate=0.02", "hard_prompt tokens='some words:'")
    config = CompareConfig(**fields, output=str(tmp_path / "out"), task="generation", target="target", methods=methods, seeds=(0,))
    comparison = jpeft.comparison.compare.compare(config, say=lambda line: None)
    nothing_trained = [(entry.label, entry.median("trained") == 0) for entry in comparison.entries]
    assert nothing_trained == [("frozen base", True), (methods[1], False), (methods[2], True)]
    base, lora, words = (entry.scores("test", "perplexity")[0] for entry in comparison.entries)
    assert 1 < lora < base
    assert abs(words / base - 1) > 1e-4  # the words were read
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (values["metric"], values["higher_is_better"]) == ("perplexity", False)
    assert values["rows"][0]["runs"][0]["steps"] == 0


def test_the_benchmark_fills_the_readme(done, tmp_path):
    _, comparison = done
    spec = importlib.util.spec_from_file_location("scipy_docs", Path(__file__).parents[1] / "benchmarks" / "scipy_docs.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    readme, results = tmp_path / "README.md", tmp_path / "benchmarks" / "results"
    readme.write_text("before\n<!-- compare -->\nold\n<!-- /compare -->\nafter\n")
    for _ in range(2):
        benchmark.write(comparison, benchmark.PAGES["all"], results, readme)
        lines = readme.read_text().splitlines()
        assert lines[:3] == ["before", "<!-- compare -->", "![quality against trained parameters](benchmarks/results/compare.png)"]
        assert lines[-2:] == ["<!-- /compare -->", "after"]
        assert lines[4] == f"| {' | '.join(benchmark.PAGES['all'].columns)} |"
        assert [line.split("|")[1].strip() for line in lines[6:9]] == ["head only", "lora rank=2", "bitfit"]
    assert (results / "compare.png").stat().st_size < 200_000
    table, caption = comparison.markdown().split("\n\n", 1)
    assert f"{table}\n\nall-MiniLM-L6-v2 on SciPy's documentation" in (results / "compare.md").read_text()
    assert caption.startswith("model on data.csv, 4 steps")
    readme.write_text("no place")
    with pytest.raises(SystemExit, match="has no place for the table"):
        benchmark.write(comparison, benchmark.PAGES["all"], results, readme)
    # The files that are filled have one.
    for page in benchmark.PAGES.values():
        assert len(benchmark.MARKED.findall(page.document.read_text())) == 1


# --- the picture ------------------------------------------------------------------------------------------------------


def test_labels_do_not_overlap(tmp_path, monkeypatch):
    """Twelve points in a narrow band: every text is inside, clear of the other texts and of all points."""
    rng = np.random.default_rng(0)
    points = [Point(f"method_{i}", 10 ** rng.uniform(4, 6), rng.uniform(0.88, 0.9), 0.004, "additive") for i in range(12)]
    figures = []
    monkeypatch.setattr(jpeft.comparison.scatter, "write_figure", lambda figure, path: figures.append(figure))
    plot_scatter("unused", points, [Line("head only", 0.82), Line("full fine-tuning", 0.93)], x_label="x", y_label="y")
    (axes,) = figures[0].axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 14
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    centres = [axes.transData.transform((point.x, point.y)) for point in points]
    frame = axes.get_window_extent()
    for box in boxes:
        assert not any(box.contains(*centre) for centre in centres)
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1


def test_lines_of_nearly_one_height_are_named_apart(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(jpeft.comparison.scatter, "write_figure", lambda figure, path: figures.append(figure))
    lines = [Line("base", 188.0), Line("no words", 188.0), Line("words of some length, " * 5, 185.0), Line("full", 60.0)]
    plot_scatter("unused", [Point("a", 5.0, 120.0, 0.0, "additive")], lines, x_label="x", y_label="y")
    (axes,) = figures[0].axes
    assert sorted(text.get_text() for text in axes.texts if text.get_text() != "a")[:2] == ["base, no words 188.0", "full 60.0"]
    boxes = [text.get_window_extent() for text in axes.texts]
    heights = [axes.transData.transform((1.0, line.y))[1] for line in lines]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.y0 < y < box.y1 for y in heights)
        assert box.x1 <= axes.get_window_extent().x1


def test_a_baseline_is_not_named_where_a_point_is(monkeypatch):
    figures = []
    monkeypatch.setattr(jpeft.comparison.scatter, "write_figure", lambda figure, path: figures.append(figure))
    points = [Point("left", 4000.0, 0.857, 0.002, "additive"), Point("right", 4e6, 0.94, 0.0, "selective")]
    plot_scatter("unused", points, [Line("head only", 0.857), Line("full", 0.93)], x_label="x", y_label="y")
    (axes,) = figures[0].axes
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    for point in points:
        x, y = axes.transData.transform((point.x, point.y))
        for box in boxes.values():
            assert not (box.x0 < x + 5 and x - 5 < box.x1 and box.y0 < y + 5 and y - 5 < box.y1)
    # At its usual end where nothing is in the way.
    assert boxes["full 0.930"].x0 < boxes["head only 0.857"].x0


@pytest.mark.parametrize("xs", [(2.9,), (1000.0, 1300.0), (4000.0, 5000.0), (700.0, 6500.0), (1e3, 9e4), (10.0, 1e6)])
def test_every_axis_has_tick_labels(monkeypatch, xs):
    figures = []
    monkeypatch.setattr(jpeft.comparison.scatter, "write_figure", lambda figure, path: figures.append(figure))
    points = [Point("lora target=$", x, 0.5, 0.0, "selective") for x in xs]
    plot_scatter("unused", points, [Line("head $only", 0.4)], x_label="x", y_label="y", title="2 methods on $data\nand more")
    (axes,) = figures[0].axes
    low, high = axes.get_xlim()
    shown = [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert len([text for text in shown if text]) >= 2


def test_a_picture_of_little(tmp_path):
    for name, points, lines in (
        ("one", [Point("a", 5.0, 0.5, 0.0, "selective")], []),
        ("lines", [], [Line("head only", 0.5)]),
    ):
        plot_scatter(tmp_path / f"{name}.png", points, lines, x_label="x", y_label="y")
        assert imread(tmp_path / f"{name}.png").std() > 0

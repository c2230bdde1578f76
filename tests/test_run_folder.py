"""The folder of a run: one writer, nothing deleted that is not a run's, nothing written through a link, damage that blocks nothing."""

import dataclasses
import json
import os
import re
import shutil
import socket
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import bits
from tiny_text import make_model, make_rows, write_csv

import jpeft.models
from jpeft.checkpoint.records import sealed
from jpeft.cli import main
from jpeft.comparison.rows import parse_row
from jpeft.training.config import TrainConfig
from jpeft.training.overwrite import check_overwrite
from jpeft.training.run import load_run
from jpeft.training.run_folder import RunFolder, config_checksum
from jpeft.training.run_lock import RunLock
from jpeft.training.train import train
from jpeft.tree.paths import path_str


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, data, and the flags of a short run; the run itself, finished."""
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    write_csv(folder / "data.csv", make_rows(48))
    places = {"model": str(folder / "model"), "data": str(folder / "data.csv"), "output": str(folder / "run")}
    config = TrainConfig(**places, max_length=8, batch_size=8, steps=4, checkpoint_every=2, log_every=1, progress="none")
    train(config)
    return folder, config


@pytest.fixture
def run(world, tmp_path):
    """A copy of the finished run, and its configuration for continuing it."""
    folder, config = world
    shutil.copytree(folder / "run", tmp_path / "run")
    return tmp_path / "run", dataclasses.replace(config, output=str(tmp_path / "run"), resume=True)


@pytest.fixture
def nothing_loads(monkeypatch):
    """The model must not be loaded."""

    def fail(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("jpeft.training.prepare.load_base", fail)
    monkeypatch.setattr("jpeft.training.run.load_base", fail)


def unfinish(run):
    """As it stood just before its result was written."""
    (run / "result.json").unlink()
    shutil.rmtree(run / "adapter")


def hidden(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".") or path.name == "lock"]


def tree_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- one writer -------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_in_one_line(run, nothing_loads):
    path, config = run
    unfinish(path)
    other = RunLock(path)
    other.acquire()
    before = tree_of(path)
    message = f"The run in {re.escape(str(path))} is in use by process {os.getpid()} on {re.escape(socket.gethostname())}: wait until"
    for changes in ({}, {"resume": False, "overwrite": True}):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(config, **changes))
    assert tree_of(path) == before
    other.release()
    assert hidden(path) == []


def test_a_row_that_another_process_trains_is_named(world, tmp_path, capfd):
    folder, _ = world
    flags = ["compare", "--model", str(folder / "model"), "--data", str(folder / "data.csv"), "--output", str(tmp_path), "--steps", "2"]
    other = RunLock(tmp_path / parse_row("bitfit").folder(0))
    other.acquire()
    assert main([*flags, "--max-length", "8", "--progress", "none", "--methods", "bitfit", "--seeds", "0"]) == 1
    assert f"bitfit, seed 0 failed: The run in {other.folder} is in use by process {os.getpid()}" in capfd.readouterr().out
    other.release()
    # Made with the lock, and empty.
    assert not other.folder.exists()


def test_a_lock_ends_with_its_process(run):
    path, config = run
    (path / "lock").write_text("1 elsewhere\n")
    (path / ".config.json.0123abcd.partial").write_text("{")
    train(config)
    assert hidden(path) == []
    (path / "lock").write_text("")
    load_run(path)
    assert hidden(path) == []


# --- overwrite --------------------------------------------------------------------------------------------------------


def test_overwrite_deletes_neither_model_nor_data(world, run, monkeypatch, nothing_loads):
    folder, config = world
    path, _ = run
    config = dataclasses.replace(config, output=str(path), overwrite=True)
    shutil.copytree(folder / "model", path / "merged")
    shutil.copytree(path, path.parent / "checkpoints")  # looks like a file of a run, and holds a run
    before = tree_of(path.parent)
    (path.parent / "to-model").symlink_to(path / "merged")
    for changes, message in (
        ({"model": str(path / "merged")}, "contains the model"),
        ({"model": str(path.parent / "to-model")}, "contains the model"),
        ({"data": str(path)}, "is the data"),
        ({"data": str(path.parent)}, "is inside of the data"),
        ({"data": str(path / "metrics.jsonl")}, "contains the data"),
        ({"output": str(path.parent)}, "not the folder of a training run"),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(config, **changes))
    monkeypatch.chdir(path)
    with pytest.raises(ValueError, match="is the working directory"):
        train(config)
    assert tree_of(path.parent) == before


@pytest.mark.parametrize("name", ["notes.txt", ".git", "checkpoints/notes.txt", "adapter/README.md"])
def test_overwrite_deletes_only_runs(run, name):
    path, _ = run
    (path / name).write_text("")
    with pytest.raises(ValueError, match=f"no run wrote {path / name}"):
        check_overwrite(path, {})


def test_overwrite_takes_a_damaged_run(run):
    path, config = run
    for content in (None, "{", b"\xff\xfe"):
        (path / "config.json").unlink(missing_ok=True)
        if content is not None:
            (path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        RunFolder(path).check(dataclasses.replace(config, resume=False, overwrite=True))
    (path.parent / "link").symlink_to(path)
    with pytest.raises(ValueError, match="is a link to"):
        check_overwrite(path.parent / "link", {})


# --- links ------------------------------------------------------------------------------------------------------------


def test_nothing_is_written_through_a_link(world, run):
    path, config = run
    unfinish(path)
    outside = path.parent / "outside"
    outside.mkdir()
    for name in ("metrics.jsonl", "checkpoints"):
        shutil.move(path / name, outside / name)
        (path / name).symlink_to(outside / name)
        before = tree_of(outside)
        with pytest.raises(ValueError, match=f"{path / name} is a link to"):
            train(config)
        assert tree_of(outside) == before
        (path / name).unlink()
        shutil.move(outside / name, path / name)
    # Whole files and folders take the place of a link.
    for name in ("curve.png", "result.json", "adapter", "checkpoints/7"):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(outside / Path(name).name)
    for name in ("adapter", "7"):
        (outside / name).mkdir()
        (outside / name / "precious").write_text("")
    before = tree_of(outside)
    with pytest.warns(UserWarning, match="checkpoints/7 is not the folder of a checkpoint"):
        train(config)
    assert tree_of(outside) == before
    assert not any(p.is_symlink() for p in path.rglob("*"))
    assert bits(load_run(path).peft.adapter) == bits(load_run(world[0] / "run").peft.adapter)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", b"{", "result.json cannot be read"),
        ("result.json", b'{"steps": "x"}', "result.json is damaged"),
        ("metrics.jsonl", b'\xff\xff\n{"step": 1}\n[]\n', "metrics.jsonl is damaged: line 1 is left out .3 such lines"),
        ("checkpoints/4/checksums.json", b"[]", "checkpoints/4 is damaged and is left out: .*4/checksums.json is damaged"),
        ("adapter/jpeft.json", b"{}", "jpeft.json' is damaged .it has no 'format'.*The run is continued from its checkpoints"),
    ],
)
def test_damage_blocks_no_checkpoint(world, run, name, content, message):
    path, config = run
    if name.startswith(("metrics", "checkpoints")):
        unfinish(path)
    (path / name).write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(config)
    assert any(re.search(message, str(warning.message)) for warning in caught)
    assert bits(load_run(path).peft.adapter) == bits(load_run(world[0] / "run").peft.adapter)
    assert RunFolder(path).finished


def test_checksums_that_are_all_damaged(world, run):
    path, config = run
    unfinish(path)
    for file in path.glob("checkpoints/*/checksums.json"):
        values = json.loads(file.read_text())
        # A digit of one number.
        values["files"] = {name: number ^ 1 for name, number in values["files"].items()}
        file.write_text(json.dumps(values))
    with pytest.warns(UserWarning) as caught:
        train(config)
    (first, second) = sorted(text for warning in caught if "checkpoints/" in (text := str(warning.message)))
    assert re.search("4/checksums.json is damaged .*so this one is used unchecked", first)
    assert re.search("checkpoints/2 is damaged and is left out: .*2/checksums.json", second)
    assert bits(load_run(path).peft.adapter) == bits(load_run(world[0] / "run").peft.adapter)


@pytest.mark.parametrize("part", ["classifier", "bert"])
def test_the_last_bits_of_a_new_head_do_not_matter(world, run, part, monkeypatch):
    """Another compiler may draw the head otherwise; the checkpoints hold it. Any other difference of the base is refused."""
    path, config = run
    unfinish(path)
    shutil.rmtree(path / "checkpoints" / "4")
    load = jpeft.models.load

    def load_nudged(*args, **options):
        loaded = load(*args, **options)
        nudge = lambda keys, leaf: np.nextafter(leaf, np.inf) if path_str(keys).startswith(part) else leaf
        return dataclasses.replace(loaded, params=jax.tree_util.tree_map_with_path(nudge, loaded.params))

    monkeypatch.setattr("jpeft.models.load", load_nudged)
    if part == "bert":
        with pytest.raises(ValueError, match="its base changed"):
            train(config)
        return
    train(config)
    monkeypatch.undo()
    assert bits(load_run(path).peft.adapter) == bits(load_run(world[0] / "run").peft.adapter)


def test_files_that_do_not_belong_together(world, run, nothing_loads):
    path, _ = run
    about = json.loads((path / "config.json").read_text())
    about["labels"] = about["labels"][::-1]
    (path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="config.json was changed after jpeft wrote it"):
        load_run(path)
    (path / "config.json").write_text(json.dumps(sealed(about, config_checksum)))
    with pytest.raises(ValueError, match="is not that of the run that .*config.json records"):
        load_run(path)


def test_another_tokenizer_or_configuration_of_the_base_is_refused(world, run):
    path, _ = run
    folder, _ = world
    model = path.parent / "model"
    shutil.copytree(folder / "model", model)
    about = json.loads((path / "config.json").read_text())
    about["run"]["model"] = str(model)
    (path / "config.json").write_text(json.dumps(about))
    # Written by another version of transformers.
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"transformers_version": "9.9"}, indent=7))
    load_run(path)
    (model / "config.json").write_text(json.dumps(values | {"layer_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match="its config.json changed since then"):
        load_run(path)
    (model / "config.json").write_text(json.dumps(values))
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text().replace("apple", "appel"))
    with pytest.raises(ValueError, match="its tokenizer.json changed since then"):
        load_run(path)


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_an_output_that_cannot_be_written_is_found_first(world, tmp_path, capfd, nothing_loads):
    folder, config = world
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "run", tmp_path / ("x" * 256), Path("/proc/run")):
        with pytest.raises(ValueError, match=f"output folder {output} cannot be written|in use"):
            train(dataclasses.replace(config, output=str(output)))
        for command in (["merge", folder / "run", output], ["predict", folder / "run", "--text", "a", "--output", output]):
            assert main(list(map(str, command))) == 2
            error = capfd.readouterr().err
            assert error.count("\n") == 1
            assert str(output) in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_of_the_umask(run, umask):
    path, config = run
    unfinish(path)
    before = os.umask(umask)
    try:
        train(dataclasses.replace(config, export=True))
    finally:
        os.umask(before)
    new = [path / "result.json", path / "metrics.jsonl", path / "curve.png", *(path / "adapter").rglob("*"), *(path / "merged").rglob("*")]
    modes = {oct(p.stat().st_mode & 0o777) for p in new if p.is_file()}
    assert modes == {oct(0o666 & ~umask)}

"""A killed, interrupted or damaged run goes on to the very same adapter as an unbroken one.

Real processes: what `kill -9` leaves behind cannot be had in another way.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_train import bits, records
from tiny_text import make_model, make_rows, write_csv

from jpeft.checkpoint.records import sealed
from jpeft.cli import main
from jpeft.training.run import load_run
from jpeft.training.run_folder import config_checksum

ROOT = Path(__file__).parents[1]
STEPS = 120


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags of a run with dropout, and its unbroken result, made through the command line as well."""
    folder = tmp_path_factory.mktemp("base")
    make_model(folder / "model", dropout=0.2)
    write_csv(folder / "data.csv", make_rows(150))
    flags = ["train", "--model", str(folder / "model"), "--data", str(folder / "data.csv"), "--max-length", "8"]
    flags += ["--method", "lora", "--batch-size", "8", "--steps", str(STEPS), "--eval-every", "25", "--log-every", "7"]
    flags += ["--checkpoint-every", "5", "--keep-best", "--grad-accum", "2"]
    finish([*flags, "--output", str(folder / "unbroken")])
    return flags, folder / "unbroken"


def start(arguments):
    """`python -m jpeft ...` as a process of its own."""
    # Compiled as conftest.py has it, for speed; not in this process, because only equal programs give equal bits.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "jpeft", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(arguments):
    """The same, to the end; what it printed on standard output and standard error."""
    process = start(arguments)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output, errors


def steps_on_disk(run):
    """Steps of the complete checkpoints of a run."""
    return sorted(int(p.parent.name) for p in (run / "checkpoints").glob("*/checksums.json"))


def stop_midway(process, run, signum, after=10):
    """Sends the signal once there is a checkpoint of step `after` or later, and waits; None if the run was too fast."""
    deadline = time.monotonic() + 300
    while not any(step >= after for step in steps_on_disk(run)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signum)
    output, errors = process.communicate(timeout=120)
    assert not (run / "result.json").exists(), "the run was over before the signal came"
    return output, errors


def assert_same(run, unbroken):
    """Adapter bit for bit, and all that is no timing."""
    assert bits(load_run(run).peft.adapter) == bits(load_run(unbroken).peft.adapter)
    assert records(run) == records(unbroken)
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, unbroken)]
    for result in results:
        # Orbax splits the same arrays into files as it happens to have time.
        for name in ("seconds", "compile_seconds", "step_seconds", "adapter_bytes"):
            del result[name]
    assert results[0] == results[1]


@pytest.mark.slow
def test_kill_and_resume_is_bit_for_bit(base, tmp_path):
    flags, unbroken = base
    run = tmp_path / "run"
    process = start([*flags, "--output", str(run)])
    stop_midway(process, run, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    # A second kill, of the continuation, by a process that starts from what the first left behind.
    before = steps_on_disk(run)[-1]
    process = start([*flags, "--output", str(run), "--resume"])
    stop_midway(process, run, signal.SIGKILL, after=before + 10)
    # What a kill inside a write leaves: half a line.
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 119, "epo')
    output, _ = finish([*flags, "--output", str(run), "--resume"])
    step = int(output.split(f"continuing {run} after step ")[1].split()[0])
    assert step >= before + 10
    assert step < STEPS
    assert_same(run, unbroken)


@pytest.mark.slow
def test_killed_in_each_stage(base, tmp_path):
    """FAR, once with whole layers and once with learners; `test_train_stages.py` has every method, from chosen checkpoints."""
    flags, _ = base
    # The last of two flags counts.
    flags = [*flags, "--method", "far", "--steps", "60", "--checkpoint-every", "4", "--eval-every", "9"]
    finish([*flags, "--output", str(tmp_path / "unbroken")])
    begins = [0, *(line["step"] for line in records(tmp_path / "unbroken") if line["split"] == "stage")]
    assert len(begins) == 2
    run, resume = tmp_path / "run", []
    for begin in begins:
        process = start([*flags, "--output", str(run), *resume])
        stop_midway(process, run, signal.SIGKILL, after=begin + 1)
        resume = ["--resume"]
    finish([*flags, "--output", str(run), "--resume"])
    assert_same(run, tmp_path / "unbroken")


@pytest.mark.slow
def test_ctrl_c_saves_first_and_says_how_to_go_on(base, tmp_path):
    flags, unbroken = base
    run = tmp_path / "run"
    process = start([*flags, "--output", str(run), "--checkpoint-every", "10"])
    _, errors = stop_midway(process, run, signal.SIGINT)
    assert process.returncode == 130
    step = steps_on_disk(run)[-1]
    assert f"interrupted after step {step}, which is saved in {run}; continue with: jpeft train" in errors
    assert errors.rstrip().endswith("--resume")
    assert (run / "curve.png").exists()
    finish([*flags, "--output", str(run), "--resume", "--checkpoint-every", "10"])
    assert_same(run, unbroken)


@pytest.mark.slow
def test_resume_without_a_checkpoint_starts_over(base, tmp_path):
    flags, unbroken = base
    run = tmp_path / "run"
    # As killed between config.json and the first checkpoint.
    run.mkdir()
    run.joinpath("config.json").write_text((unbroken / "config.json").read_text())
    run.joinpath("metrics.jsonl").write_text('{"step": 7, "split": "train", "loss": 1.0}\n')
    finish([*flags, "--output", str(run), "--resume"])
    assert_same(run, unbroken)


@pytest.mark.slow
def test_damaged_checkpoint_is_left_out(base, tmp_path):
    flags, unbroken = base
    run = tmp_path / "run"
    copy_unfinished(unbroken, run)
    newest = run / "checkpoints" / str(STEPS)
    for file in newest.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    output, errors = finish([*flags, "--output", str(run), "--resume"])
    (line,) = [line for line in errors.splitlines() if not line.startswith("note: Pretrained checkpoint")]
    assert line.startswith(f"warning: checkpoint {newest} is damaged")
    assert f"after step {STEPS - 5}" in output
    assert_same(run, unbroken)
    # The time is that of both processes.
    before = json.loads((run / "checkpoints" / str(STEPS - 5) / "progress" / "metadata").read_text())["seconds"]
    assert 0 < before < json.loads((run / "result.json").read_text())["seconds"]


def test_finished_run_just_reports(base, capfd):
    flags, unbroken = base
    before = {p: p.stat().st_mtime_ns for p in unbroken.rglob("*") if p.is_file()}
    assert main([*flags, "--output", str(unbroken), "--resume"]) == 0
    assert f"{STEPS} steps" in capfd.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in unbroken.rglob("*") if p.is_file()}


def test_resume_with_another_configuration_is_refused(base, tmp_path, capfd):
    flags, unbroken = base
    run = tmp_path / "run"
    copy_unfinished(unbroken, run)
    assert main([*flags, "--output", str(run), "--resume", "--seed", "1", "--weight-decay", "0.5", "--keep", "5"]) == 2
    err = capfd.readouterr().err
    assert "error: Cannot resume" in err
    assert "--weight-decay (0.01 before, 0.5 now)" in err
    assert "--seed (0 before, 1 now)" in err
    assert "keep " not in err


def test_resume_on_other_data_or_base_is_refused(base, tmp_path, capfd):
    flags, unbroken = base
    run = tmp_path / "run"
    copy_unfinished(unbroken, run)
    about = json.loads((run / "config.json").read_text())
    about["data"]["train"] = about["base"] = about["pretrained"] = about["base_files"]["tokenizer.json"] = "0"
    (run / "config.json").write_text(json.dumps(sealed(about, config_checksum)))
    assert main([*flags, "--output", str(run), "--resume"]) == 2
    assert "since it began, its base, data, tokenizer.json changed" in capfd.readouterr().err


def copy_unfinished(source, target):
    """A run as it stood just before its result was written."""
    shutil.copytree(source, target)
    (target / "result.json").unlink()
    shutil.rmtree(target / "adapter")


def test_bits_sees_a_single_bit():
    array = np.ones(3, np.float32)
    other = np.nextafter(array, 2, dtype=np.float32)
    assert bits({"a": array}) != bits({"a": other})

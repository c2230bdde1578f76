"""tpu/finetune_lora.py on eight devices of one process: plan, training, and a second start that finds the run finished."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_text import make_decoder, make_rows, write_csv

ROOT = Path(__file__).parents[1]


def finetune(*flags):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, ROOT / "tpu" / "finetune_lora.py", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
def test_plans_trains_and_finds_itself_finished(tmp_path):
    model, run = make_decoder(tmp_path / "model"), tmp_path / "run"
    rows = make_rows(40)
    for name, part in (("train", rows[:32]), ("validation", rows[32:])):
        write_csv(tmp_path / "data" / f"{name}.csv", part)
    flags = ["--model", str(model), "--data", str(tmp_path / "data"), "--target", "label", "--output", str(run), "--resume"]
    flags += ["--max-length", "16", "--batch-size", "16", "--steps", "6", "--log-every", "2", "rank=2"]
    done = finetune(*flags)
    assert done.returncode == 0, done.stderr
    plan, trained = done.stdout.split("step 2/6")
    assert "1 processes, 8 devices (cpu)" in plan
    assert "8 devices: data=1, fsdp=8, tensor=1" in plan
    assert "Activations of 16 sequences of 16 tokens" in plan
    assert "step 6/6" in trained
    assert "validation: loss " in trained
    about = json.loads((run / "config.json").read_text())["run"]
    assert {name: about[name] for name in ("method", "dtype", "remat", "scan", "mesh")} == {
        "method": "lora", "dtype": "bfloat16", "remat": True, "scan": True, "mesh": "fsdp=-1"
    }  # fmt: skip
    assert json.loads((run / "result.json").read_text())["steps"] == 6
    again = finetune(*flags)
    assert (again.returncode, again.stdout) == (0, f"the run in {run} is finished\n")


@pytest.mark.slow
def test_trains_what_cannot_be_planned(tmp_path):
    """FishMask is told statistics of the data, and a plan has none: the first process may not stop while others go on."""
    model, run = make_decoder(tmp_path / "model"), tmp_path / "run"
    for name in ("train", "validation"):
        write_csv(tmp_path / "data" / f"{name}.csv", make_rows(16))
    flags = ["--model", str(model), "--data", str(tmp_path / "data"), "--target", "label", "--output", str(run), "--method", "fish_mask"]
    done = finetune(*flags, "--max-length", "16", "--batch-size", "8", "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert "no plan: " in done.stdout
    assert "step 1/1" in done.stdout


@pytest.mark.slow
def test_refuses_other_tasks_in_one_line(tmp_path):
    refused = finetune("--task", "sequence-classification", "--data", "rows.csv", "--output", str(tmp_path / "run"))
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: task 'sequence-classification': this script fine-tunes decoders; `jpeft train` does the others, with --mesh as well\n"
    )

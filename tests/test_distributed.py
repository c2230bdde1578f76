"""Two processes on one machine are one run: the same losses and adapter, one set of files, and a kill or SIGTERM loses nothing."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_train import bits, records
from tiny_text import make_base

from jpeft import distributed, sharding
from jpeft.training.config import TrainConfig
from jpeft.training.devices import find_mesh
from jpeft.training.run import load_run
from jpeft.training.train import train

ROOT = Path(__file__).parents[1]
STEPS = 24

# What every process runs: command lines, after it has joined the others. A pause makes steps slow enough to be met between two. One that
# is to die does so when a checkpoint is there and the other is in that step already, where it waits for this one's gradients.
WORKER = """
import json, os, signal, sys, time
from jpeft import distributed
coordinator, process, pause, dies, *texts = sys.argv[1:]
distributed.initialize(coordinator, 2, int(process))
from jpeft.training.loop import Loop
from jpeft.cli import main

log, batch = Loop._log, Loop._batch

def read(self, index):
    if index == int(dies):
        while not any(self.folder.checkpoints.glob("*/checksums.json")):
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, index)

Loop._log = lambda self: (time.sleep(float(pause)), log(self))
Loop._batch = read
for text in texts:
    status = main(["train", *json.loads(text)])
    print("status", status)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run with dropout, evaluations that choose the adapter, and checkpoints."""
    folder = tmp_path_factory.mktemp("base")
    return TrainConfig(
        **make_base(folder, train=40, validation=13), output=str(folder / "alone"), batch_size=8,
        steps=STEPS, checkpoint_every=4, log_every=2, eval_every=6, keep_best=True, options=("rank=2", "dropout=0.1"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(config):
    return train(config)


def flags(config: TrainConfig, run: Path, *more: str) -> list[str]:
    """The same run on the command line, for two processes."""
    flags = ["--model", config.model, "--data", config.data, "--max-length", "8", "--batch-size", "8", "--steps", str(STEPS)]
    flags += ["--checkpoint-every", "4", "--log-every", "2", "--eval-every", "6", "--keep-best", "--mesh", "data=2", "--progress", "lines"]
    return [*flags, *config.options, "--output", str(run), *more]


def start(*commands: list[str], pause: float = 0.0, dies: int = -1, other: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    """Two processes that run the commands in turn.

    Args:
        commands: Flags of each.
        pause: Seconds before each line of metrics.
        dies: The step in which the first process is killed.
        other: More flags of the first command in the second process.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    # One device each; compiled as conftest.py has it, for speed.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    of_process = [(-1 if i else dies, [[*commands[0], *(other if i else ())], *commands[1:]]) for i in range(2)]
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, coordinator, str(i), str(pause), str(step), *(json.dumps(command) for command in mine)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i, (step, mine) in enumerate(of_process)
    ]


def steps_on_disk(run: Path) -> list[int]:
    """Steps of the whole checkpoints."""
    return sorted(int(done.parent.name) for done in (run / "checkpoints").glob("*/checksums.json"))


def wait_for_step(processes: list[subprocess.Popen], run: Path, step: int) -> None:
    """Until there is a checkpoint of that step or a later one."""
    deadline = time.monotonic() + 600
    while not any(done >= step for done in steps_on_disk(run)):
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def outputs(processes: list[subprocess.Popen]) -> list[tuple[str, str]]:
    return [process.communicate(timeout=600) for process in processes]


def assert_same(run: Path, alone) -> None:
    """The adapter and every line of metrics, but for rounding and timing, each line once."""
    chex.assert_trees_all_close(jax.device_get(load_run(run).peft.adapter), jax.device_get(alone.peft.adapter), atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(records(run), records(alone.path), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[key] == (pytest.approx(theirs[key], abs=1e-5) if isinstance(theirs[key], float) else theirs[key]) for key in mine)
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["best_step"]) == (alone.steps, alone.best_step)
    assert result["best"] == pytest.approx(alone.best, abs=1e-5)


@pytest.mark.slow
def test_two_processes_killed_stopped_and_continued(config, alone, tmp_path):
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    # One is killed within the seventh step. The other fails in it, says so, and does not linger.
    processes = start(flags(config, run), dies=6)
    _, (_, said) = outputs(processes)
    assert processes[0].returncode == -signal.SIGKILL
    assert processes[1].returncode != 0
    assert "Gloo" in said or "another task died" in said
    assert steps_on_disk(run) == [4]
    assert not (run / "result.json").exists()
    shutil.copytree(run, tmp_path / "copy")

    # Not started alike, the two refuse to begin. SIGTERM for one stops both after the same step, which is saved.
    processes = start(flags(config, tmp_path / "refused"), flags(config, run, "--resume"), pause=0.5, other=("--seed", "1"))
    wait_for_step(processes, run, 8)
    processes[1].terminate()
    said = outputs(processes)
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, said
    step = steps_on_disk(run)[-1]
    assert 8 <= step < STEPS
    for output, errors in said:
        assert "status 2\n" in output
        assert "error: Process 1 differs from process 0 in its configuration: start all processes with the same flags" in errors
        assert f"interrupted after step {step}, which is saved in {run}" in errors
    assert not (tmp_path / "refused").exists()

    # Nothing of all this shows in the result.
    processes = start(flags(config, run, "--resume"), flags(config, unbroken))
    said = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert f"continuing {run} after step {step}" in said[0][0]
    assert "continuing" not in said[1][0]
    assert_same(run, alone)
    assert bits(load_run(run).peft.adapter) == bits(load_run(unbroken).peft.adapter)
    assert records(run) == records(unbroken)

    # What two have begun one can finish, without a mesh.
    assert_same(train(dataclasses.replace(config, output=str(tmp_path / "copy"), resume=True)).path, alone)


def test_differences_are_named():
    every = np.zeros((6, 2, 4), np.uint8)
    assert distributed.differences(("data", "base"), every) == ""
    every[4, :, 1] = 1
    assert distributed.differences(("data", "base"), every) == "process 4 differs from process 0 in its data, base"
    every[1:, 1, 1] = 1
    assert distributed.differences(("data", "base"), every).endswith("process 4 differs from process 0 in its data, base; ...")


def test_a_failure_of_one_process_is_one_of_all(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for failed in ([False, False, False], [False, True, True]):
        monkeypatch.setattr(distributed.multihost_utils, "process_allgather", lambda mine, failed=failed: np.array(failed)[:, None])
        mine = OSError("no space left")
        with pytest.raises(OSError, match="no space left"):
            distributed.check_done(mine)
        if any(failed):
            with pytest.raises(RuntimeError, match="Process 1 failed"):
                distributed.check_done(None)
        else:
            distributed.check_done(None)


def test_joins_others_only_where_there_are_some(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: joined.append(args))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    distributed.initialize()
    assert joined == []
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    distributed.initialize()
    distributed.initialize("host:1", 2, 0)
    assert joined == [(), ("host:1", 2, 0)]
    with pytest.raises(ValueError, match="num_processes: missing"):
        distributed.initialize("host:1", process_id=0)


def test_a_process_reads_the_rows_of_its_own_devices():
    class Column(np.ndarray):
        """Remembers which rows are read."""

        def __getitem__(self, index):
            read.append(index.tolist())
            return np.asarray(self)[index]

    read: list[list[int]] = []
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    values, rows = np.arange(60, dtype=np.int32).reshape(20, 3), np.array([7, 0, 13, 13, 5, 19, 2, 4])
    batch = sharding.shard_rows({"x": values.view(Column)}, rows, mesh)["x"]
    assert batch.sharding.spec == P(("data", "fsdp"))
    np.testing.assert_array_equal(batch, values[rows])
    # Never more than a device's own quarter of the batch at once.
    assert {tuple(part) for part in read} == {(7, 0), (13, 13), (5, 19), (2, 4)}


def test_several_processes_need_a_mesh(config, monkeypatch):
    assert dict(find_mesh(dataclasses.replace(config, mesh="fsdp=-1")).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="2 processes train one model on a mesh of all their devices: give one"):
        find_mesh(config)


def test_one_of_several_processes_decides_on_the_host(monkeypatch):
    leaf = jax.numpy.arange(4)
    assert distributed.gather_to_host(leaf) is leaf
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert isinstance(distributed.gather_to_host({"a": leaf})["a"], np.ndarray)

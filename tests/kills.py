"""Kills inside every file operation, and kills of a real run at random: `python tests/kills.py --random 100` or `--every 1`.

A process that has imported everything, and has not begun to compute, forks the victims: so a kill costs a second and not ten. A victim ends
itself with `os._exit` before its n-th change of the file system that Python makes (audit events name them all), or is sent SIGKILL from
outside at a random time. Whatever it leaves behind, the next process must read the old state or the new one, bit for bit, and leave nothing
hidden.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# In a process that has computed, a fork would hang; so nothing at the top of this file computes.
import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft.training.config import TrainConfig
from jpeft.training.run_folder import RunFolder
from jpeft.training.run_lock import RunInUseError
from jpeft.training.snapshot import Progress, Snapshots
from jpeft.training.train import train

KILLED, FAILED = 9, 1
CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink", "ctypes.dlsym")


def fork(run: Callable[[], Any], *, kill_at: int | None = None, below: Path | None = None, quiet: bool = False) -> int:
    """Run a function in a process of its own.

    Args:
      run: The function.
      kill_at: The process ends itself before its so-manyeth change of files `below` a folder.
      below: The folder.
      quiet: Leave out what the process prints.

    Returns:
      The number of the process, which is not waited for.
    """
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = FAILED
    try:
        if quiet:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if kill_at is not None:
            _kill_before_change(kill_at, below or Path("/"))
        run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _kill_before_change(number: int, below: Path) -> None:
    counter, prefix = itertools.count(1), str(below)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if event == "ctypes.dlsym" and args[1] != "renameat2":
            return
        # Names below a folder's descriptor are relative: `shutil.rmtree` uses them.
        place = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
        if (place.startswith(prefix) or not place.startswith("/")) and next(counter) == number:
            os._exit(KILLED)

    sys.addaudithook(hook)


def wait(pid: int) -> int:
    """Return the exit status of a process; minus the signal that ended it."""
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def hidden(folder: Path) -> list[str]:
    """Return what nobody asked for: hidden files, locks, half-written checkpoints."""
    odd = (path for path in folder.rglob("*") if path.name.startswith(".") or path.name == "lock" or "tmp" in path.name)
    return sorted(str(path) for path in odd)


# --- an adapter -----------------------------------------------------------------------------------------------------------------------


def _peft(value: float) -> jpeft.Peft:
    params = {"dense": {"kernel": np.ones((8, 4), np.float32), "bias": np.zeros(4, np.float32)}}
    return jpeft.Peft(params, {"dense": {"bias": np.full(4, value, np.float32)}}, jpeft.bitfit())


def kill_saves(folder: Path, *, every: int, overwrite: bool, exchange: bool) -> int:
    """Kill `jpeft.save` before each of its changes; return how many kills there were."""
    # Saved once, and copied for each kill.
    old = folder / "old"
    assert wait(fork(lambda: jpeft.save(old / "out", _peft(1.0)))) == 0
    places = []

    def victim(place: Path) -> None:
        if not exchange:
            jpeft.checkpoint.files._renameat2 = lambda *args: False
        jpeft.save(place / "out", _peft(2.0), overwrite=overwrite)

    for number in itertools.count(1, every):
        place = folder / f"kill-{number}"
        shutil.copytree(old, place) if overwrite else place.mkdir()
        status = wait(fork(lambda place=place: victim(place), kill_at=number, below=place))
        places.append(place)
        if status == 0:
            break
        assert status == KILLED, f"change {number}: status {status}"
    assert wait(fork(lambda: _check_adapters(places, overwrite))) == 0
    return len(places) - 1


def _check_adapters(places: list[Path], overwrite: bool) -> None:
    found = []
    for place in places:
        try:
            found.append(float(jpeft.load(place / "out", _peft(0.0).params).adapter["dense"]["bias"][0]))
        except ValueError as error:
            assert not overwrite, place
            assert "holds no adapter" in str(error), error
            found.append(0.0)
        assert hidden(place) == [], hidden(place)
    # The old state, then from some moment on the new one.
    assert found == sorted(found), found
    assert set(found[:-1]) <= ({1.0, 2.0} if overwrite else {0.0, 2.0})
    assert found[-1] == 2.0


# --- the files of a run ---------------------------------------------------------------------------------------------------------------


def kill_run_files(folder: Path, *, every: int) -> int:
    """Kill a process that does with files what a run does, without the training, before each of its changes."""
    places = []
    for number in itertools.count(1, every):
        place = folder / f"kill-{number}"
        place.mkdir()
        status = wait(fork(lambda place=place: _write_run(place / "run"), kill_at=number, below=place, quiet=True))
        places.append(place)
        if status == 0:
            break
        assert status == KILLED, f"change {number}: status {status}"
    assert wait(fork(lambda: [_check_run(place) for place in places])) == 0
    return len(places) - 1


def _arrays(step: int) -> dict[str, Any]:
    return {"adapter": np.full(5, step, np.float32), "count": np.int32(step)}


def _write_run(path: Path) -> list[int]:
    """Begin or continue a run whose arrays are those of its step; return the steps that were done."""
    folder = RunFolder(path)
    folder.tidy()
    lock = folder.lock()
    lock.acquire()
    begun = folder.in_use
    if not begun:
        about = {"run": {}, "labels": [], "learning_rate": 1.0, "steps": 4, "base": "", "data": {}}
        folder.begin(about, lock, overwrite=False)
    snapshots = Snapshots(folder.checkpoints, keep=1)
    first = 0
    if begun and (progress := snapshots.newest()) is not None:
        read = snapshots.load(progress.step, {"adapter": jnp.zeros(5), "count": jnp.int32(0)})
        assert jax.tree.all(jax.tree.map(lambda one, two: bool((one == two).all()), read, _arrays(progress.step)))
        first = progress.step
    folder.rewind(first)
    for step in range(first + 1, 5):
        folder.append({"step": step, "split": "train", "loss": 1.0, "samples_per_second": 1.0})
        snapshots.save(_arrays(step), Progress(step=step))
    snapshots.wait()
    snapshots.close()
    jpeft.save(folder.adapter, _peft(2.0), overwrite=True)
    jpeft.checkpoint.files.write_json(folder.result, {"steps": 4})
    lock.release()
    return list(range(first + 1, 5))


def _check_run(place: Path) -> None:
    warnings.simplefilter("ignore")
    path = place / "run"
    _write_run(path)
    assert [record["step"] for record in RunFolder(path).records()] == [1, 2, 3, 4], place
    assert float(jpeft.load(path / "adapter", _peft(0.0).params).adapter["dense"]["bias"][0]) == 2.0
    assert sorted(p.name for p in path.iterdir()) == ["adapter", "checkpoints", "config.json", "metrics.jsonl", "result.json"], place
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["4"], place
    assert hidden(place) == []


# --- several writers ------------------------------------------------------------------------------------------------------------------


def race(folder: Path, *, writers: int) -> None:
    """Let several processes write one run and one adapter at once: each is refused or does all of it, and nothing is mixed."""

    def write(value: float) -> None:
        try:
            _write_run(folder / "run")
        except RunInUseError as error:
            assert f"The run in {folder / 'run'} is in use by process " in str(error), error
        jpeft.save(folder / "out", _peft(value), overwrite=True)
        assert float(jpeft.load(folder / "out", _peft(0.0).params).adapter["dense"]["bias"][0]) in range(1, writers + 1)

    assert [wait(pid) for pid in [fork(lambda value=value: write(float(value))) for value in range(1, writers + 1)]] == [0] * writers
    assert wait(fork(lambda: _check_run(folder))) == 0


# --- real runs ------------------------------------------------------------------------------------------------------------------------


def kill_training(folder: Path, *, kills: int, seed: int) -> int:
    """Kill real runs at random times, again and again until one ends, with and without `--overwrite`; return the number of kills.

    After each end the adapter must be that of the unbroken run, bit for bit.
    """
    rng = random.Random(seed)
    assert wait(fork(lambda: _make_base(folder))) == 0
    config = TrainConfig(model=str(folder / "model"), data=str(folder / "data.csv"), output=str(folder / "unbroken"), max_length=8)
    more = {"batch_size": 8, "steps": 60, "checkpoint_every": 1, "eval_every": 7, "log_every": 3, "keep_best": True, "progress": "none"}
    config = dataclasses.replace(config, **more)
    begun = time.monotonic()
    assert wait(fork(lambda: train(config))) == 0
    longest = time.monotonic() - begun
    done, chains = 0, 0
    while done < kills:
        chains += 1
        # Under a path that Orbax takes for a pattern, every other time.
        path = folder / f"chain-{chains}{'[x]' if chains % 2 else ''}" / "run"
        path.parent.mkdir()
        resume = overwrite = False
        while True:
            again = dataclasses.replace(config, output=str(path), resume=resume, overwrite=overwrite)
            pid = fork(lambda again=again: train(again), quiet=True)
            # Most of the time passes before the first step, so half of the kills come late.
            begun, share = time.monotonic(), rng.uniform(0.0, 1.0) if rng.random() < 0.5 else rng.uniform(0.6, 1.0)
            while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < begun + share * longest:
                time.sleep(0.005)
            if ended[0]:
                status, longest = os.waitstatus_to_exitcode(ended[1]), time.monotonic() - begun
            else:
                os.kill(pid, signal.SIGKILL)
                status = wait(pid)
            assert status in (0, -signal.SIGKILL), f"{path} ended with status {status}"
            if status == 0:
                break
            done += 1
            resume = overwrite = False
            if RunFolder(path).in_use:
                overwrite = rng.random() < 0.1
                resume = not overwrite
            if done >= kills:
                # To the end, and not once more.
                last = dataclasses.replace(config, output=str(path), resume=True)
                assert wait(fork(lambda last=last: train(last))) == 0
                break
        assert wait(fork(lambda path=path: _check_same(path, folder / "unbroken"))) == 0
        assert hidden(path.parent) == [], hidden(path.parent)
        shutil.rmtree(path.parent)
        print(f"{done} kills, {chains} runs", flush=True)
    return done


def _make_base(folder: Path) -> None:
    from tiny_text import make_model, make_rows, write_csv

    make_model(folder / "model", dropout=0.2)
    write_csv(folder / "data.csv", make_rows(60))


def _check_same(run: Path, unbroken: Path) -> None:
    from jpeft.training.run import load_run

    one, two = (jax.tree.leaves(load_run(path).peft.adapter) for path in (run, unbroken))
    assert [np.asarray(leaf).tobytes() for leaf in one] == [np.asarray(leaf).tobytes() for leaf in two], run
    results = [json.loads((path / "result.json").read_text()) for path in (run, unbroken)]
    assert results[0]["test"] == results[1]["test"]
    assert {path.name for path in run.iterdir()} == {path.name for path in unbroken.iterdir()}


def main() -> None:
    """Do what the flags say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=0, help="number of kills at random of a real run")
    parser.add_argument("--seed", type=int, default=0, help="seed of their times")
    parser.add_argument("--every", type=int, default=0, help="kill before every so-manyeth change of the file system; 1 for all")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        count = 0
        for i, (overwrite, exchange) in enumerate(((False, True), (True, True), (True, False)) if args.every else ()):
            (folder := Path(temporary, f"save-{i}")).mkdir()
            count += kill_saves(folder, every=args.every, overwrite=overwrite, exchange=exchange)
        if args.every:
            (folder := Path(temporary, "files")).mkdir()
            count += kill_run_files(folder, every=args.every)
            (folder := Path(temporary, "race")).mkdir()
            race(folder, writers=4)
            print(f"{count} kills inside file operations", flush=True)
        if args.random:
            (folder := Path(temporary, "runs")).mkdir()
            print(f"{kill_training(folder, kills=args.random, seed=args.seed)} kills at random", flush=True)


if __name__ == "__main__":
    main()

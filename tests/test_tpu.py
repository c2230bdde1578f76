"""The scripts for slices and clusters: sound shell, and with --dry-run the very commands that they would run, in order."""

import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

TPU = Path(__file__).parents[1] / "tpu"
SCRIPTS = sorted([*TPU.glob("*.sh"), *TPU.glob("*.sbatch")])
BASH = shutil.which("bash")


def dry(script: str, *flags: str) -> tuple[list[list[str]], subprocess.CompletedProcess]:
    """The commands that a script prints, split into words, without any program of Google's or SLURM's in reach."""
    assert BASH
    done = subprocess.run(
        [BASH, TPU / script, "--dry-run", *flags], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "HOME": "/home/u"}
    )
    printed = done.stdout + done.stderr
    return [shlex.split(_plain(line[2:])) for line in printed.splitlines() if line.startswith("+ ")], done


def _plain(line: str) -> str:
    """Bash writes words with line breaks as $'...'; shlex does not know that form."""
    start = line.find("$'")
    if start < 0:
        return line
    word = line[start + 2 :].removesuffix("'").encode().decode("unicode_escape")
    return line[:start] + shlex.quote(word)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_is_sound_shell(script):
    assert BASH
    subprocess.run([BASH, "-n", script], check=True)
    checker = shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or shutil.which("shellcheck")
    assert checker, 'shellcheck comes with pip install -e ".[dev]"'
    checked = subprocess.run([checker, "-x", script], capture_output=True, text=True, cwd=TPU)
    assert checked.returncode == 0, checked.stdout


def test_creates_a_slice():
    commands, done = dry("create.sh", "--name", "tuner", "--type", "v6e-8", "--zone", "us-east5-b", "--project", "p")
    assert done.returncode == 0
    create = "gcloud compute tpus tpu-vm create tuner --zone=us-east5-b --project=p --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e"
    assert commands == [shlex.split(create)]


def test_asks_for_a_queued_spot_slice_and_for_its_state():
    commands, done = dry("create.sh", "--queued", "--spot", "--type", "v5p-64")
    assert done.returncode == 0
    create, describe = commands
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "jpeft"]
    assert {"--spot", "--node-id=jpeft", "--accelerator-type=v5p-64", "--runtime-version=v2-alpha-tpuv5"} <= set(create)
    assert describe[4] == "describe"
    assert describe[-1] == "--format=value(state.state)"


def test_deletes_what_is_named():
    commands, done = dry("delete.sh", "--name", "tuner", "--project", "p")
    assert done.returncode == 0
    assert commands == [shlex.split("gcloud compute tpus tpu-vm delete tuner --zone=us-west4-a --project=p --quiet")]
    commands, done = dry("delete.sh", "--name", "tuner", "--queued")
    assert commands == [shlex.split("gcloud compute tpus queued-resources delete tuner --zone=us-west4-a --force --quiet")]


def test_sets_up_every_worker():
    commands, done = dry("setup.sh", "--bucket", "gs://my-runs", "--revision", "v1; rm -rf /")
    assert done.returncode == 0
    assert all("--worker=all" in command for command in commands)
    install, mount, count = (command[-1].removeprefix("--command=") for command in commands)
    assert "uv venv --python 3.12" in install.replace('"$HOME/.local/bin/uv"', "uv")
    assert "jpeft[hf,hub,tpu]" in install.replace("\\", "")
    assert "rm -rf /" not in install.replace("v1\\;\\ rm\\ -rf\\ /", "")  # a revision is one word, whatever it holds
    assert 'gcsfuse --implicit-dirs my-runs "$HOME/runs"' in mount
    assert "jax.distributed.initialize()" in count
    for remote in (install, mount, count):
        subprocess.run(["bash", "-n"], input=remote, text=True, check=True)
    # In an && list `set -e` would go on after a failure.
    assert not [line for line in (install + mount).splitlines() if "&&" in line]


def test_launches_on_every_worker_and_resumes():
    commands, done = dry("launch.sh", "--name", "tuner", "--", "--model", "Qwen/Qwen3-8B", "--text", "two words")
    assert done.returncode == 0
    (command,) = commands
    remote = command[-1].removeprefix("--command=")
    assert remote.startswith(
        'mountpoint -q "$HOME/runs" || { echo "the bucket is not mounted: tpu/setup.sh" >&2; exit 1; }; tmux kill-session'
    )
    inner = shlex.split(remote.split("tmux new-session -d -s jpeft ", 1)[1])[0]
    assert 'tpu/finetune_lora.py --output "$HOME/runs/"tuner --resume --model Qwen/Qwen3-8B --text two\\ words' in inner
    assert "tail -f jpeft.log" in done.stderr


def test_gke_makes_cluster_storage_and_workload():
    commands, done = dry("gke.sh", "--project", "p", "--bucket", "my-runs", "--spot", "--", "--model", "m")
    assert done.returncode == 0
    assert [command[:3] for command in commands] == [
        ["xpk", "cluster", "create"],
        ["xpk", "storage", "attach"],
        ["xpk", "workload", "create"],
    ]
    assert "--spot" in commands[0]
    assert "--bucket=my-runs" in commands[1]
    inner = commands[2][-1].removeprefix("--command=")
    assert inner.endswith("python jpeft/tpu/finetune_lora.py --output /runs/jpeft --resume --model m ")


def fake(folder: Path, name: str, body: str) -> None:
    """A program that notes how it was called."""
    (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "{folder}/calls"\n{body}\n')
    (folder / name).chmod(0o755)


def calls(folder: Path, script: str, *flags: str, **variables: str) -> tuple[list[str], int]:
    """What a script calls of the programs in a folder, and how it exits."""
    assert BASH
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": "/home/u", **variables}
    (folder / "calls").unlink(missing_ok=True)
    done = subprocess.run([BASH, TPU / script, *flags], capture_output=True, text=True, env=environment)
    return (folder / "calls").read_text().splitlines(), done.returncode


def test_gke_makes_what_is_not_there(tmp_path):
    """A failed attach is made up for by the next run; one that worked is not repeated; a list that fails is no empty list."""
    flags = ("--name", "tuner", "--project", "p", "--bucket", "b")
    fake(tmp_path, "xpk", '[[ "$1 $2" != "storage list" ]] || echo "my-tuner-runs  gcsfuse"; [[ "$1 $2" != "storage attach" ]]')
    fake(tmp_path, "gcloud", "echo other-cluster")
    kinds = lambda lines: [" ".join(line.split()[:3]) for line in lines]
    made, code = calls(tmp_path, "gke.sh", *flags)
    assert code != 0
    assert kinds(made) == ["gcloud container clusters", "xpk cluster create", "xpk storage list", "xpk storage attach"]
    fake(tmp_path, "gcloud", "echo tuner-cluster")
    fake(tmp_path, "xpk", "true")
    made, code = calls(tmp_path, "gke.sh", *flags)
    assert (kinds(made), code) == (["gcloud container clusters", "xpk storage list", "xpk storage attach", "xpk workload create"], 0)
    fake(tmp_path, "xpk", '[[ "$1 $2" != "storage list" ]] || echo "| tuner-runs | gcsfuse |"')
    made, code = calls(tmp_path, "gke.sh", *flags)
    assert (kinds(made), code) == (["gcloud container clusters", "xpk storage list", "xpk workload create"], 0)
    fake(tmp_path, "gcloud", "exit 1")
    made, code = calls(tmp_path, "gke.sh", *flags)
    assert (kinds(made), code) == (["gcloud container clusters"], 1)


@pytest.mark.parametrize(("status", "requeued"), [(0, []), (1, []), (143, ["scontrol requeue 7"])])
def test_slurm_asks_for_another_turn_after_the_time_limit_alone(tmp_path, status, requeued):
    fake(tmp_path, "srun", f"exit {status}")
    fake(tmp_path, "scontrol", "true")
    (started, *after), code = calls(tmp_path, "slurm.sbatch", "--model", "m", SLURM_JOB_ID="7")
    assert started.startswith("srun --kill-on-bad-exit=1 ")
    assert (after, code) == (requeued, status)


def test_slurm_starts_one_process_for_each_gpu():
    commands, done = dry("slurm.sbatch", "--model", "m")
    assert done.returncode == 0
    (command,) = commands
    assert command[:2] == ["srun", "--kill-on-bad-exit=1"]
    assert command[-3:] == ["--resume", "--model", "m"]
    assert command[3].endswith("tpu/finetune_lora.py")


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("create.sh", ["--frob"], "unknown flag --frob"),
        ("create.sh", ["--name"], "--name needs a value"),
        ("create.sh", ["--type", "h100"], "no runtime version is known for --type h100; name one with --version"),
        ("delete.sh", ["--zone", "us-west4-a"], "--name is required"),
        ("setup.sh", [], "--bucket is required"),
        ("gke.sh", ["--bucket", "b"], "--project is required"),
    ],
)
def test_refuses(script, flags, message):
    commands, done = dry(script, *flags)
    assert done.returncode != 0
    assert message in done.stderr
    assert not commands

"""`jpeft train --mesh`: a run on eight devices is the run on one."""

import dataclasses
import shutil

import chex
import jax
import pytest
from jax.sharding import PartitionSpec as P
from test_train import records
from tiny_text import make_base

import jpeft
from jpeft.cli import main
from jpeft.training.config import TrainConfig
from jpeft.training.devices import find_mesh
from jpeft.training.run import load_run
from jpeft.training.train import train

MESH = "data=2,fsdp=2,tensor=2"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A short run with dropout, and a checkpoint halfway."""
    folder = tmp_path_factory.mktemp("base")
    return TrainConfig(
        **make_base(folder, train=40, validation=13), output=str(folder / "alone"), batch_size=8,
        steps=4, checkpoint_every=2, log_every=2, options=("rank=2", "dropout=0.1"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(config):
    return train(config)


@pytest.fixture(scope="module")
def many(config):
    return train(dataclasses.replace(config, output=f"{config.output}-mesh", mesh=MESH))


def close(one, other):
    chex.assert_trees_all_close(jax.device_get(one.peft.adapter), jax.device_get(other.peft.adapter), atol=1e-5, rtol=1e-5)


def test_equals_one_device(alone, many):
    close(many, alone)
    for mine, theirs in zip(records(many.path), records(alone.path), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[key] == (pytest.approx(theirs[key], rel=1e-5) if key in ("loss", "learning_rate") else theirs[key]) for key in mine)
    leaves = jpeft.flatten(many.peft.adapter)
    (query,) = {leaf.sharding.spec for path, leaf in leaves.items() if path.endswith("query/kernel/b")}
    assert query == P(None, "tensor")
    # What was trained on a mesh is opened on one device.
    opened = load_run(many.path).peft
    assert len(jax.tree.leaves(opened.params)[0].sharding.device_set) == 1
    chex.assert_trees_all_equal(jax.device_get(opened.adapter), jax.device_get(many.peft.adapter))


def test_continues_on_other_devices(alone, many, config, tmp_path):
    shutil.copytree(many.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "result.json").unlink()
    resumed = train(dataclasses.replace(config, output=str(tmp_path / "run"), resume=True))
    assert [line["step"] for line in records(resumed.path)] == [line["step"] for line in records(alone.path)]
    close(resumed, alone)


def test_a_mesh_that_does_not_fit(config, capsys):
    with pytest.raises(ValueError, match=r"batch_size=6 cannot be split over data \* fsdp = 4 devices of the mesh 'data=2,fsdp=2"):
        find_mesh(dataclasses.replace(config, mesh=MESH, batch_size=6))
    with pytest.raises(ValueError, match=r"batch_size / grad_accum=2 cannot be split"):
        find_mesh(dataclasses.replace(config, mesh=MESH, grad_accum=4))
    flags = ["--model", config.model, "--data", config.data, "--output", f"{config.output}-bad", "--mesh", "data=3"]
    assert main(["train", *flags]) != 0
    assert "asks for 3 devices, and there are 8" in capsys.readouterr().err

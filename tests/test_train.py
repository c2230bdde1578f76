"""The training step, the loop around it, and what a run leaves behind."""

import dataclasses
import json
import os
import threading
import time
from contextlib import closing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from tiny_text import make_base, make_model

import jpeft
import jpeft.checkpoint.files
import jpeft.training.program
import jpeft.training.snapshot
from jpeft.checkpoint.files import replace_folder
from jpeft.tasks.metrics import accuracy, macro_f1
from jpeft.tasks.registry import TASKS
from jpeft.tasks.sequence_classification import SequenceClassification
from jpeft.training.config import TrainConfig, changed_fields, from_json, parse_options, to_json
from jpeft.training.keys import keys
from jpeft.training.plot import plot_curve
from jpeft.training.result import read_result
from jpeft.training.run import load_run
from jpeft.training.run_folder import RunFolder
from jpeft.training.schedule import clipped_adamw, learning_rate_schedule
from jpeft.training.snapshot import Progress, Snapshots
from jpeft.training.step import make_step
from jpeft.training.train import prepare, train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder and a data folder, as fields of a configuration."""
    return make_base(tmp_path_factory.mktemp("base"), train=72, validation=23, test=25)


@pytest.fixture
def config(base, tmp_path):
    """A short run."""
    return TrainConfig(**base, output=str(tmp_path / "run"), batch_size=16, epochs=2, log_every=3, checkpoint_every=4)


class Traced(SequenceClassification):
    """Its loss is given by a test."""


class LowestLoss(SequenceClassification):
    """Watches the loss instead of the accuracy."""

    metric = "loss"
    higher_is_better = False


class Diverging(SequenceClassification):
    """A loss that is not finite."""

    def losses(self, logits, batch, settings=None):
        return super().losses(logits, batch, settings) * jnp.nan


def records(path):
    """Lines of metrics.jsonl without timings."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines]


def bits(tree):
    """The leaves' bytes."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# --- small parts ------------------------------------------------------------------------------------------------------


def test_options_are_literals_or_strings():
    assert parse_options(["rank=8", "target=.*a=b.*", "on=false", "x=None", "alpha=1e-3", "t=('q', 'v')"]) == {
        "rank": 8,
        "target": ".*a=b.*",
        "on": False,
        "x": None,
        "alpha": 1e-3,
        "t": ("q", "v"),
    }


@pytest.mark.parametrize(("pairs", "message"), [(["rank"], "not of the form"), (["a=1", "a=2"], "given twice")])
def test_bad_options(pairs, message):
    with pytest.raises(ValueError, match=message):
        parse_options(pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 8, "grad_accum": 3}, "does not divide"),
        ({"warmup": 1.5}, "between 0 and 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"head_lr_scale": 0.0}, "head_lr_scale must be positive"),
        ({"resume": True, "overwrite": True}, "give one of them"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(model="m", data="builtin", output="o", **changes))


def test_config_round_trip():
    config = TrainConfig(model="m", data="d", output="o", options=("rank=8",), steps=3, clip=None)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    other = dataclasses.replace(config, seed=1, keep=7, output="p")
    assert changed_fields(to_json(config), to_json(other)) == {"seed": (0, 1)}


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_schedule(shape):
    schedule = learning_rate_schedule(shape, 2.0, 100, warmup=0.1)
    values = [float(schedule(step)) for step in range(101)]
    assert values[0] == pytest.approx(2 / 11)
    assert np.all(np.diff(values[:11]) > 0)
    assert max(values) == values[10] == 2.0
    assert values[100] == pytest.approx(2.0 if shape == "constant" else 0.0, abs=1e-6)
    assert values[55] == pytest.approx({"constant": 2.0, "linear": 1.0, "cosine": 1.0}[shape], abs=1e-6)


def test_metrics_by_hand():
    expected, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 2, 3])
    assert accuracy(predicted, expected) == pytest.approx(4 / 6)
    # F1: class 0 2·2/(2+3), class 1 2·1/(2+2), class 2 0, class 3 1.
    assert macro_f1(predicted, expected) == pytest.approx((0.8 + 0.5 + 0 + 1) / 4)


def test_keys_are_independent_and_depend_on_the_seed():
    drawn = [jax.random.key_data(key).tobytes() for seed in (0, 1) for key in keys(seed)[:3]]
    assert len(set(drawn)) == 6
    assert keys(0).data != keys(1).data


def test_curve_is_a_picture(tmp_path):
    lines = [{"step": s, "split": "train", "loss": 1 / s} for s in range(1, 20)]
    lines += [{"step": s, "split": "validation", "loss": 1.1 / s, "accuracy": s / 20} for s in (5, 10, 15)]
    plot_curve(tmp_path / "curve.png", lines, "accuracy", "title")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    plot_curve(tmp_path / "empty.png", [], "accuracy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.png", "empty.png"]


# --- the step ---------------------------------------------------------------------------------------------------------


def one_step(setup, accumulate, tx=None):
    """Adapter and loss after one step from the start."""
    tx = jpeft.optimizer(tx or clipped_adamw(lambda step: 1e-2, clip=1.0), setup.peft)
    forward = jpeft.wrap(setup.loaded.model.apply, setup.peft.method)
    step = jax.jit(make_step(forward, tx, setup.task, setup.peft, accumulate))
    adapter = setup.peft.adapter
    batch = {name: column[:16] for name, column in setup.splits["train"].items()}
    adapter, _, loss = step(adapter, tx.init(adapter), setup.peft.params, batch, jax.random.key(0), 0)
    return adapter, loss


@pytest.mark.parametrize("accumulate", [2, 16])
def test_accumulation_changes_nothing_but_rounding(base, tmp_path, accumulate):
    folder = make_model(tmp_path / "model", dropout=0.0)
    setup = prepare(TrainConfig(**base | {"model": str(folder)}, output="unused"))
    # Plain SGD: Adam would blow up the rounding of gradients near zero.
    sgd = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    (whole, loss), (split, split_loss) = one_step(setup, 1, sgd), one_step(setup, accumulate, sgd)
    np.testing.assert_allclose(loss, split_loss, rtol=1e-5)
    chex.assert_trees_all_close(whole, split, atol=1e-6)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, whole, setup.peft.adapter))
    np.testing.assert_allclose(moved, 0.1, rtol=1e-3)  # clipped, over the trained leaves alone


def test_one_trace_one_donation_and_a_base_left_alone(config, monkeypatch):
    traces = []

    def losses(self, logits, batch, settings=None):
        if isinstance(logits, jax.core.Tracer):
            traces.append(logits.shape)
        return SequenceClassification.losses(self, logits, batch, settings)

    monkeypatch.setattr(Traced, "losses", losses, raising=False)
    monkeypatch.setitem(TASKS, "sequence-classification", f"{__name__}.Traced")
    before = bits(prepare(config).loaded.params)
    compiled, cost = [], jpeft.training.program.cost
    monkeypatch.setattr(jpeft.training.program, "cost", lambda step, *rest: compiled.append(step) or cost(step, *rest))
    result = train(config)
    # The adapter and both moments are written in place of the old ones.
    assert compiled[0].memory_analysis().alias_size_in_bytes >= 3 * jpeft.tree.nbytes(result.peft.adapter)
    assert result.steps == 10
    # The body of lax.scan is traced a fixed number of times for the whole run.
    assert len(traces) <= 2
    assert bits(result.peft.params) == before


def test_dropout_and_seed_matter(config, tmp_path):
    def adapter(name, **changes):
        changes = {"steps": 3, "output": str(tmp_path / name)} | changes
        return bits(train(dataclasses.replace(config, **changes)).peft.adapter)

    first = adapter("a")
    assert adapter("b") == first
    assert adapter("c", seed=1) != first
    dry = make_model(tmp_path / "dry", dropout=0.0)
    assert adapter("d", model=str(dry)) != first


# --- runs -------------------------------------------------------------------------------------------------------------


# Half a percent of a model this small is less than its head.
TINY = {
    "trainable_tokens": ("tokens=[5]",),
    "fish_mask": ("sparsity=0.1",),
    "diff_pruning": ("sparsity=0.1", "l0=1e-5"),
    "miss": ("rank=2",),
    "shira": ("rank=1",),
}


@pytest.mark.parametrize("method", ["lora", "bitfit", "adapter", "freeze", "fish_mask", "diff_pruning", "far"])
def test_every_method_learns(config, tmp_path, method):
    folder = make_model(tmp_path / "model", dropout=0.0)
    rate = {"learning_rate": 2e-2, "schedule": "constant", "log_every": 25}
    often = {"steps": 100, "eval_every": 100, "checkpoint_every": 100}
    config = dataclasses.replace(config, options=TINY.get(method, ()))
    result = train(dataclasses.replace(config, model=str(folder), method=method, **rate, **often))
    losses = [line["loss"] for line in records(result.path) if line["split"] == "train"]
    assert min(losses) < 0.7 * np.log(3), losses  # ln 3 is chance among three classes


@pytest.mark.parametrize("method", sorted(jpeft.methods()))
def test_default_learning_rates_are_the_methods_own(config, method):
    config = dataclasses.replace(config, options=TINY.get(method, ()), method=method)
    setup, usual = prepare(config), jpeft.methods()[method]
    assert (setup.learning_rate, setup.head_lr_scale) == (usual.learning_rate, usual.head_lr_scale)
    if method == "lora":  # both factors of which are far from zero
        started = prepare(dataclasses.replace(config, options=(*config.options, "init=pissa")))
        assert (started.learning_rate, started.head_learning_rate) == (5e-4, pytest.approx(setup.head_learning_rate))
    given = prepare(dataclasses.replace(config, learning_rate=0.5, head_lr_scale=3.0))
    assert (given.learning_rate, given.head_lr_scale) == (0.5, 3.0)


def test_what_a_run_leaves(config):
    result = train(config)
    folder = RunFolder(config.output)
    assert {p.name for p in folder.path.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "curve.png",
        "checkpoints",
        "adapter",
        "result.json",
    }
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["10", "8"]
    lines = records(folder.path)
    assert [(line["step"], line["split"]) for line in lines] == [
        *((3, "train"), (5, "validation"), (6, "train"), (9, "train"), (10, "train"), (10, "validation")),
    ]
    assert result.to_json() == json.loads(folder.result.read_text())
    # The last adapter is kept, so its metrics are those of the last evaluation.
    assert result.validation == {k: v for k, v in lines[-1].items() if k in ("loss", "accuracy", "macro_f1")}
    run = load_run(folder.path)
    assert bits(run.peft.adapter) == bits(result.peft.adapter)
    assert run.labels == ("fruit", "metal", "water")
    summary = jpeft.summary(result.peft)
    assert (result.trained, result.stored, result.changed) == (summary.trained, summary.stored, summary.changed)


def test_the_result_tells_what_a_step_costs(config):
    """FLOPs and bytes that grow as they must, a time that is the logged one, the size of the adapter's files."""
    big, small = (
        train(dataclasses.replace(config, output=f"{config.output}-{size}", batch_size=size, steps=4, log_every=2)) for size in (16, 8)
    )
    # Two matrix products of the batch's 128 tokens, forward and back, with each kernel of the two layers, and what else there is.
    kernels = 2 * (4 * 16 * 16 + 2 * 16 * 32)
    assert big.flops > 2 * 2 * 16 * 8 * kernels
    assert 1.6 < big.flops / small.flops < 2.1
    assert big.temporary_bytes > small.temporary_bytes > 0
    rates = [line["samples_per_second"] for line in RunFolder(big.path).records() if line["split"] == "train"]
    assert big.step_seconds == pytest.approx(16 / np.mean(rates))
    assert big.adapter_bytes == sum(p.stat().st_size for p in RunFolder(big.path).adapter.rglob("*") if p.is_file())
    # An earlier version's result is read as well.
    values = json.loads(RunFolder(small.path).result.read_text())
    for name in ("stored", "flops", "step_seconds"):
        del values[name]
    RunFolder(small.path).result.write_text(json.dumps(values))
    again = read_result(RunFolder(small.path))
    assert (again.trained, again.flops) == (small.trained, None)


def test_scan_remat_and_bfloat16_train(config):
    result = train(dataclasses.replace(config, scan=True, remat=True, dtype="bfloat16", steps=2))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(result.peft.adapter))


def test_patience_stops_and_keeps_the_best(config):
    # A rate of nearly nothing: the first evaluation stays the best.
    changes = {"learning_rate": 1e-12, "patience": 2, "eval_every": 3, "steps": 60}
    result = train(dataclasses.replace(config, **changes))
    assert (result.best_step, result.steps) == (3, 9)
    assert result.validation["accuracy"] == result.best


def test_the_best_of_a_metric_may_be_the_lowest(config, monkeypatch):
    monkeypatch.setitem(TASKS, "sequence-classification", f"{__name__}.LowestLoss")
    # Constant and far too high: the loss goes up and down.
    result = train(dataclasses.replace(config, learning_rate=0.3, schedule="constant", keep_best=True, eval_every=1, steps=8))
    losses = [line["loss"] for line in records(result.path) if line["split"] == "validation"]
    assert result.validation["loss"] == result.best == min(losses) < losses[-1]


def test_a_loss_that_is_not_finite_stops_the_run(config, monkeypatch):
    monkeypatch.setitem(TASKS, "sequence-classification", f"{__name__}.Diverging")
    with pytest.raises(ValueError, match="The loss is nan at step 1: training diverged"):
        train(config)


def test_export_writes_the_merged_model(config):
    result = train(dataclasses.replace(config, export=True))
    merged = jpeft.models.load(RunFolder(config.output).merged)
    assert merged.labels == ("fruit", "metal", "water")
    assert not merged.initialised
    chex.assert_trees_all_close(merged.params, jpeft.merge(result.peft), atol=1e-6)


def test_a_finished_run_is_exported_when_asked_for_later(config):
    result = train(config)
    again = train(dataclasses.replace(config, resume=True, export=True))
    assert again.test == result.test
    chex.assert_trees_all_close(jpeft.models.load(RunFolder(config.output).merged).params, jpeft.merge(result.peft), atol=1e-6)


def test_export_is_refused_before_training(config):
    with pytest.raises(ValueError, match="merge"):
        train(dataclasses.replace(config, method="adapter", export=True))
    assert not os.path.exists(config.output)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def snapshots(folder, keep=3):
    return closing(Snapshots(folder, keep))


def test_snapshot_round_trip(tmp_path):
    arrays = {"adapter": {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16)}, "count": jnp.int32(3)}
    progress = Progress(step=4, best=0.5, best_step=2, stale=1, latest=0.25, losses=(0.1, 0.2))
    with snapshots(tmp_path / "s") as saved:
        saved.save(arrays, progress)
    like = jax.tree.map(jnp.zeros_like, arrays)
    with snapshots(tmp_path / "s") as saved:
        restored, read = saved.restore(lambda progress: like)
    assert read == progress
    assert bits(restored) == bits(arrays)
    chex.assert_trees_all_equal_dtypes(restored, arrays)


def test_training_goes_on_while_a_snapshot_is_written(tmp_path, monkeypatch):
    """The next step may take the arrays' memory, and until the new one has its checksums the old one is there."""
    go, checksums = threading.Event(), jpeft.training.snapshot.file_checksums
    monkeypatch.setattr(jpeft.training.snapshot, "file_checksums", lambda *args, **more: go.wait(60) and checksums(*args, **more))
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    with snapshots(tmp_path, keep=1) as saved:
        go.set()
        value = jnp.ones(1 << 20)
        saved.save({"a": value}, Progress(step=1))
        saved.wait()
        go.clear()
        value = step(value)
        saved.save({"a": value}, Progress(step=2))
        for _ in range(5):
            value = step(value)
        saved.check()
        assert not (tmp_path / "2" / "checksums.json").exists()
        assert (tmp_path / "1" / "checksums.json").exists()
        go.set()
        saved.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["2"]
        with snapshots(tmp_path) as other:
            restored, _ = other.restore(lambda progress: {"a": jnp.zeros(1 << 20)})
        np.testing.assert_array_equal(restored["a"], 2)
        # One at a time: the second waits for the first.
        saved.save({"a": value}, Progress(step=7))
        saved.save({"a": value}, Progress(step=8))
        assert (tmp_path / "7" / "checksums.json").exists()


def test_an_error_in_the_background_is_raised_at_the_next_step(tmp_path, monkeypatch):
    """And leaves the old snapshot, until the new one has its checksums."""
    begin = lambda: Snapshots(tmp_path, keep=1)
    saved = begin()
    saved.save({"a": jnp.ones(3)}, Progress(step=1))
    saved.wait()
    # Orbax cannot write this one.
    saved.save({"a": jnp.ones(3)}, Progress(step=2, method={"rank": object()}))
    with pytest.raises(OSError, match=f"The checkpoint {tmp_path}/2 could not be written.*TypeError: .*not JSON serializable"):
        for _ in range(600):
            saved.check()
            time.sleep(0.1)
    saved.close()
    saved = begin()
    assert saved.restore(lambda progress: {"a": jnp.zeros(3)})[1].step == 1

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jpeft.training.snapshot, "write_json", full)
    saved.save({"a": jnp.ones(3)}, Progress(step=2))
    with pytest.raises(OSError, match=f"The checkpoint {tmp_path}/2 could not be written.*No space left on device"):
        saved.save({"a": jnp.ones(3)}, Progress(step=3))
    saved.close()
    saved = begin()
    with pytest.warns(UserWarning, match=f"checkpoint {tmp_path}/2 is damaged"):
        assert saved.restore(lambda progress: {"a": jnp.zeros(3)})[1].step == 1
    # Nobody asks any more: closing tells.
    saved.save({"a": jnp.ones(3)}, Progress(step=3))
    with pytest.raises(OSError, match="No space left"):
        saved.close()
    assert (tmp_path / "1" / "checksums.json").exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "unfinished"])
def test_a_damaged_snapshot_is_named_and_the_one_before_is_used(tmp_path, damage):
    with snapshots(tmp_path) as saved:
        for step in (1, 2):
            saved.save({"a": jnp.full(1000, step, jnp.float32)}, Progress(step=step))
    files = sorted((tmp_path / "2" / "arrays").rglob("d/*"), key=lambda p: p.stat().st_size)
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "delete":
            file.unlink()
        elif damage != "unfinished":
            file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    if damage == "unfinished":
        (tmp_path / "2" / "checksums.json").unlink()
        # A kill while Orbax writes.
        (tmp_path / f"3{ocp.utils.TMP_DIR_SUFFIX}").mkdir()
    with snapshots(tmp_path) as saved, pytest.warns(UserWarning, match=f"checkpoint {tmp_path}/2 is damaged"):
        restored, progress = saved.restore(lambda progress: {"a": jnp.zeros(1000)})
    assert progress.step == 1
    np.testing.assert_array_equal(restored["a"], 1)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_whole_snapshot_that_does_not_fit_is_kept(tmp_path):
    """Another version's optimizer state, say: the user must learn of it, and nothing may be deleted for it."""
    with snapshots(tmp_path) as saved:
        saved.save({"a": jnp.ones(3)}, Progress(step=1))
    with (
        snapshots(tmp_path) as saved,
        pytest.raises(ValueError, match=f"The checkpoint {tmp_path}/1 is whole, but cannot be continued here"),
    ):
        saved.restore(lambda progress: {"a": jnp.zeros(3), "b": jnp.zeros(2)})
    with snapshots(tmp_path) as saved:
        assert saved.restore(lambda progress: {"a": jnp.zeros(3)})[1].step == 1


def test_a_folder_takes_anothers_place_or_leaves_it(tmp_path, monkeypatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    rename, calls = os.rename, []

    def second_fails(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise OSError
        rename(a, b)

    # Where the system cannot exchange two names in one step.
    monkeypatch.setattr(jpeft.checkpoint.files, "_renameat2", lambda *args: False)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "rename", second_fails)
        replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "name").read_text() == "old"
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "name").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]

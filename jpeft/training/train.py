"""Training: the base frozen, one compiled step, and a run on disk that survives being killed.

A step is a function of (adapter, optimizer state, base, batch, step): the batch is `ds[step]`, the dropout key
`fold_in(key, step)`. So a run continued from a checkpoint goes through bit for bit the same states as an unbroken one.

A method may train in stages (`jpeft.Stage`): between two of them it changes what is trained, and the optimizer and the step are made
anew. A checkpoint records the method in whose stage it was taken, so that a run is continued in any of them.

Several processes (`jpeft.distributed`) train on one mesh of all their devices. Each runs all of this and reads its own rows of a batch;
the first of them looks after the files of the run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import jpeft
from jpeft import data, models, registry, stats
from jpeft.checkpoint.files import size_on_disk, write_json
from jpeft.checkpoint.fingerprint import fingerprint, leaf_table
from jpeft.core.peft import Peft
from jpeft.core.stages import plan
from jpeft.distributed import check_equal, from_first, is_first, stop_signal, within_reach
from jpeft.tasks.task import Arrays, Task, find_task, model_inputs
from jpeft.training.config import TrainConfig, check_values, resolved, to_json
from jpeft.training.cost import Cost, cost
from jpeft.training.devices import Devices, find_mesh
from jpeft.training.evaluate import Evaluator
from jpeft.training.interrupt import InterruptedRun, deferred_signals
from jpeft.training.plot import plot_curve
from jpeft.training.progress import Reporter, reporter
from jpeft.training.run import RunFolder, attach, columns, keys, load_base, method_options, open_run, save_merged
from jpeft.training.schedule import faster, learning_rate_schedule, optimizer
from jpeft.training.snapshot import Progress, Snapshots


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of a run."""

    # Metrics of the adapter that is kept, on the validation and the test split; empty where there is none.
    validation: dict[str, float]
    test: dict[str, float]
    # Best validation metric seen and its step (None and 0 without evaluations).
    best: float | None
    best_step: int
    # Finished steps; fewer than planned after early stopping.
    steps: int
    # Scalars that are trained, that the kept adapter holds, and of the base that change; see `jpeft.Summary`.
    trained: int
    # Wall time of the training loop with its evaluations, up to the newest checkpoint by those who had a part in the run before; and of
    # compiling the step, or the step of each stage, in this process.
    seconds: float
    compile_seconds: float
    # Folder of the run.
    path: Path
    # The base with the trained adapter, folded (`jpeft.fold`).
    peft: Peft = dataclasses.field(repr=False)
    # (Runs of earlier versions lack what follows.)
    stored: int | None = None
    changed: int | None = None
    # Size of the saved adapter's files.
    adapter_bytes: int | None = None
    # Seconds a step: the median over the lines of metrics.jsonl, of the whole run, without evaluations and checkpoints between them.
    step_seconds: float | None = None
    # Floating point operations of a compiled step, and the peak of its temporary memory; of the last stage, if the method has several.
    # No FLOPs with grad_accum or scan, because XLA counts the body of a loop once.
    flops: float | None = None
    temporary_bytes: int | None = None
    # Where it ran, as JAX names it.
    device: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All but the arrays and the folder."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("path", "peft")}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything a configuration names, loaded and checked; nothing is on disk yet."""

    config: TrainConfig
    task: Task
    devices: Devices
    labels: tuple[str, ...]
    splits: dict[str, Arrays]
    loaded: models.Loaded
    peft: Peft
    learning_rate: float
    head_lr_scale: float
    steps: int
    steps_per_epoch: int

    def about(self) -> dict[str, Any]:
        """What config.json records."""
        return {
            "jpeft": jpeft.__version__,
            "run": to_json(self.config),
            "method": self.peft.method.config(),
            "labels": list(self.labels),
            "learning_rate": self.learning_rate,
            "head_lr_scale": self.head_lr_scale,
            "steps": self.steps,
            "base": fingerprint(self.peft.params),
            "data": {name: fingerprint(arrays) for name, arrays in self.splits.items()},
        }


def prepare(config: TrainConfig) -> Setup:
    """Loads and checks data, model and method.

    Raises:
        ValueError: for anything wrong with them.
    """
    task = find_task(config.task)
    tables = data.splits(config.data, **columns(config, task))
    labels = task.labels(tables["train"])
    mesh = find_mesh(config)
    loaded = load_base(config, labels, mesh)
    splits = {
        name: task.encode(table, loaded.tokenizer, labels=labels, max_length=config.max_length)
        for name, table in tables.items()
        if len(table)
    }
    if (config.patience or config.keep_best) and "validation" not in splits:
        raise ValueError("patience and keep_best need a validation split, which the data has not")

    apply: Callable[..., Any] = loaded.model.apply

    def forward(params: PyTree, inputs: dict[str, Array]) -> Array:
        return apply({"params": params}, **inputs, deterministic=True)

    available = statistics(config, task, splits["train"], forward, loaded.params)
    # For methods that start from the names of the labels, or from what the model makes of the words in their option `tokens`.
    words = {
        "labels": lambda: [loaded.tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels],
        "key_values": lambda: jax.jit(functools.partial(stats.key_values, loaded.model))(
            loaded.params, jnp.array([method_options(config, loaded.tokenizer)["tokens"]])
        ),
    }
    peft = attach(config, loaded.params, loaded.new, {**available, **words}, loaded.tokenizer)
    for stage in peft.method.stages:
        if stage.needs is not None and stage.needs not in available:
            raise ValueError(f"the stage {stage.name!r} of {config.method} needs {stage.needs!r}; there are {', '.join(available)}")
    if config.export:
        # Refused now, by the method itself, rather than after hours of training.
        jpeft.merge(peft)
    per_epoch = data.steps_per_epoch(splits["train"], config.batch_size)
    usual = registry.methods()[config.method]
    return Setup(
        config=config,
        task=task,
        devices=Devices(mesh, models.partition_rules(loaded.model)),
        labels=labels,
        splits=splits,
        loaded=loaded,
        peft=peft,
        learning_rate=config.learning_rate or usual.learning_rate,
        head_lr_scale=config.head_lr_scale or usual.head_rate,
        # A frozen base without a head is evaluated as it is.
        steps=(config.steps or config.epochs * per_epoch) if jax.tree.leaves(peft.adapter) else 0,
        steps_per_epoch=per_epoch,
    )


def statistics(
    config: TrainConfig,
    task: Task,
    arrays: Arrays,
    forward: Callable[[PyTree, dict[str, Array]], Array],
    params: PyTree,
) -> dict[str, Callable[[], PyTree]]:
    """What `Method.needs` and `Stage.needs` may name, each made when it is called and the same whenever that is.

    Args:
        config: Gives the seed of the order of examples.
        task: Gives the loss.
        arrays: The training split.
        forward: `(params, inputs) -> logits` of the model as it stands, an adapter in it included, without dropout.
        params: The base.
    """

    def losses(params: PyTree, batch: dict[str, Array]) -> Array:
        return task.losses(forward(params, model_inputs(batch)), batch)

    def fisher() -> PyTree:
        ds = data.batches(arrays, config.batch_size, seed=keys(config.seed).data)
        examples = len(next(iter(arrays.values())))
        return stats.fisher(losses, params, iter(ds), num_samples=min(1024, examples))

    return {"fisher": fisher}


def make_step(
    forward: Callable[..., Any],
    tx: optax.GradientTransformation,
    task: Task,
    peft: Peft,
    grad_accum: int = 1,
) -> Callable[..., Any]:
    """The training step, to be jitted with its first two arguments donated.

    Only the adapter is differentiated. The base is an argument: neither a constant of the program nor donated.

    Args:
        forward: `jpeft.wrap(model.apply, peft.method)`.
        tx: `jpeft.optimizer(..., peft)`.
        task: Gives the loss of each example.
        peft: For its method and structure; its arrays are not used.
        grad_accum: Micro-batches the batch is split into; the gradient is that of the whole batch's mean loss. The mean is over all that is
            predicted in the batch (rows of a classifier, tokens of a text), each counting once, however they fall into micro-batches.

    Returns:
        `(adapter, opt_state, params, batch, key, step) -> (adapter, opt_state, loss)`.
    """

    def loss_fn(adapter: PyTree, params: PyTree, batch: dict[str, Array], key: Array, count: Array) -> Array:
        bound = peft.replace(params=params, adapter=adapter)
        logits = forward(bound.variables, **model_inputs(batch), deterministic=False, rngs={"dropout": key})
        return task.losses(logits, batch).sum() / count + jpeft.penalty(bound) / grad_accum

    def step(adapter: PyTree, opt_state: PyTree, params: PyTree, batch: dict[str, Array], key: Array, step: Array) -> Any:
        key = jax.random.fold_in(key, step)
        count = task.counts(batch).sum()
        # [batch, ...] -> [grad_accum, batch / grad_accum, ...]
        micro = jax.tree.map(lambda x: x.reshape(grad_accum, -1, *x.shape[1:]), batch)

        def add(total: PyTree, part: tuple[dict[str, Array], Array]) -> tuple[PyTree, None]:
            one = jax.value_and_grad(loss_fn)(adapter, params, *part, count)
            return jax.tree.map(jnp.add, total, one), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, adapter))
        (loss, grads), _ = jax.lax.scan(add, zero, (micro, jax.random.split(key, grad_accum)))
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    return step


def train(config: TrainConfig, *, report: Reporter | None = None) -> Result:
    """Trains as configured, or continues a run, and leaves it in `config.output`.

    Args:
        config: The configuration.
        report: Shown progress; by default what `config.progress` names, in the first of several processes.

    Raises:
        ValueError: for bad input, before anything is written; with several processes also if they were not started alike.
        InterruptedRun: after Ctrl-C or SIGTERM, once a checkpoint is written.

    Example:
        >>> result = train(TrainConfig(model="all-MiniLM-L6-v2", data="builtin", output="run"))  # doctest: +SKIP
        >>> result.test["accuracy"]                                                               # doctest: +SKIP
    """
    check_values(config)
    config = resolved(config)
    check_equal({"version of jpeft": jpeft.__version__, "configuration": to_json(config)})
    folder = RunFolder(config.output)
    from_first(lambda: folder.check(config))
    if config.resume and from_first(folder.result.exists):
        result = read_result(folder)
        if config.export and not from_first(folder.merged.exists):
            save_merged(folder.merged, open_run(folder.path).loaded, result.peft)
        return result
    setup = prepare(config)
    about = setup.about()
    check_equal({name: about[name] for name in ("method", "labels", "base", "data")})
    if config.resume:
        from_first(lambda: _check_same(folder, about))
    return _Trainer(setup, about, folder, report or reporter(config.progress if is_first() else "none")).run()


def read_result(folder: RunFolder) -> Result:
    """The result of a finished run, with its model loaded."""
    values = json.loads(folder.result.read_text())
    return Result(**values, path=folder.path, peft=open_run(folder.path).peft)


def _check_same(folder: RunFolder, about: dict[str, Any]) -> None:
    """A continuation must see the data and defaults it began with, which the configuration only names."""
    if not folder.in_use:
        return
    before, now = folder.about(), json.loads(json.dumps(about))
    # Earlier versions wrote the head's scale under another name.
    before.setdefault("head_lr_scale", before.get("head_rate"))
    changed = [
        name for name in ("method", "labels", "learning_rate", "head_lr_scale", "steps", "base", "data") if before[name] != now[name]
    ]
    if changed:
        raise ValueError(f"cannot resume {folder.path}: since it began, its {', '.join(changed)} changed")


class _Trainer:
    """The loop: from step to step, `adapter`, `opt_state`, `best_adapter` and `progress` change; from stage to stage, `peft` does."""

    def __init__(self, setup: Setup, about: dict[str, Any], folder: RunFolder, report: Reporter):
        config = setup.config
        self.setup, self.about, self.config, self.folder, self.report = setup, about, config, folder, report
        self.keeps_best = config.keep_best or config.patience is not None
        self.eval_every = config.eval_every or setup.steps_per_epoch
        self.rows = data.batch_rows(setup.splits["train"], config.batch_size, seed=keys(config.seed).data)
        self.key = keys(config.seed).dropout
        self.plan = plan(setup.peft.method.stages, setup.steps)
        # Losses since the last log line stay on the device until that line, so that steps need not wait for each other.
        self.losses: list[Any] = []
        self.compile_seconds = 0.0
        self._enter(setup.peft, Progress())

    def _enter(self, peft: Peft, progress: Progress) -> None:
        """Sets up the stage of training that this method is; its step is still to be compiled.

        Args:
            peft: The adapter to go on from.
            progress: Where the run stands.
        """
        config, devices, now = self.config, self.setup.devices, self.plan[progress.stage]
        self.peft = peft = devices.put(peft)
        self.progress = progress
        begin, end = now.course
        course = learning_rate_schedule(config.schedule, self.setup.learning_rate, end - begin, config.warmup)
        # The optimizer counts its own steps, which are those of the stage.
        self.schedule = lambda count: course(count + now.begin - begin)
        tx = jpeft.optimizer(optimizer(self.schedule, weight_decay=config.weight_decay, clip=config.clip), peft)
        self.tx = faster(tx, peft.adapter, self.setup.loaded.new, self.setup.head_lr_scale)
        self.forward = devices.forward(jpeft.wrap(self.setup.loaded.model.apply, peft.method))
        self.evaluator = Evaluator(self.forward, self.setup.task, config.batch_size, self.setup.labels, put=devices.batch)

        # A copy, because the step donates its adapter and the caller's must live on.
        self.adapter = jax.tree.map(jnp.copy, peft.adapter)
        self.opt_state = devices.state(self.tx, self.adapter)
        self.best_adapter = jax.tree.map(jnp.copy, self.adapter) if self.keeps_best else None

    def run(self) -> Result:
        resumes = self.config.resume and from_first(lambda: self.folder.in_use)
        if resumes:
            self._restore()
        # Compiled before a new run writes anything: what the model or the method refuses only now leaves no trace either.
        self._compile()
        self._begun, self._compiled = time.perf_counter(), self.compile_seconds
        with deferred_signals() as signals:
            if not resumes:
                from_first(lambda: self.folder.begin(self.about, overwrite=self.config.overwrite))
                self._restore()
            self._before = self.progress.seconds
            self.report.start(self.setup.steps, self.progress.step)
            try:
                self._loop(signals)
            finally:
                self.report.stop()
                self.snapshots.close()
            # All steps are saved: an interrupt from here on waits for the last evaluation and the result.
            result = self._finish()
        if signals:
            raise InterruptedRun(signals[0], self.progress.step, self.folder.path)
        return result

    @property
    def done(self) -> bool:
        """Whether all steps are done, or evaluations have stopped getting better in the last stage."""
        patience, last = self.config.patience, self.progress.stage + 1 == len(self.plan)
        return self.progress.step >= self.setup.steps or (last and patience is not None and self.progress.stale >= patience)

    def _compile(self) -> None:
        """The step, compiled ahead for the shapes it will see: another shape is an error, not a recompilation."""
        begun = time.perf_counter()
        step = make_step(self.forward, self.tx, self.setup.task, self.peft, self.config.grad_accum)
        batch, places = self._batch(0), self.setup.devices.places(self.adapter, self.opt_state)
        arguments = (self.adapter, self.opt_state, self.peft.params, batch, self.key, np.int32(0))
        self.step = jax.jit(step, donate_argnums=(0, 1), out_shardings=places).lower(*arguments).compile()
        self.cost: Cost = cost(self.step)
        self.compile_seconds += time.perf_counter() - begun

    def _advance(self) -> None:
        """Moves on to the method's next stage, with another adapter, optimizer and step, and nothing best so far."""
        stage, index, step = self.peft.method.stages[0], self.progress.stage + 1, self.progress.step
        # The stage may choose on the host what it trains.
        now, forward = self.peft.replace(adapter=within_reach(self.adapter)), self.forward
        made = None
        if stage.needs is not None:
            run = lambda params, inputs: forward(now.replace(params=params).variables, **inputs, deterministic=True)
            made = statistics(self.config, self.setup.task, self.setup.splits["train"], run, now.params)[stage.needs]()
        moved = jpeft.advance(now, key=jax.random.fold_in(keys(self.config.seed).adapter, index), stats=within_reach(made))
        self._enter(moved, dataclasses.replace(self.progress, stage=index, best=None, best_step=0, stale=0))
        self._compile()
        trained = jpeft.summary(moved).trained
        epoch = round(step / self.setup.steps_per_epoch, 4)
        self.folder.append({"step": step, "epoch": epoch, "split": "stage", "stage": stage.name, "trained": trained})
        segment = self.plan[index]
        self.report.message(f"stage {stage.name!r}: steps {segment.begin + 1} to {segment.end}, {trained:,} parameters trained")
        self._start_clock()

    def _loop(self, signals: list[int]) -> None:
        self._start_clock()
        while not self.done:
            self.snapshots.check()
            if signum := stop_signal(signals):
                self._checkpoint()
                self.snapshots.wait()
                from_first(lambda: plot_run(self.folder, self.setup.task))
                raise InterruptedRun(signum, self.progress.step, self.folder.path)
            index = self.progress.step
            batch = self._batch(index)
            self.adapter, self.opt_state, loss = self.step(self.adapter, self.opt_state, self.peft.params, batch, self.key, np.int32(index))
            self.losses.append(loss)
            self.progress = dataclasses.replace(self.progress, step=index + 1)
            # The last step of a stage, of the last one or of another.
            ends = index + 1 == self.plan[self.progress.stage].end
            if ends or (index + 1) % self.config.log_every == 0:
                self._log()
            if ends or (index + 1) % self.eval_every == 0:
                self._evaluate()
            # Before the checkpoint: one of this step belongs to the new stage.
            if ends and not self.done:
                self._advance()
            if ends or self.done or (index + 1) % self.config.checkpoint_every == 0:
                self._checkpoint()
        self.snapshots.wait()

    # --- one thing at a time ------------------------------------------------------------------------------------------

    def _batch(self, index: int) -> PyTree:
        """Batch number `index`, in its place."""
        return self.setup.devices.rows(self.setup.splits["train"], np.asarray(self.rows[index]))

    def _start_clock(self) -> None:
        self._clock, self._clock_step = time.perf_counter(), self.progress.step

    def _pull_losses(self) -> list[float]:
        """The losses since the last log line as numbers.

        Raises:
            ValueError: if one is not finite.
        """
        losses = [float(loss) for loss in self.losses]
        if not np.all(np.isfinite(losses)):
            first = self.progress.step - len(losses) + 1 + int(np.argmin(np.isfinite(losses)))
            raise ValueError(
                f"the loss is {losses[first - 1 - self.progress.step + len(losses)]} at step {first}: "
                f"training diverged, try a learning rate below {self.setup.learning_rate:g}"
            )
        self.losses = list(losses)
        return losses

    def _log(self) -> None:
        step, losses = self.progress.step, self._pull_losses()
        elapsed = time.perf_counter() - self._clock
        loss = float(np.mean(losses))
        rate = (step - self._clock_step) * self.config.batch_size / elapsed
        record = {"step": step, "epoch": round(step / self.setup.steps_per_epoch, 4), "split": "train", "loss": loss}
        # The rate that the last of these steps used.
        count = step - 1 - self.plan[self.progress.stage].begin
        record |= {"learning_rate": float(np.asarray(self.schedule(count))), "samples_per_second": float(f"{rate:.4g}")}
        self.folder.append(record)
        self.losses = []
        metric, latest = self.setup.task.metric, self.progress.latest
        self.report.update(step, loss, "" if latest is None else f"{metric} {latest:.4f}", rate)
        self._start_clock()

    def _evaluate(self) -> None:
        if "validation" not in self.setup.splits:
            return
        step = self.progress.step
        metrics = self.evaluator.metrics(self.peft.replace(adapter=self.adapter), self.setup.splits["validation"])
        epoch = round(step / self.setup.steps_per_epoch, 4)
        self.folder.append({"step": step, "epoch": epoch, "split": "validation", **metrics})
        value, progress = metrics[self.setup.task.metric], self.progress
        if progress.best is None or self.setup.task.better(value, progress.best):
            self.progress = dataclasses.replace(progress, latest=value, best=value, best_step=step, stale=0)
            if self.keeps_best:
                self.best_adapter = jax.tree.map(jnp.copy, self.adapter)
        else:
            self.progress = dataclasses.replace(progress, latest=value, stale=progress.stale + 1)
        self._start_clock()

    def _state(self) -> dict[str, PyTree]:
        best = {"best_adapter": self.best_adapter} if self.keeps_best else {}
        return {"adapter": self.adapter, "opt_state": self.opt_state, **best}

    def _checkpoint(self) -> None:
        stage = {"method": self.peft.method.config(), "leaves": leaf_table(self.adapter)} if self.progress.stage else {}
        losses, seconds = tuple(self._pull_losses()), self._seconds()
        self.progress = dataclasses.replace(self.progress, losses=losses, seconds=seconds, **stage)
        self.snapshots.save(self._state(), self.progress)
        self._start_clock()

    def _restore(self) -> None:
        """Goes back to the newest readable checkpoint, in whatever stage it was taken; to the beginning if there is none."""
        params = self.setup.peft.params

        def like(progress: Progress) -> dict[str, PyTree]:
            peft = self.setup.peft
            if progress.stage:
                zeros = {path: jnp.zeros(shape, dtype) for path, (shape, dtype) in progress.leaves.items()}
                peft = Peft(params, jpeft.unflatten(zeros), jpeft.make(progress.method))
            self._enter(peft, progress)
            return self._state()

        self.snapshots = Snapshots(self.folder.checkpoints, self.config.keep)
        restored = self.snapshots.restore(like)
        if restored is None:
            self._enter(self.setup.peft, Progress())
        else:
            state, _ = restored
            self.adapter, self.opt_state = state["adapter"], state["opt_state"]
            self.best_adapter = state.get("best_adapter")
            self.losses = list(self.progress.losses)
            self.report.message(f"continuing {self.folder.path} after step {self.progress.step}")
        from_first(lambda: self.folder.rewind(self.progress.step))

    def _seconds(self) -> float:
        """Spent in the loop so far, without compiling."""
        return self._before + time.perf_counter() - self._begun - (self.compile_seconds - self._compiled)

    def _finish(self) -> Result:
        seconds = self._seconds()
        kept = self.peft.replace(adapter=self.best_adapter if self.keeps_best else self.adapter)
        metrics = {
            name: self.evaluator.metrics(kept, self.setup.splits[name]) if name in self.setup.splits else {}
            for name in ("validation", "test")
        }
        trained = jpeft.summary(kept).trained
        # What only training needs, a network that makes the prompt say, is in the checkpoints.
        kept = jpeft.fold(kept)
        jpeft.save(self.folder.adapter, kept, overwrite=True)
        summary = jpeft.summary(kept)
        result = Result(
            **metrics,
            best=self.progress.best,
            best_step=self.progress.best_step,
            steps=self.progress.step,
            trained=trained,
            seconds=round(seconds, 3),
            compile_seconds=round(self.compile_seconds, 3),
            path=self.folder.path,
            peft=kept,
            stored=summary.stored,
            changed=summary.changed,
            adapter_bytes=from_first(lambda: size_on_disk(self.folder.adapter)),
            step_seconds=from_first(self._step_seconds),
            flops=None if self.config.scan or self.config.grad_accum > 1 else self.cost.flops,
            temporary_bytes=self.cost.temporary_bytes,
            device=jax.devices()[0].device_kind,
        )
        if self.config.export:
            save_merged(self.folder.merged, self.setup.loaded, kept)

        def write() -> None:
            plot_run(self.folder, self.setup.task)
            write_json(self.folder.result, result.to_json())

        from_first(write)
        return result

    def _step_seconds(self) -> float | None:
        rates = [record["samples_per_second"] for record in self.folder.records() if record["split"] == "train"]
        return float(self.config.batch_size / np.median(rates)) if rates else None


def plot_run(folder: RunFolder, task: Task) -> None:
    """Draws a run's curve.png from its metrics.jsonl."""
    about = folder.about()
    # A folder is often just called "model", and a hub id has an owner.
    name = "/".join(Path(about["run"]["model"]).parts[-2:])
    title = f"{about['run']['method']} on {name}"
    plot_curve(folder.curve, folder.records(), task.metric, title, higher_is_better=task.higher_is_better)

"""Everything that a configuration names, loaded and checked in order, before anything is written."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

import jpeft
from jpeft import data, models, registry
from jpeft.checkpoint.adapter import replaced_paths
from jpeft.checkpoint.fingerprint import fingerprint
from jpeft.core.method import Method
from jpeft.core.peft import Peft
from jpeft.core.stages import Segment, plan
from jpeft.extras import explained
from jpeft.models.checkpoints.notes import unsaid
from jpeft.tasks.task import Arrays, Task, task_of
from jpeft.training.adapter_folder import attach_adapter, held_by, method_name, order_labels
from jpeft.training.added_tokens import warn_of_absent
from jpeft.training.base_files import base_files
from jpeft.training.build import attach, load_base, read_columns
from jpeft.training.config import TrainConfig, parse_options, to_json
from jpeft.training.devices import Devices, find_mesh
from jpeft.training.keys import keys
from jpeft.training.statistics import Kinds, Source, check_statistics, count_steps, make_statistics
from jpeft.tree.paths import Params

with explained():
    import grain


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run is made of; none of it changes in training.

    Attributes:
      config: The configuration.
      task: Loss, metrics and predictions.
      devices: Where arrays are.
      labels: Names of the classes, in the order of the logits.
      splits: The encoded data: train and, if there are such rows, validation and test.
      loaded: The pretrained model.
      peft: The base with the adapter that training begins with.
      new: Paths of parameters that neither the checkpoint nor an adapter to train on has, such as a new head.
      learning_rate: Peak learning rate, the configured one or the method's default.
      head_lr_scale: Learning rate of a new head as a multiple of that.
      steps: Optimizer steps of the run.
      steps_per_epoch: Optimizer steps of a pass over the training data.
      segments: The steps of each stage.
      rows: `rows[step]` are the numbers of the training rows in a batch.
    """

    config: TrainConfig
    task: Task
    devices: Devices
    labels: tuple[str, ...]
    splits: dict[str, Arrays]
    loaded: models.Loaded
    peft: Peft
    new: frozenset[str]
    learning_rate: float
    head_lr_scale: float
    steps: int
    steps_per_epoch: int
    segments: tuple[Segment, ...]
    rows: grain.MapDataset

    @property
    def head_learning_rate(self) -> float:
        """Peak learning rate of a new head."""
        return self.learning_rate * self.head_lr_scale

    @property
    def replaces_initialised(self) -> bool:
        """Whether every parameter that the checkpoint lacks, such as a new head, is trained whole: its first values then do not matter."""
        return self.loaded.initialised <= replaced_paths(self.peft.params, self.peft.adapter, self.peft.method)

    @property
    def keeps_best(self) -> bool:
        """Whether the adapter of the best evaluation is kept instead of the last one."""
        return self.config.keep_best or self.config.patience is not None

    def batch(self, step: int) -> PyTree:
        """Return the training batch of a step, on its devices."""
        return self.devices.rows(self.splits["train"], np.asarray(self.rows[step]))

    def statistics(self, kinds: Kinds, peft: Peft, forward: Callable[..., Any]) -> Any:
        """Make statistics of a model in training: `peft`, run by `forward`."""

        def run(params: Params, inputs: dict[str, Any]) -> Any:
            return forward(peft.replace(params=params).variables, **inputs, deterministic=True)

        return make_statistics(kinds, Source(self.config, self.task, self.labels, self.splits["train"], self.loaded, run, peft.params))

    def to_json(self) -> dict[str, Any]:
        """Return what config.json records."""
        return {
            "jpeft": jpeft.__version__,
            "run": to_json(
                self.config,
                learning_rate=self.learning_rate,
                head_lr_scale=self.head_lr_scale,
                dtype=self.loaded.config.dtype.name,
                param_dtype=self.loaded.config.param_dtype.name if self.config.param_dtype else None,
                scan=self.loaded.config.scan,
            ),
            "method": self.peft.method.config(),
            "labels": list(self.labels),
            "learning_rate": self.learning_rate,
            "head_lr_scale": self.head_lr_scale,
            "head_learning_rate": self.head_learning_rate,
            "steps": self.steps,
            "base": fingerprint(self.peft.params, exact_dtypes=False),
            # Without what each seed initialises, so that runs of several seeds can be compared.
            "pretrained": fingerprint(self.loaded.params, skip=self.loaded.initialised, exact_dtypes=False),
            "base_files": base_files(self.loaded.folder),
            "data": {name: fingerprint(self.task.identity(arrays)) for name, arrays in self.splits.items()},
            "examples": {name: len(next(iter(arrays.values()))) for name, arrays in self.splits.items()},
        } | ({} if self.config.adapter is None else {"adapter": fingerprint(self.peft.adapter)})


def prepare(config: TrainConfig, recorded: dict[str, Any] | None = None) -> Setup:
    """Load and check data, model and method, in this order.

    Args:
      config: The configuration.
      recorded: The method that the folder of the run records, if the run is continued.

    Raises:
      ValueError: for anything wrong with them.
    """
    task = task_of(config)
    tables = data.splits(config.data, **read_columns(config, task))
    labels = task.label_names(tables["train"])
    if config.adapter is not None:
        labels = order_labels(config, labels)
    mesh = find_mesh(config)
    with unsaid():  # it is said once all is checked
        loaded = load_base(config, labels, mesh)
    splits = encode_splits(config, task, tables, labels, loaded)
    warn_of_absent(loaded, splits["train"])
    peft = _attach(config, task, labels, splits["train"], loaded, recorded)
    new = loaded.initialised
    if config.adapter is not None:
        config, new = dataclasses.replace(config, method=method_name(peft)), new - held_by(config.adapter, loaded)
    # A frozen base without a head has nothing to train and is evaluated as it is.
    steps = count_steps(config, splits["train"]) if jax.tree.leaves(peft.adapter) else 0
    factory: Any = registry.methods()[config.method].factory
    usual = factory.rates_for(parse_options(config.options))
    return Setup(
        config=config,
        task=task,
        devices=Devices(mesh, models.partition_rules(loaded.model)),
        labels=labels,
        splits=splits,
        loaded=loaded,
        peft=peft,
        new=new,
        learning_rate=config.learning_rate or usual.learning_rate,
        head_lr_scale=config.head_lr_scale or usual.head_lr_scale,
        steps=steps,
        steps_per_epoch=data.steps_per_epoch(splits["train"], config.batch_size),
        segments=plan(peft.method.stages, steps),
        rows=data.batch_rows(splits["train"], config.batch_size, seed=keys(config.seed).data),
    )


def encode_splits(
    config: TrainConfig, task: Task, tables: dict[str, data.Table], labels: tuple[str, ...], loaded: models.Loaded
) -> dict[str, Arrays]:
    """Return the columns of each split that has rows.

    Raises:
      ValueError: from the task, or if the configuration needs a validation split and there is none.
    """
    splits = {
        name: task.encode_for(loaded, table, labels=labels, max_length=config.max_length) for name, table in tables.items() if len(table)
    }
    if (config.patience or config.keep_best) and "validation" not in splits:
        raise ValueError("The settings `patience` and `keep_best` need a validation split, and the data has none.")
    return splits


def _attach(
    config: TrainConfig,
    task: Task,
    labels: tuple[str, ...],
    arrays: Arrays,
    loaded: models.Loaded,
    recorded: dict[str, Any] | None,
) -> Peft:
    """Return the base with its adapter, after checking what later parts of the run need of the method."""
    apply: Callable[..., Any] = loaded.model.apply

    def forward(params: Params, inputs: dict[str, Any]) -> Any:
        return apply({"params": params}, **inputs, deterministic=True)

    source = Source(config, task, labels, arrays, loaded, forward, loaded.params)

    def statistics(method: Method) -> Any:
        check_statistics(method.requires_stats, config.method)
        return make_statistics(method.requires_stats, dataclasses.replace(source, method=method))

    steps = count_steps(config, arrays)
    if config.adapter is not None:
        peft = attach_adapter(config, loaded, steps)
    else:
        peft = attach(config, loaded, statistics, recorded, steps)
    for stage in peft.method.stages:
        check_statistics(stage.requires_stats, f"The stage {stage.name!r} of {config.method}")
    if config.export:
        # A method that cannot merge says so now rather than after hours of training.
        jpeft.merge(peft)
    return peft

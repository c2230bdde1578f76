"""A finished run, opened again: its model, ready to predict."""

import contextlib
import dataclasses
import os
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jpeft
from jpeft import models
from jpeft.checkpoint.adapter import WrongBaseError, read_record
from jpeft.core.peft import Peft
from jpeft.data import Table
from jpeft.data.texts import texts_table
from jpeft.deprecation import renamed_members
from jpeft.distributed import gather_to_host, on_first_process
from jpeft.models.checkpoints.shards import LARGEST_FILE
from jpeft.tasks.task import Arrays, Task, task_of
from jpeft.training.base_files import check_base_files
from jpeft.training.build import load_base
from jpeft.training.config import TrainConfig, from_json, pinned
from jpeft.training.decoding import make_decoding
from jpeft.training.evaluate import Evaluator
from jpeft.training.finite import explain
from jpeft.training.places import find_places
from jpeft.training.run_folder import RunFolder, config_checksum
from jpeft.tree.finite import not_finite
from jpeft.tree.paths import Params, first_few


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, loaded. Several threads may use one.

    Attributes:
      folder: Its files.
      config: Its configuration, with the places where its base and its data are now.
      task: What the model was trained for.
      labels: Names of the classes, in the order of the logits.
      loaded: The pretrained model.
      peft: The base with the trained adapter, without the parts that only training needs (`jpeft.fold`).
      evaluator: Runs the model.
    """

    folder: RunFolder
    config: TrainConfig
    task: Task
    labels: tuple[str, ...]
    loaded: models.Loaded
    peft: Peft
    evaluator: Evaluator
    _tokenizing: contextlib.AbstractContextManager[Any] = dataclasses.field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def model(self) -> Any:
        """The linen model, as `jpeft.wrap` takes its `apply`."""
        return self.loaded.model

    def predict(
        self,
        texts: str | Iterable[str | Sequence[str]],
        pairs: str | Iterable[str] | None = None,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Any:
        """Return the model's answer to each text, in order, or to a single text.

        The model is compiled once for each of a dozen shapes, whatever the number and the length of the texts, and once for each
        `max_new_tokens` and `top_k`.

        Args:
          texts: Any number of texts, or one as a string. For tags, a text may also be a list of its words.
          pairs: Their second texts, for a model of pairs.
          max_new_tokens: Most tokens to generate for a text; None for 64. Only for a model that generates text, like the arguments below.
          seed: Draw tokens at random with this seed; None takes the most likely token each time.
          temperature: Temperature of the draw: above 1 the probabilities become more even, below 1 sharper.
          top_k: Draw among this many most likely tokens.
          top_p: Draw among the most likely tokens that make up this probability.

        Returns:
          A dictionary for each text, of values that JSON has: `label` and `probabilities`, `tags`, or `generated`, by the task. For a
          single text, its dictionary.

        Raises:
          ValueError: for what is not a text, and for options that do not suit the task.

        Example: `run.predict(["Not bad at all."])` gives `[{"label": "positive", "probabilities": {"negative": 0.1, "positive": 0.9}}]`.
        """
        options = {"max_new_tokens": max_new_tokens, "seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        if isinstance(texts, str):
            return self.answers(self.table([texts], None if pairs is None else [pairs]), **options)[0]
        return self.answers(self.table(texts, pairs), **options)

    def table(self, texts: Any, pairs: Any = None, *, names: tuple[str, str] = ("texts", "pairs")) -> Table:
        """Return texts as the table of rows to be predicted that the task reads; see `jpeft.data.texts.texts_table`."""
        words = "tags" in self.task.columns
        return texts_table(texts, pairs, needs_pairs=self.config.pair is not None, takes_words=words, names=names)

    def answers(self, table: Table, **options: Any) -> list[dict[str, Any]]:
        """Return the model's answer to each row of a table; the options are those of `predict`."""
        with self._tokenizing:
            decoding = make_decoding(self.task, self.loaded, **options)
        if not len(table):
            return []
        arrays = self.encode(table)
        if self.task.generates:
            self._warn_of_positions(arrays["input_ids"].shape[1] + decoding.max_new_tokens)
        answers = self.evaluator.answers(self.peft, arrays, decoding, longest=self.config.max_length if self.task.generates else None)
        with self._tokenizing:
            return self.task.predictions(answers, self.labels, self.loaded.tokenizer)

    def _warn_of_positions(self, length: int) -> None:
        """Say that a text may become longer than the model's positions; a model with a table of positions refuses it by itself."""
        has_table = getattr(self.loaded.config, "position_rows", None) is not None
        if not has_table and length > self.loaded.config.max_length:
            warnings.warn(
                f"Prompt and max_new_tokens make up to {length} tokens, and the model has {self.loaded.config.max_length} positions: "
                "what comes behind them may be of no use.",
                stacklevel=3,
            )

    def metrics(self, table: Table) -> dict[str, float]:
        """Return the task's metrics on a table of rows with labels, tags or targets."""
        return self.evaluator.metrics(self.peft, self.encode(table, self.labels))

    def encode(self, table: Table, labels: Sequence[str] | None = None) -> Arrays:
        """Return a table as arrays, whose columns `task.inputs` the model takes.

        Args:
          table: Rows; `table` makes one of texts.
          labels: The run's labels for rows to be scored; None for rows to be predicted.
        """
        # A tokenizer keeps how it cuts and pads, so two threads must not use it at once.
        with self._tokenizing:
            return self.task.encode_for(self.loaded, table, labels=labels, max_length=self.config.max_length)

    def configured(self, **changes: Any) -> "Run":
        """Return the run with other values of settings that do not change its model, such as `overlong`.

        Raises:
          ValueError: for a setting that the task has no use for.
        """
        config = dataclasses.replace(self.config, **changes)
        task = task_of(config)
        evaluator = Evaluator(self.evaluator.forward, task, self.evaluator.batch_size, self.labels)
        return dataclasses.replace(self, config=config, task=task, evaluator=evaluator)

    def merged(self) -> Params:
        """Return the parameters with the adapter merged into them, for the plain model: `run.model.apply({"params": run.merged()}, ...)`.

        Raises:
          ValueError: the method's reason, if it cannot merge.
        """
        return jpeft.merge(self.peft)

    def save_merged(self, folder: str | os.PathLike[str], *, max_shard_size: int | str = LARGEST_FILE) -> None:
        """Write the merged model as a plain Hugging Face folder; see `save_merged`."""
        save_merged(folder, self.loaded, self.peft, max_shard_size=max_shard_size)


def load_run(
    path: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    base: Run | None = None,
    batch_size: int = 64,
) -> Run:
    """Load the model of a finished run with its adapter, once, to predict any number of times.

    Args:
      path: Folder of the run, as `jpeft train` made it.
      model: Folder or hub id of the base, where it has moved. None for where the run found it, or where that lies beside the moved run.
      data: The run's data, where it has moved. Only what reads the data needs it.
      base: Another run of the same base and the same number of labels, whose base is shared instead of loaded again.
      batch_size: Most texts that the model answers at once.

    Returns:
      A `Run`, with `predict(texts)`, `task`, `labels`, `config`, `peft`, `model` and `merged()`.

    Raises:
      ValueError: if `path` holds no finished run, or the base is not there or not the one that the adapter was trained on.

    >>> run = load_run("runs/lora")                  # doctest: +SKIP
    >>> run.predict("Not bad at all.")["label"]      # doctest: +SKIP
    'positive'
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    folder = RunFolder(path)
    on_first_process(folder.tidy)
    about = folder.read_config()
    if not folder.adapter.exists():
        raise ValueError(f"The run in {folder.path} is not finished: continue it with --resume.")
    labels = tuple(about["labels"])
    recorded = pinned(from_json(about["run"]), about["run"])
    if base is not None:
        _check_shareable(base, recorded, labels, folder)
        model = model or base.config.model
    check_belongs(folder, about)
    config = find_places(recorded, folder.path, model=model, data=data)
    loaded = _load_base(config, labels, named=model is not None) if base is None else dataclasses.replace(base.loaded, labels=labels)
    try:
        check_base_files(about.get("base_files"), loaded.folder, folder.path)
        peft = jpeft.fold(jpeft.load(folder.adapter, base.peft.params if base is not None else loaded.params))
    except WrongBaseError as error:
        raise WrongBaseError(
            f"{config.model} is not the base of the run in {folder.path}; say where that is with --model (in Python model=...). {error}"
        ) from error
    task = task_of(config)
    evaluator = Evaluator(jpeft.wrap(loaded.model.apply, peft.method), task, batch_size, labels)
    shared = {} if base is None else {"_tokenizing": base._tokenizing}
    return Run(folder, config, task, labels, loaded, peft, evaluator, **shared)


def check_belongs(folder: RunFolder, about: dict[str, Any]) -> None:
    """Check that a run's adapter was trained with the run's configuration. Adapters of earlier versions do not say it, and pass.

    Raises:
      ValueError: if it was not, or its record is damaged.
    """
    run = read_record(folder.adapter).get("run")
    if run is not None and run != config_checksum(about):
        raise ValueError(f"The adapter in {folder.adapter} is not that of the run that {folder.config} records: one of them was replaced.")


def _load_base(config: TrainConfig, labels: tuple[str, ...], *, named: bool) -> models.Loaded:
    """Load the base; if it is not there and the caller has not named it, say how to."""
    try:
        return load_base(config, labels)
    except ValueError as error:
        if named or os.path.exists(config.model):
            raise
        message = f"{error} If the base is elsewhere now, say where with --model (in Python model=...)."
        raise ValueError(message) from error


def _check_shareable(base: Run, config: TrainConfig, labels: Sequence[str], folder: RunFolder) -> None:
    """Check that a run can take its base from another run: the model must be the same, its head included."""
    names = ("task", "dtype", "param_dtype", "scan", "add_tokens")
    pairs = [(name, getattr(base.config, name), getattr(config, name)) for name in names]
    pairs.append(("number of labels", len(base.labels), len(labels)))
    different = [f"{name} ({one} and {other})" for name, one, other in pairs if one != other]
    if different:
        raise ValueError(f"{folder.path} cannot share the base of {base.folder.path}: they differ in {', '.join(different)}.")


def save_merged(folder: str | os.PathLike[str], loaded: models.Loaded, peft: Peft, *, max_shard_size: int | str = LARGEST_FILE) -> None:
    """Write the merged model as a Hugging Face folder with its labels and tokenizer; the folder may exist if it is empty.

    If there are several processes, all must call this, and each holds the whole model in its host's memory for a while. Weights of more
    than `max_shard_size` are split into several files, as `jpeft.models.save` does.

    Raises:
      ValueError: the method's reason, if it cannot merge; if the merged weights are not finite.
    """
    params = gather_to_host(jpeft.merge(peft))
    if bad := not_finite(params):
        raise ValueError(f"The merged weights are not finite, in {first_few(bad, 3)}. {explain(peft)}")
    options: dict[str, Any] = {"labels": loaded.labels, "tokenizer": loaded.tokenizer, "max_shard_size": max_shard_size}
    on_first_process(lambda: models.save(folder, loaded.model, params, overwrite=True, **options))


__getattr__ = renamed_members(__name__, open_run="load_run")

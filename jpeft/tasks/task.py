"""The contract of a task: how a table becomes arrays, and how the outputs of a model become a loss, metrics and predictions.

Trainer and command line call these methods and ask no task for its name.
"""

import abc
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Array, Float, PyTree

from jpeft.data import Table
from jpeft.models import Loaded
from jpeft.models.generation.decoding import Decoding as Decoding
from jpeft.tasks.registry import TASKS
from jpeft.tasks.token_ids import check_token_ids
from jpeft.training.config import Settings

# Columns by name, each [rows, ...].
Arrays = dict[str, np.ndarray]
# The same on a device, with the rows of one batch.
Batch = Mapping[str, Any]
# A column of the data besides the text; `Settings` has a field of the same name that says what the file calls the column.
Column = Literal["pair", "label", "target", "tags"]

# What the text models of `jpeft.models` take.
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Task(abc.ABC):
    """A task: constants, and pure functions as methods. docs/skeletons/task.py is one to copy.

    Attributes:
      name: Name on the command line, a key of `jpeft.tasks.registry.TASKS`.
      model: Kind of model, one of those that `jpeft.models.load(task=...)` takes.
      columns: Columns of the data that the task reads besides the text.
      metric: Validation metric that early stopping and `keep_best` watch, one of those that `metrics` returns.
      higher_is_better: Whether a higher value of that metric is better.
      inputs: Columns of `encode` that are arguments of the model; a column that is absent is not passed.
      targets: The other columns of `encode`.
      token_columns: Columns of `encode` that hold token ids.
      generates: Whether answers are generated text, so that `Decoding` applies.
    """

    name: ClassVar[str]
    model: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = TEXT_INPUTS
    targets: ClassVar[tuple[str, ...]] = ("label",)
    token_columns: ClassVar[tuple[str, ...]] = ("input_ids",)
    generates: ClassVar[bool] = False

    # --- data ---------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def label_names(self, table: Table) -> tuple[str, ...]:
        """Return the labels of a training table in the order of the logits; empty for a task without classes."""

    @abc.abstractmethod
    def encode(self, table: Table, tokenizer: Any, *, labels: Sequence[str] | None, max_length: int) -> Arrays:
        """Return the columns `inputs` and `targets` of a table as arrays, all rows of one length.

        Args:
          table: Rows of data.
          tokenizer: The model's tokenizer.
          labels: From `label_names`; None for rows to be predicted, which have no targets and keep the order of the table.
          max_length: Tokens of a row.
        """

    def row_shapes(self, max_length: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of a row in each column that `encode` makes of plain texts; the numbers are int32. `jpeft.estimate` asks.

        Token types are no part of it: a model that has them adds them. By default, token ids with a mask and one label a row.
        """
        return {"input_ids": (max_length,), "attention_mask": (max_length,), "label": ()}

    def configured(self, settings: Settings) -> "Task":
        """Return the task with what `encode` must know of a configuration besides its arguments; by default nothing.

        Raises:
          ValueError: for a setting that the task has no use for.
        """
        if settings.overlong != "error":
            raise ValueError(f"The task {self.name} has no use for `overlong`={settings.overlong!r}: texts that are too long are cut.")
        return self

    # --- training -----------------------------------------------------------------------------------------------------

    def loss_inputs(self, batch: Batch, settings: Settings | None = None) -> dict[str, Any]:
        """Return the arguments of the model in training and scoring: `model_inputs`, unless the model itself is to compute the loss.

        A language model that is given ``labels=`` returns the loss of each token, and holds no logits of the whole batch.

        Args:
          batch: Columns of `encode`, [batch, ...].
          settings: As in `losses`.
        """
        del settings
        return self.model_inputs(batch)

    @abc.abstractmethod
    def losses(self, outputs: Any, /, batch: Batch, settings: Settings | None = None) -> Float[Array, " batch"]:
        """Return the loss of each row, summed over all predictions in the row.

        Args:
          outputs: What the model returns for `loss_inputs`: logits, [batch, ...], unless the task asks for something else.
          batch: Columns of `encode`, [batch, ...].
          settings: Configuration of the run, for the training loss. None for the negative log-likelihood alone, without smoothing or other
            regularisation, as metrics and Fisher information need it.
        """

    @abc.abstractmethod
    def counts(self, batch: Batch) -> Float[Array, " batch"]:
        """Return the number of predictions in each row. The loss of a batch is the sum of its `losses` over the sum of its `counts`."""

    # --- evaluation ---------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def scores(self, outputs: Any, /, batch: Batch) -> PyTree:
        """Return what `metrics` needs of each row, as arrays [batch, ...]. `outputs` are as in `losses`. This runs under `jit`."""

    @abc.abstractmethod
    def metrics(self, scores: Any, arrays: Arrays, labels: Sequence[str]) -> dict[str, float]:
        """Return the metrics over all rows, from the `scores` of all rows and the columns of `encode`."""

    @abc.abstractmethod
    def answer(self, forward: Callable[..., Any], variables: Mapping[str, Any], batch: Batch, decoding: Decoding) -> PyTree:
        """Return the model's answer to each row, as arrays [batch, ...].

        The answer must tell if the logits were not finite: by logits or scores among its arrays, beside choices such as `argmax`, which is
        a number even of NaN. An answer with a float that is not finite is an error.

        Args:
          forward: `forward(variables, **inputs, deterministic=True) -> logits`.
          variables: `Peft.variables`.
          batch: Columns of `encode` without labels.
          decoding: How text is generated, for a task that does.
        """

    @abc.abstractmethod
    def predictions(self, answers: Any, labels: Sequence[str], tokenizer: Any) -> list[dict[str, Any]]:
        """Return the answers as one JSON object per row."""

    # --- the same for every task --------------------------------------------------------------------------------------

    def encode_for(self, loaded: Loaded, table: Table, *, labels: Sequence[str] | None, max_length: int) -> Arrays:
        """Return what `encode` makes of a table with the model's tokenizer, once it is sure that the model can read it.

        Raises:
          ValueError: from `encode`; for a token that the model has no embedding for; for an undeclared column.
        """
        arrays = self.encode(table, loaded.tokenizer, labels=labels, max_length=max_length)
        self.check_columns(arrays)
        check_token_ids(arrays, loaded, self.token_columns)
        return arrays

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the columns of a batch that are arguments of the model."""
        return model_inputs(batch, self.inputs)

    def check_columns(self, arrays: Arrays) -> None:
        """Raise an error if `encode` made a column that the task declares neither as an input nor as a target.

        Raises:
          ValueError: naming the column.
        """
        unknown = [name for name in arrays if name not in (*self.inputs, *self.targets)]
        if unknown:
            raise ValueError(
                f"The task {self.name} encodes the column {unknown[0]!r}, which is neither in its inputs {self.inputs} nor in its targets "
                f"{self.targets}: add it to one of them."
            )

    def identity(self, arrays: Arrays) -> Arrays:
        """Return the columns by whose fingerprint a run recognises its data: all, unless a task says otherwise."""
        return arrays

    def is_better(self, value: float, than: float) -> bool:
        """Return whether one value of the watched metric is better than another."""
        return value > than if self.higher_is_better else value < than


def model_inputs(batch: Batch, inputs: Sequence[str] = TEXT_INPUTS) -> dict[str, Any]:
    """Return the columns of a batch that are arguments of the model; `inputs` are those of a text model by default.

    >>> model_inputs({"input_ids": [[5]], "label": [1]})
    {'input_ids': [[5]]}
    """
    return {name: batch[name] for name in inputs if name in batch}


def task_of(settings: Settings) -> Task:
    """Return the task of a configuration.

    Raises:
      ValueError: listing the tasks, if there is none of its name.
    """
    return find_task(settings.task).configured(settings)


def find_task(name: str) -> Task:
    """Return the task of that name, with the defaults of its settings.

    Raises:
      ValueError: listing the tasks, if there is none.

    >>> find_task("generation").metric
    'perplexity'
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; there are {', '.join(sorted(TASKS))}.")
    module, _, cls = TASKS[name].rpartition(".")
    return getattr(importlib.import_module(module), cls)()

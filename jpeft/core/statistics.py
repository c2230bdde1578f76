"""Statistics: what some methods must be told about the data or the model before they can choose or start what they train.

A method names the kinds that it takes in `Method.requires_stats`; `jpeft.stats` has a function that makes each kind. `jpeft.apply` takes
one of them as ``stats=``, or several in a list, of which each part of a chain takes its kind.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import numpy as np

from jpeft.tree.adapters import ADDED, Adapter
from jpeft.tree.paths import Params, flatten


class Statistic(abc.ABC):
    """The common base of all kinds."""

    made_by: ClassVar[str]  # the call that makes it, for error messages

    @classmethod
    @abc.abstractmethod
    def of(cls, value: Any) -> "Statistic | None":
        """A plain value as this kind of statistic; None if it cannot be one."""


class _PerParameter(Statistic):
    values: Params

    @classmethod
    def of(cls, value: Any) -> "Statistic | None":
        return cls(value)  # pyright: ignore[reportCallIssue]

    def __getitem__(self, key: str) -> Any:
        """A part of `values`, which has the tree of the parameters."""
        return self.values[key]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fisher(_PerParameter):
    """The diagonal of the Fisher information, from `jpeft.stats.fisher`.

    Attributes:
      values: A tree like the parameters, float32.
    """

    values: Params
    made_by: ClassVar[str] = "jpeft.stats.fisher(losses, params, batches)"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Movement(_PerParameter):
    """How far training has moved each parameter, from `jpeft.stats.movement`.

    Attributes:
      values: A tree like the parameters, float32.
    """

    values: Params
    made_by: ClassVar[str] = "jpeft.stats.movement(params, tuned)"


class Moments(NamedTuple):
    """Sums over all inputs x of one kernel, or of each in a stack; every input as a vector of the kernel's inputs.

    Attributes:
      gram: The sum of ``x xᵀ``, [*stack, inputs, inputs].
      total: The sum of x, [*stack, inputs].
      count: The number of inputs, [*stack].
    """

    gram: Any
    total: Any
    count: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputMoments(Statistic):
    """First and second moments of the inputs of kernels, from `jpeft.stats.input_moments`.

    Attributes:
      values: `Moments` by path of the kernel.
    """

    values: Mapping[str, Moments]
    made_by: ClassVar[str] = "jpeft.stats.input_moments(model.apply, params, batches, method=jpeft.lora(init='eva'))"

    @classmethod
    def of(cls, value: Any) -> "InputMoments | None":
        """A dict of `Moments`."""
        return cls(value) if isinstance(value, Mapping) and all(isinstance(each, Moments) for each in value.values()) else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues(Statistic):
    """Keys and values for every layer, from `jpeft.stats.key_values`; or the adapter of another prefix.

    Attributes:
      values: A tree in the form of a prefix's adapter.
    """

    values: Adapter
    made_by: ClassVar[str] = "jpeft.stats.key_values(model, params, [tokens])"

    @classmethod
    def of(cls, value: Any) -> "KeyValues | None":
        """The leaves under some module's ``+`` are taken for keys and values, if they are called so."""
        leaves = flatten(value) if isinstance(value, Mapping) else {}
        ends = {path.rpartition(f"/{ADDED}/")[2] for path in leaves if f"/{ADDED}/" in path}
        return cls(value) if ends & {"key", "value"} else None

    def __getitem__(self, key: str) -> Any:
        """A part of `values`."""
        return self.values[key]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelTokens(Statistic):
    """The token ids of each class label.

    Attributes:
      ids: One tuple of ids for each label.
    """

    ids: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    made_by: ClassVar[str] = "jpeft.stats.LabelTokens(((2204,), (2919, 102))), the token ids of each label"

    @classmethod
    def of(cls, value: Any) -> "LabelTokens | None":
        """A sequence of sequences of whole numbers."""
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence) or not value:
            return None
        rows = [np.asarray(ids) for ids in value]
        if not all(row.ndim == 1 and (not row.size or np.issubdtype(row.dtype, np.integer)) for row in rows):
            return None
        return cls(tuple(tuple(row.tolist()) for row in rows))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt(Statistic):
    """The rows of a prompt to start from.

    Attributes:
      rows: An array [l, d].
    """

    rows: Any
    made_by: ClassVar[str] = "jpeft.stats.Prompt(rows), rows an array [l, d]"

    @classmethod
    def of(cls, value: Any) -> "Prompt | None":
        """An array with two axes, or an adapter that holds a prompt."""
        if getattr(value, "ndim", 0) == 2:
            return cls(value)
        leaves = flatten(value) if isinstance(value, Mapping) else {}
        found = [leaf for path, leaf in leaves.items() if path.endswith(f"/{ADDED}/prompt")]
        return cls(found[0]) if found else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourcePrompt(Statistic):
    """The prompt that tasks share and the factors of one of them, or their mean: what a prompt for a new task starts from.

    Attributes:
      rows: The shared prompt, [l, d].
      task_cols: The left factor, [l, r].
      task_rows: The right factor, [r, d].
    """

    rows: Any
    task_cols: Any
    task_rows: Any
    made_by: ClassVar[str] = "jpeft.stats.source_prompt(peft)"

    @classmethod
    def of(cls, value: Any, task: int | None = None) -> "SourcePrompt | None":
        """An adapter that holds a prompt of several tasks: one of them, or the mean of their factors."""
        leaves = flatten(value) if isinstance(value, Mapping) else {}
        found = [[leaf for path, leaf in leaves.items() if path.endswith(f"/{ADDED}/{name}")] for name in ("shared", "cols", "rows")]
        if not all(len(each) == 1 for each in found):
            return None
        (shared,), *factors = found
        return cls(shared, *(each.mean(0) if task is None else each[task] for (each,) in factors))


def kinds_of(name: str | None) -> tuple[type[Statistic], ...]:
    """The kinds that one of the names of earlier versions stands for.

    >>> kinds_of("fisher"), kinds_of(None)
    ((<class 'jpeft.core.statistics.Fisher'>,), ())
    """
    kinds: dict[str, type[Statistic]] = {"fisher": Fisher, "movement": Movement, "key_values": KeyValues, "labels": LabelTokens}
    return () if name is None else (kinds[name],)


S = TypeVar("S", bound=Statistic)


def find(stats: Any, kind: type[S]) -> S | None:
    """The statistic of one kind in what `jpeft.apply` was given; None if there is none.

    Args:
      stats: None, one statistic, or a list of them. A plain value is taken for the kind that is asked for, if it can be one.
      kind: The kind.

    >>> find([Fisher({"w": 1.0}), LabelTokens(((3,),))], LabelTokens).ids
    ((3,),)
    """
    several = isinstance(stats, (list, tuple)) and any(isinstance(one, Statistic) for one in stats)
    for one in stats if several else [stats]:
        if isinstance(one, kind):
            return one
        if one is not None and not isinstance(one, Statistic):
            return kind.of(one)  # pyright: ignore[reportReturnType]
    return None

"""Heads with labels: whether a checkpoint's head is kept for other data, and in which order of its rows.

A head is kept where its labels are the data's labels, whatever their order: its rows follow the names. Labels without names (LABEL_0,
LABEL_1, ...) stay where they are if they are as many. Any other head knows other classes, so a fresh one is made.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is done with a checkpoint's head.

    Attributes:
      kept: whether its values are read; False initialises a new head.
      rows: for each label the row of the checkpoint's head; None if the rows stand in the right order.
      remark: what the user is told; empty if there is nothing to tell.
    """

    kept: bool
    rows: tuple[int, ...] | None = None
    remark: str = ""


@dataclasses.dataclass(frozen=True)
class Stored:
    """The head of a checkpoint.

    Attributes:
      outputs: number of its outputs; None if the checkpoint has no head for this task, or a part of one.
      labels: names of the outputs; () if config.json has none.
      task: name of another class of model, for which the checkpoint says that it was trained; empty if there is none.
    """

    outputs: int | None
    labels: tuple[str, ...]
    task: str = ""

    @property
    def named(self) -> bool:
        """Whether the labels have names of their own."""
        return any(label != f"LABEL_{i}" for i, label in enumerate(self.labels))


def choose_head(stored: Stored, labels: Sequence[str], *, given: bool, counted: bool, fresh: bool, keep: bool) -> Choice:
    """Decide what is done with a checkpoint's head.

    Args:
      stored: the head in the checkpoint.
      labels: the labels that the model will have.
      given: whether the caller named these labels.
      counted: whether the caller gave only their number.
      fresh: the caller asks for a fresh head.
      keep: the caller asks to keep the head.

    Raises:
      ValueError: if the head is to be kept and cannot be.

    >>> choose_head(Stored(2, ("pos", "neg")), ("neg", "pos"), given=True, counted=False, fresh=False, keep=False).rows
    (1, 0)
    """
    same = len(set(stored.labels)) == len(stored.labels) == stored.outputs and set(stored.labels) == set(labels)
    rows = tuple(stored.labels.index(label) for label in labels) if same else None
    rows = None if rows == tuple(range(len(labels))) else rows
    if keep:
        _check_can_be_kept(stored, labels)
        by_position = given and not same
        return Choice(True, rows, _positions(stored, labels) if by_position else "")
    if fresh or stored.outputs is None:
        return Choice(False)
    if stored.task:
        return Choice(False, remark=f"the checkpoint's head is left out, because it was trained as {stored.task} (--keep-head keeps it)")
    if not (given or counted) or (given and same):
        return Choice(True, rows)
    if stored.outputs == len(labels) and (counted or not stored.named):
        return Choice(True, remark="" if counted else _positions(stored, labels))
    keeps = " (--keep-head keeps it)" if stored.outputs == len(labels) else ""
    if stored.named and given:
        about = f"its labels are {_list(stored.labels)}, and those asked for {_list(labels)}"
    else:
        about = f"it has {stored.outputs} outputs, and {len(labels)} are asked for"
    return Choice(False, remark=f"the checkpoint's head is left out, because {about}{keeps}")


def read_labels(content: Mapping[str, Any], file: Any, id2label: Any) -> tuple[str, ...]:
    """Return the names of the outputs that config.json gives; () if it gives none.

    Args:
      content: Of config.json.
      file: Its path, for messages.
      id2label: The same as the configuration of `transformers` has it.

    Raises:
      ValueError: if the names are not those of outputs 0, 1, 2, ....
    """
    if not {"id2label", "num_labels", "_num_labels"} & content.keys() or not id2label:
        return ()
    if sorted(id2label) != list(range(len(id2label))):
        raise ValueError(f"{file}: id2label must name the outputs 0 to {len(id2label) - 1}, and names {_list(list(map(str, id2label)))}.")
    names = tuple(id2label[i] for i in range(len(id2label)))
    if wrong := [name for name in names if not isinstance(name, str | int | float)]:
        raise ValueError(f"{file}: id2label holds {wrong[0]!r}, which is no name of a label.")
    return tuple(map(str, names))


def _check_can_be_kept(stored: Stored, labels: Sequence[str]) -> None:
    if stored.outputs is None:
        raise ValueError("keep_head (--keep-head): the checkpoint has no head for this task, or only a part of one.")
    if stored.outputs != len(labels):
        raise ValueError(
            f"keep_head (--keep-head): the checkpoint's head has {stored.outputs} outputs, and there are {len(labels)} labels: "
            f"{_list(labels)}."
        )


def _positions(stored: Stored, labels: Sequence[str]) -> str:
    """Return the remark on a head whose outputs are taken for labels by their position."""
    names = stored.labels if len(stored.labels) == len(labels) else [f"output {i}" for i in range(len(labels))]
    pairs = [f"{name} for {label}" for name, label in zip(names, labels, strict=True) if name != label]
    return f"the checkpoint's head is kept, and its outputs are taken in their order: {_list(pairs)}" if pairs else ""


def _list(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")

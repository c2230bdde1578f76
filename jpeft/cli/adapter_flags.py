"""The flags of commands that take an adapter and its base in place of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

from jpeft.training.adapter_folder import load_adapter
from jpeft.training.config import TaskName
from jpeft.training.run import Run, load_run

# Flags -> settings of a run.
_SETTINGS = {
    "task": "task",
    "revision": "revision",
    "untie": "untie",
    "max_length": "max_length",
    "text_column": "text",
    "pair_column": "pair",
    "label_column": "label",
    "tags_column": "tags",
    "target_column": "target",
}


@dataclasses.dataclass(frozen=True)
class AdapterFlags:
    """What an adapter without a run does not know."""

    # Folder of an adapter, or a hub id, in place of a run: of HF PEFT, of the library adapters, or of jpeft. Needs --model.
    adapter: str | None = None
    # Names of the outputs of the adapter's head, in their order; none takes those that stand beside the adapter, or of the base.
    labels: tuple[str, ...] = ()
    # Task of the adapter; none for sequence-classification. Like the flags below only with --adapter.
    task: TaskName | None = None
    # Branch, tag or commit of the base on the hub; none for its main branch.
    revision: str | None = None
    # Give the head of a language model a copy of the word embedding, where the two are one.
    untie: bool = False
    # Tokens per text; none for 128. Longer texts are cut.
    max_length: int | None = None
    # Text column of the data; none for "text".
    text_column: str | None = None
    # Column of the second text of a pair; none for single texts.
    pair_column: str | None = None
    # Label column; none for "label".
    label_column: str | None = None
    # For token classification: column of the lists of tags; none for "tags".
    tags_column: str | None = None
    # For generation: column of the text to generate; none for texts that are scored whole.
    target_column: str | None = None


def open_model(args: Any) -> Run:
    """Return the run of a command, or the model with the adapter that is given in its place.

    Raises:
      ValueError: if both are given or neither, or flags that do not belong to what is given.
    """
    if (args.run is None) == (args.adapter is None):
        raise ValueError("Give either the folder of a run, or --adapter with --model.")
    given = {name: value for name in _SETTINGS if (value := getattr(args, name)) not in (None, False)}
    if args.adapter is None:
        if given or args.labels:
            name = next(iter(given), "labels").replace("_", "-")
            raise ValueError(f"--{name} is for an adapter without a run; {args.run} is a run, which has its own.")
        return load_run(args.run, model=args.model, batch_size=args.batch_size)
    if args.model is None:
        raise ValueError(f"--adapter {args.adapter} needs its base: give it with --model.")
    settings = {_SETTINGS[name]: value for name, value in given.items()}
    return load_adapter(args.adapter, model=args.model, labels=args.labels, batch_size=args.batch_size, **settings)


def check_data_given(args: Any, run: Run) -> None:
    """Refuse to take the data of a run where there is none.

    Raises:
      ValueError: naming the flag.
    """
    if args.adapter is not None and args.data is None:
        raise ValueError(f"The adapter in {run.folder.path} has no data of its own: give some with --data.")

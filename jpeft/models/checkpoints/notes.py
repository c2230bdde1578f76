"""What `load` says of a checkpoint that does not fit the model exactly: one line, as a warning."""

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jpeft import distributed


class CheckpointNote(UserWarning):
    """A checkpoint lacks parameters of the model, or has tensors that it has no place for. The command line prints it as a note."""


def make_note(folder: Path, initialised: Iterable[str], unused: Iterable[str], remarks: Sequence[str]) -> str:
    """Return the line about a checkpoint; empty if there is nothing to say.

    >>> make_note(Path("base"), ["classifier/bias", "classifier/kernel"], [], ())
    'Pretrained checkpoint base: newly initialised: classifier/bias, classifier/kernel.'
    """
    parts = list(remarks)
    if initialised := sorted(initialised):
        parts.append(f"newly initialised: {_list(initialised)}")
    if unused := sorted(unused):
        parts.append(f"without a place in the model: {_list(unused)}")
    return f"Pretrained checkpoint {folder}: {'; '.join(parts)}." if parts else ""


def say(note: str) -> None:
    """Show a note, if there is one, in the first of several processes."""
    if note and distributed.is_first():
        warnings.warn(note, CheckpointNote, stacklevel=3)


@contextlib.contextmanager
def unsaid() -> Iterator[None]:
    """Load checkpoints without their notes: the caller says them later, or they were said before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointNote)
        yield


def _list(names: Sequence[str], most: int = 6) -> str:
    """Return names as text: those that differ in a number once, and no more than a line can hold."""
    kinds = list(dict.fromkeys(re.sub(r"(?<=[./])\d+(?=[./])", "*", name) for name in names))
    shown = ", ".join(kinds[:most])
    more = f", and {len(kinds) - most} more" if len(kinds) > most else ""
    return f"{shown}{more}" if len(kinds) == len(names) else f"{shown}{more} ({len(names)} in all)"

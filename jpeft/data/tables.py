"""Tables of texts."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jpeft.data.origin import Origin
from jpeft.data.values import fault_of


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of a data set by column; all columns have the same length.

    Attributes:
      text: The texts, or the first of each pair.
      pair: The second texts of sentence pairs; None for single texts.
      label: The class of each row; None for rows to be predicted and for data without classes.
      target: The text to generate from each text; None for prompts and for plain text.
      words: The words of each text, if the data has lists of words; None if words are separated by spaces.
      tags: A tag for each word of each text; None for rows to be tagged and for data without tags.
      origin: Where the rows come from, for messages; None for a table made by hand. Two tables of the same rows are equal whatever
        their origin.

    Raises:
      ValueError: for columns of different lengths, values that are not strings, and texts with half of a surrogate pair or a NUL character.

    >>> from jpeft.data import Table
    >>> len(Table(text=["good", "bad"], pair=None, label=["pos", "neg"]))
    2
    """

    text: list[str]
    pair: list[str] | None = None
    label: list[str] | None = None
    target: list[str] | None = None
    words: list[list[str]] | None = None
    tags: list[list[str]] | None = None
    origin: Origin | None = dataclasses.field(default=None, compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self._columns().items() if column is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"The columns of a Table must have the same length, got {lengths}.")
        for name, column in self._columns().items():
            cells: list[Any] = column or []
            for row, cell in enumerate(cells):
                if not (isinstance(cell, str) or (name in ("words", "tags") and all(isinstance(part, str) for part in cell))):
                    raise ValueError(f"The {name} of a Table must be strings, got {cell!r} in {self.where([row])}.")
                if fault := fault_of(cell if isinstance(cell, str) else "".join(cell)):
                    raise ValueError(f"The {name} holds {fault}, which is not text, in {self.where([row])}: correct or remove it.")

    def __len__(self) -> int:
        return len(self.text)

    def _columns(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "origin"}

    def take(self, rows: Sequence[int]) -> "Table":
        """Return the given rows, in that order."""
        columns = {name: column and [column[i] for i in rows] for name, column in self._columns().items()}
        return Table(**columns, origin=self.origin and self.origin.take(rows))

    def where(self, rows: Sequence[int]) -> str:
        """Return the file and the numbers of some rows, given by their positions, for a message.

        >>> from jpeft.data import Table
        >>> Table(text=["good", "bad"]).where([1])
        'row 2'
        """
        origin = self.origin or Origin("", range(1, len(self) + 1))
        return f"{origin.source}, {origin.at(rows)}" if origin.source else origin.at(rows)

    @property
    def title(self) -> str:
        """The name of the split, or of the source, before a message about the whole table: "train: "; empty for a table made by hand."""
        name = self.origin and (self.origin.split or self.origin.source)
        return f"{name}: " if name else ""

    def named(self, split: str) -> "Table":
        """Return the same rows as a split of that name."""
        origin = self.origin or Origin("", range(1, len(self) + 1))
        return dataclasses.replace(self, origin=dataclasses.replace(origin, split=split))


def label_names(table: Table) -> tuple[str, ...]:
    """Return the classes of a training table in the order of the model's outputs: by number if all are whole numbers, else by name.

    Raises:
      ValueError: for a table without labels or with fewer than two classes.

    >>> from jpeft.data import Table, label_names
    >>> label_names(Table(text=["a", "b", "c"], label=["10", "9", "9"]))
    ('9', '10')
    """
    if table.label is None:
        raise ValueError("The table has no labels to train on: name their column with `label`.")
    names = sorted(set(table.label))
    if len(names) < 2:
        raise ValueError(f"Training needs at least two classes, got {names} in {len(table)} rows: check the label column.")
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        names.sort(key=int)  # stable, so "1" and "01" stay ordered by name
    return tuple(names)

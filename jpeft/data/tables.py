"""Tables of texts, read from files."""

import csv
import dataclasses
import json
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jpeft.extras import explained

with explained():
    import pyarrow as pa
    import pyarrow.parquet as pq


Columns = Mapping[str, Sequence[Any]]


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

    def __post_init__(self) -> None:
        lengths = {f.name: len(column) for f in dataclasses.fields(self) if (column := getattr(self, f.name)) is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"The columns of a Table must have the same length, got {lengths}.")

    def __len__(self) -> int:
        return len(self.text)

    def take(self, rows: Sequence[int]) -> "Table":
        """Return the given rows, in that order."""
        columns = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Table(**{name: column and [column[i] for i in rows] for name, column in columns.items()})


# --- reading --------------------------------------------------------------------------------------------------------


def read(
    path: str | Path,
    *,
    text: str = "text",
    pair: str | None = None,
    label: str | None = "label",
    target: str | None = None,
    tags: str | None = None,
) -> Table:
    """Read one file of texts.

    Args:
      path: A `.csv`, `.tsv` (both with a header line), `.jsonl`, `.parquet` or `.txt` file, UTF-8. A `.txt` file has one
        column, "text"; blank lines separate the texts.
      text: Column of the texts; with tags, of the lists of words.
      pair: Column of the second texts of sentence pairs; None for single texts.
      label: Column of the classes, strings or whole numbers (which become strings); None for rows to be predicted and for
        data without classes.
      target: Column of the texts to generate; None for none.
      tags: Column of lists with a tag for each word (or of texts, "B-PER O O"); None for none.

    Returns:
      The table, with its rows in the order of the file.

    Raises:
      ValueError: for a missing or empty file, an unknown suffix, a missing column, a row without text, label or target,
        and a file whose content does not fit its suffix. Rows are counted from 1, without the header.

    >>> import pathlib, tempfile
    >>> from jpeft.data import read
    >>> path = pathlib.Path(tempfile.mkdtemp(), "reviews.csv")
    >>> _ = path.write_text("text,label\\ngood,1\\nbad,0\\n")
    >>> read(path).label
    ['1', '0']
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: cannot read files ending in {path.suffix!r}; give one of {', '.join(READERS)}.")
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*") if p.suffix.lower() in READERS)[:10]
        raise ValueError(f"{path}: no such file; data files in that folder: {', '.join(beside) or 'none'}.")
    try:
        columns = reader(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it with that encoding.") from error
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable {path.suffix} file: {error}.") from error
    return from_columns(columns, str(path), text=text, pair=pair, label=label, target=target, tags=tags)


def _read_csv(path: Path, delimiter: str = ",") -> Columns:
    # Not pandas, which drops surplus fields (an unquoted comma in a text) and reads "NA" as a missing value.
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            rows = []
            for row in reader:
                if row and len(row) != len(names):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(row)} fields under a header of {len(names)} "
                        f"({', '.join(names)}); put quotes around texts that contain the separator {delimiter!r}."
                    )
                if row:  # not a blank line
                    rows.append(row)
        except csv.Error as error:
            raise ValueError(f'{path}, line {reader.line_num}: {error}; a quotation mark within a quoted text is written "".') from error
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two columns of the same name in {', '.join(names)}.")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _read_jsonl(path: Path) -> Columns:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); each line must be an object.") from error
            if not isinstance(row, dict):
                raise ValueError(f'{path}, line {number}: expected an object such as {{"text": "..."}}, got {line[:60]!r}.')
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> Columns:
    return pq.read_table(path).to_pydict()


def _read_txt(path: Path) -> Columns:
    parts = re.split(r"\n[^\S\n]*\n", path.read_text(encoding="utf-8-sig"))
    return {"text": [part.strip("\n") for part in parts if part.strip()]}


READERS: dict[str, Callable[[Path], Columns]] = {
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def from_columns(
    columns: Columns, source: str, *, text: str, pair: str | None, label: str | None, target: str | None, tags: str | None
) -> Table:
    """Return the named columns as a table, after checking them; `source` names the data in errors."""
    if not any(len(column) for column in columns.values()):
        raise ValueError(f"{source}: no rows; it needs a column {text!r} and at least one row.")
    for option, name in (("text", text), ("pair", pair), ("label", label), ("target", target), ("tags", tags)):
        if name is not None and name not in columns:
            there = ", ".join(map(repr, columns))
            raise ValueError(f"{source}: no column {name!r}; it has {there}. Name the right one with `{option}`.")
    words = None
    if tags is not None or any(isinstance(value, list) for value in columns[text]):
        words = _lists(columns[text], source, text)
    table = Table(
        text=_filled(columns[text] if words is None else [" ".join(row) for row in words], source, text),
        pair=None if pair is None else _texts(columns[pair], source, pair),
        label=None if label is None else _labels(columns[label], source, label),
        target=None if target is None else _filled(columns[target], source, target),
        words=words,
        tags=None if tags is None else _lists(columns[tags], source, tags),
    )
    uneven = [i for i, (row, marks) in enumerate(zip(words or (), table.tags or ()), start=1) if len(row) != len(marks)]
    if uneven:
        raise ValueError(f"{source}: as many tags in column {tags!r} as words in column {text!r} are needed; not so in {_rows(uneven)}.")
    return table


def _lists(values: Sequence[Any], source: str, column: str) -> list[list[str]]:
    lists = [value.split() if isinstance(value, str) else [_label(part) for part in value or ()] for value in values]
    wrong = [i for i, row in enumerate(lists, start=1) if not row or not all(row)]
    if wrong:
        raise ValueError(f"{source}: column {column!r} must hold lists of words, none of them empty; not so in {_rows(wrong)}.")
    return [[part for part in row if part] for row in lists]


def _filled(values: Sequence[Any], source: str, column: str) -> list[str]:
    texts = _texts(values, source, column)
    empty = [i for i, value in enumerate(texts, start=1) if not value.strip()]
    if empty:
        raise ValueError(f"{source}: no text in column {column!r} of {_rows(empty)}; remove them or fill them in.")
    return texts


def _texts(values: Sequence[Any], source: str, column: str) -> list[str]:
    wrong = [i for i, value in enumerate(values, start=1) if not isinstance(value, str | None)]
    if wrong:
        got = type(values[wrong[0] - 1]).__name__
        raise ValueError(f"{source}: column {column!r} holds {got} instead of text in {_rows(wrong)}.")
    return [value or "" for value in values]


def _labels(values: Sequence[Any], source: str, column: str) -> list[str]:
    names = [_label(value) for value in values]
    wrong = [i for i, name in enumerate(names, start=1) if name is None]
    if wrong:
        got = values[wrong[0] - 1]
        raise ValueError(
            f"{source}: the label in column {column!r} must be a string or a whole number, got {got!r} in "
            f"{_rows(wrong)}; jpeft trains classifiers, so turn numbers into classes first."
        )
    unlabelled = [i for i, name in enumerate(names, start=1) if name == ""]
    if unlabelled:
        raise ValueError(
            f"{source}: no label in column {column!r} of {_rows(unlabelled)}; label them, remove them, or give "
            "label=None to read a file for prediction."
        )
    return [name for name in names if name is not None]


def _label(value: Any) -> str | None:
    """Return a label as a string; "" for a missing one, None for a value that cannot be a label."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()  # the spelling of JSON files
    whole = isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer())
    return str(int(value)) if whole else None


def _rows(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:10]))
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


# --- splitting ------------------------------------------------------------------------------------------------------


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

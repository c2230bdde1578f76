"""From the columns of a file to a table, by one rule of types for all formats (`jpeft.data.values`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpeft.data.origin import Origin
from jpeft.data.tables import Table
from jpeft.data.values import as_label, as_text

Columns = Mapping[str, Sequence[Any]]


def from_columns(
    columns: Columns,
    source: str,
    *,
    text: str,
    pair: str | None,
    label: str | None,
    target: str | None,
    tags: str | None,
    tag_names: Sequence[str] = (),
    lines: Sequence[int] | None = None,
) -> Table:
    """Return the named columns as a table, after checking them.

    Args:
      columns: Values by column.
      source: Names the data in errors.
      text: Column of the texts; and so on, as in `jpeft.data.read`.
      pair: As there.
      label: As there.
      target: As there.
      tags: As there.
      tag_names: As there.
      lines: Line of the file in which each row begins.

    Raises:
      ValueError: naming rows and lines, for a missing column, and for values that are missing or of a wrong type.
    """
    if not any(len(column) for column in columns.values()):
        raise ValueError(f"{source}: no rows; it needs a column {text!r} and at least one row.")
    for option, name in (("text", text), ("pair", pair), ("label", label), ("target", target), ("tags", tags)):
        if name is not None and name not in columns:
            there = ", ".join(map(repr, columns))
            raise ValueError(f"{source}: no column {name!r}; it has {there}. Name the right one with `{option}`.")
    origin = Origin(source, range(1, len(columns[text]) + 1), lines)
    words = None
    if tags is not None or any(isinstance(value, list | tuple) for value in columns[text]):
        words = _lists(columns[text], origin, text, as_text, "words")
    marks = None if tags is None else _tags(columns[tags], origin, tags, tag_names)
    uneven = [i for i, (row, of_row) in enumerate(zip(words or (), marks or ())) if len(row) != len(of_row)]
    if uneven:
        raise ValueError(
            f"{source}: as many tags in column {tags!r} as words in column {text!r} are needed; not so in {origin.at(uneven)}."
        )
    return Table(
        # Beside lists of words, a text stays as it is.
        text=_filled(columns[text], origin, text)
        if words is None
        else [value if tags is None and isinstance(value, str) else " ".join(row) for value, row in zip(columns[text], words)],
        pair=None if pair is None else _texts(columns[pair], origin, pair),
        label=None if label is None else _labels(columns[label], origin, label),
        target=None if target is None else _filled(columns[target], origin, target),
        words=words,
        tags=marks,
        origin=origin,
    )


def _texts(values: Sequence[Any], origin: Origin, column: str) -> list[str]:
    texts = [as_text(value) for value in values]
    wrong = [i for i, value in enumerate(texts) if value is None]
    if wrong:
        got = values[wrong[0]]
        shown = repr(got) if isinstance(got, float) else type(got).__name__
        raise ValueError(f"{origin.source}: column {column!r} holds {shown} instead of text in {origin.at(wrong)}.")
    return [value for value in texts if value is not None]


def _filled(values: Sequence[Any], origin: Origin, column: str) -> list[str]:
    texts = _texts(values, origin, column)
    empty = [i for i, value in enumerate(texts) if not value.strip()]
    if empty:
        raise ValueError(f"{origin.source}: no text in column {column!r} of {origin.at(empty)}; remove them or fill them in.")
    return texts


def _labels(values: Sequence[Any], origin: Origin, column: str) -> list[str]:
    names = [as_label(value) for value in values]
    wrong = [i for i, name in enumerate(names) if name is None]
    if wrong:
        got = values[wrong[0]]
        raise ValueError(
            f"{origin.source}: the label in column {column!r} must be a string or a whole number, got {got!r} in {origin.at(wrong)}; jpeft "
            "trains classifiers, so turn numbers into classes first, such as 'low' and 'high'."
        )
    unlabelled = [i for i, name in enumerate(names) if name == ""]
    if unlabelled:
        raise ValueError(
            f"{origin.source}: no label in column {column!r} of {origin.at(unlabelled)}; label them, remove them, or give "
            "label=None to read a file for prediction."
        )
    return [name for name in names if name is not None]


def _lists(values: Sequence[Any], origin: Origin, column: str, convert: Callable[[Any], str | None], what: str) -> list[list[str]]:
    """Return lists of words or of tags; a text is split at spaces."""
    wrong = [i for i, value in enumerate(values) if not isinstance(value, list | tuple | str | None)]
    if wrong:
        got = type(values[wrong[0]]).__name__
        raise ValueError(f"{origin.source}: column {column!r} holds {got} instead of lists of {what} in {origin.at(wrong)}.")
    lists = [[convert(part) for part in (value.split() if isinstance(value, str) else value or ())] for value in values]
    lists = [[part and part.strip() for part in row] for row in lists]
    wrong = [i for i, row in enumerate(lists) if not row or not all(row)]
    if wrong:
        kind = "" if what == "words" else ", each a name or a whole number"
        raise ValueError(
            f"{origin.source}: column {column!r} must hold lists of {what}{kind}, none of them empty; not so in {origin.at(wrong)}."
        )
    return [[part for part in row if part] for row in lists]


def _tags(values: Sequence[Any], origin: Origin, column: str, names: Sequence[str]) -> list[list[str]]:
    # The text of a list, as spreadsheets and CSV files have it, would be split into tags such as "['O',".
    written = [i for i, value in enumerate(values) if isinstance(value, str) and value.strip()[:1] == "[" and value.strip()[-1:] == "]"]
    if written:
        raise ValueError(
            f"{origin.source}: column {column!r} holds a list that is written as text in {origin.at(written)}: "
            "save lists as JSONL or Parquet, or write words and tags with spaces between them."
        )
    tags = _lists(values, origin, column, as_label, "tags")
    if not names:
        return tags
    named = [[_named(tag, names) for tag in row] for row in tags]
    for i, row in enumerate(named):
        if None in row:
            unknown = tags[i][row.index(None)]
            raise ValueError(
                f"{origin.source}: the tag {unknown!r} in column {column!r} of {origin.at([i])} is neither one of the tag names "
                f"{', '.join(names)} nor their number, from 0 to {len(names) - 1}."
            )
    return [[tag for tag in row if tag is not None] for row in named]


def _named(tag: str, names: Sequence[str]) -> str | None:
    """Return the name of a tag that is a number; None for an unknown one."""
    if tag in names:
        return tag
    return names[int(tag)] if tag.isdecimal() and tag.isascii() and len(tag) < 10 and int(tag) < len(names) else None

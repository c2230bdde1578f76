"""Rows of CSV and TSV files, with the line in which each begins.

In a CSV file a field may be quoted. In a TSV file a quotation mark is a character like any other, unless the file was written by a program
that quotes.
"""

import csv
import io
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_QUOTED = re.compile(r'"(?:[^"]|"")*"')  # a field that a program has quoted
ADVICE = 'A quotation mark within a quoted text is written "".'


class Row(NamedTuple):
    """The fields of a row, and its first and last line in the file, from 1."""

    fields: list[str]
    first: int
    last: int


def read_csv(path: Path, text: str) -> list[Row]:
    """Return the rows of a CSV file, the header first.

    Warns if a quoted field holds both line ends and separators, as it does where a quotation mark is not closed.

    Raises:
      ValueError: naming the line, for a field that is quoted wrongly or a row with more or fewer fields than the header.
    """
    rows = _read_quoted(path, text, ",")
    if wrong := _first_uneven(rows):
        raise ValueError(_uneven(path, wrong, rows[0], 'put quotes around texts that contain the separator ","'))
    _warn_of_swallowed(path, [row for row in rows if _may_have_swallowed(row, ",")])
    return rows


def read_tsv(path: Path, text: str) -> list[Row]:
    """Return the rows of a TSV file, the header first.

    Fields are quoted in a file if quotation marks occur only in and around whole fields, as programs write them, or if its rows have the
    width of the header only so.

    Raises:
      ValueError: naming the line, for a row with more or fewer fields than the header.
    """
    lines = enumerate(io.StringIO(text, newline=""), start=1)
    plain = [Row(line.rstrip("\r\n").split("\t"), number, number) for number, line in lines if line.strip()]
    wrong = _first_uneven(plain)
    if wrong is None:
        marked = [field for row in plain for field in row.fields if '"' in field] if '"' in text else []
        if not marked or not all(map(_QUOTED.fullmatch, marked)):
            return plain
        return [row._replace(fields=[_unquoted(field) for field in row.fields]) for row in plain]
    error = ValueError(_uneven(path, wrong, plain[0], "a text must not contain tabs or line ends"))
    try:
        rows = _read_quoted(path, text, "\t")
    except ValueError:
        raise error from None
    swallowed = [row for row in rows if _may_have_swallowed(row, "\t")]
    # Lines that are whole rows by themselves stand between two lone marks, not in a quoted field.
    widths = {row.first: len(row.fields) for row in plain}
    whole = any(all(widths.get(line) == len(plain[0].fields) for line in range(row.first, row.last + 1)) for row in swallowed)
    if whole or _first_uneven(rows):
        raise error
    _warn_of_swallowed(path, swallowed)
    return rows


def _read_quoted(path: Path, text: str, separator: str) -> list[Row]:
    # Not pandas, which drops surplus fields (an unquoted comma in a text) and reads "NA" as a missing value.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[Row] = []
    first = 1
    with _long_fields():
        try:
            for fields in reader:
                if fields:  # not a blank line
                    rows.append(Row(fields, first, reader.line_num))
                first = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}, line {first}: {error}. {ADVICE}") from None
    return rows


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the limit of 131,072 characters that the module csv sets on a field."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if field.startswith('"') else field


def _first_uneven(rows: list[Row]) -> Row | None:
    return next((row for row in rows if len(row.fields) != len(rows[0].fields)), None)


def _uneven(path: Path, row: Row, header: Row, advice: str) -> str:
    return (
        f"{path}, line {row.first}: {len(row.fields)} fields under a header of {len(header.fields)} ({', '.join(header.fields)}); {advice}."
    )


def _may_have_swallowed(row: Row, separator: str) -> bool:
    return row.last > row.first and any(separator in field and ("\n" in field or "\r" in field) for field in row.fields)


def _warn_of_swallowed(path: Path, rows: list[Row]) -> None:
    if rows:
        shown = ", ".join(f"{row.first}-{row.last}" for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
        warnings.warn(
            f"{path}: {len(rows)} quoted field{'s hold' if len(rows) > 1 else ' holds'} both line ends and separators (lines {shown}). "
            f"If a quotation mark is not closed there, rows were lost in it. {ADVICE}",
            stacklevel=2,
        )

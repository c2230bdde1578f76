"""Files as columns of values, by format."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jpeft.data.delimited import Row, read_csv, read_tsv
from jpeft.extras import explained

with explained():
    import pyarrow as pa
    import pyarrow.parquet as pq

Columns = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Content:
    """The content of a file.

    Attributes:
      columns: Values by column, all of one length.
      lines: Line in which each row begins, from 1; None for a format without lines.
    """

    columns: Columns
    lines: Sequence[int] | None = None


def read_content(path: Path) -> Content:
    """Read a file by its suffix.

    Raises:
      ValueError: naming the file and, where there is one, the line: for a missing or damaged file, an unknown suffix, a file that is not
        UTF-8, and a content that does not fit the suffix.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: cannot read files ending in {path.suffix!r}; give one of {', '.join(READERS)}.")
    if path.is_dir():
        raise ValueError(f"{path}: this is a folder, not a file.")
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*") if p.suffix.lower() in READERS)[:10]
        raise ValueError(f"{path}: no such file; data files in that folder: {', '.join(beside) or 'none'}.")
    content = reader(path)
    names = list(content.columns)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: the names of columns must be text, got {names}.")
    return content


def decode(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
      ValueError: naming the line, for another encoding or a NUL byte.
    """
    content = path.read_bytes()
    for name, marks in (("UTF-32", (b"\xff\xfe\0\0", b"\0\0\xfe\xff")), ("UTF-16", (b"\xff\xfe", b"\xfe\xff"))):
        if content.startswith(marks):
            raise ValueError(f"{path}: not UTF-8 text but {name}; save it with the encoding UTF-8.")
    if b"\0" in content:
        line = _line(content[: content.index(b"\0")])
        raise ValueError(f"{path}: not UTF-8 text but a NUL byte in line {line}: the file is damaged, or UTF-16 without its mark.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, line = content[error.start], _line(content[: error.start])
        raise ValueError(f"{path}: not UTF-8 text: byte 0x{byte:02x} in line {line}; save it with the encoding UTF-8.") from None


def _line(before: bytes) -> int:
    return len(re.findall(rb"\r\n|\r|\n", before)) + 1


def _columns(path: Path, rows: list[Row]) -> Content:
    names = rows[0].fields if rows else []
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two columns of the same name in {', '.join(names)}.")
    columns = {name: [row.fields[i] for row in rows[1:]] for i, name in enumerate(names)}
    return Content(columns, [row.first for row in rows[1:]])


def _read_jsonl(path: Path) -> Content:
    return _json_lines(path, decode(path))


def _json_lines(path: Path, text: str) -> Content:
    rows, lines = [], []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip():
            line = line.strip()
            value, end = _parse(path, number, line)
            if end < len(line):
                raise ValueError(f"{path}, line {number}: not JSON (more than one value); {_EXPECTED[path.suffix.lower()]}.")
            rows.append(_object(path, number, value))
            lines.append(number)
    return _objects(rows, lines)


def _read_json(path: Path) -> Content:
    """Read a list of objects, or objects line by line."""
    text = decode(path)
    rest = text.lstrip()
    if not rest.startswith("["):
        return _json_lines(path, text)
    at, number = len(text) - len(rest) + 1, 1 + text[: len(text) - len(rest)].count("\n")
    rows, lines = [], []
    space = re.compile(r"\s*")
    while True:
        start = _end(space, text, at)
        number += text.count("\n", at, start)
        if text[start : start + 1] == "]" and not rows:
            break
        value, at = _parse(path, number, text, start)
        rows.append(_object(path, number, value))
        lines.append(number)
        end = _end(space, text, at)
        number += text.count("\n", start, end)
        if text[end : end + 1] not in (",", "]"):
            raise ValueError(f"{path}, line {number}: not JSON: ',' or ']' is missing behind row {len(rows)}.")
        at = end + 1
        if text[end] == "]":
            if text[at:].strip():
                raise ValueError(f"{path}, line {number}: there is more behind the list.")
            break
    # A list in one line says nothing by its lines.
    return _objects(rows, lines if len(set(lines)) == len(lines) else None)


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    return match.end() if match else start


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(items)) < len(items):
        raise ValueError(f"Two values of the same name in {', '.join(name for name, _ in items)}.")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def _parse(path: Path, number: int, text: str, start: int = 0) -> tuple[Any, int]:
    """Return the JSON value that is in line `number` and begins at `start`, and where it ends.

    Raises:
      ValueError: naming the line.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError(f"{path}, line {number}: values are nested too deep.") from None
    except json.JSONDecodeError as error:
        at, problem = number + text.count("\n", start, error.pos), f"{error.msg} at column {error.colno}"
    except ValueError as error:  # an integer of thousands of digits, or from `_pairs`
        at, problem = number, str(error).rstrip(".")
    raise ValueError(f"{path}, line {at}: not JSON ({problem}); {_EXPECTED[path.suffix.lower()]}.")


_EXPECTED = {".jsonl": "each line must be an object", ".json": "a .json file is a list of objects, or has an object in each line"}


def _object(path: Path, number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        hint = "; a file with one list of objects ends in .json" if isinstance(row, list) else ""
        raise ValueError(f'{path}, line {number}: expected an object such as {{"text": "..."}}, got {json.dumps(row)[:60]}{hint}.')
    return row


def _objects(rows: list[dict[str, Any]], lines: list[int] | None) -> Content:
    names = dict.fromkeys(name for row in rows for name in row)
    return Content({name: [row.get(name) for row in rows] for name in names}, lines)


def _read_parquet(path: Path) -> Content:
    try:
        # Not `read_table`, which makes columns of the names of folders.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
            names = table.column_names
            if len(set(names)) < len(names):
                raise ValueError(f"Two columns of the same name in {', '.join(names)}.")
            return Content({name: table.column(name).to_pylist() for name in names})
    # A damaged file may fail in its structure, its compression, or its values.
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: not a readable .parquet file: {' '.join(str(error).split()).rstrip('.')}.") from error


def _read_txt(path: Path) -> Content:
    texts: list[list[str]] = [[]]
    starts = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", decode(path)), start=1):
        if line.strip():
            if not texts[-1]:
                starts.append(number)
            texts[-1].append(line)
        elif texts[-1]:
            texts.append([])
    return Content({"text": ["\n".join(lines) for lines in texts if lines]}, starts)


READERS: dict[str, Callable[[Path], Content]] = {
    ".csv": lambda path: _columns(path, read_csv(path, decode(path))),
    ".tsv": lambda path: _columns(path, read_tsv(path, decode(path))),
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}

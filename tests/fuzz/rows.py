"""Data formats: what is written is what is read, in every format alike, and damage stays where it is.

An independent writer for each format makes files of the same rows. A damaged file is refused, or it differs from the whole one only at the
place of the damage: a quotation mark must not make one text of a hundred rows.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import jpeft.data
from fuzz import mutations
from fuzz.mutations import Unchanged
from fuzz.verdict import Verdict, judge
from fuzz.watch import watch
from jpeft.data.readers import READERS

Rows = Sequence[tuple[Any, Any]]  # text, label

ROWS: Rows = (
    ("a good film, really", "yes"),
    ('he said "no" twice', "no"),
    ("two\nlines of text", "yes"),
    ("naïve — 電影 🎬", "no"),
    ("plain words here", "yes"),
    ("it's 5\" wide; a|b", "no"),
    ("tab\there", "yes"),
    ("back\\slash \\n", "no"),
    ("ends with a comma,", "yes"),
    ("NA", "no"),
    ("null", "yes"),
    ("  spaces around  ", "no"),
    ("the last row", "yes"),
)
# Rows that every format can hold, .txt and raw TSV among them.
SIMPLE: Rows = tuple((re.sub(r"[\n\t\"]", " ", text).strip(), label) for text, label in ROWS)


# --- writers ----------------------------------------------------------------------------------------------------------


def write_csv(rows: Rows, *, delimiter: str = ",", ends: str = "\n", quoting: int = csv.QUOTE_MINIMAL) -> bytes:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator=ends, quoting=quoting).writerows([("text", "label"), *rows])  # type: ignore
    return file.getvalue().encode()


def write_tsv(rows: Rows, **style: Any) -> bytes:
    return write_csv(rows, delimiter="\t", **style)


def write_jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows).encode()


def write_json(rows: Rows) -> bytes:
    return json.dumps([{"text": text, "label": label} for text, label in rows], indent=1, ensure_ascii=False).encode()


def write_parquet(rows: Rows) -> bytes:
    file = io.BytesIO()
    text, label = zip(*rows)
    pq.write_table(pa.table({"text": list(text), "label": list(label)}), file)
    return file.getvalue()


def write_txt(rows: Rows) -> bytes:
    return "\n\n".join(text for text, _ in rows).encode() + b"\n"


_WRITERS: dict[str, Callable[..., bytes]] = {
    ".csv": write_csv,
    ".tsv": write_tsv,
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".parquet": write_parquet,
    ".txt": write_txt,
}
WRITERS = {suffix: write for suffix, write in _WRITERS.items() if suffix in READERS}


# --- what is written is what is read ----------------------------------------------------------------------------------


def read(path: Path) -> list[tuple[str, str]]:
    """The rows of a file, as jpeft reads them."""
    plain = path.suffix == ".txt"
    table = jpeft.data.read(path, label=None if plain else "label")
    return [(text, "" if table.label is None else table.label[row]) for row, text in enumerate(table.text)]


def read_alike(folder: Path, rows: Rows) -> dict[str, Any]:
    """What each format that has types, and CSV, makes of the same rows: the rows, or that they are refused."""
    found: dict[str, Any] = {}
    for suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet"):
        if suffix in WRITERS:
            path = folder / f"typed{suffix}"
            path.write_bytes(WRITERS[suffix](rows))
            try:
                found[suffix] = read(path)
            except ValueError as error:
                assert path.name in str(error), f"the error does not name {path}: {error}"
                assert "\n" not in str(error), error
                found[suffix] = "refused"
    return found


# --- damage -----------------------------------------------------------------------------------------------------------


def judge_damage(folder: Path, suffix: str, kind: str, rng: np.random.Generator, world: Path) -> tuple[str, Verdict]:
    """Damage a file of one format; the damage in words, and what came of it."""
    rows = SIMPLE if suffix in (".txt", ".tsv") else ROWS
    path = folder / f"rows{suffix}"
    path.write_bytes(WRITERS[suffix](rows))
    whole = read(path)
    about, local = _damage(path, suffix, kind, rng, rows)
    seen = watch(lambda: read(path), world)
    explain = lambda value: "the damage stays where it is" if local and _stays(whole, value, local) else None
    verdict = judge(seen, whole, [re.escape(path.name)], explain=explain)
    for left in folder.glob("rows*"):
        left.unlink() if not left.is_dir() else left.rmdir()
    return about, verdict


def _stays(whole: list[Any], value: list[Any], local: int) -> bool:
    """Whether at most so many rows in one place differ; a negative number stands for a cut, after which nothing has to follow."""
    before = next((i for i, (a, b) in enumerate(zip(whole, value)) if a != b), min(len(whole), len(value)))
    if local < 0:
        return len(value) - before <= -local
    rest = min(len(whole), len(value)) - before
    after = next((i for i in range(rest) if whole[-1 - i] != value[-1 - i]), rest)
    return len(whole) - before - after <= local and len(value) - before - after <= local


def _damage(path: Path, suffix: str, kind: str, rng: np.random.Generator, rows: Rows) -> tuple[str, int]:
    """Damage a file; the damage in words, and how many rows in one place may differ then (see `_stays`)."""
    if kind in mutations.BYTES:
        about = mutations.BYTES[kind](path, rng)
        binary = suffix == ".parquet"  # no checksums of its own: a value may change wherever it is used
        return about, len(rows) if binary else {"cut": -1, "zeros": 6, "deleted": 3, "longer": 2}.get(kind, 3)
    if kind in mutations.PLACES:
        return mutations.PLACES[kind](path, rng), 0
    return _TEXT[kind](path, rng)


def _edit(path: Path, change: Callable[[str], str | None]) -> None:
    old = path.read_bytes()
    try:
        text = old.decode()
    except UnicodeDecodeError:
        raise Unchanged from None
    new = change(text)
    if new is None or new == text:
        raise Unchanged
    path.write_bytes(new.encode("utf-8", "surrogatepass"))


def _at(rng: np.random.Generator, text: str) -> int:
    return int(rng.integers(len(text) + 1))


def quote(path: Path, rng: np.random.Generator) -> tuple[str, int]:
    where: list[int] = []

    def change(text: str) -> str:
        where.append(_at(rng, text))
        return text[: where[0]] + '"' + text[where[0] :]

    _edit(path, change)
    return f"a quotation mark at {where[0]}", 2


def unquote(path: Path, rng: np.random.Generator) -> tuple[str, int]:
    where: list[int] = []

    def change(text: str) -> str | None:
        marks = [i for i, char in enumerate(text) if char == '"']
        if not marks:
            return None
        where.append(marks[rng.integers(len(marks))])
        return text[: where[0]] + text[where[0] + 1 :]

    _edit(path, change)
    return f"without the quotation mark at {where[0]}", 2


def encoding(path: Path, rng: np.random.Generator) -> tuple[str, int]:
    name = ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-8-sig", "shift_jis", "utf-7"][rng.integers(8)]
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        raise Unchanged from None
    new = text.encode(name, "replace")
    if new == path.read_bytes() or name == "utf-7":  # which looks like ASCII
        raise Unchanged
    path.write_bytes(new)
    # Letters that the encoding lacks are question marks there.
    return f"encoded as {name}", len(ROWS) if name == "shift_jis" and b"?" in new else 0


def line_ends(path: Path, rng: np.random.Generator) -> tuple[str, int]:
    ends = ["\r\n", "\r", "\u2028", "\v", "\n\n"][rng.integers(5)]
    if path.suffix == ".txt" and ends in ("\u2028", "\v"):  # letters like others, there
        raise Unchanged
    _edit(path, lambda text: text.replace("\n", ends))
    # The line ends in a quoted text change with all others.
    return f"lines end with {ends!r}", 1


def line(path: Path, rng: np.random.Generator) -> tuple[str, int]:
    """A line lost, repeated or cut in the middle."""
    what = ["lost", "repeated", "halved", "blank"][rng.integers(4)]
    number: list[int] = []

    def change(text: str) -> str:
        lines = text.split("\n")
        number.append(int(rng.integers(len(lines))))
        at = number[0]
        new = {"lost": [], "repeated": [lines[at]] * 2, "halved": [lines[at][: len(lines[at]) // 2]], "blank": [lines[at], "   "]}[what]
        return "\n".join([*lines[:at], *new, *lines[at + 1 :]])

    _edit(path, change)
    return f"line {number[0]} {what}", 3


def field(path: Path, rng: np.random.Generator) -> tuple[str, int]:
    """A separator more or less in one line, or another separator everywhere."""
    what = ["more", "less", "other"][rng.integers(3)]
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix, ",")

    def change(text: str) -> str | None:
        if what == "other":
            return None if path.suffix == ".txt" else text.replace(separator, ";")
        places = [i for i, char in enumerate(text) if char == separator]
        if not places:
            return None
        at = places[rng.integers(len(places))]
        return text[:at] + (separator * 2 if what == "more" else "") + text[at + 1 :]

    _edit(path, change)
    return f"separator: {what}", 2


def header(path: Path, rng: np.random.Generator) -> tuple[str, int]:
    """Names of columns in another case, with spaces, twice, or none."""
    new = ["Text,Label", "text ,label", "text,text", "label", "", "text,label,", "\ufefftext,label", "text;label"][rng.integers(8)]

    def change(text: str) -> str | None:
        first, _, rest = text.partition("\n")
        if "label" not in first or path.suffix not in (".csv", ".tsv"):
            return None
        return (new.replace(",", "\t") if path.suffix == ".tsv" else new) + "\n" + rest

    _edit(path, change)
    return f"header {new!r}", 0


def value(path: Path, rng: np.random.Generator) -> tuple[str, int]:
    """Another value, of whatever type, in one row of JSON."""
    new = mutations.VALUES[rng.integers(len(mutations.VALUES))]
    key, row = ["text", "label"][rng.integers(2)], int(rng.integers(len(ROWS)))
    if path.suffix not in (".jsonl", ".json"):
        raise Unchanged
    content = [{"text": text, "label": label} for text, label in ROWS]
    if isinstance(new, float) and not math.isfinite(new) and rng.random() < 0.5:
        new = math.nan
    content[row][key] = new
    text = "".join(json.dumps(one) + "\n" for one in content) if path.suffix == ".jsonl" else json.dumps(content)
    path.write_text(text)
    return f"{key} of row {row} is {new!r:.50}", 1


def deep(path: Path, rng: np.random.Generator) -> tuple[str, int]:
    _edit(path, lambda text: text.replace('"yes"', "[" * 100_000 + "]" * 100_000, 1) if path.suffix in (".jsonl", ".json") else None)
    return "a value 100,000 lists deep", 0


def digits(path: Path, rng: np.random.Generator) -> tuple[str, int]:
    _edit(path, lambda text: text.replace('"yes"', "7" * 6000, 1) if path.suffix in (".jsonl", ".json") else None)
    return "a label of 6,000 digits", 1


_TEXT: dict[str, Callable[[Path, np.random.Generator], tuple[str, int]]] = {
    "quotation mark": quote,
    "quotation mark lost": unquote,
    "encoding": encoding,
    "line ends": line_ends,
    "line": line,
    "field": field,
    "header": header,
    "JSON value": value,
    "JSON deep": deep,
    "JSON huge number": digits,
}
KINDS = (*mutations.BYTES, *mutations.PLACES, *_TEXT)

"""Tables of texts: read them, split them, turn them into arrays and those into batches.

    tables = splits("reviews.csv", text="review", label="stars")        # or a folder, "hub:imdb", "builtin"
    labels = label_names(tables["train"])
    arrays = encode(tables["train"], tokenizer, labels=labels, max_length=128)
    ds = batches(arrays, 32, seed=0)                                    # ds[step] is batch number `step`

Nothing here depends on the order of rows, of files or of dictionaries, nor on the process: the same data and seed give
the same batches everywhere, and a run resumed at step k sees what an unbroken run sees.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import math
import numbers
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Names under which files and hub data sets carry their splits, the preferred one first.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "test_matched"),
}

Columns = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of a data set by column; all columns have the same length.

    Attributes:
      text: The texts, or the first of each pair.
      pair: The second texts of sentence pairs; None for single texts.
      label: The class of each row; None for rows to be predicted, and where there are no classes.
      target: What is to be generated from each text; None for rows to be continued, and for plain text.
      words: The words of each text, if they came as lists; None if the spaces tell.
      tags: A tag for each word of each text; None for rows to be tagged, and where there are no tags.

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
            raise ValueError(f"the columns of a Table must have the same length, got {lengths}")

    def __len__(self) -> int:
        return len(self.text)

    def take(self, rows: Sequence[int]) -> "Table":
        """The given rows, in that order."""
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
        column, "text": what stands between blank lines.
      text: Column of the texts; of lists of words, where there are tags.
      pair: Column of the second texts of sentence pairs; None for single texts.
      label: Column of the classes, strings or whole numbers (which become strings); None for rows to be predicted, and
        where there are no classes.
      target: Column of what is to be generated from the texts; None where nothing is.
      tags: Column of lists with a tag for each word (or of texts, "B-PER O O"); None where there are none.

    Returns:
      The table, rows in the order of the file.

    Raises:
      ValueError: for a missing or empty file, an unknown suffix, a missing column, a row without text, label or target,
        and a file that is not what its suffix says. Rows are counted from 1, without the header.

    >>> import pathlib, tempfile
    >>> from jpeft.data import read
    >>> path = pathlib.Path(tempfile.mkdtemp(), "reviews.csv")
    >>> _ = path.write_text("text,label\\ngood,1\\nbad,0\\n")
    >>> read(path).label
    ['1', '0']
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: cannot read files ending in {path.suffix!r}; give one of {', '.join(_READERS)}")
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*") if p.suffix.lower() in _READERS)[:10]
        raise ValueError(f"{path}: no such file; data files in that folder: {', '.join(beside) or 'none'}")
    try:
        columns = reader(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it with that encoding") from error
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable {path.suffix} file: {error}") from error
    return _table(columns, str(path), text=text, pair=pair, label=label, target=target, tags=tags)


def _read_csv(path: Path, delimiter: str = ",") -> Columns:
    # Not through pandas, which drops surplus fields (an unquoted comma in a text) and reads "NA" as a gap.
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            rows = []
            for row in reader:
                if row and len(row) != len(names):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(row)} fields under a header of {len(names)} "
                        f"({', '.join(names)}); put quotes around texts that hold the separator {delimiter!r}"
                    )
                if row:  # blank lines hold nothing
                    rows.append(row)
        except csv.Error as error:
            raise ValueError(f'{path}, line {reader.line_num}: {error}; a quotation mark within a quoted text is written ""') from error
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two columns of the same name in {', '.join(names)}")
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
                raise ValueError(f"{path}, line {number}: not JSON ({error}); one object a line is expected") from error
            if not isinstance(row, dict):
                raise ValueError(f'{path}, line {number}: expected an object such as {{"text": "..."}}, got {line[:60]!r}')
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> Columns:
    return pq.read_table(path).to_pydict()


def _read_txt(path: Path) -> Columns:
    parts = re.split(r"\n[^\S\n]*\n", path.read_text(encoding="utf-8-sig"))
    return {"text": [part.strip("\n") for part in parts if part.strip()]}


_READERS: dict[str, Callable[[Path], Columns]] = {
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _table(columns: Columns, source: str, *, text: str, pair: str | None, label: str | None, target: str | None, tags: str | None) -> Table:
    """Pick the named columns and check them; `source` names the data in errors."""
    if not any(len(column) for column in columns.values()):
        raise ValueError(f"{source}: no rows; it needs a column {text!r} and at least one row")
    for option, name in (("text", text), ("pair", pair), ("label", label), ("target", target), ("tags", tags)):
        if name is not None and name not in columns:
            there = ", ".join(map(repr, columns))
            raise ValueError(f"{source}: no column {name!r}; it has {there}. Name the right one with `{option}`")
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
        raise ValueError(f"{source}: as many tags in column {tags!r} as words in column {text!r} are needed; not so in {_rows(uneven)}")
    return table


def _lists(values: Sequence[Any], source: str, column: str) -> list[list[str]]:
    lists = [value.split() if isinstance(value, str) else [_label(part) for part in value or ()] for value in values]
    wrong = [i for i, row in enumerate(lists, start=1) if not row or not all(row)]
    if wrong:
        raise ValueError(f"{source}: column {column!r} must hold lists of words, none of them empty; not so in {_rows(wrong)}")
    return [[part for part in row if part] for row in lists]


def _filled(values: Sequence[Any], source: str, column: str) -> list[str]:
    texts = _texts(values, source, column)
    empty = [i for i, value in enumerate(texts, start=1) if not value.strip()]
    if empty:
        raise ValueError(f"{source}: no text in column {column!r} of {_rows(empty)}; remove them or fill them in")
    return texts


def _texts(values: Sequence[Any], source: str, column: str) -> list[str]:
    wrong = [i for i, value in enumerate(values, start=1) if not isinstance(value, str | None)]
    if wrong:
        got = type(values[wrong[0] - 1]).__name__
        raise ValueError(f"{source}: column {column!r} holds {got} instead of text in {_rows(wrong)}")
    return [value or "" for value in values]


def _labels(values: Sequence[Any], source: str, column: str) -> list[str]:
    names = [_label(value) for value in values]
    wrong = [i for i, name in enumerate(names, start=1) if name is None]
    if wrong:
        got = values[wrong[0] - 1]
        raise ValueError(
            f"{source}: the label in column {column!r} must be a string or a whole number, got {got!r} in "
            f"{_rows(wrong)}; jpeft trains classifiers, so turn numbers into classes first"
        )
    unlabelled = [i for i, name in enumerate(names, start=1) if name == ""]
    if unlabelled:
        raise ValueError(
            f"{source}: no label in column {column!r} of {_rows(unlabelled)}; label them, remove them, or give "
            "label=None to read a file for prediction"
        )
    return [name for name in names if name is not None]


def _label(value: Any) -> str | None:
    """A label as a string; "" if there is none, None if it cannot be one."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()  # as JSON and CSV files write it
    whole = isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer())
    return str(int(value)) if whole else None


def _rows(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:10]))
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


# --- splitting ------------------------------------------------------------------------------------------------------


def splits(
    spec: str | Path,
    *,
    text: str = "text",
    pair: str | None = None,
    label: str | None = "label",
    target: str | None = None,
    tags: str | None = None,
    validation: float = 0.1,
    test: float = 0.1,
) -> dict[str, Table]:
    """The training, validation and test tables of a data set.

    Args:
      spec: One of
        `"builtin"`: `jpeft.builtin.builtin()`, or `"builtin:docs"`, `"builtin:reference"`, `"builtin:summaries"`: those of
        `jpeft.python_docs`; they have their own columns and splits;
        a folder with files `train.*`, `validation.*` (or `valid.*`, `val.*`, `dev.*`) and `test.*`;
        one file, split here by `split_table`;
        `"hub:name"` or `"hub:name/config"`, a data set of the Hugging Face hub, name with or without an owner.
      text: Column of the texts.
      pair: Column of the second texts of sentence pairs; None for single texts.
      label: Column of the classes; None where there are none.
      target: Column of what is to be generated from the texts; None where nothing is.
      tags: Column of lists with a tag for each word; None where there are none.
      validation: Share of all texts for validation, where the data set brings no such split.
      test: Share of all texts for the test, likewise. A hub split with hidden labels (-1) counts as missing.

    Returns:
      `{"train": ..., "validation": ..., "test": ...}`.

    Raises:
      ValueError: as `read`, and for a data set that is not there, without training rows or, if there are classes, with
        a single one.

    >>> from jpeft.data import splits
    >>> {name: len(table) for name, table in splits("builtin").items()}["test"] > 100
    True
    """
    if str(spec).partition(":")[0] == "builtin":
        return _builtin(str(spec))
    columns: dict[str, Any] = {"text": text, "pair": pair, "label": label, "target": target, "tags": tags}
    if isinstance(spec, str) and spec.startswith("hub:"):
        given = _hub(spec, **columns)
    elif Path(spec).is_dir():
        given = _folder(Path(spec), **columns)
    elif Path(spec).exists():
        given = {"train": read(spec, **columns)}
    else:
        raise ValueError(
            f"{spec}: no such file or folder; give a file ({', '.join(_READERS)}), a folder of train, validation and "
            'test files, "hub:name" or "builtin"'
        )
    # Only what the data set lacks is carved out of its training rows.
    shares = {name: share for name, share in (("validation", validation), ("test", test)) if name not in given}
    try:
        carved = split_table(given["train"], **{"validation": 0.0, "test": 0.0, **shares})
        if label is not None:
            label_names(carved["train"])
    except ValueError as error:
        raise ValueError(f"{spec}: {error}") from error
    return {name: given[name] if name != "train" and name in given else carved[name] for name in SPLIT_NAMES}


def split_table(table: Table, *, validation: float, test: float) -> dict[str, Table]:
    """Split a table by a hash of the text, class by class.

    Each class keeps its share of each split to within one text, and at least one text for training. Which split a row
    goes to depends on the texts in the table, not on their order; texts that are the same but for case, spaces and
    punctuation go together.

    Args:
      table: The rows to split.
      validation: Share of the different texts for validation, 0 for none.
      test: Share of the different texts for the test, 0 for none.

    Returns:
      `{"train": ..., "validation": ..., "test": ...}`, each in the order of `table`.

    Raises:
      ValueError: for shares that leave nothing to train on, or a split that would be empty although it has a share.

    >>> from jpeft.data import Table, split_table
    >>> rows = Table(text=[f"text {i}" for i in range(20)], label=["a", "b"] * 10)
    >>> {name: len(part) for name, part in split_table(rows, validation=0.1, test=0.2).items()}
    {'train': 14, 'validation': 2, 'test': 4}
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise ValueError(f"validation={validation} and test={test} must be at least 0 and together less than 1")
    groups: dict[str, list[int]] = defaultdict(list)  # rows that must stay together
    for row, text in enumerate(table.text):
        groups[fingerprint(text, table.pair[row] if table.pair is not None else None)].append(row)
    classes: dict[str, list[str]] = defaultdict(list)
    for key in sorted(groups):
        # A text with several labels counts for the first of them.
        classes[min(table.label[row] for row in groups[key]) if table.label is not None else ""].append(key)

    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    shares = {"test": test, "validation": validation}
    due, taken = dict.fromkeys(shares, 0.0), dict.fromkeys(shares, 0)
    for name in sorted(classes):
        keys = classes[name]
        left = len(keys)
        for part, share in shares.items():
            # What rounding withholds from one class goes to the next, so that many small classes get a split too.
            due[part] += share * len(keys)
            wanted = max(int(due[part] - taken[part] + 0.5), 0)
            count = min(wanted, math.ceil(share * len(keys)), left - 1)
            parts[part] += [row for key in keys[left - count : left] for row in groups[key]]
            taken[part] += count
            left -= count
        parts["train"] += [row for key in keys[:left] for row in groups[key]]
    for part, share in shares.items():
        if share > 0 and not parts[part]:
            raise ValueError(
                f"the {part} split would be empty: {len(groups)} different texts, {part}={share}; "
                f"give more rows, a larger share, or a {part} file of its own"
            )
    return {part: table.take(sorted(rows)) for part, rows in parts.items()}


def fingerprint(text: str, pair: str | None = None) -> str:
    """A hash of the text in which case, spaces and punctuation do not count.

    >>> from jpeft.data import fingerprint
    >>> fingerprint("Fast Fourier-transform.") == fingerprint("fast  fourier transform")
    True
    """
    # A text of nothing but punctuation stands for itself.
    parts = [" ".join(re.findall(r"\w+", part.casefold())) or part for part in (text, pair) if part is not None]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _builtin(spec: str) -> dict[str, Table]:
    # Inside: they are made of Tables.
    from jpeft import builtin, python_docs

    sets = {"builtin": builtin.builtin}
    sets |= {f"builtin:{make.__name__}": make for make in (python_docs.docs, python_docs.reference, python_docs.summaries)}
    if spec not in sets:
        raise ValueError(f"there is no built-in data {spec!r}; there are {', '.join(sets)}")
    return sets[spec]()


def _folder(folder: Path, **columns: Any) -> dict[str, Table]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _READERS)
    found = {name: [path for path in files if path.stem in aliases] for name, aliases in SPLIT_NAMES.items()}
    for name, paths in found.items():
        if len(paths) > 1:
            raise ValueError(f"{folder}: several {name} files, {', '.join(p.name for p in paths)}; leave only one there")
    if not found["train"]:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise ValueError(f"{folder}: no train file; it holds {there}. Name it train{', train'.join(_READERS)}")
    return {name: read(paths[0], **columns) for name, paths in found.items() if paths}


def _hub(spec: str, *, label: str | None, **others: Any) -> dict[str, Table]:
    dataset = _load_hub(spec)
    found = {name: [alias for alias in aliases if alias in dataset] for name, aliases in SPLIT_NAMES.items()}
    if not found["train"]:
        raise ValueError(f"{spec}: no train split; it has {', '.join(sorted(dataset))}")
    tables = {}
    for name, aliases in found.items():
        if not aliases:
            continue
        rows = dataset[aliases[0]]
        # Other columns by name only: they may hold images.
        columns: dict[str, Any] = {c: rows[c][:] if c in (label, *others.values()) else () for c in rows.column_names}
        names = getattr(rows.features.get(label), "names", None)
        if label is not None and names is not None:  # a ClassLabel: numbers in the table, names beside it; -1 for a hidden label
            columns[label] = [None if i is None or i < 0 else names[i] for i in columns[label]]
            if name != "train" and not any(columns[label]):
                continue
        tags = others["tags"]
        kinds = getattr(getattr(rows.features.get(tags), "feature", None), "names", None)
        if tags is not None and kinds is not None:  # lists of a ClassLabel
            columns[tags] = [[kinds[i] for i in row] for row in columns[tags]]
        tables[name] = _table(columns, f"{spec} ({aliases[0]})", label=label, **others)
    return tables


def _load_hub(spec: str) -> Any:
    """A `datasets.DatasetDict`; "a/b" is the data set b of owner a, or else the configuration b of data set a."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f'{spec}: data sets of the hub need another package: pip install "jpeft[hub]"') from error
    parts = spec.removeprefix("hub:").split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise ValueError(f"{spec}: expected hub:name, hub:owner/name, hub:name/config or hub:owner/name/config")
    named = [("/".join(parts[:2]), parts[2] if len(parts) == 3 else None)]
    configured = [(parts[0], parts[1])] if len(parts) == 2 else []
    problems = []
    for name, config in named + configured:
        try:
            return datasets.load_dataset(name, config)
        except OSError as error:  # not found, or the hub is out of reach
            problems.append(str(error))
    raise ValueError(f"{spec}: the hub gave no such data set ({'; '.join(problems)}); check its name and the connection")


def label_names(table: Table) -> tuple[str, ...]:
    """The classes of a training table in the order of the model's outputs: by number if all are whole, else by name.

    Raises:
      ValueError: for a table without labels or with fewer than two classes.

    >>> from jpeft.data import Table, label_names
    >>> label_names(Table(text=["a", "b", "c"], label=["10", "9", "9"]))
    ('9', '10')
    """
    if table.label is None:
        raise ValueError("the table has no labels to train on; read it with `label` naming their column")
    names = sorted(set(table.label))
    if len(names) < 2:
        raise ValueError(f"training needs at least two classes, got {names} in {len(table)} rows; check the label column")
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        names.sort(key=int)  # stable: "1" and "01" stay in order of name
    return tuple(names)


# --- arrays and batches ---------------------------------------------------------------------------------------------


def encode(table: Table, tokenizer: Any, *, labels: Sequence[str] | None, max_length: int) -> dict[str, np.ndarray]:
    """Turn texts into token numbers, all rows of one length.

    Args:
      table: N rows.
      tokenizer: A tokenizer of `transformers`; its own template (`[CLS] text [SEP] pair [SEP]`, ...) and padding apply.
      labels: The classes in the order of the model's outputs; None to leave labels out.
      max_length: Length of every row, special tokens included: longer texts are cut, shorter ones padded.

    Returns:
      `input_ids` and `attention_mask` [N, max_length], `token_type_ids` [N, max_length] if the tokenizer makes them,
      `label` [N] if `labels` is given; all int32.

    Raises:
      ValueError: for a label that is not among `labels`, a length the tokenizer cannot make, or no padding token.

    Example: `encode(table, AutoTokenizer.from_pretrained(folder), labels=("neg", "pos"), max_length=128)`.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no padding token; set one, e.g. tokenizer.pad_token = tokenizer.eos_token")
    special = tokenizer.num_special_tokens_to_add(pair=table.pair is not None)
    if not special < max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_length={max_length} must be more than the {special} special tokens and at most "
            f"{tokenizer.model_max_length}, the tokenizer's own limit"
        )
    arrays: dict[str, list[np.ndarray]] = defaultdict(list)
    chunk = 4096  # the tokenizer's Python lists take ten times the memory of the arrays
    for start in range(0, max(len(table), 1), chunk):
        stop = start + chunk
        pairs = None if table.pair is None else table.pair[start:stop]
        encoded = (
            tokenizer(table.text[start:stop], pairs, truncation=True, padding="max_length", max_length=max_length)
            if len(table)
            else {"input_ids": [], "attention_mask": []}
        )
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            if name in encoded:
                arrays[name].append(np.asarray(encoded[name], np.int32).reshape(-1, max_length))
    result = {name: np.concatenate(parts) for name, parts in arrays.items()}
    if labels is not None:
        result["label"] = _label_numbers(table, tuple(labels))
    return result


def _label_numbers(table: Table, labels: tuple[str, ...]) -> np.ndarray:
    if table.label is None:
        raise ValueError("the table has no labels; give labels=None to encode rows for prediction")
    unknown = sorted(set(table.label) - set(labels))
    if unknown:
        raise ValueError(
            f"unknown label{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown[:10]))}: the model knows "
            f"{', '.join(map(repr, labels))}; remove those rows or train with them"
        )
    number = {name: i for i, name in enumerate(labels)}
    return np.asarray([number[name] for name in table.label], np.int32)


def batches(arrays: Mapping[str, np.ndarray], batch_size: int, *, seed: int) -> grain.MapDataset:
    """Endless training batches of one shape; `ds[step]` is batch number `step`.

    The examples run through one endless stream, shuffled anew in every epoch, and each batch is the next `batch_size`
    of it. So every example is seen exactly once an epoch, none is dropped, and a batch at the border holds the end of
    one epoch and the start of the next. Resuming at step k is `ds[k]`: nothing has to be stored or skipped.

    Args:
      arrays: Columns [N, ...], as `encode` makes them.
      batch_size: Rows B of a batch; may exceed N.
      seed: Of the shuffling, 0 ... 2^32 - 1.

    Returns:
      A `grain.MapDataset` of dictionaries of arrays [B, ...].

    Raises:
      ValueError: for no rows, columns of different lengths, or a batch size below 1.

    >>> import numpy as np
    >>> from jpeft.data import batches
    >>> ds = batches({"x": np.arange(5)}, 2, seed=0)
    >>> sorted(np.concatenate([ds[step]["x"] for step in range(5)]).tolist())    # two epochs
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    """
    return batch_rows(arrays, batch_size, seed=seed).map(functools.partial(_take, dict(arrays)))


def _take(arrays: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[rows] for name, column in arrays.items()}


def batch_rows(arrays: Mapping[str, np.ndarray], batch_size: int, *, seed: int) -> grain.MapDataset:
    """The numbers of the rows in each batch of `batches`, for processes that read only a part of it.

    Args:
      arrays: As for `batches`, and so the rest.
      batch_size: Rows B of a batch.
      seed: Of the shuffling.

    Returns:
      A `grain.MapDataset` of arrays [B].

    Raises:
      ValueError: as `batches`.

    >>> import numpy as np
    >>> from jpeft.data import batch_rows, batches
    >>> x = np.arange(5) * 10
    >>> bool((x[batch_rows({"x": x}, 2, seed=0)[7]] == batches({"x": x}, 2, seed=0)[7]["x"]).all())
    True
    """
    size = _size(arrays, batch_size)
    if size == 0:
        raise ValueError("no rows to train on")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2^32 - 1, got {seed}")
    take = functools.partial(_batch_rows, size=size, batch_size=batch_size, seed=seed)
    return grain.MapDataset.range(sys.maxsize // batch_size).map(take)


def _batch_rows(step: int, *, size: int, batch_size: int, seed: int) -> np.ndarray:
    position = np.arange(step * batch_size, (step + 1) * batch_size)  # in the endless stream
    epoch, offset = np.divmod(position, size)
    rows = np.empty(batch_size, np.int64)
    for number in range(int(epoch[0]), int(epoch[-1]) + 1):
        rows[epoch == number] = _order(size, seed, number)[offset[epoch == number]]
    return rows


# Not grain's shuffle: it takes milliseconds an example on small data sets and gives epoch 1 of seed 0 and epoch 0 of
# seed 1 the same order. And not numpy's `permutation`, whose result may change with numpy: raw bits and their ranks
# do not. The cache holds what the batch at an epoch's border needs; a lost entry is only made again.
@functools.lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Row numbers [size] in the order of one epoch."""
    order = np.argsort(np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(size), kind="stable")
    order.flags.writeable = False  # shared by all callers
    return order


def eval_batches(arrays: Mapping[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All rows once and in order, in batches of one shape.

    Args:
      arrays: Columns [N, ...].
      batch_size: Rows B of a batch.

    Yields:
      ceil(N / B) dictionaries of arrays [B, ...] with a further column `weight` [B], float32: 1 for a row of the data,
      0 for the copies of the last row that fill the last batch. A mean over the data is sum(weight * x) / sum(weight).

    Raises:
      ValueError: for columns of different lengths, or a batch size below 1.

    >>> import numpy as np
    >>> from jpeft.data import eval_batches
    >>> [batch["weight"].tolist() for batch in eval_batches({"x": np.arange(3)}, 2)]
    [[1.0, 1.0], [1.0, 0.0]]
    """
    size = _size(arrays, batch_size)
    for start in range(0, size, batch_size):
        index = np.arange(start, start + batch_size)
        weight = (index < size).astype(np.float32)
        index = np.minimum(index, size - 1)
        yield {**{name: column[index] for name, column in arrays.items()}, "weight": weight}


def steps_per_epoch(arrays: Mapping[str, np.ndarray], batch_size: int) -> int:
    """Batches until every example was seen once, the last of them possibly shared with the next epoch: ceil(N / B).

    >>> import numpy as np
    >>> from jpeft.data import steps_per_epoch
    >>> steps_per_epoch({"x": np.arange(5)}, 2)
    3
    """
    return -(-_size(arrays, batch_size) // batch_size)


def _size(arrays: Mapping[str, np.ndarray], batch_size: int) -> int:
    """Number of rows N of checked columns."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    sizes = {name: len(column) for name, column in arrays.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"columns must have the same number of rows, got {sizes or 'no columns'}")
    return next(iter(sizes.values()))

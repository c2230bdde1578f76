"""The splits of a data set: a file, a folder, a data set of the hub, or a built-in one.

Nothing here depends on the order of rows or of files, nor on the process.
"""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jpeft.data.columns import from_columns
from jpeft.data.readers import READERS
from jpeft.data.reading import read
from jpeft.data.tables import Table, label_names

# Names of the splits in files and hub data sets, the preferred one first.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "test_matched"),
}


def splits(
    spec: str | Path,
    *,
    text: str = "text",
    pair: str | None = None,
    label: str | None = "label",
    target: str | None = None,
    tags: str | None = None,
    tag_names: Sequence[str] = (),
    validation: float = 0.1,
    test: float = 0.1,
) -> dict[str, Table]:
    """Return the training, validation and test tables of a data set.

    Args:
      spec: One of
        `"builtin"`, from `jpeft.data.builtin`, or `"builtin:docs"`, `"builtin:reference"`, `"builtin:summaries"`, from
        `jpeft.data.python_docs`; they have their own columns and splits;
        a folder with files `train.*`, `validation.*` (or `valid.*`, `val.*`, `dev.*`) and `test.*`;
        one file, split here by `split_table`;
        `"hub:name"` or `"hub:name/config"`, a data set of the Hugging Face hub, name with or without an owner.
      text: Column of the texts.
      pair: Column of the second texts of sentence pairs; None for single texts.
      label: Column of the classes; None for data without classes.
      target: Column of the texts to generate; None for none.
      tags: Column of lists with a tag for each word; None for none.
      tag_names: Names of the tags 0, 1, ..., if the tags are numbers. Without it, a data set of the hub has its own names.
      validation: Share of all texts for validation, if the data set has no such split.
      test: Share of all texts for the test, if the data set has no such split. A hub split with hidden labels (-1) counts as missing.

    Returns:
      `{"train": ..., "validation": ..., "test": ...}`.

    Raises:
      ValueError: see `read`; and for a data set that does not exist, that has no training rows, or that has only one class.

    >>> from jpeft.data import splits
    >>> {name: len(table) for name, table in splits("builtin").items()}["test"] > 100
    True
    """
    if str(spec).partition(":")[0] == "builtin":
        return _builtin(str(spec))
    columns: dict[str, Any] = {"text": text, "pair": pair, "label": label, "target": target, "tags": tags, "tag_names": tag_names}
    if isinstance(spec, str) and spec.startswith("hub:"):
        found = _hub(spec, **columns)
    elif Path(spec).is_dir():
        found = _folder(Path(spec), **columns)
    elif Path(spec).exists():
        found = {"train": read(spec, **columns)}
    else:
        raise ValueError(
            f"{spec}: no such file or folder; give a file ({', '.join(READERS)}), a folder of train, validation and "
            'test files, "hub:name" or "builtin".'
        )
    # Splits that the data set lacks are taken from its training rows.
    shares = {name: share for name, share in (("validation", validation), ("test", test)) if name not in found}
    try:
        parts = split_table(found["train"], **{"validation": 0.0, "test": 0.0, **shares})
        if label is not None:
            label_names(parts["train"])
    except ValueError as error:
        message = f"{spec}: {error}"
        raise ValueError(message) from error
    return {name: (found[name] if name != "train" and name in found else parts[name]).named(name) for name in SPLIT_NAMES}


def split_table(table: Table, *, validation: float, test: float) -> dict[str, Table]:
    """Split a table by a hash of the text, class by class.

    Each class has its share of each split to within one text, and at least one text for training. The split of a row depends on the texts
    in the table, not on their order. Texts that differ only in case, spaces and punctuation are in the same split.

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
        raise ValueError(f"validation={validation} and test={test} must be at least 0 and together less than 1.")
    groups: dict[str, list[int]] = defaultdict(list)  # rows of one text, by its fingerprint
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
            # The remainder of rounding is carried to the next class, so that many small classes get a split too.
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
                f"The {part} split would be empty: {len(groups)} different texts, {part}={share}; "
                f"give more rows, a larger share, or a {part} file of its own."
            )
    return {part: table.take(sorted(rows)).named(part) for part, rows in parts.items()}


def fingerprint(text: str, pair: str | None = None) -> str:
    """Return a hash of the text that ignores case, spaces and punctuation.

    >>> from jpeft.data import fingerprint
    >>> fingerprint("Fast Fourier-transform.") == fingerprint("fast  fourier transform")
    True
    """
    # A text of punctuation alone is hashed as it is.
    parts = [" ".join(re.findall(r"\w+", part.casefold())) or part for part in (text, pair) if part is not None]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _builtin(spec: str) -> dict[str, Table]:
    # Imported here, because both modules import this package.
    from jpeft.data import builtin, python_docs

    sets = {"builtin": builtin.builtin}
    sets |= {f"builtin:{make.__name__}": make for make in (python_docs.docs, python_docs.reference, python_docs.summaries)}
    if spec not in sets:
        raise ValueError(f"There is no built-in data {spec!r}; there are {', '.join(sets)}.")
    return sets[spec]()


def _folder(folder: Path, **columns: Any) -> dict[str, Table]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in READERS)
    found = {name: [path for path in files if path.stem in aliases] for name, aliases in SPLIT_NAMES.items()}
    for name, paths in found.items():
        if len(paths) > 1:
            raise ValueError(f"{folder}: several {name} files, {', '.join(p.name for p in paths)}; leave only one there.")
    if not found["train"]:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise ValueError(f"{folder}: no train file; it holds {there}. Name it train{', train'.join(READERS)}.")
    return {name: read(paths[0], **columns) for name, paths in found.items() if paths}


def _hub(spec: str, *, label: str | None, tags: str | None, tag_names: Sequence[str], **others: Any) -> dict[str, Table]:
    dataset = _load_hub(spec)
    found = {name: [alias for alias in aliases if alias in dataset] for name, aliases in SPLIT_NAMES.items()}
    if not found["train"]:
        raise ValueError(f"{spec}: no train split; it has {', '.join(sorted(dataset))}.")
    tables = {}
    for name, aliases in found.items():
        if not aliases:
            continue
        rows = dataset[aliases[0]]
        # All other columns are only named and not read: they may hold images.
        columns: dict[str, Any] = {c: rows[c][:] if c in (label, tags, *others.values()) else () for c in rows.column_names}
        # A ClassLabel: numbers in the table, their names in its features; -1 for a hidden label.
        names = getattr(rows.features.get(label), "names", None)
        if label is not None and names is not None:
            columns[label] = [_class_name(i, names) for i in columns[label]]
            if name != "train" and not any(columns[label]):
                continue
        kinds = _names_of_lists(rows.features.get(tags))
        if tags is not None and kinds is not None:
            columns[tags] = [row and [_class_name(i, tag_names or kinds) for i in row] for row in columns[tags]]
            if name != "train" and not any(tag for row in columns[tags] for tag in row or ()):
                continue
        tables[name] = from_columns(columns, f"{spec} ({aliases[0]})", label=label, tags=tags, tag_names=tag_names, **others)
    return tables


def _class_name(number: int | None, names: Sequence[str]) -> str | None:
    return None if number is None or not 0 <= number < len(names) else names[number]


def _names_of_lists(feature: Any) -> Sequence[str] | None:
    """Return the names of a feature of lists of a ClassLabel; None for any other feature."""
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    return getattr(inner, "names", None)


def _load_hub(spec: str) -> Any:
    """Return a `datasets.DatasetDict`. "a/b" is the data set b of owner a or, if there is none, the configuration b of data set a."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f'{spec}: data sets of the hub need another package: pip install "jpeft[hub]".') from error
    parts = spec.removeprefix("hub:").split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise ValueError(f"{spec}: expected hub:name, hub:owner/name, hub:name/config or hub:owner/name/config.")
    named = [("/".join(parts[:2]), parts[2] if len(parts) == 3 else None)]
    configured = [(parts[0], parts[1])] if len(parts) == 2 else []
    problems = []
    for name, config in named + configured:
        try:
            return datasets.load_dataset(name, config)
        except OSError as error:  # not found, or the hub cannot be reached
            problems.append(str(error))
    raise ValueError(f"{spec}: the hub gave no such data set ({'; '.join(problems)}); check its name and the connection.")

"""The counts as Markdown."""

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fuzz import mutations, rows, tensor_files, values
from fuzz.verdict import RIGHT

PACKAGES = ("jax", "flax", "orbax-checkpoint", "transformers", "tokenizers", "safetensors", "pyarrow", "torch")

HEAD = """# Damaged input

Made by `make fuzz`: {count:,} mutations with seed {seed}. `{repeat}` repeats the one of that number.

Versions: {versions}.

Every mutation damages one file or folder, or gives an option one value, and does one thing with it. What may come of it:

* `same`: to the bit what undamaged input gives;
* `refused`: one line, which names what was damaged;
* `said`: something else, and a warning that names what was damaged;
* `as it says`: something else, as it has to be, since the file is the only source: torch computes from a model folder what jpeft computes,
  transformers encodes alike, damage in data changes the rows it stands in and no others.

All else is a failure: a difference that nothing says (`silent`), a traceback, an error of several lines or without the name, a hang, a
crash of the process, a file that is left over or was written through a link, and a refusal for the sake of a file that is not needed
(`blocked`).

A cell is the four counts in this order: same/refused/said/as it says.
"""


def write(output: Path, cases: list[dict[str, Any]], seed: int) -> int:
    """Write the table of some cases and return the number of failures."""
    failed = [case for case in cases if case["outcome"] not in RIGHT]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    repeat = f"PYTHONPATH=tests python -m fuzz --seed {seed} --mutations 1 --output /dev/stdout --first NUMBER"
    parts = [HEAD.format(count=len(cases), seed=seed, repeat=repeat, versions=f"Python {platform.python_version()}, {versions}")]
    parts.append(_table("outcome", Counter(case["outcome"] for case in cases).items(), ("mutations",)))
    named = [case | {"row": f"{case['target']}: {case['group']}", "column": column_of(case["kind"])} for case in cases]
    for title, of in (("folder and file", "row"), ("mutation", "kind")):
        parts.append(f"## By {title}\n")
        kinds = sorted({case[of] for case in named})
        lines = [(kind, _counts(case for case in named if case[of] == kind)) for kind in kinds]
        parts.append(_table(title, lines, ("mutations", *RIGHT, "failed")))
    parts.append("## Folder and file by kind of mutation\n")
    columns = sorted({case["column"] for case in named})
    lines = []
    for row in sorted({case["row"] for case in named}):
        lines.append((row, [_cell(case for case in named if case["row"] == row and case["column"] == column) for column in columns]))
    parts.append(_table("folder and file", lines, columns))
    if failed:
        parts.append("## Failures\n")
        parts += [f"* {case['number']}: {case['target']}, {case['about']}: {case['outcome']}: {case['why']!r:.300}" for case in failed]
    output.write_text("\n".join(parts).rstrip("\n") + "\n")
    return len(failed)


def column_of(kind: str) -> str:
    """The kind of a kind of mutation: what the columns of the large table are."""
    groups: Mapping[str, Iterable[str]] = {
        "bytes": mutations.BYTES,
        "place": (*mutations.PLACES, *mutations.FOLDERS),
        "JSON": mutations.JSON,
        "tensors": tensor_files.TENSORS,
        "rows": rows.KINDS,
        "value": values.VALUES,
    }
    return next((name for name, kinds in groups.items() if kind in kinds), "swapped" if kind.startswith("swapped") else "?")


def _counts(cases: Iterable[dict[str, Any]]) -> list[int]:
    count = Counter(case["outcome"] for case in cases)
    right = [count[outcome] for outcome in RIGHT]
    return [count.total(), *right, count.total() - sum(right)]


def _cell(cases: Iterable[dict[str, Any]]) -> str:
    total, *right, failed = _counts(cases)
    return "" if not total else "/".join(map(str, right)) + (f", {failed} failed" if failed else "")


def _table(name: str, lines: Iterable[tuple[str, Any]], columns: Iterable[str]) -> str:
    columns = list(columns)
    out = [f"| {' | '.join([name, *columns])} |", f"|---{'|---:' * len(columns)}|"]
    for row, cells in lines:
        out.append(f"| {' | '.join(str(cell) for cell in [row, *(cells if isinstance(cells, list) else [cells])])} |")
    return "\n".join(out) + "\n"

"""The stages of the rows that train in several, as a Markdown table."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from jpeft.core.summary import readable_bytes

Runs = Iterable[Mapping[str, Any]]  # contents of result.json


def stages_table(rows: Mapping[str, Runs]) -> str:
    """Return what each stage of each row trained and what its step cost; an empty string if every row has one stage.

    Args:
      rows: The finished runs of each row, by the row's label. Numbers are medians over the runs.

    >>> first = {"name": "", "begin": 0, "end": 5, "trained": 40, "flops": 2e9, "temporary_bytes": 2048}
    >>> print(stages_table({"far": [{"stages": [first, {**first, "name": "learners", "begin": 5, "end": 20, "trained": 9}]}]}))
    | method | stage | steps | trained | GFLOP/step | memory/step |
    | --- | --- | ---: | ---: | ---: | ---: |
    | far | first | 5 | 40 | 2 | 2.0 KiB |
    | far | learners | 15 | 9 | 2 | 2.0 KiB |
    """
    lines = []
    for label, runs in rows.items():
        of_runs = [run["stages"] for run in runs if len(run.get("stages", ())) > 1]
        lines += [f"| {label} | {' | '.join(_cells(stages))} |" for stages in zip(*of_runs, strict=False)]
    if not lines:
        return ""
    head = "| method | stage | steps | trained | GFLOP/step | memory/step |\n| --- | --- | ---: | ---: | ---: | ---: |"
    return "\n".join([head, *lines])


def _cells(stages: tuple[Mapping[str, Any], ...]) -> list[str]:
    """Return the cells of one stage, from its record in each run."""
    steps = _median([stage["end"] - stage["begin"] for stage in stages])
    flops, size = (_median([stage[name] for stage in stages if stage[name] is not None]) for name in ("flops", "temporary_bytes"))
    return [
        stages[0]["name"] or "first",
        f"{steps:,.0f}",
        f"{_median([stage['trained'] for stage in stages]):,.0f}",
        "–" if flops is None else f"{flops * 1e-9:,.4g}",
        "–" if size is None else readable_bytes(size),
    ]


def _median(values: list[Any]) -> float | None:
    return float(statistics.median(values)) if values else None

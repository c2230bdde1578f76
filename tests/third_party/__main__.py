"""Run all cells, a few processes at a time, and write the table: `make third-party`."""

import concurrent.futures
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from third_party import environment
from third_party.cells import GROUPS, METHODS, Cell

RESULTS = environment.ROOT / "benchmarks" / "results" / "third_party.md"


def cells_of(model: str, folder: Path | None, methods: Iterable[str] = ()) -> list[Cell]:
    """Run one model's cells in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "third_party.cells", model, *(["|".join(methods)] if methods else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment.variables(folder), timeout=1200, check=False)
    found = [Cell(*json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode:
        found.append(Cell(model, "", "BAD", (done.stderr.strip().splitlines() or ["no reason"])[-1], 0.0))
    return found


def main() -> int:
    """Return the exit status: 1 if a cell is bad."""
    begun, absent, waiting = time.perf_counter(), [], []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for group, models in GROUPS.items():
            try:
                folder = environment.make(group)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                absent.append(str(error))
                continue
            waiting += [pool.submit(cells_of, model, folder) for model in models]
        cells = []
        for future in waiting:
            found = future.result()
            cells += found
            counts = {outcome: sum(cell.outcome == outcome for cell in found) for outcome in ("ok", "refused", "BAD")}
            print(f"{found[0].model}: {counts}, {sum(cell.seconds for cell in found):.0f} s", flush=True)
    bad = [cell for cell in cells if cell.outcome == "BAD"]
    RESULTS.write_text(table(cells, absent))
    print(f"{len(cells)} cells, {len(bad)} bad, {time.perf_counter() - begun:.0f} s; {RESULTS.relative_to(environment.ROOT)}")
    for cell in bad:
        print(f"BAD {cell.model}, {cell.method}: {cell.text[:300]}")
    return bool(bad or absent)


def table(cells: list[Cell], absent: list[str]) -> str:
    """The table as a page, with every reason below it."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    at = {(cell.model, cell.method): cell for cell in cells}
    mark = lambda cell: "" if cell is None else {"ok": "whole" if cell.text else "ok", "refused": "no", "BAD": "**BAD**"}[cell.outcome]
    rows = [f"| {model} | " + " | ".join(mark(at.get((model, method))) for method in METHODS) + " |" for model in models]
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.text:
            reasons.setdefault((cell.method, _short(cell.text)), []).append(cell.model)
    order = {method: number for number, method in enumerate(METHODS)}
    listed = sorted(reasons.items(), key=lambda item: order.get(item[0][0], -1))
    packages = ", ".join(sorted({name for group in environment.PACKAGES.values() for name in group if "==" in name}))
    lines = [
        "# Methods on models that others wrote",
        "",
        f"Tiny models with random weights, made by `make third-party`. Packages: flax's own, {packages}.",
        "",
        "ok: `jpeft.check` finds nothing wrong: a new adapter leaves the outputs as they are where the method promises it, every leaf",
        "has a gradient, merged parameters give the outputs of the wrapped model, and the gradient costs what an adapter needs.",
        "",
        "whole: the same, but some kernels are exchanged whole, which costs full fine-tuning of their layers and is said in a warning.",
        "",
        "no: refused, with the reason below, which is cut where it goes on to list names. Empty: not run.",
        "",
        "| model | " + " | ".join(METHODS) + " |",
        "| --- |" + " --- |" * len(METHODS),
        *rows,
        "",
        "## Reasons",
        "",
        *(f"* **{method}** ({', '.join(of)}): {text}" for (method, text), of in listed),
        *(f"* {text}" for text in absent),
    ]
    return "\n".join(lines) + "\n"


def _short(text: str) -> str:
    for end in (" Candidates, ", "; looked for: ", " They are: ", " Its leaves are", "; parameters begin with"):
        text = text.partition(end)[0]
    return text.replace("|", "\\|")[:300]


if __name__ == "__main__":
    sys.exit(main())

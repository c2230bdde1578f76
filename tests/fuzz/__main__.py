"""`make fuzz`: many mutations, counted in benchmarks/results/fuzz.md.

A process of its own does them and begins a line of the journal with each, so that a crash or a hang of compiled code is counted too, and
the next process goes on behind it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--mutations", type=int, default=2000, help="how many")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first one; with --mutations 1, to repeat one")
    parser.add_argument("--folder", type=Path, help="where to work; its journal is continued")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    journal, last, end = folder / "journal.jsonl", args.first + args.mutations, time.monotonic() + args.seconds
    while (next_one := _next(journal, args.first)) < last and time.monotonic() < end:
        left = min(end - time.monotonic(), 10**7)
        command = [sys.executable, "-m", "fuzz", "--worker", "--folder", str(folder), "--seed", str(args.seed)]
        command += ["--first", str(next_one), "--mutations", str(last - next_one), "--seconds", str(left)]
        _watch_over(subprocess.Popen(command), journal)
    from fuzz.table import write

    failures = write(args.output, read(journal), args.seed)
    print(f"{args.output}: {failures} failures; journal and copies of what failed in {folder}")
    sys.exit(1 if failures else 0)


def work(args: argparse.Namespace) -> None:
    """Do mutations in this process and write each to the journal."""
    import conftest  # noqa: F401  # the tests' environment, before jax is imported
    import jax

    from fuzz.campaign import Campaign
    from fuzz.folders import World

    campaign = Campaign(World(args.folder / "world"), args.seed)
    end = time.monotonic() + args.seconds
    with open(args.folder / "journal.jsonl", "a", encoding="utf-8") as journal:
        for number in range(args.first, args.first + args.mutations):
            if time.monotonic() > end:
                return
            print(json.dumps({"begun": number}), file=journal, flush=True)
            case = campaign.run(number)
            line = {name: getattr(case, name) for name in ("number", "target", "group", "kind", "operation", "about")}
            print(json.dumps(line | {"outcome": case.verdict.outcome, "why": case.verdict.why}), file=journal, flush=True)
            if not case.verdict.right:
                print(
                    f"{number}: {case.target}, {case.group}, {case.operation}: {case.about}\n    {case.verdict.outcome}: {case.verdict.why}"
                )
            if number % 200 == 199:
                jax.clear_caches()  # a process may not map more than so many pieces of memory


def read(journal: Path) -> list[dict[str, Any]]:
    """The cases of a journal; a mutation that was begun and has no result ended its process."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    cases = {line["number"]: line for line in lines if "number" in line}
    crash = {"target": "?", "group": "?", "kind": "?", "operation": "?", "about": "", "outcome": "crash", "why": "the process ended"}
    begun = [line["begun"] for line in lines if "begun" in line]
    return [cases.get(number, crash | {"number": number}) for number in sorted(set(begun))]


def _next(journal: Path, first: int) -> int:
    if not journal.exists():
        return first
    return max([first, *(json.loads(line).get("begun", -1) + 1 for line in journal.read_text().splitlines())])


def _watch_over(process: subprocess.Popen[bytes], journal: Path) -> None:
    """Wait for a worker; end it if it has written nothing for five minutes, in compiled code that no signal interrupts."""
    while process.poll() is None:
        time.sleep(1)
        if journal.exists() and time.time() - os.path.getmtime(journal) > 300:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()

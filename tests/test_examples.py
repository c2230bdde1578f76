"""Every example runs as its header says, small: on a tiny random model where it takes one, for a few steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_text import make_decoder, make_model, make_rows, write_csv

EXAMPLES = Path(__file__).parents[1] / "examples"

# Arguments, and what must be in the output; {model} and {data} are a tiny encoder and sentences in three classes.
SMALL = {
    "own_loop.py": (
        "--model {model} --data {data} --steps 12 --max-length 12",
        [r"step   11  loss \d", r"test accuracy (\S+)\nmerged model  \1"],
    ),
    "train_state.py": (
        "--steps 40",
        [r"leaves of the base that moved: 0 of 6", r"optimizer state: 1,803 numbers; of full fine-tuning: 50,955"],
    ),
    "diff_pruning.py": (
        "--steps 12",
        [r"stage gates: trains", r"stage mask: trains", r"(\S+) of \S+ weights differ from the base; the budget is \1"],
    ),
    "far.py": (
        "--steps 20",
        [r"priming   trains \S+: \d+ MFLOP", r"learners  trains \S+: \d+ MFLOP", r"merged: 64 of 256 neurons of \S+ differ"],
    ),
    "fish_mask.py": (
        "--model {model} --data {data} --steps 3 --samples 8 --sparsity 0.05 --max-length 12",
        [r"trains (\S+) of \S+ weights", r"(\S+) weights differ from the base"],
    ),
    "token_classification.py": (
        "--model {model} --data {data} --steps 3 --length 2 --max-length 12",
        [r"word     precision \S+  recall \S+  of"],
    ),
    "chained.py": ("--steps 20", [r"collections: \['params', 'bitfit', 'lora'\]", r"refused: chain: 'freeze' replaces"]),
    "custom_method.py": ("--steps 60", [r"merged and wrapped logits differ by at most \S+e-0[67]", r"in a chain with LoRA"]),
    "sweep.py": ("--rates 1e-3 3e-3 --seeds 0 1 --steps 12", [r"best: rate", r"one step of all 4 takes"]),
    "generation_prefix.py": (
        "--model {decoder} --steps 3 --rows 40 --length 2 --max-length 120",
        [r"trained (\S+) parameters, stored 128 of", r"perplexity of 128 summaries, with prefix: \d", r"with prefix  def "],
    ),
    "prompt_from_words.py": (
        "--model {model} --data {data} --steps 3 --max-length 12 --prompt=some/old/iron",
        [r"hard prompt: accuracy \S+, 51 parameters", r"began as 'iron'\s+ended near 'iron'"],
    ),
    "generation.py": (
        "--model {decoder} --data {pairs} --target label --steps 20 --max-length 12 --new-tokens 3 --shown 2",
        [r"as it is +test perplexity +\d+\.\d+ exact match", r"lora +test perplexity", r"\n  wanted +'(fruit|metal|water)'"],
    ),
    "hub_model.py": (
        "--model {model} --data {data} --output {output} --batch-size 8 --max-length 12",
        [r"'accuracy'", r"parameters trained in"],
    ),
}
ELSEWHERE = {"demo.py"}  # what `make demo` runs, with the pretrained encoder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    rows = make_rows(72)
    write_csv(folder / "data" / "train.csv", rows[:48])
    write_csv(folder / "data" / "validation.csv", rows[48:60])
    write_csv(folder / "data" / "test.csv", rows[60:])
    return {
        "model": make_model(folder / "model"),
        "decoder": make_decoder(folder / "decoder", positions=160),
        "data": folder / "data",
        "pairs": folder / "data" / "train.csv",
        "output": folder / "run",
    }


def test_every_example_is_run_and_listed():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == SMALL.keys() | ELSEWHERE
    assert set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())) == names


@pytest.mark.parametrize("name", SMALL)
def test_runs(name, tiny):
    text, patterns = SMALL[name]
    arguments = [part.format(**tiny) for part in text.split()]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling is nearly all that a small run does
    # A new head is said.
    strict = ["-W", "error", "-W", "ignore:Pretrained checkpoint"]
    run = subprocess.run([sys.executable, *strict, EXAMPLES / name, *arguments], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    for pattern in patterns:
        assert re.search(pattern, run.stdout), run.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_is_short_and_says_how_to_run_it(path):
    source = path.read_text()
    assert source.count("\n") < 150
    header = source.split('"""')[1]
    assert f"python examples/{path.name}" in header or "make demo" in header
    assert re.search(r"[Pp]rints", header)

"""Generation: adapt a decoder to pairs of text and target, measure its perplexity before and after, and generate text.

    python examples/generation.py                      # trains a small decoder first, in minutes; function heads and summaries
    python examples/generation.py --model gpt2 --data pairs.jsonl --target answer

Prints the test perplexity and the share of exact matches of the decoder without and with the trained adapter, and for a few test texts
the target and what both generate.
"""

import argparse
import tempfile
from pathlib import Path

import jpeft
from jpeft import data, models
from jpeft.tasks.generation import Generation
from jpeft.tasks.task import Decoding
from jpeft.training.config import TrainConfig
from jpeft.training.evaluate import Evaluator
from jpeft.training.small_decoder import decoder
from jpeft.training.train import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder of a checkpoint, or a hub id; by default the decoder of jpeft.training.small_decoder")
parser.add_argument("--data", default="builtin:summaries", help="with a column `text`")
parser.add_argument("--target", help="column of the targets; the built-in data has its own")
parser.add_argument("--method", default="lora")
parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--max-length", type=int, default=96)
parser.add_argument("--new-tokens", type=int, default=24)
parser.add_argument("--shown", type=int, default=5, help="number of generated texts to show")
parser.add_argument("--output", help="folder of the run; a temporary one by default")
args = parser.parse_args()

# --- training with jpeft's trainer: rows of fixed length, a loss on the targets only, one compiled step ----------------------------------

result = train(
    TrainConfig(
        model=args.model or str(decoder()),
        output=args.output or str(Path(tempfile.mkdtemp(), "run")),
        data=args.data,
        target=args.target,
        task="generation",
        method=args.method,
        options=tuple(args.options),
        steps=args.steps,
        batch_size=args.batch_size,
        max_length=args.max_length,
        overlong="cut",
    )
)

# --- before and after: the same test rows, the same metrics ---------------------------------------------------------------------------

task = Generation(overlong="cut")
loaded = models.load(args.model or decoder(), task=task.model)
test = data.splits(args.data, label=None, target=args.target)["test"]
rows = task.encode(test, loaded.tokenizer, labels=(), max_length=args.max_length)
prompts = task.encode(data.Table(text=test.text[: args.shown]), loaded.tokenizer, labels=None, max_length=args.max_length)
end = loaded.tokenizer.eos_token_id
decoding = Decoding(max_new_tokens=args.new_tokens, stop=(end,), pad=end)
# `freeze` with all weights, before any training, is the pretrained model.
variants = {"as it is": jpeft.apply(loaded.params, method="freeze", target=".*"), args.method: result.peft}

written = {}
for name, peft in variants.items():
    evaluator = Evaluator(jpeft.wrap(loaded.model.apply, peft.method), task, args.batch_size)
    metrics = evaluator.metrics(peft, rows)
    exact = f" exact match {metrics['exact_match']:.3f}" if "exact_match" in metrics else ""  # plain texts have no targets to match
    print(f"{name:<12} test perplexity {metrics['perplexity']:8.2f}{exact}")
    lines = task.predictions(evaluator.answers(peft, prompts, decoding), (), loaded.tokenizer)
    written[name] = [line["generated"] for line in lines]
print(f"{result.trained:,} trained numbers, {result.steps} steps in {result.seconds:.0f} s; the run is in {result.path}")

for i, text in enumerate(test.text[: args.shown]):
    print(f"\n{text}")
    for name, texts in written.items():
        print(f"  {name:<12} {texts[i]!r}")
    if test.target is not None:
        print(f"  {'wanted':<12} {test.target[i]!r}")

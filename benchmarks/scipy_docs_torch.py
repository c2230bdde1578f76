"""The results of torch and HF PEFT on the built-in data, to compare with those of jpeft.

    python benchmarks/scipy_docs_torch.py --seeds 0 1 2
    python benchmarks/scipy_docs_torch.py --rows freeze full --seeds 0

Encoder, texts, splits, batches of 16 × 64 tokens, 5 epochs, AdamW, warmup, schedule, clipping and learning rates are
those of `make compare`; the model is transformers' `BertForSequenceClassification`, LoRA is peft's. Results are written to
results/scipy_docs_torch.json and results/scipy_docs_torch.md. Rows that are in the JSON file already are not run again.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from peft import LoraConfig, get_peft_model
from scipy_docs import minilm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import jpeft
from jpeft.checkpoint.files import write_atomically
from jpeft.comparison.rows import BASELINES
from jpeft.data.builtin import builtin

RESULTS = Path(__file__).parent / "results"
BATCH, LENGTH, EPOCHS, WARMUP, DECAY, CLIP = 16, 64, 5, 0.06, 0.01, 1.0
KERNELS = ["query", "key", "value", "dense"]


def only(*kept: str) -> Callable[[Any], Any]:
    """Train the parameters with one of these texts in their names, and the head."""

    def prepare(model: Any) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = any(part in name for part in (*kept, "classifier"))
        return model

    return prepare


def bitfit(model: Any) -> Any:
    """Train all biases, and the head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith(".bias") or "classifier" in name
    return model


def lora(*targets: str) -> Callable[[Any], Any]:
    """HF PEFT's LoRA of rank 8, with jpeft's scale alpha / rank = 2."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(targets), modules_to_save=["classifier"])
    return lambda model: get_peft_model(model, config)


USUAL = jpeft.methods()


class Row(NamedTuple):
    """What is trained, and the learning rates of `jpeft compare`."""

    prepare: Callable[[Any], Any]
    rate: float
    head_lr_scale: float  # a multiple of the learning rate


def row(name: str, prepare: Callable[[Any], Any], rate: float | None = None) -> Row:
    """A row with the learning rates of a method of jpeft; for baselines that are not methods, `rate` replaces the learning rate."""
    return Row(prepare, rate or USUAL[name].learning_rate, USUAL[name].head_lr_scale)


ROWS = {
    "head-only": row("freeze", only(), BASELINES["head-only"].learning_rate),
    "freeze": row("freeze", only("layer.4.", "layer.5.", "pooler")),
    "bitfit": row("bitfit", bitfit),
    "lora": row("lora", lora(*KERNELS)),
    "full": row("freeze", only(""), BASELINES["full"].learning_rate),
}


def run(name: str, seed: int) -> dict[str, Any]:
    """Return the test accuracy after training, and the seconds of the training."""
    how = ROWS[name]
    tables, tokenizer = builtin(), AutoTokenizer.from_pretrained(minilm())
    names = sorted(set(tables["train"].label or ()))

    def encode(split: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        table = tables[split]
        inputs = tokenizer(list(table.text), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return dict(inputs), torch.tensor([names.index(label) for label in table.label or ()])

    torch.manual_seed(seed)
    model = how.prepare(AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(names)))
    trained = [(path, leaf) for path, leaf in model.named_parameters() if leaf.requires_grad]
    groups = [
        {"params": [leaf for path, leaf in trained if "classifier" not in path], "lr": how.rate},
        {"params": [leaf for path, leaf in trained if "classifier" in path], "lr": how.head_lr_scale * how.rate},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=DECAY)
    inputs, labels = encode("train")
    steps = EPOCHS * (len(labels) // BATCH)
    warm = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, (steps - i) / (steps - warm)))
    order, begun = np.random.default_rng(seed), time.perf_counter()
    model.train()
    for _ in range(EPOCHS):
        shuffled = order.permutation(len(labels))
        for rows in shuffled[: len(shuffled) // BATCH * BATCH].reshape(-1, BATCH):
            loss = model(**{name: column[rows] for name, column in inputs.items()}, labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([leaf for _, leaf in trained], CLIP)
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - begun
    model.eval()
    inputs, labels = encode("test")
    with torch.no_grad():
        parts = [{name: column[i : i + 64] for name, column in inputs.items()} for i in range(0, len(labels), 64)]
        guesses = torch.cat([model(**part).logits.argmax(-1) for part in parts])
    count = sum(leaf.numel() for _, leaf in trained)
    return {"accuracy": float((guesses == labels).float().mean()), "trained": count, "seconds": seconds, "rate": how.rate}


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    path = RESULTS / "scipy_docs_torch.json"
    done: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for name in args.rows:
        for seed in args.seeds:
            if str(seed) not in done.setdefault(name, {}):
                done[name][str(seed)] = run(name, seed)
                print(name, seed, done[name][str(seed)])
                write_atomically(path, json.dumps(done, indent=1) + "\n")
    write_atomically(RESULTS / "scipy_docs_torch.md", table(done))


def table(done: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown: mean ± standard deviation over the seeds."""
    made = f"Made by `python benchmarks/scipy_docs_torch.py` with torch {torch.__version__} and peft {peft.__version__}."
    lines = ["# torch and HF PEFT on the built-in data", "", made, ""]
    lines += ["| method | test accuracy | seeds | trained | seconds | learning rate |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name in ROWS:
        if found := list(done.get(name, {}).values()):
            scores = [result["accuracy"] for result in found]
            accuracy = f"{statistics.mean(scores):.3f}" + (f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else "")
            seconds = statistics.mean(result["seconds"] for result in found)
            lines.append(f"| {name} | {accuracy} | {len(scores)} | {found[0]['trained']:,} | {seconds:.0f} | {found[0]['rate']:g} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

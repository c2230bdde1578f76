"""The results of torch and HF PEFT on the built-in data, to compare with those of jpeft.

    python benchmarks/scipy_docs_torch.py --seeds 0 1 2
    python benchmarks/scipy_docs_torch.py --rows freeze full --seeds 0

Encoder, texts, splits, batches of 16 × 64 tokens, 5 epochs, AdamW without decay of biases and LayerNorms, warmup, schedule, clipping and
learning rates are those of `make compare`; the model is transformers' `BertForSequenceClassification`. LoRA, prompt tuning (20 rows, drawn
from the vocabulary) and the network of prefix-tuning (10 rows, width 512) are peft's, of the sizes that jpeft has by default. Results are
written to results/scipy_docs_torch.json and results/scipy_docs_torch.md. Rows that are in the JSON file already are not run again.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.tuners.prefix_tuning import PrefixEncoder
from scipy_docs import minilm
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForSequenceClassification, AutoTokenizer

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


def prompt(length: int) -> Callable[[Any], Any]:
    """HF PEFT's prompt tuning, begun with embeddings drawn from the vocabulary."""
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=length, prompt_tuning_init="SAMPLE_VOCAB")
    return lambda model: get_peft_model(model, config)


class Prefix(torch.nn.Module):
    """Prefix-tuning of a BERT classifier: peft's network makes the keys and values that stand in front of every layer's own.

    peft itself refuses encoders whose attention keeps no cache, which are all of transformers 5. So attention is a function of
    transformers' registry here, which prepends the layer's rows and calls scaled dot-product attention.
    """

    def __init__(self, model: Any, length: int, inner: int):
        super().__init__()
        config = model.config
        sizes = {"token_dim": config.hidden_size, "num_layers": config.num_hidden_layers, "encoder_hidden_size": inner}
        self.network = PrefixEncoder(PrefixTuningConfig(num_virtual_tokens=length, prefix_projection=True, **sizes))
        self.model, self.length = model, length
        AttentionInterface.register("prefixed", self._attend)
        AttentionMaskInterface.register("prefixed", AttentionMaskInterface()["sdpa"])
        model.set_attn_implementation("prefixed")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> Any:
        """Run the model, the text's positions counted from the prefix's length on."""
        rows = self.network(torch.arange(self.length))  # [length, 2 * layers * width]
        heads = self.model.config.num_attention_heads
        self.rows = rows.view(1, self.length, -1, heads, rows.shape[-1] // len(self.model.bert.encoder.layer) // 2 // heads)
        positions = torch.arange(self.length, self.length + input_ids.shape[1])[None]
        return self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, **inputs)

    def _attend(self, layer: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> tuple[torch.Tensor, None]:
        index = layer.layer_idx if layer.layer_idx is not None else self._index[layer]
        batch = query.shape[0]
        begin = self.rows[:, :, 2 * index : 2 * index + 2].permute(2, 0, 3, 1, 4)  # [2, 1, heads, length, head_dim]
        key = torch.cat([begin[0].expand(batch, -1, -1, -1), key], dim=2)
        value = torch.cat([begin[1].expand(batch, -1, -1, -1), value], dim=2)
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (self.length, 0), value=True if mask.dtype == torch.bool else 0.0)
        return AttentionInterface()["sdpa"](layer, query, key, value, mask, **options)

    @functools.cached_property
    def _index(self) -> dict[Any, int]:
        return {block.attention.self: i for i, block in enumerate(self.model.bert.encoder.layer)}


def prefix(length: int, inner: int) -> Callable[[Any], Any]:
    """Prefix-tuning, with the head."""
    return lambda model: Prefix(only()(model), length, inner)


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
    "prompt_tuning": row("prompt_tuning", prompt(20)),
    "prefix_tuning": row("prefix_tuning", prefix(10, 512)),
    "full": row("freeze", only(""), BASELINES["full"].learning_rate),
}


def decays(path: str) -> bool:
    """Whether weight decay acts on a parameter: neither a bias nor a LayerNorm's gain."""
    return not (path.endswith(".bias") or "LayerNorm" in path)


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
        {
            "params": [leaf for path, leaf in trained if ("classifier" in path) is head and decays(path) is decayed],
            "lr": how.rate * (how.head_lr_scale if head else 1.0),
            "weight_decay": DECAY if decayed else 0.0,
        }
        for head in (False, True)
        for decayed in (False, True)
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
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

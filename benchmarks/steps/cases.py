"""The cases: who computes what, on which shapes. Nothing here imports a framework."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

JPEFT, QWIX, PEFT, TORCH = "jpeft", "qwix", "HF PEFT", "torch"
Size = Literal["gpu", "cpu", "toy"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The numbers of a transformer, and the type that it computes in."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    dtype: str

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that configurations of jpeft and of transformers have under the same names."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.inner,
        }


# Llama-3.2-1B and BERT-base; a small one of each for a CPU; and one that costs nothing.
LLAMA: dict[str, Shape] = {
    "gpu": Shape(16, 2048, 32, 8, 8192, 128256, "bfloat16"),
    "cpu": Shape(4, 256, 8, 2, 1024, 32000, "float32"),
    "toy": Shape(2, 32, 4, 2, 64, 256, "float32"),
}
BERT: dict[str, Shape] = {
    "gpu": Shape(12, 768, 12, 12, 3072, 30522, "bfloat16"),
    "cpu": Shape(4, 256, 4, 4, 1024, 30522, "float32"),
    "toy": Shape(2, 32, 2, 2, 64, 256, "float32"),
}
RANK, ALPHA = 16, 32.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One process: one line of the results, or one for each method.

    Attributes:
      who: Whose code.
      what: What it does, in words.
      kind: The function that runs it: "llama", "bert", "sweep" or "generate".
      batch: Rows.
      length: Tokens of a row.
      options: Of the function.
      seconds: What it takes on an H100, about; with less time left it is not begun.
    """

    who: str
    what: str
    kind: Literal["llama", "bert", "sweep", "generate"]
    batch: int
    length: int
    options: tuple[tuple[str, Any], ...] = ()
    seconds: int = 25

    @property
    def name(self) -> str:
        """A name that no other case has."""
        return f"{self.who}: {self.what}, {self.batch} x {self.length}"

    @property
    def in_jax(self) -> bool:
        """Whether JAX runs it."""
        return self.who in (JPEFT, QWIX)

    def line(self, **values: Any) -> dict[str, Any]:
        """A line of the results."""
        return {"who": self.who, "what": self.what, "batch": self.batch, "length": self.length, **values}


def case(who: str, what: str, kind: Any, batch: int, length: int, seconds: int = 25, **options: Any) -> Case:
    """Return a case; the options are those of its function."""
    return Case(who, what, kind, batch, length, tuple(options.items()), seconds)


TORCH_METHODS = ("full", "lora", "bitfit", "ia3", "prompt", "prefix")


def gpu_cases() -> list[Case]:
    """Return the set for one H100, the most important cases first, jpeft and torch in turn."""
    short, middle, long = (8, 1024), (2, 4096), (1, 32768)
    return [
        case(JPEFT, "LoRA, scan, dots", "llama", *short, remat="dots"),
        case(PEFT, "LoRA, torch.compile", "llama", *short, seconds=95, compiled=True),
        case(QWIX, "LoRA, scan, dots", "llama", *short, remat="dots"),
        case(JPEFT, "LoRA joined, scan, dots", "llama", *short, remat="dots", view="joined"),
        case(JPEFT, "LoRA two-view, scan, dots", "llama", *short, remat="dots", view="two-view"),
        case(JPEFT, "LoRA, scan, remat", "llama", *short, remat=True),
        case(JPEFT, "LoRA, scan, remat", "llama", *middle, remat=True),
        case(PEFT, "LoRA, checkpointing", "llama", *middle, seconds=15, checkpointing=True),
        case(JPEFT, "LoRA, scan, remat", "llama", *long, remat=True),
        case(JPEFT, "BERT", "bert", 32, 128, seconds=50),
        case(TORCH, "BERT, eager", "bert", 32, 128, seconds=25, methods=TORCH_METHODS),
        case(PEFT, "LoRA, checkpointing", "llama", *short, seconds=15, checkpointing=True),
        case(PEFT, "LoRA, eager", "llama", *short, seconds=15),
        case(JPEFT, "generation", "generate", 8, 128, seconds=30),
        case(PEFT, "generation", "generate", 8, 128, seconds=25),
        case(JPEFT, "LoRA, scan", "llama", *short),
        case(PEFT, "LoRA, Liger kernels", "llama", *short, seconds=15, liger=True),
        case(PEFT, "LoRA, checkpointing", "llama", *long, seconds=20, checkpointing=True),
        case(JPEFT, "sweep of 8 adapters", "sweep", 4, 32, seconds=25),
        case(JPEFT, "full fine-tuning, scan, remat", "llama", *short, remat=True, full=True),
        case(TORCH, "full fine-tuning, checkpointing", "llama", *short, seconds=20, checkpointing=True, full=True),
        case(TORCH, "BERT, torch.compile", "bert", 32, 128, seconds=60, methods=TORCH_METHODS, compiled=True),
        case(JPEFT, "LoRA, scan, dots", "llama", *middle, remat="dots"),
    ]


def cpu_cases() -> list[Case]:
    """Return the small set for a CPU."""
    rows = (4, 256)
    return [
        case(JPEFT, "LoRA, scan", "llama", *rows),
        case(PEFT, "LoRA, eager", "llama", *rows),
        case(JPEFT, "LoRA, scan, dots", "llama", *rows, remat="dots"),
        case(PEFT, "LoRA, checkpointing", "llama", *rows, checkpointing=True),
        case(JPEFT, "LoRA, scan, remat", "llama", *rows, remat=True),
        case(PEFT, "LoRA, torch.compile", "llama", *rows, compiled=True),
        case(QWIX, "LoRA, scan", "llama", *rows),
        case(PEFT, "LoRA, Liger kernels", "llama", *rows, liger=True),
        case(JPEFT, "full fine-tuning, scan", "llama", *rows, full=True),
        case(TORCH, "full fine-tuning, eager", "llama", *rows, full=True),
        case(JPEFT, "BERT", "bert", 8, 64, methods=("full", "lora", "bitfit", "adapter", "prefix_tuning", "prompt_tuning", "ia3")),
        case(TORCH, "BERT, eager", "bert", 8, 64, methods=TORCH_METHODS),
        case(JPEFT, "sweep of 8 adapters", "sweep", 4, 32),
        case(JPEFT, "generation", "generate", 4, 32),
        case(PEFT, "generation", "generate", 4, 32),
    ]


def toy(full_size: Case) -> Case:
    """Return a case of the GPU's set with shapes that cost nothing."""
    options = full_size.options
    if full_size.in_jax and full_size.kind == "bert":
        options += (("methods", ("full", "lora", "prefix_tuning")),)
    return dataclasses.replace(full_size, batch=2, length=max(8, min(full_size.length // 64, 32)), options=options)


def forward_flops(shape: Shape, batch: int, length: int, *, decoder: bool) -> float:
    """Return the operations of a forward pass in matrix products: weights for each token, and attention, of which a decoder needs half."""
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    block = shape.width * (2 * queries + 2 * keys + (3 if decoder else 2) * shape.inner)
    weights = shape.layers * block + (shape.width * shape.vocabulary if decoder else 0)
    attention = 4.0 * shape.layers * batch * length**2 * queries / (2 if decoder else 1)
    return 2.0 * batch * length * weights + attention

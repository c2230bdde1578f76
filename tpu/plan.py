"""Plan the memory of a slice for a model, a method and a mesh, without any device.

    python tpu/plan.py                                              # Llama-3.1-70B with LoRA on 256 devices
    python tpu/plan.py --mesh fsdp=64,tensor=4 --batch 128 --length 8192 rank=64
    python tpu/plan.py --model llama-3.1-8b --devices 8 --mesh fsdp=-1 --batch 8 --method bitfit --memory 16
    python tpu/plan.py --config path/to/config.json --hidden-size 1024   # any family of jpeft.models, any dimension

Prints the shape, placement and bytes per device of every weight and of the adapter, gradients and optimizer state, and an estimate of the
activations with its calculation. The plan uses shapes only: it downloads and allocates nothing and takes seconds on a laptop.
"""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a plan needs no accelerator and must not occupy one

import jax
import jax.numpy as jnp
import optax
import tyro

import jpeft
from jpeft import sharding
from jpeft.core.summary import readable_bytes
from jpeft.models import LlamaConfig, LlamaForCausalLM, abstract_params, families, partition_rules
from jpeft.training.config import parse_options


def _larger(hidden: int, layers: int, heads: int, inner: int) -> Callable[..., LlamaConfig]:
    """Another size of Llama-3.1, equal to the smallest one in everything else."""
    sizes: dict[str, Any] = dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner)
    return functools.partial(LlamaConfig.llama_3_1_8b, **sizes)


# Name -> configuration, given the fields that shall be different.
PRESETS: dict[str, Callable[..., LlamaConfig]] = {
    "llama-3.1-8b": LlamaConfig.llama_3_1_8b,
    "llama-3.1-70b": _larger(8192, 80, 64, 28672),
    "llama-3.1-405b": _larger(16384, 126, 128, 53248),
    "mistral-7b": LlamaConfig.mistral_7b,
    "qwen3-4b": LlamaConfig.qwen3_4b,
    "qwen3-8b": LlamaConfig.qwen3_8b,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Plan a fine-tuning run on a slice."""

    # Name of a model: llama-3.1-8b, llama-3.1-70b, llama-3.1-405b, mistral-7b, qwen3-4b, qwen3-8b.
    model: str = "llama-3.1-70b"
    # A Hugging Face config.json (or its folder), instead of --model.
    config: str | None = None
    # Dimensions that replace the model's.
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    # Devices of the slice and their arrangement; -1 is the rest.
    devices: int = 256
    mesh: str = "data=1,fsdp=32,tensor=8"
    # Method and its options, as for `jpeft train`.
    method: str = "lora"
    options: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    # Sequences in a step, over all devices, and tokens in each sequence.
    batch: int = 32
    length: int = 4096
    # Type of the base's weights and of the activations. Adapter, gradients and Adam's moments are float32.
    dtype: str = "bfloat16"
    # Type of the base's weights, if it is another one. (`jpeft train` keeps them in float32 for every --dtype.)
    weights: str | None = None
    # Memory of a device in GiB; the exit status is 1 if the plan needs more: TPU v4 32, v5e 16, v5p 95, v6e 32.
    memory: float = 32.0


class Part(NamedTuple):
    """One kind of activations on one device."""

    name: str
    arithmetic: str
    bytes: int


def main(args: Args) -> int:
    """Print the plan; return 0 if it fits into the memory, else 1."""
    model = make_model(args)
    mesh = sharding.abstract_mesh(args.devices, **({"data": 1, "fsdp": 1, "tensor": 1} | sharding.parse_mesh(args.mesh)))
    params = abstract_params(model)
    method = jpeft.make(args.method, **parse_options(args.options))
    peft = jax.eval_shape(lambda params: jpeft.apply(params, method=method), params)
    plan = sharding.plan(peft, mesh, partition_rules(model), tx=optax.adamw(1e-4))
    parts = activations(model.config, dict(mesh.shape), args.batch, args.length)
    total, room = plan.total + sum(part.bytes for part in parts), args.memory * 2**30

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{args.config or args.model}: {size:,} parameters, {method!r}\n\n{plan}\n")
    print(f"Activations of {args.batch} sequences of {args.length:,} tokens, each block recomputed in the backward pass:")
    width = max(len(part.name) for part in parts), max(len(part.arithmetic) for part in parts)
    for part in parts:
        print(f"  {part.name:<{width[0]}}  {part.arithmetic:<{width[1]}}  {readable_bytes(part.bytes):>10}")
    verdict = "fits" if total <= room else "does not fit"
    print(f"\n{readable_bytes(total)} per device, about; it {verdict} into {args.memory:g} GiB.")
    return 0 if total <= room else 1


def make_model(args: Args) -> Any:
    """The model, with layers stacked and recomputed.

    Raises:
      ValueError: for an unknown name, or a configuration of an unknown family.
    """
    weights = jnp.dtype(args.weights or args.dtype)
    numerics: dict[str, Any] = dict(dtype=jnp.dtype(args.dtype), param_dtype=weights, scan=True, remat=True)
    sizes: dict[str, Any] = {name: value for name in SIZES if (value := getattr(args, name)) is not None}
    if args.config is None:
        if args.model not in PRESETS:
            raise ValueError(f"model {args.model!r} is not one of {', '.join(PRESETS)}; give its --config, a config.json")
        return LlamaForCausalLM(PRESETS[args.model](**sizes, **numerics))
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.config)
    family = families.family_of(config.model_type) if config.model_type in families.model_types("causal-lm") else None
    if family is None:
        raise ValueError(f"{args.config}: model_type {config.model_type!r}; supported: {', '.join(families.model_types('causal-lm'))}")
    cls: Any = family.models["causal-lm"].module
    return cls(family.config.from_hf(config, **sizes, **numerics))


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")


def activations(config: Any, mesh: dict[str, int], batch: int, length: int) -> list[Part]:
    """Estimate the activations of a step on one device, from the largest arrays that exist at the same time.

    With remat only the input of each block is kept. While one block is recomputed and differentiated, all of its activations exist too, and
    with fsdp also its gathered weights. Attention scores are computed in full, in float32.

    Raises:
      ValueError: if the batch cannot be split.
    """
    groups, tensor = mesh["data"] * mesh["fsdp"], mesh["tensor"]
    if batch % groups:
        raise ValueError(f"{batch} sequences cannot be split over data * fsdp = {groups}")
    rows, d, wide = batch // groups, config.hidden_size, jnp.dtype(config.dtype).itemsize
    n, layers, vocab = rows * length, config.num_hidden_layers, config.vocab_size
    inner = config.intermediate_size or 4 * d
    heads, q, kv = config.num_attention_heads, config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    gated = hasattr(config, "rms_norm_eps")  # gate, up and their product; or one projection and its activation
    weights = d * (2 * q + 2 * kv) + (3 if gated else 2) * d * inner
    return [
        part("inputs of all blocks", (layers, "layers"), (n, "tokens"), (d, "wide"), (wide, "B")),
        part("attention of one block", (2, ""), (n, "tokens"), (q + 2 * kv, "wide"), (wide, "B"), over=tensor),
        part("its scores and weights", (rows * heads, "heads"), (length, ""), (length, "pairs"), (4 + wide, "B"), over=tensor),
        part("its feed-forward layer", (6 if gated else 4, ""), (n, "tokens"), (inner, "wide"), (wide, "B"), over=tensor),
        part("its weights, gathered", (2, ""), (weights if mesh["fsdp"] > 1 else 0, "weights"), (wide, "B"), over=tensor),
        part("logits and their gradient", (2, ""), (n, "tokens"), (vocab, "words"), (4, "B"), over=tensor),
    ]


def part(name: str, *factors: tuple[int, str], over: int = 1) -> Part:
    """A product, as a number and as text."""
    text = " * ".join(f"{value:,} {unit}".strip() for value, unit in factors)
    return Part(name, text + (f" / {over}" if over > 1 else ""), math.prod(value for value, _ in factors) // over)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
    except ValueError as error:
        sys.exit(f"error: {error}")

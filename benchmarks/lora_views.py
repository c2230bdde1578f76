"""The cost of a LoRA step, and of the alternatives: FLOPs, temporary memory and time of one training step.

    python benchmarks/lora_views.py --output benchmarks/results/lora_views.md

The model is GPT-2 small cut to 4 layers: a causal decoder of d = 768, feed-forward 3072, 12 heads, its vocabulary, 8 x 128 tokens,
float32; LoRA of rank 8 on all kernels of its layers. FLOPs and bytes are XLA's figures for the compiled step (`cost_analysis`,
`memory_analysis`); they are exact. Times are medians of interleaved runs, so all rows have the same conditions. The costs are compared with
twice the forward pass: this is what remains if no gradient of a frozen kernel is computed. With plain remat it is three times, because the
forward pass of the blocks runs again. Remat that keeps the results of matrix products (`jax.checkpoint_policies.dots_saveable`) and
recomputes everything between them is compared with twice the forward pass. In a scanned stack XLA counts the body of the loop once, in the
forward pass and in the step.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

import jpeft

D, F, HEADS, LAYERS, VOCAB, BATCH, LENGTH = 768, 3072, 12, 4, 50257, 8, 128


class Block(nn.Module):
    """A pre-norm decoder block of plain Dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Hidden states [batch, length, D] -> the same, and None for `nn.scan`."""
        h = nn.LayerNorm(name="ln_1")(x)
        q, k, v = (nn.Dense(D, name=name)(h).reshape(*h.shape[:2], HEADS, -1) for name in ("query", "key", "value"))
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(h.shape)
        x = x + nn.Dense(D, name="out_proj")(h)
        h = nn.Dense(F, name="up_proj")(nn.LayerNorm(name="ln_2")(x))
        return x + nn.Dense(D, name="down_proj")(nn.gelu(h)), None


class Decoder(nn.Module):
    """Embedding, blocks, logits; `variant` is plain, scan, remat (of everything, or of all but the products: remat-dots) or both."""

    variant: str

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Token ids [batch, length] -> logits [batch, length, vocabulary]."""
        embed = nn.Embed(VOCAB, D, name="wte")
        x = embed(ids)
        policy = jax.checkpoint_policies.dots_saveable if "dots" in self.variant else None
        block = nn.remat(Block, prevent_cse="scan" not in self.variant, policy=policy) if "remat" in self.variant else Block
        if "scan" in self.variant:
            x, _ = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)(name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = block(name=f"layer_{i}")(x, None)
        return embed.attend(nn.LayerNorm(name="ln_f")(x))


def steps(variant: str, rank: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The compared functions by name, each with its arguments. All return a loss and the gradients of the trained leaves."""
    model = Decoder(variant)
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    target = r"layer.*/kernel"

    def loss(logits: Any, ids: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1).mean()

    def lora(view: Literal["auto", "two-view", "factored"]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        method = jpeft.lora(rank=rank, target=target, view=view, head=None)
        peft = jax.eval_shape(lambda p: jpeft.apply(p, method=method), params)
        forward = jpeft.wrap(model.apply, method)
        return (
            lambda params, adapter, ids: jax.value_and_grad(lambda a: loss(forward({"params": params, "lora": a}, ids), ids))(adapter),
            (params, peft.adapter, ids),
        )

    def merged(params: Any, adapter: Any, ids: jax.Array) -> Any:
        method = jpeft.lora(rank=rank, target=target, head=None)
        run = lambda a: loss(model.apply({"params": jpeft.merge(jpeft.Peft(params, a, method))}, ids), ids)
        return jax.value_and_grad(run)(adapter)

    return {
        "forward pass": (lambda params, ids: loss(model.apply({"params": params}, ids), ids), (params, ids)),
        "full fine-tuning": (
            lambda params, ids: jax.value_and_grad(lambda p: loss(model.apply({"params": p}, ids), ids))(params),
            (params, ids),
        ),
        "LoRA, merged in step": (merged, lora("factored")[1]),
        "LoRA, factored": lora("factored"),
        "LoRA, two-view": lora("two-view"),
        "LoRA, auto": lora("auto"),
    }


def compiled(variant: str, rank: int = 8) -> dict[str, Any]:
    """The compiled functions of `steps`."""
    return {name: jax.jit(fn).lower(*args).compile() for name, (fn, args) in steps(variant, rank).items()}


def main() -> None:
    """Print one table for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed runs of each row; 0 leaves the times out")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--variants", nargs="+", default=["plain", "scan", "remat-dots", "scan+remat-dots", "remat", "scan+remat"])
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    lines: list[str] = []

    def show(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    show(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {BATCH} x {LENGTH} tokens, rank {args.rank}")
    for variant in args.variants:
        rows = compiled(variant, args.rank)
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        if args.steps:
            inputs = {name: _arrays(shapes) for name, (_, shapes) in steps(variant, args.rank).items()}
            for i in range(args.steps + 1):
                for name, fn in rows.items():
                    start = time.perf_counter()
                    jax.block_until_ready(fn(*inputs[name]))
                    if i:
                        seconds[name].append(time.perf_counter() - start)
        limit = 2 * rows["forward pass"].cost_analysis()["flops"]
        show(f"\n{variant}\n{'':22} {'GFLOP':>8} {'/ 2 forward':>12} {'temp MiB':>9} {'out MiB':>8} {'s':>7}")
        for name, fn in rows.items():
            flops, memory = fn.cost_analysis()["flops"], fn.memory_analysis()
            took = f"{statistics.median(seconds[name]):7.3f}" if args.steps else "      -"
            show(
                f"{name:22} {flops / 1e9:8.1f} {flops / limit:12.3f} {memory.temp_size_in_bytes / 2**20:9.0f} "
                f"{memory.output_size_in_bytes / 2**20:8.0f} {took}"
            )

    if args.output:
        command = f"python benchmarks/lora_views.py --steps {args.steps} --rank {args.rank} --variants {' '.join(args.variants)}"
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(f"# What a LoRA step costs\n\nMade by `{command}`.\n\n```\n" + "\n".join(lines) + "\n```\n")


def _arrays(shapes: Any) -> Any:
    """Random arrays of these shapes; token ids stay below the vocabulary."""
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    make = lambda key, s: jax.random.randint(key, s.shape, 0, VOCAB) if s.dtype == jnp.int32 else 0.02 * jax.random.normal(key, s.shape)
    return jax.tree.unflatten(treedef, [make(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])


if __name__ == "__main__":
    main()

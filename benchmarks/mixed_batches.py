"""What a mixed batch costs: 32 rows over 16 adapters, beside merged weights and one pass for each adapter.

    python benchmarks/mixed_batches.py --output benchmarks/results/mixed_batches.md

The model is GPT-2 cut to 4 layers of d = 256 with a vocabulary of 4096, float32; LoRA of rank 8 on all kernels of its layers. The rows:

* merged: one adapter written into the weights, all 32 rows with it. No server of many adapters can do this; it is the limit.
* one adapter: all 32 rows with one adapter of LoRA in its factored form.
* 16 passes: the rows of each adapter by themselves, 2 at a time, by one compiled program that is called 16 times.
* mixed: all 32 rows with an index, in one call.

"prompt" is the forward pass over 32 x 64 tokens; "gradient" the same with the gradients of the adapters; "generate" continues prompts of 16
tokens by 16 tokens with a cache. FLOPs are XLA's figures for the compiled program (`cost_analysis`), those of 16 passes times 16; in a loop
XLA counts the body once, so "generate" has none. Times are medians of interleaved runs, so all rows have the same conditions.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft.models import GPT2Config, GPT2LMHeadModel, generate

ROWS, ADAPTERS, LENGTH, PROMPT, NEW, RANK = 32, 16, 64, 16, 16, 8
TARGET = r".*h/.*kernel"
Runs = dict[str, tuple[Callable[[], Any], float]]  # what is timed, and its FLOPs


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed runs of each row")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    config = GPT2Config(
        vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=128, scan=False
    )
    model = GPT2LMHeadModel(config)
    ids = jax.random.randint(jax.random.key(0), (ROWS, LENGTH), 0, config.vocab_size)
    params = jax.jit(model.init)(jax.random.key(1), ids)["params"]
    lines = [f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {ROWS} rows over {ADAPTERS} adapters of rank {RANK}"]
    print(lines[0], flush=True)
    for name, runs in kinds(model, params, ids).items():
        seconds: dict[str, list[float]] = {row: [] for row in runs}
        for i in range(args.steps + 1):
            for row, (run, _) in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run())
                if i:
                    seconds[row].append(time.perf_counter() - start)
        one = runs["one adapter"][1]
        table = [f"\n{name:14} {'GFLOP':>8} {'/ one adapter':>14} {'ms':>8}"]
        for row, (_, flops) in runs.items():
            counted = f"{flops / 1e9:8.2f} {flops / one:14.3f}" if flops else f"{'-':>8} {'-':>14}"
            table.append(f"{row:14} {counted} {1e3 * statistics.median(seconds[row]):8.1f}")
        print("\n".join(table), flush=True)
        lines += table
    if args.output:
        command = f"python benchmarks/mixed_batches.py --steps {args.steps}"
        note = (__doc__ or "").split("\n\n", 2)[2].rstrip()
        args.output.write_text(f"# What a mixed batch costs\n\nMade by `{command}`.\n\n{note}\n\n```\n" + "\n".join(lines) + "\n```\n")


def kinds(model: Any, params: Any, ids: jax.Array) -> dict[str, Runs]:
    """What is compared, by kind of call."""
    method = jpeft.lora(rank=RANK, target=TARGET, view="factored", head=None)
    pefts = [_noised(jpeft.apply(params, method), seed) for seed in range(ADAPTERS)]
    index = np.arange(ROWS) % ADAPTERS
    pool = jpeft.assign(jpeft.mix(params, pefts), index)
    merged = jpeft.merge(pefts[0])
    parts = [ids[index == i] for i in range(ADAPTERS)]
    forward, forward_of_pool = jpeft.wrap(model.apply, method), jpeft.wrap(model.apply, pool.method)
    plain = lambda variables, ids: model.apply(variables, ids)

    def gradient(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """With respect to the adapter, the collection of that name."""
        loss = lambda adapter, state, ids: (call({**state, name: adapter}, ids) ** 2).mean()
        return lambda state, ids: jax.grad(loss)(state[name], state, ids)

    def new_tokens(call: Callable[..., Any], variables: Any, ids: jax.Array) -> jax.Array:
        return generate(call, variables, ids[:, :PROMPT], max_new_tokens=NEW).tokens

    prompt = {
        "merged": _timed(plain, {"params": merged}, [ids]),
        "one adapter": _timed(forward, pefts[0].variables, [ids]),
        "16 passes": _timed(forward, [peft.variables for peft in pefts], parts),
        "mixed": _timed(forward_of_pool, pool.variables, [ids]),
    }
    grad_of_one, grad_of_pool = gradient(forward, "lora"), gradient(forward_of_pool, "mixed")
    training = {
        "one adapter": _timed(grad_of_one, pefts[0].variables, [ids]),
        "16 passes": _timed(grad_of_one, [peft.variables for peft in pefts], parts),
        "mixed": _timed(grad_of_pool, pool.variables, [ids]),
    }
    text: Runs = {
        "merged": (lambda: new_tokens(model.apply, {"params": merged}, ids), 0),
        "one adapter": (lambda: new_tokens(forward, pefts[0].variables, ids), 0),
        "16 passes": (lambda: [new_tokens(forward, peft.variables, part) for peft, part in zip(pefts, parts, strict=True)], 0),
        "mixed": (lambda: new_tokens(forward_of_pool, pool.variables, ids), 0),
    }
    return {"prompt": prompt, "gradient": training, "generate": text}


def _timed(fn: Callable[..., Any], variables: Any, batches: list[jax.Array]) -> tuple[Callable[[], Any], float]:
    """A function to be timed, one program that is called for each batch, and its FLOPs in all."""
    each = variables if isinstance(variables, list) else [variables]
    program = jax.jit(fn).lower(each[0], batches[0]).compile()
    run = lambda: [program(own, batch) for own, batch in zip(each, batches, strict=True)]
    cost: Any = program.cost_analysis()
    return run, cost["flops"] * len(batches)


def _noised(peft: jpeft.Peft, seed: int) -> jpeft.Peft:
    """An adapter that changes something."""
    leaves, treedef = jax.tree.flatten(peft.adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [leaf + 0.01 * jax.random.normal(key, jnp.shape(leaf)) for key, leaf in zip(keys, leaves, strict=True)]
    return peft.replace(adapter=jax.tree.unflatten(treedef, noisy))


if __name__ == "__main__":
    main()

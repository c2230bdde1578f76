"""The gain of a sweep by `vmap`: N adapters trained in one step, compared with N steps of one adapter each.

    python benchmarks/sweep.py --output benchmarks/results/sweep.md

The model is an encoder of MiniLM's shape (width 384, feed-forward 1536, 12 heads, 6 layers), float32, random weights. The method is LoRA of
rank 8 on every query and value, factored. Each adapter has a learning rate, a random initialisation and an AdamW state. A step is loss,
gradient, clipping by global norm, AdamW and new adapter, with adapter and optimizer state donated. "together" is this step under `vmap`.
"in turn" is the same step compiled once for one adapter and called N times, with N states. FLOPs and temporary bytes are XLA's figures for
the compiled programs; in turn they are N times the FLOPs of one step, and the memory of one step. Times are medians of pairs measured in
turn; the gain is the median over pairs.

Both variants compute the same products with frozen kernels, so the sweep cannot save FLOPs. It can improve utilisation: with one small
batch, an accelerator is partly idle, reads all weights for few tokens, and launches each operation for few tokens. N adapters share these
costs. A CPU core is busy with one batch already, so there the gain is small, and there is none if N sets of activations do not fit into the
caches.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft.models import BertConfig, BertForSequenceClassification


class Sweep:
    """The two compiled steps for N adapters, and their first inputs.

    Args:
      count: N.
      args: The flags.
    """

    def __init__(self, count: int, args: argparse.Namespace):
        self.count = count
        config = BertConfig(
            vocab_size=30522, hidden_size=384, intermediate_size=1536, num_attention_heads=12, num_hidden_layers=args.layers
        )
        model = BertForSequenceClassification(config, num_labels=4)
        rng = np.random.default_rng(0)
        ids = jnp.asarray(rng.integers(0, config.vocab_size, (args.batch, args.length)))
        labels = jnp.asarray(rng.integers(0, 4, args.batch))
        params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
        self.shared = params, ids, labels

        method = jpeft.lora(rank=8, view="factored")
        forward = jpeft.wrap(model.apply, method)
        make = lambda seed: jpeft.apply(params, method=method, key=jax.random.key(seed)).adapter
        optimizer = lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
        tx = optax.inject_hyperparams(optimizer)(rate=0.0)

        def state(seed: Any, rate: Any) -> Any:
            adapter = make(seed)
            started: Any = tx.init(adapter)
            return adapter, started._replace(hyperparams=started.hyperparams | {"rate": rate})

        def step(state: Any, params: Any, ids: jax.Array, labels: jax.Array) -> Any:
            adapter, opt_state = state

            def loss_fn(adapter: Any) -> jax.Array:
                logits = forward(jpeft.Peft(params, adapter, method).variables, ids)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            loss, grads = jax.value_and_grad(loss_fn)(adapter)
            updates, opt_state = tx.update(grads, opt_state, adapter)
            return (optax.apply_updates(adapter, updates), opt_state), loss

        seeds, rates = jnp.arange(count), jnp.geomspace(1e-4, 1e-2, count)
        self.together = jax.jit(jax.vmap(state))(seeds, rates)
        self.in_turn = [jax.tree.map(lambda leaf, i=i: leaf[i].copy(), self.together) for i in range(count)]
        every = jax.vmap(step, in_axes=(0, None, None, None))
        compiled = lambda fn, state: jax.jit(fn, donate_argnums=0).lower(state, *self.shared).compile()
        self.step_together = compiled(every, self.together)
        self.step_one = compiled(step, self.in_turn[0])

    def run_together(self) -> float:
        """Seconds of one step of all adapters at once."""
        begun = time.perf_counter()
        self.together, self.losses = jax.block_until_ready(self.step_together(self.together, *self.shared))
        return time.perf_counter() - begun

    def run_in_turn(self) -> float:
        """Seconds of one step of each adapter, one after another."""
        begun = time.perf_counter()
        done = jax.block_until_ready([self.step_one(state, *self.shared) for state in self.in_turn])
        self.in_turn, self.losses_in_turn = [state for state, _ in done], jnp.stack([loss for _, loss in done])
        return time.perf_counter() - begun


def measure(sweep: Sweep, steps: int) -> tuple[float, float, float]:
    """Median seconds of a step together and in turn, and the median of their ratio; the first pair is left out."""
    pairs = []
    for i in range(steps + 1):
        # Alternate which of the two runs first.
        order = (sweep.run_together, sweep.run_in_turn) if i % 2 else (sweep.run_in_turn, sweep.run_together)
        seconds = {run.__name__: run() for run in order}
        pairs.append((seconds["run_together"], seconds["run_in_turn"]))
    pairs = pairs[1:]
    np.testing.assert_allclose(sweep.losses, sweep.losses_in_turn, rtol=1e-3)
    together, in_turn = (statistics.median(times) for times in zip(*pairs, strict=True))
    return together, in_turn, statistics.median(b / a for a, b in pairs)


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of adapters")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=7, help="timed pairs of each row")
    parser.add_argument("--note", default="", help="a sentence on the machine, for the file")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    lines: list[str] = []

    def show(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    show(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.layers} layers, batch of {args.batch} x {args.length} tokens")
    show(f"\n{'':8} {'adapter steps a second':>26} {'':7} {'GFLOP':>19} {'temporary MiB':>19}")
    show(f"{'adapters':8} {'together':>12} {'in turn':>13} {'gain':>7} {'together':>10} {'in turn':>8} {'together':>10} {'in turn':>8}")
    for count in args.counts:
        sweep = Sweep(count, args)
        programs: tuple[Any, ...] = sweep.step_together, sweep.step_one
        flops = [float(program.cost_analysis()["flops"]) / 1e9 for program in programs]
        memory = [program.memory_analysis().temp_size_in_bytes / 2**20 for program in programs]
        together, in_turn, gain = measure(sweep, args.steps)
        show(
            f"{count:8} {count / together:12.2f} {count / in_turn:13.2f} {gain:6.2f}x {flops[0]:10.2f} {count * flops[1]:8.2f}"
            f" {memory[0]:10.1f} {memory[1]:8.1f}"
        )
    if args.output:
        flags = f"--batch {args.batch} --length {args.length} --layers {args.layers} --steps {args.steps}"
        note = f" {args.note}" if args.note else ""
        text = (
            f"# What a sweep by vmap gains\n\nMade by `python benchmarks/sweep.py {flags}`.{note}\n\n```\n" + "\n".join(lines) + "\n```\n"
        )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)


if __name__ == "__main__":
    main()

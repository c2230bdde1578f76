"""What FAR's reconfiguration saves: FLOPs, memory and time of a training step before it and after it.

    python benchmarks/far.py --output benchmarks/results/far.md

The model is an encoder of d = 768, feed-forward 3072, 12 heads, 4 layers, float32. A step is what a trainer does: loss, gradient,
clipping by global norm, AdamW, new adapter, with adapter and optimizer state donated. "primed" is FAR's first stage, which trains the
MLPs whole, "reconfigured" its second. FLOPs and bytes are XLA's own figures for the compiled step: exact and free of noise. Times are
medians of interleaved runs, and the ratio is the median over pairs.

The yardstick for FLOPs is what the gradients of the frozen neurons' weights cost, (1 - retention) * 2 * tokens * 2 d f in each layer;
for temporary bytes it is the buffers of these gradients, (1 - retention) * 2 d f floats. Temporary memory peaks either when the backward
pass begins, where activations are all there and no gradient is, or when it ends, where it is the other way round. FAR makes gradients
smaller, not activations, so what it saves at the peak depends on which is larger: the table has long and short batches, with and
without remat.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jpeft

D, F, HEADS, LAYERS, CLASSES = 768, 3072, 12, 4, 4


class Block(nn.Module):
    """A pre-norm encoder block of plain Dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Hidden states [batch, length, D] -> the same."""
        h = nn.LayerNorm(name="ln_1")(x)
        q, k, v = (nn.Dense(D, name=name)(h).reshape(*h.shape[:2], HEADS, -1) for name in ("query", "key", "value"))
        h = jax.nn.dot_product_attention(q, k, v).reshape(h.shape)
        x = x + nn.Dense(D, name="out_proj")(h)
        h = nn.Dense(F, name="up_proj")(nn.LayerNorm(name="ln_2")(x))
        return x + nn.Dense(D, name="down_proj")(nn.gelu(h))


class Encoder(nn.Module):
    """A projection of given embeddings, blocks, and a head on their mean."""

    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Embeddings [batch, length, D] -> logits [batch, classes]."""
        block = nn.remat(Block) if self.remat else Block
        x = nn.Dense(D, name="embed")(x)
        for i in range(LAYERS):
            x = block(name=f"layer_{i}")(x)
        return nn.Dense(CLASSES, name="classifier")(x.mean(1))


class Case(NamedTuple):
    """A row's setting."""

    batch: int
    length: int
    remat: bool

    def __str__(self) -> str:
        """As in the table."""
        return f"{self.batch} x {self.length}{', remat' if self.remat else ''}"


CASES = (Case(8, 128, False), Case(8, 128, True), Case(1, 64, False), Case(1, 64, True))


def compiled(case: Case, retention: float) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The compiled step of each stage, and its arguments as shapes."""
    model = Encoder(case.remat)
    x = jax.ShapeDtypeStruct((case.batch, case.length, D), jnp.float32)
    y = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    # With the projection trained in both stages, all blocks pass gradients on: none is a special case.
    primed = jax.eval_shape(lambda p: jpeft.apply(p, method="far", retention=retention, also="embed/.*"), params)
    out = {}
    for name, peft in (("primed", primed), ("reconfigured", jax.eval_shape(jpeft.advance, primed))):
        tx = jpeft.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), peft)
        step = jax.jit(_step(jpeft.wrap(model.apply, peft.method), tx, peft), donate_argnums=(0, 1))
        arguments = (peft.adapter, jax.eval_shape(tx.init, peft.adapter), params, x, y)
        out[name] = step.lower(*arguments).compile(), arguments
    return out


def _step(forward: Any, tx: optax.GradientTransformation, peft: jpeft.Peft) -> Any:
    def step(adapter: Any, opt_state: Any, params: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss_fn(adapter: Any) -> jax.Array:
            logits = forward(peft.replace(params=params, adapter=adapter).variables, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    return step


def bounds(case: Case, retention: float) -> tuple[float, float]:
    """FLOPs and bytes of the gradients of the frozen neurons' weights, in all layers."""
    weights = (1 - retention) * LAYERS * 2 * D * F
    return 2 * case.batch * case.length * weights, 4 * weights


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retention", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=7, help="timed runs of each row; 0 leaves the times out")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    lines: list[str] = []

    def show(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    show(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {LAYERS} layers of {D} and {F}, retention {args.retention:g}")
    show(f"\n{'':16} {'':13} {'GFLOP':>8} {'temp MiB':>9} {'state MiB':>10} {'s':>7}")
    for case in CASES:
        rows = compiled(case, args.retention)
        seconds = _times(rows, args.steps)
        found = {}
        for name, (fn, arguments) in rows.items():
            flops, temp = fn.cost_analysis()["flops"], fn.memory_analysis().temp_size_in_bytes
            found[name] = flops, temp
            took = f"{statistics.median(seconds[name]):7.3f}" if args.steps else "      -"
            state = jpeft.tree.nbytes(arguments[:2])
            show(f"{case!s:16} {name:13} {flops / 1e9:8.2f} {temp / 2**20:9.1f} {state / 2**20:10.1f} {took}")
        saved = [a - b for a, b in zip(found["primed"], found["reconfigured"], strict=True)]
        least = bounds(case, args.retention)
        ratio = f"{statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)):6.3f}x" if args.steps else "      -"
        show(f"{'':16} {'saved':13} {saved[0] / 1e9:8.2f} {saved[1] / 2**20:9.1f} {'':10} {ratio}")
        show(f"{'':16} {'frozen dW':13} {least[0] / 1e9:8.2f} {least[1] / 2**20:9.1f}")
    if args.output:
        command = f"python benchmarks/far.py --retention {args.retention:g} --steps {args.steps}"
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(f"# What FAR's reconfiguration saves\n\nMade by `{command}`.\n\n```\n" + "\n".join(lines) + "\n```\n")


def _times(rows: dict[str, tuple[Any, tuple[Any, ...]]], steps: int) -> dict[str, list[float]]:
    """Seconds of every run of each row, in turn; the first is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    states = {name: _arrays(arguments) for name, (_, arguments) in rows.items()} if steps else {}
    for i in range(steps + 1 if steps else 0):
        for name, (fn, _) in rows.items():
            start = time.perf_counter()
            adapter, opt_state, _ = jax.block_until_ready(fn(*states[name]))
            states[name] = (adapter, opt_state, *states[name][2:])
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _arrays(shapes: Any) -> Any:
    """Small random arrays of these shapes; integers are zero. The learners are the first neurons, wherever their places are asked for."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    out = []
    for i, (path, shape) in enumerate(paths):
        if shape.dtype == jnp.int32:
            out.append(jnp.zeros(shape.shape, shape.dtype))
        elif jax.tree_util.keystr(path).endswith("['indices']"):
            out.append(jnp.broadcast_to(jnp.arange(shape.shape[-1], dtype=shape.dtype), shape.shape))
        else:
            # Second moments must not be negative.
            out.append(0.02 * jnp.abs(jax.random.normal(jax.random.key(i), shape.shape)))
    return jax.tree_util.tree_unflatten(treedef, out)


if __name__ == "__main__":
    main()

"""What FAR's reconfiguration saves: FLOPs, memory and time of a training step before and after the reconfiguration.

    python benchmarks/far.py --output benchmarks/results/far.md

The model is an encoder of MiniLM's size, d = 384, feed-forward 1536, 12 heads, 6 layers, float32. A step is that of a trainer: loss,
gradient, clipping by global norm, AdamW, new adapter, with adapter and optimizer state donated. "primed" is FAR's first stage, which
trains whole MLPs, "reconfigured" is its second stage. FLOPs and bytes are XLA's figures for the compiled step; they are exact. Times are
medians of interleaved runs, and the ratio is the median over pairs. FLOPs are left out if the step has a loop, because XLA counts the body
of a loop once.

"temp" is memory that exists only during the step: activations, gradients, scratch. "peak" is all memory that the step needs: arguments,
results and temp, less the results that reuse the memory of donated arguments. Base parameters that a step does not read are not arguments
of the step. So "primed" does not include the pretrained MLPs, of which it trains copies, although the reconfiguration needs them.

The FLOPs are compared with the cost of the gradients of the frozen neurons' weights, (1 - retention) * 2 * tokens * 2 d f in each layer,
and the bytes with the buffers of these gradients, (1 - retention) * 2 d f floats. FAR makes gradients, moments and trained copies smaller,
but not activations: all neurons of a layer share its input, so the learners need the same inputs as all neurons. How much FAR saves of temp
depends on whether gradients exist at the same time as activations:

* Layer by layer, they do not. Temporary memory peaks at the start of the backward pass (long batches: activations, and the gradient of one
  kernel) or at its end (short batches: gradients). At the start, the reconfigured step has a copy of the kernel with its learners instead
  of this gradient, so temp is the same to within half a kernel.
* Scanned layers have one buffer for the gradients of all layers, which exists throughout the backward pass.
* Micro-batches add their gradients, and the sum exists throughout the step; the saving is smaller by the same fraction of a kernel.

The saving of the moments and the trained copies is added in the peak; it does not depend on these cases.
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

CLASSES = 4


class Sizes(NamedTuple):
    """Sizes of the encoder; the defaults are those of MiniLM-L6."""

    d: int = 384
    f: int = 1536
    heads: int = 12
    layers: int = 6


MINILM = Sizes()


class Block(nn.Module):
    """A pre-norm encoder block of plain Dense layers; returns a pair, as `nn.scan` requires."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """Hidden states [batch, length, d] -> the same."""
        d, f, heads = self.sizes[:3]
        h = nn.LayerNorm(name="ln_1")(x)
        q, k, v = (nn.Dense(d, name=name)(h).reshape(*h.shape[:2], heads, -1) for name in ("query", "key", "value"))
        h = jax.nn.dot_product_attention(q, k, v).reshape(h.shape)
        x = x + nn.Dense(d, name="out_proj")(h)
        h = nn.Dense(f, name="up_proj")(nn.LayerNorm(name="ln_2")(x))
        return x + nn.Dense(d, name="down_proj")(nn.gelu(h)), None


class Encoder(nn.Module):
    """A projection of embeddings, blocks, and a head on the mean over positions."""

    sizes: Sizes
    scan: bool
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Embeddings [batch, length, d] -> logits [batch, classes]."""
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        x = nn.Dense(self.sizes.d, name="embed")(x)
        if self.scan:
            stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.sizes.layers)
            x, _ = stack(self.sizes, name="layers")(x, None)
        else:
            for i in range(self.sizes.layers):
                x, _ = block(self.sizes, name=f"layer_{i}")(x)
        return nn.Dense(CLASSES, name="classifier")(x.mean(1))


class Case(NamedTuple):
    """The setting of a row: the shape of a batch, whether layers are scanned, and the number of micro-batches."""

    batch: int
    length: int
    scan: bool = False
    remat: bool = False
    parts: int = 1

    def __str__(self) -> str:
        """The name in the table."""
        how = [*["scan"] * self.scan, *["remat"] * self.remat, *[f"{self.parts} parts"] * (self.parts > 1)]
        return ", ".join([f"{self.batch} x {self.length}", *how])

    @property
    def loops(self) -> bool:
        """Whether the step has a loop."""
        return self.scan or self.parts > 1


CASES = (
    Case(8, 64),
    Case(8, 64, scan=True),
    Case(8, 64, scan=True, remat=True),
    Case(8, 64, parts=4),
    Case(1, 32),
)


class Spent(NamedTuple):
    """The cost of a compiled step, in FLOPs (the body of a loop counts once) and bytes."""

    flops: float
    temp: int
    peak: int


def spent(fn: Any) -> Spent:
    """XLA's figures for a compiled step."""
    memory = fn.memory_analysis()
    temp = memory.temp_size_in_bytes
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Spent(fn.cost_analysis()["flops"], temp, held + temp)


def compiled(case: Case, retention: float, sizes: Sizes = MINILM) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The compiled step of each stage, and its arguments as shapes."""
    model = Encoder(sizes, case.scan, case.remat)
    x = jax.ShapeDtypeStruct((case.batch, case.length, sizes.d), jnp.float32)
    y = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    # The projection is trained in both stages, so that all blocks must pass gradients on and none is a special case.
    primed = jax.eval_shape(lambda p: jpeft.apply(p, method="far", retention=retention, also="embed/.*"), params)
    out = {}
    for name, peft in (("primed", primed), ("reconfigured", jax.eval_shape(jpeft.advance, primed))):
        tx = jpeft.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), peft)
        step = jax.jit(_step(jpeft.wrap(model.apply, peft.method), tx, peft, case.parts), donate_argnums=(0, 1))
        arguments = (peft.adapter, jax.eval_shape(tx.init, peft.adapter), params, x, y)
        out[name] = step.lower(*arguments).compile(), arguments
    return out


def _step(forward: Any, tx: optax.GradientTransformation, peft: jpeft.Peft, parts: int) -> Any:
    def loss_fn(adapter: Any, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = forward(peft.replace(params=params, adapter=adapter).variables, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean() / parts

    def step(adapter: Any, opt_state: Any, params: Any, x: jax.Array, y: jax.Array) -> Any:
        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(adapter, params, *part)), None

        if parts == 1:
            loss, grads = jax.value_and_grad(loss_fn)(adapter, params, x, y)
        else:
            micro = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), (x, y))
            (loss, grads), _ = jax.lax.scan(add, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, adapter)), micro)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    return step


def bounds(case: Case, retention: float, sizes: Sizes = MINILM) -> tuple[float, float]:
    """FLOPs and bytes of the gradients of the frozen neurons' weights, in all layers."""
    weights = (1 - retention) * sizes.layers * 2 * sizes.d * sizes.f
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

    mib = 2.0**20
    about = f"{MINILM.layers} layers of {MINILM.d} and {MINILM.f}, retention {args.retention:g}"
    show(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {about}")
    show(f"\n{'':20} {'':13} {'GFLOP':>8} {'temp MiB':>9} {'peak MiB':>9} {'state MiB':>10} {'s':>7}")
    for case in CASES:
        rows = compiled(case, args.retention)
        seconds = _times(rows, args.steps)
        found = {name: spent(fn) for name, (fn, _) in rows.items()}
        gflop = lambda flops, case=case: f"{'-':>8}" if case.loops else f"{flops / 1e9:8.2f}"
        for name, (_, arguments) in rows.items():
            took = f"{statistics.median(seconds[name]):7.3f}" if args.steps else "      -"
            cost, state = found[name], jpeft.tree.nbytes(arguments[:2]) / mib
            show(f"{case!s:20} {name:13} {gflop(cost.flops)} {cost.temp / mib:9.1f} {cost.peak / mib:9.1f} {state:10.1f} {took}")
        flops, temp, peak = (a - b for a, b in zip(found["primed"], found["reconfigured"], strict=True))
        ratio = f"{statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)):6.3f}x" if args.steps else "      -"
        show(f"{'':20} {'saved':13} {gflop(flops)} {temp / mib:9.1f} {peak / mib:9.1f} {'':10} {ratio}")
        flops, size = bounds(case, args.retention)
        show(f"{'':20} {'frozen dW':13} {gflop(flops)} {size / mib:9.1f} {size / mib:9.1f}")
    if args.output:
        command = f"python benchmarks/far.py --retention {args.retention:g} --steps {args.steps}"
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(f"# What FAR's reconfiguration saves\n\nMade by `{command}`.\n\n```\n" + "\n".join(lines) + "\n```\n")


def _times(rows: dict[str, tuple[Any, tuple[Any, ...]]], steps: int) -> dict[str, list[float]]:
    """Seconds of every run of each row. The rows take turns, and the first run is left out."""
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
    """Small random arrays of these shapes; integers are zero. The learners are the first neurons of each layer."""
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

"""Where the time of a LoRA step on one GPU goes: the step in each view, and what its parts take alone.

    python benchmarks/gpu_parts.py            # less than two minutes on one H100
    python benchmarks/gpu_parts.py --toy      # at toy size, on a CPU

Every line of JSON names a part and its milliseconds, the median; where they are known, the share of the device's rate that its products
reach, the rate being that of one large product.
"""

import argparse
import concurrent.futures
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import optax
from steps.cases import ALPHA, JPEFT, LLAMA, RANK, Case, Shape, Size, case
from steps.in_jax import PROJECTIONS, Step, llama, next_token_loss, rate_of, reason, tokens
from steps.machine import machine
from steps.measure import timed

import jpeft
from jpeft.models.common.attention import AttentionCore
from jpeft.models.common.visible import Visible


def main() -> int:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy shapes, on whatever device there is")
    size: Size = "toy" if parser.parse_args().toy else "gpu"
    shape, rows = LLAMA[size], case(JPEFT, "parts", "llama", *((2, 32) if size == "toy" else (8, 1024)))
    say(machine=machine())
    rate = rate_of(size, shape.dtype)
    say(part="one large product", TFLOP_s=round(rate / 1e12, 1))
    model, params = llama(shape, remat="dots")
    ids = tokens(shape, rows)
    with concurrent.futures.ThreadPoolExecutor(1 if size == "toy" else 8) as pool:
        steps = [(view, pool.submit(step(model, params, ids, view).compile)) for view in ("auto", "factored", "two-view", "joined")]
        compile_ = lambda traced: traced.lower().compile()
        alone = [
            (what, args, flops, pool.submit(compile_, jax.jit(fn).trace(*args)))
            for what, fn, args, flops in parts(model, params, ids, shape, rows)
        ]
        concurrent.futures.wait([future for *_, future in (*steps, *alone)])
    for view, future in steps:
        try:
            done = future.result()
            memory: Any = done.compiled.memory_analysis()
            say(part=f"step, view={view}", ms=milliseconds(done, size), temp_GiB=round(memory.temp_size_in_bytes / 2**30, 2))
        except Exception as error:
            say(part=f"step, view={view}", failed=reason(error))
    for what, args, flops, future in alone:
        try:
            run = future.result()
            # Ten calls for each wait, which takes longer than some parts.
            took = round(milliseconds(lambda run=run, args=args: jax.block_until_ready([run(*args) for _ in range(10)]), size) / 10, 4)
            say(part=what, ms=took, **({} if flops is None else {"rate_share": round(1e3 * flops / rate / took, 3)}))
        except Exception as error:
            say(part=what, failed=reason(error))
    return 0


def step(model: Any, params: Any, ids: jax.Array, view: Any) -> Step:
    """Return the traced step of a view."""
    peft = jpeft.apply(params, method="lora", rank=RANK, alpha=ALPHA, target=PROJECTIONS, view=view)
    forward = jpeft.wrap(model.apply, peft.method)
    apply = lambda trained, frozen: lambda *given, **more: forward(peft.replace(adapter=trained, params=frozen).variables, *given, **more)
    loss = lambda trained, frozen: next_token_loss(apply(trained, frozen), ids)
    made = Step(loss, jpeft.optimizer(optax.adamw(1e-4), peft), peft.adapter, params)
    made.trace()
    return made


def parts(
    model: Any, params: Any, ids: jax.Array, shape: Shape, rows: Case
) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...], float | None]]:
    """Yield name, function, arguments and operations of each part."""
    peft = jpeft.apply(params, method="lora", rank=RANK, alpha=ALPHA, target=PROJECTIONS)
    forward = jpeft.wrap(model.apply, peft.method)
    wrapped = lambda params, adapter: next_token_loss(
        lambda *given, **more: forward(peft.replace(params=params, adapter=adapter).variables, *given, **more), ids
    )
    base = lambda params: next_token_loss(lambda *given, **more: model.apply({"params": params}, *given, **more), ids)
    yield "forward and loss, no adapter", base, (params,), None
    yield "forward and loss, adapter", wrapped, (params, peft.adapter), None
    yield "gradient", jax.grad(wrapped, 1), (params, peft.adapter), None
    count, dtype = rows.batch * rows.length, jnp.dtype(shape.dtype)
    draw = lambda *sizes: jax.random.normal(jax.random.key(0), sizes, dtype)
    query = draw(rows.batch, rows.length, shape.heads, shape.head_size)
    key = draw(rows.batch, rows.length, shape.kv_heads, shape.head_size)
    core = AttentionCore(name="core")
    attention = lambda query, key, value: core.apply({}, query, key, value, Visible(causal=True))
    products = 2.0 * rows.batch * rows.length**2 * shape.width  # causal, so half of 4
    scalar = lambda fn: lambda *args: (fn(*args) ** 2).sum(dtype=jnp.float32)
    yield "attention of a layer", attention, (query, key, key), products
    yield "attention of a layer, with gradients", jax.grad(scalar(attention), (0, 1, 2)), (query, key, key), 3.5 * products
    hidden, inner = draw(count, shape.width), draw(count, shape.inner)
    up, down, square = draw(shape.width, shape.inner), draw(shape.inner, shape.width), draw(shape.width, shape.width)
    narrow = draw(shape.width, shape.kv_heads * shape.head_size)
    for name, x, w in (("up", hidden, up), ("down", inner, down), ("query", hidden, square), ("key", hidden, narrow)):
        yield f"product of a layer, {name}", jnp.matmul, (x, w), 2.0 * count * w.size
        yield f"product of a layer, {name}, backwards", lambda y, w: y @ w.T, (x @ w, w), 2.0 * count * w.size
    a, b = draw(shape.width, RANK), draw(RANK, shape.inner)
    yield "low rank, up: x a b", lambda x, a, b: (x @ a) @ b, (hidden, a, b), None
    yield "low rank, up: W + a b", lambda w, a, b: w + a @ b, (up, a, b), None
    yield "low rank, up: gradients", lambda x, y, a, b: (x.T @ (y @ b.T), (x @ a).T @ y), (hidden, inner, a, b), None
    yield "copy of an activation", lambda x: x + 1, (inner,), None


def milliseconds(call: Callable[[], Any], size: Size) -> float:
    """Return the median of a call that waits."""
    return round(1e3 * timed(call, size), 3)


def say(**line: Any) -> None:
    """Print a line at once."""
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())

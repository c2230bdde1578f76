"""Attention by the kernel of this device against attention in float32 with a dense mask: outputs and gradients, in two minutes or less.

    python benchmarks/check_attention.py          # on a GPU
    python benchmarks/check_attention.py --xla    # small, anywhere: the kernel's arguments, computed by XLA

Every line names a structure, who computed it, and the relative errors ‖x - y‖ / ‖y‖ of the context and of the gradients of queries, keys
and values, which bfloat16 keeps under 2e-2. The status is 1 if one is not, or if a context is no number.
"""

import argparse
import concurrent.futures
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from jpeft.models.common import attention_kernels
from jpeft.models.common.attention import AttentionCore, attend
from jpeft.models.common.visible import Visible

BAR = 2e-2


def structures(batch: int, length: int) -> dict[str, Visible]:
    """Return what there is to compute, by name."""
    random = np.random.default_rng(0)
    right = jnp.arange(length)[None] < jnp.array([length, *random.integers(length // 3, length, batch - 1)])[:, None]
    holes = jnp.array(random.random((batch, length)) < 0.7)
    segments = jnp.array(np.cumsum(random.random((batch, length)) < 4 / length, axis=1), jnp.int32)
    causal, window = Visible(causal=True), Visible(causal=True, window=length // 5)
    return {
        "full": Visible(),
        "full, padding": Visible(right),
        "full, prefix, padding": Visible(right).with_prefix(7),
        "causal": causal,
        "causal, padding on the right": causal.replace(keys=right),
        "causal, padding on the left": causal.replace(keys=right[:, ::-1]),
        "causal, prefix": causal.with_prefix(7),
        "causal, prefix, padding on the left": causal.replace(keys=right[:, ::-1]).with_prefix(7),
        "window": window,
        "window, holes": window.replace(keys=holes),
        "window in this layer": window.replace(uses_window=jnp.array(True)),
        "no window in this layer": window.replace(uses_window=jnp.array(False)),
        "segments": causal.replace(query_segments=segments, key_segments=segments),
    }


def compare(name: str, visible: Visible, shape: tuple[int, int, int, int, int], *, many: bool, by_xla: bool) -> dict[str, Any]:
    """Return the line of a structure."""
    batch, length, heads, groups, size = shape
    keys = length + visible.prefix
    random = np.random.default_rng(1)
    lead = (3,) if many else ()
    draw = lambda *shape: jnp.array(random.normal(size=(*lead, *shape)), jnp.bfloat16)
    inputs = draw(batch, length, heads, size), draw(batch, keys, groups, size), draw(batch, keys, groups, size)
    tokens = jnp.ones((batch, length), bool) if visible.keys is None else visible.keys
    weight = draw(batch, length, heads, size) * tokens[..., None, None]

    def kernel(query: Any, key: Any, value: Any) -> Any:
        if by_xla:
            return attention_kernels._cudnn(query, key, value, visible.replace(uses_window=None), implementation="xla")
        return AttentionCore(name="core").apply({}, query, key, value, visible)

    def exact(query: Any, key: Any, value: Any) -> Any:
        return attend(query, key, value, visible.dense(length, keys))

    def run(attention: Any, dtype: Any, device: Any) -> list[np.ndarray]:
        def score(weight: Any, *inputs: Any) -> Any:
            out = attention(*inputs)
            return (out * weight).sum(dtype=jnp.float32), out

        def both(weight: Any, *inputs: Any) -> Any:
            grads, out = jax.grad(score, (1, 2, 3), has_aux=True)(weight, *inputs)
            return out, *grads

        fn = jax.vmap(both) if many else both
        return [np.asarray(x, np.float64) for x in jax.jit(fn)(*jax.device_put([x.astype(dtype) for x in (weight, *inputs)], device))]

    # The processor compiles the reference in a moment; a GPU's compiler would try many kernels for it.
    found, expected = run(kernel, jnp.bfloat16, None), run(exact, jnp.float32, jax.local_devices(backend="cpu")[0])
    seen = np.broadcast_to(np.asarray(tokens), (*lead, batch, length))
    finite = all(np.isfinite(x).all() for x in found)
    errors = [error(found[0][seen], expected[0][seen]), *map(error, found[1:], expected[1:])]
    query, key = (jnp.zeros(x.shape[-4:], x.dtype) for x in inputs[:2])
    who = attention_kernels.choose("auto", query, key, visible, drops=False)
    what = f"{name}{', three at once (vmap)' if many else ''}"
    line = {"attention": what, "shape": shape, "by": "xla, as cudnn" if by_xla else who}
    return line | dict(zip(("out", "dq", "dk", "dv"), errors, strict=True)) | {"ok": finite and max(errors) < BAR}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative error."""
    return float(f"{np.linalg.norm(found - expected) / np.linalg.norm(expected):.2g}")


def main() -> int:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--xla", action="store_true", help="compute the kernel's arguments by XLA, at a small size")
    args = parser.parse_args()
    shapes = [(2, 41, 4, 2, 8)] if args.xla else [(2, 1024, 32, 8, 64), (2, 515, 16, 4, 128)]
    jobs = []
    for shape in shapes:
        for name, visible in structures(*shape[:2]).items():
            if not (args.xla and name in ("segments", "no window in this layer")):
                jobs.append(functools.partial(compare, name, visible, shape, many=False, by_xla=args.xla))
    for name in ("full, padding", "causal, padding on the left"):
        jobs.append(functools.partial(compare, name, structures(*shapes[0][:2])[name], shapes[0], many=True, by_xla=args.xla))
    bad = 0
    # A few side by side, as most of the time goes into compiling.
    with concurrent.futures.ThreadPoolExecutor(2 if args.xla else 4) as pool:
        for waiting in [pool.submit(job) for job in jobs]:
            line = waiting.result()
            bad += not line["ok"]
            print(json.dumps(line), flush=True)
    print(json.dumps({"attention": "all", "cases": len(jobs), "bad": bad}), flush=True)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())

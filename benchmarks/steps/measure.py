"""Times and memory, alike for both frameworks."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from steps.cases import BERT, LLAMA, Case, Size, forward_flops

# Calls before the first timed one, and timed ones.
CALLS = {"gpu": (3, 10), "cpu": (2, 5), "toy": (1, 2)}
# Rows of the square matrices whose product says what the device can do.
PRODUCT = {"gpu": 8192, "cpu": 1024, "toy": 64}
GIB = 2**30


def timed(call: Callable[[], Any], size: Size) -> float:
    """Return the median seconds of a call that waits for its result."""
    first, timed_calls = CALLS[size]
    for _ in range(first):
        call()
    seconds = []
    for _ in range(timed_calls):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def product_rate(call: Callable[[], Any], size: Size) -> float:
    """Return the operations a second of a call that is one product of square matrices, the device's limit in practice."""
    return 2.0 * PRODUCT[size] ** 3 / timed(call, size)


def host_peak() -> float:
    """Return the most memory that this process has had, in GiB: all that there is to say on a CPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / GIB, 3)


def numbers(case: Case, size: Size, seconds: float, rate: float, *, full: bool = False, **more: Any) -> dict[str, Any]:
    """Return what every line of a training step has.

    The share of the limit is the time of the products that the step cannot do without, at the rate of one large product, by the time that
    it took: twice the forward pass for an adapter, three times for full fine-tuning, without recomputation.
    """
    decoder = case.kind == "llama"
    shape = (LLAMA if decoder else BERT)[size]
    needed = (3 if full else 2) * forward_flops(shape, case.batch, case.length, decoder=decoder)
    return {
        "ms": round(1e3 * seconds, 3),
        "tokens_s": round(case.batch * case.length / seconds),
        "needed_TFLOP": float(f"{needed / 1e12:.4g}"),
        "limit_share": round(needed / rate / seconds, 3),
        **more,
    }

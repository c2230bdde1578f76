"""How long JAX takes to trace a wrapped model, against the bare one: `python benchmarks/trace_time.py`.

The model is BERT with 24 unrolled layers of BERT-large's shapes; nothing is computed. Times are CPU seconds of one process, the smallest of
several interleaved rounds: other work on the machine can only make them larger.
"""

import argparse
import gc
import time
import timeit
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jpeft
from jpeft.models import BertConfig, BertForSequenceClassification, abstract_params

METHODS = ("lora", "adapter", "prefix_tuning", "bitfit", "dora", "ia3")


def main() -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    config = BertConfig(hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=args.layers, scan=False)
    model = BertForSequenceClassification(config, 2)
    params = abstract_params(model)
    ids = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    traces: dict[str, Callable[[], Any]] = {"bare": lambda: jax.make_jaxpr(lambda p, x: model.apply({"params": p}, x))(params, ids)}
    for name in args.methods:
        peft = jax.eval_shape(lambda params, name=name: jpeft.apply(params, name), params)
        traces[name] = lambda peft=peft: jax.make_jaxpr(jpeft.wrap(model.apply))(peft, ids)
    best = dict.fromkeys(traces, float("inf"))
    for _ in range(args.rounds):
        for name, trace in traces.items():
            best[name] = min(best[name], timeit.timeit(trace, timer=time.process_time, number=1))  # without the garbage collector
            gc.collect()
    for name, seconds in best.items():
        print(f"{name:16} {seconds:6.2f} s  {seconds / best['bare']:5.2f} x bare")


if __name__ == "__main__":
    main()

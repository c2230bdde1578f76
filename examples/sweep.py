"""Train many adapters at once: a sweep over learning rates and seeds as one `vmap`, in one compiled step on one base.

    python examples/sweep.py --rates 1e-4 3e-4 1e-3 3e-3 --seeds 0 1

Every adapter has a learning rate, a random initialisation and an optimizer state; all share the base and each batch. Prints the loss of
each adapter after training, the best adapter, and the time of one step of all adapters and of one step of a single adapter.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft.models import BertConfig, BertForSequenceClassification

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3])
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

# --- a small encoder and a task -------------------------------------------------------------------------------------------------------

config = BertConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, initializer_range=0.1
)
model = BertForSequenceClassification(config, num_labels=4)
rng = np.random.default_rng(0)
ids = rng.integers(0, 100, (512, 16))
label = ids.max(1) % 4
params = model.init(jax.random.key(0), ids[:1])["params"]

# --- one adapter for each pair of rate and seed, stacked along a new first axis ---------------------------------------------------------

# In the factored view, the frozen product x W is one large product for all adapters. Merged, each adapter would have its own kernel.
method = jpeft.lora(rank=4, view="factored")
rate, seed = (jnp.asarray(axis) for axis in zip(*[(r, s) for r in args.rates for s in args.seeds], strict=True))
make = lambda seed: jpeft.apply(params, method=method, key=jax.random.key(seed)).adapter
adapters = jax.vmap(make)(seed)
forward = jpeft.wrap(model.apply, method)

# The learning rate is part of the optimizer state, so that each adapter can have a different one.
one = jpeft.Peft(params, make(0), method)
tx = optax.inject_hyperparams(lambda learning_rate: jpeft.optimizer(optax.adamw(learning_rate), one))(learning_rate=0.0)


def init(adapter, rate):
    """The optimizer state of one adapter with its learning rate."""
    state: Any = tx.init(adapter)
    return state._replace(hyperparams=state.hyperparams | {"learning_rate": rate})


def step(adapter, opt_state, params, batch):
    """One step of one adapter."""

    def loss_fn(adapter):
        logits = forward(jpeft.Peft(params, adapter, method).variables, batch["ids"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(adapter)
    updates, opt_state = tx.update(grads, opt_state, adapter)
    return optax.apply_updates(adapter, updates), opt_state, loss


def fit(step, adapter, opt_state):
    """Train; return the adapter, the mean loss of the last ten steps (of each adapter) and the median time of a step."""
    order, losses, seconds = np.random.default_rng(1), [], []
    for _ in range(args.steps):
        rows = order.integers(0, len(ids), 32)
        begun = time.perf_counter()
        adapter, opt_state, loss = step(adapter, opt_state, params, {"ids": ids[rows], "label": label[rows]})
        losses.append(np.asarray(loss))
        seconds.append(time.perf_counter() - begun)
    return adapter, np.mean(losses[-10:], axis=0), float(np.median(seconds))


trained, losses, together = fit(jax.jit(jax.vmap(step, in_axes=(0, 0, None, None))), adapters, jax.vmap(init)(adapters, rate))
for r, s, loss in zip(rate, seed, losses, strict=True):
    print(f"rate {float(r):.0e}  seed {int(s)}  loss {loss:.4f}")
best = int(np.argmin(losses))
print(f"best: rate {float(rate[best]):.0e}, seed {int(seed[best])}")

single = jax.tree.map(lambda leaf: leaf[best], adapters)
_, alone, apart = fit(jax.jit(step), single, init(single, rate[best]))
print(f"the best trained alone has loss {alone:.4f}")
print(f"one step of all {len(losses)} takes {1e3 * together:.1f} ms, one of each in turn {1e3 * apart * len(losses):.1f} ms")

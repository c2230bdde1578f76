"""FAR and what it saves: prime the feed-forward layers, then train only the quarter of their neurons that changed the most.

    python examples/far.py --steps 200

The step is made twice, before and after `jpeft.advance`, and XLA reports the cost of each. Prints FLOPs, the bytes of gradients and of the
optimizer state for both, the loss, and that the merged weights of frozen neurons are bit for bit the pretrained ones.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jpeft
from jpeft.models import BertConfig, BertForSequenceClassification

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--priming", type=float, default=0.1, help="share of the steps before the neurons are chosen")
parser.add_argument("--retention", type=float, default=0.25, help="share of the neurons that are trained after priming")
args = parser.parse_args()

config = BertConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, initializer_range=0.1
)
model = BertForSequenceClassification(config, num_labels=4)
ids = jax.random.randint(jax.random.key(1), (128, 16), 0, 100)
label = ids.max(1) % 4
params = model.init(jax.random.key(0), ids)["params"]


def compiled(peft: jpeft.Peft):
    """Return the step and the optimizer state of the present stage."""
    forward, tx = jpeft.wrap(model.apply, peft.method), jpeft.optimizer(optax.adamw(3e-3, weight_decay=0.01), peft)

    def step(adapter, opt_state, peft):
        def loss_fn(adapter):
            logits = forward(peft.replace(adapter=adapter).variables, ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    opt_state = tx.init(peft.adapter)
    return jax.jit(step).lower(peft.adapter, opt_state, peft).compile(), opt_state


def nbytes(tree) -> int:
    """Bytes of all leaves."""
    return sum(jnp.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))


peft = jpeft.apply(params, method="far", retention=args.retention)
done = 0
for name, end in (("priming", round(args.priming * args.steps)), ("learners", args.steps)):
    if name == "learners":
        peft = jpeft.advance(peft)  # from priming to learners: the neurons that changed the most since the start
    step, opt_state = compiled(peft)
    cost: Any = step.cost_analysis()
    print(
        f"{name:9} trains {jpeft.summary(peft).trained:,}: {cost['flops'] / 1e6:.0f} MFLOP a step, "
        f"{nbytes(peft.adapter) / 1e3:.0f} kB of gradients, {nbytes(opt_state) / 1e3:.0f} kB of optimizer state"
    )
    adapter = peft.adapter
    while done < end:
        adapter, opt_state, loss = step(adapter, opt_state, peft)
        done += 1
        if done % 50 == 0 or done == end:
            print(f"step {done:4d}  loss {loss:.4f}")
    peft = peft.replace(adapter=adapter)

kernel = "bert/encoder/layer/0/intermediate/dense/kernel"
old, new = jpeft.flatten(params)[kernel], jpeft.flatten(jpeft.merge(peft))[kernel]
moved = int((old != new).any(0).sum())
print(f"merged: {moved} of {old.shape[1]} neurons of {kernel} differ, the others are bit for bit the same")

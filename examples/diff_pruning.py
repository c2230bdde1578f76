"""DiffPruning with its two stages in your own training loop: first gates decide which weights change, then only these weights are trained.

    python examples/diff_pruning.py --steps 300

A training loop with stages does not depend on the method: it trains `peft.method`, and at the end of a stage `jpeft.advance` returns the
next method and adapter. Then the loop makes a new optimizer and a new step. Prints for each stage what is trained and the size of the
optimizer state, the loss, how many gates are open at the end, and that exactly as many weights differ from the base as the budget allows.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import jpeft
from jpeft.core.stages import plan
from jpeft.models import BertConfig, BertForSequenceClassification

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--sparsity", type=float, default=0.02)
args = parser.parse_args()

# --- a small encoder and a task -------------------------------------------------------------------------------------------------------

config = BertConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, initializer_range=0.1
)
model = BertForSequenceClassification(config, num_labels=4)
ids = jax.random.randint(jax.random.key(1), (256, 16), 0, 100)
label = ids.max(1) % 4
params = model.init(jax.random.key(0), ids)["params"]
peft = jpeft.apply(params, method="diff_pruning", sparsity=args.sparsity)


def make_step(method: jpeft.Method, tx: optax.GradientTransformation):
    """The training step of one stage."""
    forward = jpeft.wrap(model.apply, method)

    @jax.jit
    def step(adapter, opt_state, peft, key):
        def loss_fn(adapter):
            now = peft.replace(adapter=adapter)
            # The dropout key also draws the gates. The penalty is the expected number of open gates; it is zero in the second stage.
            logits = forward(now.variables, ids, deterministic=False, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean() + jpeft.penalty(now)

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    return step


def count(tree) -> int:
    """Number of scalars."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))


# `plan` divides the steps: each later stage gets the share that the method asks for.
for number, segment in enumerate(plan(peft.method.stages, args.steps, first="gates")):
    if number:
        peft = jpeft.advance(peft, key=jax.random.key(number))
    # The gates are a parameter group: the method asks for Adam at a constant rate, and `jpeft.optimizer` follows.
    rate = optax.linear_schedule(5e-3, 0.0, segment.end - segment.begin)
    tx = jpeft.optimizer(optax.adamw(rate, weight_decay=0.01), peft)
    step, adapter, opt_state = make_step(peft.method, tx), peft.adapter, tx.init(peft.adapter)
    summary = jpeft.summary(peft)
    print(f"stage {segment.name}: trains {summary.trained:,} of {summary.base:,}, optimizer state {count(opt_state):,} numbers")
    for i in range(segment.begin, segment.end):
        adapter, opt_state, loss = step(adapter, opt_state, peft, jax.random.key(i))
        if i % 50 == 0 or i == segment.end - 1:
            print(f"step {i:4d}  loss {loss:.4f}")
    peft = peft.replace(adapter=adapter)
    alphas = [leaf for path, leaf in jpeft.flatten(adapter).items() if path.endswith("/alpha")]
    if alphas:
        print(f"gates more likely open than closed: {sum(int((alpha > 0).sum()) for alpha in alphas):,} of {count(alphas):,}")

merged = jpeft.merge(peft)
changed = sum(int((new != old).sum()) for new, old in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True))
print(f"{changed:,} of {count(params):,} weights differ from the base; the budget is {int(args.sparsity * count(params)):,}")

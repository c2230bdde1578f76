"""Two methods chained: LoRA on the attention and BitFit on every bias, one adapter each, trained together and merged together.

    python examples/chained.py

Prints the collections and counts of the chain, the loss, that the part of the order that matters is refused when it is wrong, and the
largest difference between the wrapped and the merged model.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import jpeft
from jpeft.models import BertConfig, BertForSequenceClassification

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=150)
args = parser.parse_args()

config = BertConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, initializer_range=0.1
)
model = BertForSequenceClassification(config, num_labels=4)
ids = jax.random.randint(jax.random.key(1), (128, 16), 0, 100)
label = ids.max(1) % 4
params = model.init(jax.random.key(0), ids)["params"]

# The first is closest to the base. Each part is a collection of its own; the head belongs to the first that trains it.
method = jpeft.chain(bitfit=jpeft.bitfit(), lora=jpeft.lora(rank=4, target=["query", "value"]))
peft = jpeft.apply(params, method=method)
print(jpeft.summary(peft, depth=1))
print(f"collections: {list(peft.variables)}")

# Each part could have an optimizer of its own, by its labels; here one does for both.
forward = jpeft.wrap(model.apply, method)
tx = jpeft.optimizer(optax.adamw(3e-3), peft)


@jax.jit
def step(adapter, opt_state, peft):
    """One step on the one batch."""

    def loss_fn(adapter):
        logits = forward(peft.replace(adapter=adapter).variables, ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    loss, grads = jax.value_and_grad(loss_fn)(adapter)
    updates, opt_state = tx.update(grads, opt_state, adapter)
    return optax.apply_updates(adapter, updates), opt_state, loss


adapter, opt_state = peft.adapter, tx.init(peft.adapter)
for i in range(args.steps):
    adapter, opt_state, loss = step(adapter, opt_state, peft)
    if i % 50 == 0 or i == args.steps - 1:
        print(f"step {i:4d}  loss {loss:.4f}")

peft = peft.replace(adapter=adapter)
merged = jax.jit(model.apply)({"params": jpeft.merge(peft)}, ids)
print(f"merged and wrapped logits differ by at most {jnp.abs(merged - forward(peft.variables, ids)).max():.1e}")

# A part that replaces what an earlier one adapts would throw that part's change away, so the order is checked.
try:
    jpeft.apply(params, method=jpeft.chain(lora=jpeft.lora(), freeze=jpeft.freeze(top=1)))
except ValueError as error:
    print(f"refused: {str(error)[:100]}...")

"""Two methods as one: LoRA on attention and BitFit on every bias, each with an adapter, trained and merged together.

    python examples/chained.py

Prints the collections and parameter counts of the chain, the loss, the error that a wrong order gives, and the largest difference between
the wrapped and the merged model.
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

# The first method is the closest to the base. Each method has a collection; the head belongs to the first method that trains it.
method = jpeft.chain(bitfit=jpeft.bitfit(), lora=jpeft.lora(rank=4, target=["query", "value"]))
peft = jpeft.apply(params, method=method)
print(jpeft.summary(peft, depth=1))
print(f"collections: {list(peft.variables)}")

# The labels allow a different optimizer for each method; here both have the same.
forward = jpeft.wrap(model.apply, method)
tx = jpeft.optimizer(optax.adamw(3e-3), peft)


@jax.jit
def step(adapter, opt_state, peft):
    """One step on the batch."""

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

# If a later method replaced a leaf that an earlier one adapts, the earlier change would be lost. So jpeft checks the order.
try:
    jpeft.apply(params, method=jpeft.chain(lora=jpeft.lora(), freeze=jpeft.freeze(top=1)))
except ValueError as error:
    print(f"refused: {str(error)[:100]}...")

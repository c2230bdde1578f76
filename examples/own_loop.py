"""LoRA on a pretrained encoder in your own training loop, without jpeft's trainer.

    python examples/own_loop.py --model sentence-transformers/all-MiniLM-L6-v2 --steps 200

Prints what is trained, the loss every 20 steps, the test accuracy, and that the merged model has the same accuracy. The data are paragraphs
of SciPy's documentation with their subpackages as labels. --data takes any folder, file or hub data set that `jpeft train` takes.
"""

import argparse

import jax
import numpy as np
import optax

import jpeft
from jpeft import data, models

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="folder of a checkpoint, or a hub id")
parser.add_argument("--data", default="builtin")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--max-length", type=int, default=64)
args = parser.parse_args()

# --- data and model -------------------------------------------------------------------------------------------------------------------

tables = data.splits(args.data)
labels = data.label_names(tables["train"])
loaded = models.load(args.model, labels=labels)  # a linen module and its parameters; the head is new
encode = lambda table: data.encode(table, loaded.tokenizer, labels=labels, max_length=args.max_length)
train, test = encode(tables["train"]), encode(tables["test"])
batches = data.batches(train, args.batch_size, seed=0)  # batches[step], without end, shuffled in every epoch

# --- the method -----------------------------------------------------------------------------------------------------------------------

peft = jpeft.apply(loaded.params, method="lora", rank=8, key=jax.random.key(0))
print(jpeft.summary(peft, depth=2))
forward = jpeft.wrap(loaded.model.apply, peft.method)
tx = jpeft.optimizer(optax.adamw(optax.linear_schedule(3e-3, 0.0, args.steps), weight_decay=0.01), peft)


def inputs(batch):
    """The inputs of the model in a batch."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


@jax.jit
def step(adapter, opt_state, peft, batch, key):
    """One optimizer step. The base is an argument, in `peft`: neither a constant of the compiled program nor donated."""

    def loss_fn(adapter):
        logits = forward(peft.replace(adapter=adapter).variables, **inputs(batch), deterministic=False, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(adapter)  # only the adapter is differentiated
    updates, opt_state = tx.update(grads, opt_state, adapter)
    return optax.apply_updates(adapter, updates), opt_state, loss


adapter, opt_state = peft.adapter, tx.init(peft.adapter)
for i in range(args.steps):
    adapter, opt_state, loss = step(adapter, opt_state, peft, batches[i], jax.random.key(i))
    if i % 20 == 0 or i == args.steps - 1:
        print(f"step {i:4d}  loss {loss:.4f}")
peft = peft.replace(adapter=adapter)

# --- evaluation, merge ----------------------------------------------------------------------------------------------------------------


def accuracy(apply, variables):
    """Share of correct predictions on the test split; `weight` is 0 for the rows that fill up the last batch."""
    right = total = 0.0
    for batch in data.eval_batches(test, 64):
        predicted = np.asarray(apply(variables, **inputs(batch))).argmax(-1)
        right += float(np.sum(batch["weight"] * (predicted == batch["label"])))
        total += float(np.sum(batch["weight"]))
    return right / total


print(f"test accuracy {accuracy(jax.jit(forward), peft.variables):.4f}")
merged = jpeft.merge(peft)  # plain parameters: inference costs nothing more than the base
print(f"merged model  {accuracy(jax.jit(loaded.model.apply), {'params': merged}):.4f}")

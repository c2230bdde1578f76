"""FishMask: measure which weights matter for a task, then train the half percent of them that matter most.

    python examples/fish_mask.py --model sentence-transformers/all-MiniLM-L6-v2 --steps 200

Prints which tensors have chosen weights, the loss, the test accuracy, how many weights of the model have changed, and the sizes of the
saved adapter and of the model. The adapter stores one number and one index for each chosen weight.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import optax

import jpeft
from jpeft import data, models
from jpeft.stats import fisher

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="folder of a checkpoint, or a hub id")
parser.add_argument("--data", default="builtin")
parser.add_argument("--sparsity", type=float, default=0.005)
parser.add_argument("--samples", type=int, default=256, help="number of texts for the Fisher information")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--max-length", type=int, default=64)
args = parser.parse_args()

tables = data.splits(args.data)
labels = data.label_names(tables["train"])
loaded = models.load(args.model, labels=labels)
train, test = (data.encode(tables[name], loaded.tokenizer, labels=labels, max_length=args.max_length) for name in ("train", "test"))
batches = data.batches(train, 16, seed=0)


def losses(logits, batch):
    """Cross-entropy of each text."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def inputs(batch):
    """The inputs of the model in a batch."""
    return {name: column for name, column in batch.items() if name not in ("label", "weight")}


# --- which weights matter: the squared gradient of each text, summed over texts, of the pretrained model ---------------------------------

information = fisher(
    lambda params, batch: losses(loaded.model.apply({"params": params}, **inputs(batch)), batch),
    loaded.params,
    iter(batches),
    num_samples=args.samples,
)
peft = jpeft.apply(loaded.params, method="fish_mask", sparsity=args.sparsity, stats=information)
summary = jpeft.summary(peft)
print(f"trains {summary.trained:,} of {summary.base:,} weights")
chosen = Counter()
for path, leaf in jpeft.flatten(peft.adapter).items():
    if path.endswith("/values"):
        chosen[path.split("/")[-3]] += leaf.size
for module, count in chosen.most_common(5):
    print(f"{count:8,} of them in {module}")

# --- training: gradients, moments and checkpoint have one entry for each chosen weight ---------------------------------------------------

forward = jpeft.wrap(loaded.model.apply, peft.method)
tx = jpeft.optimizer(optax.adamw(optax.linear_schedule(2e-3, 0.0, args.steps)), peft)


@jax.jit
def step(adapter, opt_state, peft, batch, key):
    """One step."""

    def loss_fn(adapter):
        logits = forward(peft.replace(adapter=adapter).variables, **inputs(batch), deterministic=False, rngs={"dropout": key})
        return losses(logits, batch).mean()

    loss, grads = jax.value_and_grad(loss_fn, allow_int=True)(adapter)
    updates, opt_state = tx.update(grads, opt_state, adapter)
    return optax.apply_updates(adapter, updates), opt_state, loss


adapter, opt_state = peft.adapter, tx.init(peft.adapter)
for i in range(args.steps):
    adapter, opt_state, loss = step(adapter, opt_state, peft, batches[i], jax.random.key(i))
    if i % 20 == 0 or i == args.steps - 1:
        print(f"step {i:4d}  loss {loss:.4f}")
peft = peft.replace(adapter=adapter)

predict, right, total = jax.jit(lambda peft, batch: forward(peft.variables, **inputs(batch)).argmax(-1)), 0.0, 0.0
for batch in data.eval_batches(test, 64):
    right += float(np.sum(batch["weight"] * (np.asarray(predict(peft, batch)) == batch["label"])))
    total += float(np.sum(batch["weight"]))
print(f"test accuracy {right / total:.4f}")

pairs = zip(jax.tree.leaves(jpeft.merge(peft)), jax.tree.leaves(peft.params), strict=True)
print(f"{sum(int((new != old).sum()) for new, old in pairs):,} weights differ from the base")
with tempfile.TemporaryDirectory() as folder:
    jpeft.save(Path(folder) / "adapter", peft)
    stored = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
print(f"{stored / 1e6:.2f} MB on disk; the model has {summary.base_bytes / 1e6:.2f} MB")

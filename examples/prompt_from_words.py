"""A hard prompt, a soft prompt that starts from the same words, and the words nearest to the trained soft prompt.

    python examples/prompt_from_words.py --model sentence-transformers/all-MiniLM-L6-v2 --steps 200

A hard prompt inserts words into every text and trains the head alone. A soft prompt starts from the embeddings of these words and trains
them. Prints the test accuracy of both, the number of parameters that each trains, and the words nearest to each row of the trained prompt.
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
parser.add_argument("--prompt", default="which part of the library does this paragraph document?")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--max-length", type=int, default=64)
args = parser.parse_args()

tables = data.splits(args.data)
labels = data.label_names(tables["train"])
loaded = models.load(args.model, labels=labels)
train, test = (data.encode(tables[name], loaded.tokenizer, labels=labels, max_length=args.max_length) for name in ("train", "test"))
batches = data.batches(train, 16, seed=0)
words = loaded.tokenizer(args.prompt, add_special_tokens=False)["input_ids"]


def inputs(batch):
    """The inputs of the model in a batch."""
    return {name: column for name, column in batch.items() if name not in ("label", "weight")}


def fit(peft: jpeft.Peft, rate: float) -> jpeft.Peft:
    """Train on the batches."""
    forward = jpeft.wrap(loaded.model.apply, peft.method)
    tx = jpeft.optimizer(optax.adamw(optax.linear_schedule(rate, 0.0, args.steps)), peft)

    @jax.jit
    def step(adapter, opt_state, peft, batch):
        def loss_fn(adapter):
            logits = forward(peft.replace(adapter=adapter).variables, **inputs(batch))
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    adapter, opt_state = peft.adapter, tx.init(peft.adapter)
    for i in range(args.steps):
        adapter, opt_state, _ = step(adapter, opt_state, peft, batches[i])
    return peft.replace(adapter=adapter)


def accuracy(peft: jpeft.Peft) -> float:
    """Accuracy on the test split."""
    forward, right, total = jax.jit(jpeft.wrap(loaded.model.apply, peft.method)), 0.0, 0.0
    for batch in data.eval_batches(test, 64):
        predicted = np.asarray(forward(peft.variables, **inputs(batch))).argmax(-1)
        right += float(np.sum(batch["weight"] * (predicted == batch["label"])))
        total += float(np.sum(batch["weight"]))
    return right / total


print(f"prompt: {args.prompt!r}, {len(words)} tokens")
hard = fit(jpeft.apply(loaded.params, method="hard_prompt", tokens=words), rate=1e-2)
print(f"hard prompt: accuracy {accuracy(hard):.4f}, {jpeft.summary(hard).trained:,} parameters (the head)")
soft = fit(jpeft.apply(loaded.params, method="prompt_tuning", init="tokens", tokens=words), rate=1e-2)
print(f"soft prompt: accuracy {accuracy(soft):.4f}, {jpeft.summary(soft).trained:,} parameters")
print("nearest words, with the cosine of the angle to them:")
nearest = jpeft.nearest_tokens(soft)
for word, ids, cosine in zip(words, np.asarray(nearest.ids), np.asarray(nearest.similarity), strict=True):
    print(f"  began as {loaded.tokenizer.decode([word])!r:12} ended near {loaded.tokenizer.decode(ids)!r:12} {cosine[0]:.3f}")

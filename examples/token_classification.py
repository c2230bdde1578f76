"""Token classification with P-Tuning v2: which words of a documentation paragraph are code, which are numbers?

    python examples/token_classification.py --model sentence-transformers/all-MiniLM-L6-v2 --steps 200

A rule labels the words of SciPy's documentation: parentheses, underscores, dots and "=" make code, digits a number. The tagger sees word
pieces and must learn the rule. Prints the loss, precision and recall of each class on held-out paragraphs, and one tagged paragraph.
"""

import argparse
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft import data, models

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="folder of a checkpoint, or a hub id")
parser.add_argument("--data", default="builtin")
parser.add_argument("--length", type=int, default=20, help="virtual tokens in every layer")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--max-length", type=int, default=64)
args = parser.parse_args()

TAGS = ("word", "code", "number")
NONE = -1  # label of special tokens, padding, and all pieces of a word but the first


def tag(word: str) -> int:
    """The tag of a word, by its form."""
    if re.search(r"[()_=\[\]]|\w\.\w", word):
        return TAGS.index("code")
    return TAGS.index("number") if re.fullmatch(r"[-+]?\d+(\.\d+)?[,.]?", word) else TAGS.index("word")


def encode(table: data.Table, tokenizer) -> dict[str, np.ndarray]:
    """Token ids, mask, and a tag for the first piece of each word."""
    words = [text.split() for text in table.text]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, padding="max_length", max_length=args.max_length)
    tags = np.full((len(words), args.max_length), NONE)
    for row, row_words in enumerate(words):
        before = None
        for column, word in enumerate(encoded.word_ids(row)):
            if word is not None and word != before:
                tags[row, column] = tag(row_words[word])
            before = word
    return {"input_ids": np.asarray(encoded["input_ids"]), "attention_mask": np.asarray(encoded["attention_mask"]), "tags": tags}


tables = data.splits(args.data)
loaded = models.load(args.model, task="token-classification", labels=TAGS)
train, test = encode(tables["train"], loaded.tokenizer), encode(tables["test"], loaded.tokenizer)
batches = data.batches(train, 16, seed=0)

# Trained are keys and values of 20 virtual tokens in every layer, and the new head; the encoder is frozen.
peft = jpeft.apply(loaded.params, method="p_tuning_v2", length=args.length)
print(f"trains {jpeft.summary(peft).trained:,} of {jpeft.summary(peft).base:,} parameters")
forward = jpeft.wrap(loaded.model.apply, peft.method)
tx = jpeft.optimizer(optax.adamw(optax.linear_schedule(1e-2, 0.0, args.steps)), peft)


@jax.jit
def step(adapter, opt_state, peft, batch, key):
    """One step; the loss is the mean over the words."""

    def loss_fn(adapter):
        variables, rngs = peft.replace(adapter=adapter).variables, {"dropout": key}
        logits = forward(variables, batch["input_ids"], batch["attention_mask"], deterministic=False, rngs=rngs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["tags"], 0))
        return jnp.mean(losses, where=batch["tags"] != NONE)

    loss, grads = jax.value_and_grad(loss_fn)(adapter)
    updates, opt_state = tx.update(grads, opt_state, adapter)
    return optax.apply_updates(adapter, updates), opt_state, loss


adapter, opt_state = peft.adapter, tx.init(peft.adapter)
for i in range(args.steps):
    adapter, opt_state, loss = step(adapter, opt_state, peft, batches[i], jax.random.key(i))
    if i % 20 == 0 or i == args.steps - 1:
        print(f"step {i:4d}  loss {loss:.4f}")
peft = peft.replace(adapter=adapter)

predict = jax.jit(lambda peft, ids, mask: forward(peft.variables, ids, mask).argmax(-1))
counts = np.zeros((len(TAGS), len(TAGS)), int)  # [true, predicted]
for batch in data.eval_batches(test, 32):
    predicted = np.asarray(predict(peft, batch["input_ids"], batch["attention_mask"]))
    seen = (batch["tags"] != NONE) & (batch["weight"][:, None] > 0)
    np.add.at(counts, (batch["tags"][seen], predicted[seen]), 1)
for i, name in enumerate(TAGS):
    precision, recall = counts[i, i] / max(counts[:, i].sum(), 1), counts[i, i] / max(counts[i].sum(), 1)
    print(f"{name:8} precision {precision:.3f}  recall {recall:.3f}  of {counts[i].sum():,} words")

first = {name: column[:1] for name, column in test.items()}
predicted = np.asarray(predict(peft, first["input_ids"], first["attention_mask"]))[0]
starts = np.flatnonzero(first["tags"][0] != NONE)
print(" ".join(f"{word}/{TAGS[predicted[at]]}" for word, at in zip(tables["test"].text[0].split(), starts, strict=False)))

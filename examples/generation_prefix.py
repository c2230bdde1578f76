"""Generation with prefix tuning: a decoder learns to summarise a function in one line, given the function's head.

    python examples/generation_prefix.py --steps 300

The decoder is a small one, which the first call trains (minutes on a CPU; see `jpeft.training.small_decoder`). --model takes any causal
language model. The pairs are heads of functions of Python's standard library and the first lines of their docstrings. The method trains
keys and values of a few virtual tokens in every layer; the network that computes them is dropped after training. Prints the loss, the
perplexity of held-out summaries before and after, the size of the adapter, and what model and base generate for three functions.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft import data, models
from jpeft.tasks import generation
from jpeft.training.small_decoder import decoder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder of a checkpoint, or a hub id; by default the small decoder")
parser.add_argument("--length", type=int, default=10, help="virtual tokens of the prefix")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--rows", type=int, default=2000, help="largest number of pairs to train on")
parser.add_argument("--max-length", type=int, default=64)
args = parser.parse_args()

# --- pairs and model ------------------------------------------------------------------------------------------------------------------

source = args.model or str(decoder())
loaded = models.load(source, task="causal-lm")
tokenizer = loaded.tokenizer
pairs = data.splits("builtin:summaries")


def encode(table: data.Table, rows: int) -> dict[str, np.ndarray]:
    """Rows [text target EOS], and for each position the token that it predicts: targets only, -100 elsewhere."""
    few = data.Table(text=table.text[:rows], target=(table.target or [])[:rows])
    return generation.encode(few, tokenizer, labels=(), max_length=args.max_length, overlong="cut")


train, test = encode(pairs["train"], args.rows), encode(pairs["test"], 128)
batches = data.batches(train, 16, seed=0)

# --- prefix tuning --------------------------------------------------------------------------------------------------------------------

peft = jpeft.apply(loaded.params, method="prefix_tuning", length=args.length)
forward = jpeft.wrap(loaded.model.apply, peft.method)
tx = jpeft.optimizer(optax.adamw(optax.linear_schedule(1e-3, 0.0, args.steps)), peft)


def mean_loss(apply, variables, batch):
    """Negative log-likelihood of a token of a target, averaged over all targets of the batch; the model computes it without logits."""
    out = apply(variables, batch["input_ids"], batch["attention_mask"], labels=batch["label"])
    return jnp.mean(out.loss, where=batch["label"] != generation.IGNORE)


@jax.jit
def step(adapter, opt_state, peft, batch):
    """One step."""

    def loss_fn(adapter):
        return mean_loss(forward, peft.replace(adapter=adapter).variables, batch)

    loss, grads = jax.value_and_grad(loss_fn)(adapter)
    updates, opt_state = tx.update(grads, opt_state, adapter)
    return optax.apply_updates(adapter, updates), opt_state, loss


adapter, opt_state = peft.adapter, tx.init(peft.adapter)
for i in range(args.steps):
    adapter, opt_state, loss = step(adapter, opt_state, peft, batches[i])
    if i % 50 == 0 or i == args.steps - 1:
        print(f"step {i:4d}  loss {loss:.4f}")
peft = peft.replace(adapter=adapter)

# Without the network that computes the prefix, the outputs are the same and the adapter is much smaller.
folded = jpeft.fold(peft)
print(f"trained {jpeft.summary(peft).trained:,} parameters, stored {jpeft.summary(folded).stored:,} of {jpeft.summary(peft).base:,}")
forward = jpeft.wrap(loaded.model.apply, folded.method)

base = {"params": loaded.params}
for name, apply, variables in (("base", loaded.model.apply, base), ("with prefix", forward, folded.variables)):
    loss = jax.jit(mean_loss, static_argnums=0)(apply, variables, test)
    print(f"perplexity of {len(test['label'])} summaries, {name}: {np.exp(loss):.1f}")

# --- generated text -------------------------------------------------------------------------------------------------------------------

heads = data.Table(text=pairs["test"].text[:3])
prompts = generation.encode(heads, tokenizer, labels=None, max_length=args.max_length, overlong="cut")
for name, apply, variables in (("base", loaded.model.apply, base), ("with prefix", forward, folded.variables)):
    new = models.generate(apply, variables, prompts["input_ids"], prompts["attention_mask"], max_new_tokens=16, stop=tokenizer.eos_token_id)
    for head, tokens, length in zip(heads.text, np.asarray(new.tokens), np.asarray(new.lengths), strict=True):
        print(f"{name:12} {head.splitlines()[1]}  ->  {tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()!r}")

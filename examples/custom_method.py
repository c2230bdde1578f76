"""Write your own method in 30 lines: (IA)3, which scales the outputs of chosen layers by learned vectors.

    python examples/custom_method.py

Equation: y = (W x + b) * l, with l = 1 at the start (Liu et al., 2022, https://arxiv.org/abs/2205.05638). The rest comes with the protocol:
linen layers under scan and remat, the optimizer, saving, counts, chains. Prints the summary, the loss before and after training, the
largest difference between the wrapped and the merged model, and a chain with LoRA.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jpeft
from jpeft import tree
from jpeft.core.method import Method, factory, not_head, with_head
from jpeft.tree.select import select

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

# --- the method -----------------------------------------------------------------------------------------------------------------------


@factory
def ia3(*, target=("key", "value", "up"), head="auto"):
    """Scale the outputs of the layers of these names."""

    def init_fn(key, params, *, stats=None):
        kernels = {path: leaf for path, leaf in not_head(params, head).items() if path.endswith("/kernel")}
        return tree.unflatten({f"{path}/l": jnp.ones(kernels[path].shape[-1:]) for path in select(kernels, target)})

    def call_fn(layer, inputs, leaves, rng):
        return layer(*inputs) * leaves["kernel"]["l"]

    def merge_fn(params, adapter):
        replaced, scales, _ = tree.split(params, adapter)
        base = tree.flatten(params)
        for kernel, leaves in scales.items():
            bias = kernel.removesuffix("kernel") + "bias"
            replaced |= {path: base[path] * leaves["l"] for path in (kernel, bias) if path in base}
        return tree.replace(params, replaced)

    return Method(init=with_head(init_fn, head), call=call_fn, merge=merge_fn)


# --- a model that uses it -------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention with one head, and an MLP."""

    @nn.compact
    def __call__(self, x):
        """[batch, length, 32] -> the same."""
        query, key, value = (nn.Dense(32, name=name)(x) for name in ("query", "key", "value"))
        x = x + jax.nn.softmax(query @ key.swapaxes(1, 2) / 32**0.5) @ value
        return x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(x)))


class Model(nn.Module):
    """Embedding, rematerialised blocks, head."""

    @nn.compact
    def __call__(self, ids):
        """Token ids [batch, length] -> logits [batch, 3]."""
        x = nn.Embed(50, 32, name="embed")(ids)
        for i in range(2):
            x = nn.remat(Block)(name=f"layer_{i}")(x)
        return nn.Dense(3, name="classifier")(x.mean(1))


model = Model()
ids = jax.random.randint(jax.random.key(1), (64, 8), 0, 50)
label = ids.max(1) % 3
peft = jpeft.apply(model.init(jax.random.key(0), ids)["params"], method=ia3())
print(jpeft.summary(peft))

forward = jpeft.wrap(model.apply, peft.method)
tx = jpeft.optimizer(optax.adam(1e-2), peft)


@jax.jit
def step(adapter, opt_state):
    """One step on the batch."""
    loss_fn = lambda a: optax.softmax_cross_entropy_with_integer_labels(forward(peft.replace(adapter=a).variables, ids), label).mean()
    loss, grads = jax.value_and_grad(loss_fn)(adapter)
    updates, opt_state = tx.update(grads, opt_state, adapter)
    return optax.apply_updates(adapter, updates), opt_state, loss


adapter, opt_state = peft.adapter, tx.init(peft.adapter)
for i in range(args.steps):
    adapter, opt_state, loss = step(adapter, opt_state)
    if i in (0, args.steps - 1):
        print(f"step {i:4d}  loss {loss:.4f}")

peft = peft.replace(adapter=adapter)
merged = model.apply({"params": jpeft.merge(peft)}, ids)
print(f"merged and wrapped logits differ by at most {jnp.abs(merged - forward(peft.variables, ids)).max():.1e}")

chained = jpeft.apply(peft.params, method=jpeft.chain(ia3=ia3(), lora=jpeft.lora(rank=2)))
print(f"in a chain with LoRA: {jpeft.summary(chained).trained:,} trained parameters in the collections {list(chained.variables)}")

"""Write your own method: scale and shift the outputs of chosen kernels.

    python examples/custom_method.py

Equation: y = (1 + g) * (W x + b), with one g for each output and g = 0 at the start. The class says what happens to one kernel, seen as a
matrix; heads, scanned and rematerialised layers, merging, saving, chains, counts and the optimizer come with the base class. Prints the
summary, the loss before and after training, the largest difference between the wrapped and the merged model, and a chain with LoRA.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jpeft
from jpeft.core.options import Names
from jpeft.reparameterized.matrix_form import OUTPUTS
from jpeft.reparameterized.weight_method import WeightMethod

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

# --- the method -----------------------------------------------------------------------------------------------------------------------


class OutputScale(WeightMethod):
    """Scale the outputs of the layers of these names."""

    target: Names = ("key", "value", "up")

    name = "output_scale"
    leaf_axes = {"g": (OUTPUTS,)}

    def init_kernel(self, key, kernel, path):
        """One zero for each output."""
        return {"g": jnp.zeros(kernel.shape[1])}

    def new_kernel(self, kernel, leaves, path):
        """[inputs, outputs] -> the same."""
        return kernel * (1 + leaves["g"])[None]

    def new_bias(self, bias, leaves, path):
        """[outputs] -> the same."""
        return bias * (1 + leaves["g"])

    def call_linear(self, layer, linear, inputs, leaves, path, rng):
        """Scaling the outputs is cheaper than scaling the kernel: no gradient of the kernel's size is formed."""
        if linear.scale_outputs is None:  # a layer whose outputs cannot be scaled by themselves
            return super().call_linear(layer, linear, inputs, leaves, path, rng)
        return linear.scale_outputs(layer(*inputs), 1 + leaves["g"])


# --- a model that uses it -------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention with two heads and an MLP; returns a pair, as `nn.scan` requires."""

    @nn.compact
    def __call__(self, x, _):
        """[batch, length, 32] -> the same."""
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(x))), None


class Model(nn.Module):
    """Embedding, two scanned and rematerialised blocks, head."""

    @nn.compact
    def __call__(self, ids):
        """Token ids [batch, length] -> logits [batch, 3]."""
        x = nn.Embed(50, 32, name="embed")(ids)
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(3, name="classifier")(x.mean(1))


model = Model()
ids = jax.random.randint(jax.random.key(1), (64, 8), 0, 50)
label = ids.max(1) % 3
peft = jpeft.apply(model.init(jax.random.key(0), ids)["params"], method=OutputScale())
print(jpeft.summary(peft))

forward = jpeft.wrap(model.apply)
tx = jpeft.optimizer(optax.adam(1e-2), peft)


@jax.jit
def step(adapter, opt_state, peft):
    """One step on the batch."""
    loss_fn = lambda a: optax.softmax_cross_entropy_with_integer_labels(forward(peft.replace(adapter=a), ids), label).mean()
    loss, grads = jax.value_and_grad(loss_fn)(adapter)
    updates, opt_state = tx.update(grads, opt_state, adapter)
    return optax.apply_updates(adapter, updates), opt_state, loss


adapter, opt_state = peft.adapter, tx.init(peft.adapter)
for i in range(args.steps):
    adapter, opt_state, loss = step(adapter, opt_state, peft)
    if i in (0, args.steps - 1):
        print(f"step {i:4d}  loss {loss:.4f}")

peft = peft.replace(adapter=adapter)
merged = model.apply({"params": jpeft.merge(peft)}, ids)
print(f"merged and wrapped logits differ by at most {jnp.abs(merged - forward(peft, ids)).max():.1e}")

chained = jpeft.apply(peft.params, method=jpeft.chain(scale=OutputScale(), lora=jpeft.lora(rank=2)))
print(f"in a chain with LoRA: {jpeft.summary(chained).trained:,} trained parameters in the collections {list(chained.variables)}")

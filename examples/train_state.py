"""A Flax `TrainState` that holds all variables, base and adapter, with `optax.multi_transform`, for training loops that expect one tree.

    python examples/train_state.py

Trains a small classifier on five noisy patterns, then adapts it to five others with BitFit. Prints the loss, that every bit of the base is
unchanged although weight decay is on, and the sizes of the optimizer state here and with full fine-tuning.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import jpeft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300)
args = parser.parse_args()


class Classifier(nn.Module):
    """Two hidden layers and a head."""

    @nn.compact
    def __call__(self, x):
        """Patterns [batch, 64] -> logits [batch, 5]."""
        for i in range(2):
            x = nn.relu(nn.Dense(128, name=f"hidden_{i}")(x))
        return nn.Dense(5, name="classifier")(x)


def noisy_patterns(seed: int) -> dict[str, np.ndarray]:
    """2,000 noisy copies of five fixed patterns of 64 numbers."""
    rng = np.random.default_rng(seed)
    patterns = rng.normal(size=(5, 64))
    label = rng.integers(0, 5, 2000)
    return {"x": (patterns[label] + 2.0 * rng.normal(size=(2000, 64))).astype(np.float32), "label": label}


def loss_fn(apply, variables, batch):
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(variables, batch["x"]), batch["label"]).mean()


@jax.jit
def step(state: TrainState, batch):
    """One step on the whole state. `multi_transform` sets the updates of the base to zero; XLA then removes the base gradients too."""
    loss, grads = jax.value_and_grad(lambda variables: loss_fn(state.apply_fn, variables, batch))(state.params)
    return state.apply_gradients(grads=grads), loss


def fit(state: TrainState, arrays: dict[str, np.ndarray]) -> TrainState:
    """Train on random batches of 64."""
    rng = np.random.default_rng(0)
    for i in range(args.steps):
        rows = rng.integers(0, 2000, 64)
        state, loss = step(state, {name: column[rows] for name, column in arrays.items()})
        if i % 100 == 0 or i == args.steps - 1:
            print(f"step {i:4d}  loss {loss:.4f}")
    return state


def size(tree) -> int:
    """Number of scalars in a tree."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))


model = Classifier()
base = model.init(jax.random.key(0), jnp.zeros((1, 64)))

print("the base, all of it, on the first five patterns")
full = fit(TrainState.create(apply_fn=model.apply, params=base, tx=optax.adamw(1e-3)), noisy_patterns(0))
pretrained = full.params["params"]

print("BitFit on five others")
peft = jpeft.apply(pretrained, method="bitfit")
tx = jpeft.optimizer(optax.adamw(1e-2, weight_decay=0.1), peft, over="variables")
state = TrainState.create(apply_fn=jpeft.wrap(model.apply, peft.method), params=peft.variables, tx=tx)
state = fit(state, noisy_patterns(1))

moved = [bool((a != b).any()) for a, b in zip(jax.tree.leaves(state.params["params"]), jax.tree.leaves(pretrained), strict=True)]
print(f"leaves of the base that moved: {sum(moved)} of {len(moved)}")
print(f"optimizer state: {size(state.opt_state):,} numbers; of full fine-tuning: {size(full.opt_state):,}")

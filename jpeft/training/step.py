"""The training step: a function of adapter, optimizer state, base, batch and the number of the step.

The dropout key is `fold_in(key, step)`, so a run continued from a checkpoint goes through the same states as an unbroken one, bit for bit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

import jpeft
from jpeft.core.peft import Peft
from jpeft.tasks.task import Batch, Task
from jpeft.training.config import Settings


def make_step(
    forward: Callable[..., Any],
    tx: optax.GradientTransformation,
    task: Task,
    peft: Peft,
    grad_accum: int = 1,
    settings: Settings | None = None,
) -> Callable[..., Any]:
    """Return the training step, to be jitted with its first two arguments donated.

    Only the adapter is differentiated. The base is an argument: neither a constant of the program nor donated.

    Args:
      forward: `jpeft.wrap(model.apply, peft.method)`.
      tx: `jpeft.optimizer(..., peft)`.
      task: Defines the loss of each example.
      peft: Defines method and structure; its arrays are not used.
      grad_accum: Micro-batches that the batch is split into. The gradient is that of the whole batch's mean loss, the mean over all
        predictions in the batch (rows of a classifier, tokens of a text) with equal weights, in whichever micro-batch they are.
      settings: Passed to `Task.loss_inputs` and `Task.losses`.

    Returns:
      `(adapter, opt_state, params, batch, key, step) -> (adapter, opt_state, loss)`.
    """

    def loss_fn(adapter: PyTree, params: PyTree, batch: Batch, key: Array, count: Array) -> Array:
        bound = peft.replace(params=params, adapter=adapter)
        outputs = forward(bound.variables, **task.loss_inputs(batch, settings), deterministic=False, rngs={"dropout": key})
        return task.losses(outputs, batch, settings).sum() / count + jpeft.penalty(bound) / grad_accum

    def step(adapter: PyTree, opt_state: PyTree, params: PyTree, batch: Batch, key: Array, step: Array) -> Any:
        key = jax.random.fold_in(key, step)
        # A batch may hold nothing to predict, such as words that give no token.
        count = jnp.maximum(task.counts(batch).sum(), 1)
        # [batch, ...] -> [grad_accum, batch / grad_accum, ...]
        micro = jax.tree.map(lambda x: x.reshape(grad_accum, -1, *x.shape[1:]), batch)

        def add(total: PyTree, part: tuple[dict[str, Array], Array]) -> tuple[PyTree, None]:
            loss_and_grads = jax.value_and_grad(loss_fn)(adapter, params, *part, count)
            return jax.tree.map(jnp.add, total, loss_and_grads), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, adapter))
        (loss, grads), _ = jax.lax.scan(add, zero, (micro, jax.random.split(key, grad_accum)))
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    return step

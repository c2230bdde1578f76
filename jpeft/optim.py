"""Optimizers for adapters: labels -> `optax.multi_transform`."""

from collections.abc import Mapping

import jax
import optax

from .method import FREEZE, TRAIN
from .peft import Peft


def optimizer(
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    peft: Peft,
    *,
    over: str = "adapter",
) -> optax.GradientTransformation:
    """An optax optimizer that moves what a method trains and nothing else.

    It is `optax.multi_transform` over the method's labels: the *updates* of frozen leaves are set to zero, so neither weight decay nor
    momentum can move them, and they have no optimizer state. Clipping by the global norm inside `tx` counts trained leaves only.

    Args:
      tx: The optimizer of all trained leaves, or one for each label (``{"train": ..., "lora_b": ...}``) of a method with groups.
      peft: What is trained.
      over: "adapter" for loops that differentiate `Peft.adapter` (the cheap way); "variables" for loops whose TrainState holds
        `Peft.variables`, base included. There the gradients of the base are still formed unless XLA finds them unused.

    Returns:
      A gradient transformation over that tree.

    Raises:
      ValueError: if a label has no optimizer, or an optimizer no label.

    >>> import jax.numpy as jnp, optax, jpeft
    >>> peft = jpeft.apply({"dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}}, method="bitfit")
    >>> tx = jpeft.optimizer(optax.adamw(1e-3), peft)
    >>> updates, _ = tx.update(peft.adapter, tx.init(peft.adapter), peft.adapter)
    >>> jnp.shape(updates["dense"]["bias"])
    (4,)
    """
    if over not in ("adapter", "variables"):
        raise ValueError(f"over={over!r} is not one of 'adapter', 'variables'.")
    labels = peft.method.labels(peft.adapter) if over == "adapter" else peft.labels
    used = set(jax.tree.leaves(labels)) - {FREEZE}
    groups = dict(tx) if isinstance(tx, Mapping) else dict.fromkeys(used or {TRAIN}, tx)
    missing, idle = used - groups.keys(), groups.keys() - used - {FREEZE}
    if isinstance(tx, Mapping) and (missing or idle):
        raise ValueError(
            f"The optimizers are for the labels {sorted(groups)}, but {peft.method!r} uses {sorted(used)}: "
            f"{'no optimizer for ' + str(sorted(missing)) if missing else 'no leaf is labelled ' + str(sorted(idle))}."
        )
    return optax.multi_transform({**groups, FREEZE: optax.set_to_zero()}, labels)

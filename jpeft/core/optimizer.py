"""Optimizers for adapters: labels -> `optax.multi_transform`."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from jpeft.core.groups import Group
from jpeft.core.lr_scale import scale_by_path
from jpeft.core.method import FREEZE, TRAIN
from jpeft.core.options import shown
from jpeft.core.peft import Peft, check_peft
from jpeft.core.update_rule import with_rule


def optimizer(
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    peft: Peft,
    *,
    over: str = "adapter",
    lr_scale: Mapping[Any, float | int] | None = None,
) -> optax.GradientTransformation:
    """An optax optimizer that moves what a method trains and nothing else.

    It is `optax.multi_transform` over the method's labels: the *updates* of frozen leaves are set to zero, so neither weight decay nor
    momentum can move them, and they have no optimizer state. Clipping by the global norm inside `tx` counts the leaves of one label only.
    To keep weight decay off biases and normalisations, give optax the mask `jpeft.decay_mask`.

    A method may have parameter groups, such as the gates of DiffPruning, and says in `Method.groups` how each is optimised: at a multiple
    of `tx`'s learning rate, or at a constant one of its own by Adam without weight decay. It may also have a rule for the updates
    themselves, such as the budget of AdaLoRA: the rule then stands behind `tx`, counts its updates, and must be given the adapter,
    ``tx.update(grads, state, adapter)``.

    Args:
      tx: The optimizer of all trained leaves; or one for each label, ``{"train": ..., "gates": ...}``, where a group may be left out that
        the method itself says how to optimise.
      peft: What is trained.
      over: "adapter" for loops that differentiate `Peft.adapter` (the cheap way); "variables" for loops whose TrainState holds
        `Peft.variables`, base included. There the gradients of the base are still formed unless XLA finds them unused.
      lr_scale: Learning rates of some leaves as multiples of the others': ``{rule: factor}``, where a rule is a role, ``"@head"``, a regex
        that must match the whole path of a leaf in the adapter, ``".*/b"``, a name, or a tuple of names. The first rule that chooses a
        leaf counts.

    Returns:
      A gradient transformation over that tree.

    Raises:
      ValueError: if a label has no optimizer, or an optimizer no label; if a rule of `lr_scale` chooses nothing.

    >>> import jax.numpy as jnp, optax, jpeft
    >>> peft = jpeft.apply({"dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}}, method="bitfit")
    >>> tx = jpeft.optimizer(optax.adamw(1e-3, mask=jpeft.decay_mask), peft, lr_scale={("bias",): 2.0})
    >>> updates, _ = tx.update(peft.adapter, tx.init(peft.adapter), peft.adapter)
    >>> jnp.shape(updates["dense"]["bias"])
    (4,)
    """
    check_peft(peft, "optimizer")
    for name, one in (tx if isinstance(tx, Mapping) else {"tx": tx}).items():
        if not (callable(getattr(one, "init", None)) and callable(getattr(one, "update", None))):
            raise ValueError(f"optimizer: {name}={shown(one)} is no optax optimizer, such as optax.adamw(1e-3).")
    if over not in ("adapter", "variables"):
        raise ValueError(f"over={shown(over)} is not one of 'adapter', 'variables'.")
    labels = peft.method.labels(peft.adapter) if over == "adapter" else peft.labels
    used = set(jax.tree.leaves(labels)) - {FREEZE}
    given, common = (dict(tx), tx.get(TRAIN)) if isinstance(tx, Mapping) else ({}, tx)
    found = {label: _of_group(group, common) for label, group in peft.method.groups if label in used}
    groups = {label: how for label, how in found.items() if how is not None} | given
    if not isinstance(tx, Mapping):
        groups = dict.fromkeys(used or {TRAIN}, tx) | groups
    # "train" is in use, too, if only groups are trained, at multiples of its rate.
    shared = {TRAIN} if any(label in found and group.fixed_lr is None for label, group in peft.method.groups) else set()
    missing, idle = used - groups.keys(), given.keys() - used - shared - {FREEZE}
    if missing or idle:
        raise ValueError(
            f"The optimizers are for the labels {sorted(groups)}, but {peft.method!r} uses {sorted(used)}: "
            f"{'no optimizer for ' + str(sorted(missing)) if missing else 'no leaf is labelled ' + str(sorted(idle))}."
        )
    chosen = optax.multi_transform({**groups, FREEZE: optax.set_to_zero()}, labels)
    chosen = scale_by_path(chosen, labels, lr_scale, peft.params) if lr_scale else chosen
    rule = peft.method.update_rule(peft.params, peft.adapter)
    if rule is None:
        return chosen
    if over == "adapter":
        return with_rule(chosen, rule)
    return with_rule(chosen, rule, peft.method.from_collections, lambda tree, adapter: {**tree, **peft.method.to_collections(adapter)})


def _of_group(group: Group, common: optax.GradientTransformation | None) -> optax.GradientTransformation | None:
    """The optimizer of one parameter group. None if it scales the common optimizer and none was given."""
    if group.fixed_lr is not None:
        adam = optax.adam(group.fixed_lr)
        return adam if group.clip is None else optax.chain(optax.clip_by_global_norm(group.clip), adam)
    return None if common is None else optax.chain(common, optax.scale(group.lr_scale))

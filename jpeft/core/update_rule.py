"""Update rules: what a method does to the updates of an optimizer, such as taking ranks out of training by a budget."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from jpeft.tree.adapters import Adapter


class UpdateRule(NamedTuple):
    """A change of the updates that any optimizer makes. `jpeft.optimizer` puts it behind the optimizer, inside the compiled step.

    Attributes:
      init: ``adapter -> state``. Where the state holds something for each leaf, it is a tree with the leaf's path, which is then sharded
        like the leaf.
      update: ``(grads, updates, state, adapter) -> (updates, state)``: the gradients that the optimizer was given, the updates that it
        made of them, and the adapter before the step. Zeros stand for the updates of what is not trained.
    """

    init: Callable[[Adapter], Any]
    update: Callable[[Adapter, Adapter, Any, Adapter], tuple[Adapter, Any]]


class RuledState(NamedTuple):
    """The state of an optimizer with an update rule."""

    optimizer: Any
    rule: Any


def with_rule(
    tx: optax.GradientTransformation,
    rule: UpdateRule,
    get: Callable[[Any], Adapter] = lambda tree: tree,
    put: Callable[[Any, Adapter], Any] = lambda tree, adapter: adapter,
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer with the rule behind it.

    Args:
      tx: The optimizer.
      rule: The rule.
      get: The adapter in the tree that is optimised.
      put: That tree with another adapter.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: Any) -> RuledState:
        return RuledState(tx.init(params), rule.init(get(params)))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, RuledState]:
        if params is None:
            raise ValueError("The method's update rule looks at the values of the adapter: call tx.update(grads, state, adapter).")
        moved, inner = tx.update(updates, state.optimizer, params, **extra)
        ruled, own = rule.update(get(updates), get(moved), state.rule, get(params))
        return put(moved, ruled), RuledState(inner, own)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

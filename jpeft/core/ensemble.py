"""Several adapters of one method in one pass over one base, and what they agree on."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jpeft.core.method import Method
from jpeft.core.peft import Peft, check_peft
from jpeft.hosts.base import Host


def stack(pefts: Sequence[Peft]) -> Peft:
    """Adapters of one method on one base as one, each leaf with a new first axis; the base is not copied.

    Raises:
      ValueError: for none, or for different methods or bases.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"wte": {"embedding": jnp.ones((50, 8))}}
    >>> pefts = [jpeft.apply(params, method="prompt_tuning", length=3, key=jax.random.key(i)) for i in range(5)]
    >>> jpeft.stack(pefts).adapter["wte"]["+"]["prompt"].shape
    (5, 3, 8)
    """
    if isinstance(pefts, Peft) or not pefts or not all(isinstance(peft, Peft) for peft in pefts):
        raise ValueError("stack() needs at least one Peft, in a list: jpeft.stack([peft, other]).")
    first = pefts[0]
    for peft in pefts:
        check_peft(peft, "stack")
        if peft.method != first.method:
            raise ValueError(f"stack() needs adapters of one method, and was given {first.method!r} and {peft.method!r}.")
        if any(mine is not base for mine, base in zip(jax.tree.leaves(peft.params), jax.tree.leaves(first.params), strict=True)):
            raise ValueError("stack() needs adapters of one base: make them all from the very same params.")
    return first.replace(adapter=jax.tree.map(lambda *leaves: jnp.stack(leaves), *(peft.adapter for peft in pefts)))


def ensemble(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapped model run with every one of N stacked adapters on the same inputs, in one pass.

    As in the prompt-tuning paper, the examples are there N times in the batch, each time with another prompt; the base is there once. It
    works for adapters of any method.

    Args:
      forward: A function that `jpeft.wrap` made.

    Returns:
      ``(peft, *args, **kwargs) -> outputs`` with a new first axis N, for the result of `stack`; or ``(variables, ...)`` if `forward` was
      made with a method. Collections other than the adapter's and "cache", a cache that such a call returned, are shared by the members.

    Raises:
      ValueError: if `forward` was not made by `jpeft.wrap`.

    >>> import jax.numpy as jnp, jpeft
    >>> from flax import linen as nn
    >>> model, x = nn.Dense(4), jnp.ones((2, 8))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> stacked = jpeft.stack([jpeft.apply(params, method="lora", rank=2, key=jax.random.key(i)) for i in range(3)])
    >>> jpeft.ensemble(jpeft.wrap(model.apply))(stacked, x).shape
    (3, 2, 4)
    """
    wrapped = inspect.unwrap(forward, stop=lambda fn: hasattr(fn, "method"))
    if not isinstance(getattr(wrapped, "host", None), Host):
        raise ValueError(f"ensemble needs a function that jpeft.wrap made, and was given {forward!r}.")
    method: Method | None = wrapped.method  # pyright: ignore[reportFunctionMemberAccess]

    @functools.wraps(forward)
    def run(variables: Peft | Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if isinstance(variables, Peft):
            peft, collections = variables, kwargs.pop("collections", None) or {}
            member = lambda peft, collections: forward(peft, *args, collections=collections, **kwargs)
            return jax.vmap(member, in_axes=(peft.replace(params=None, adapter=0), _axes(collections)))(peft, dict(collections))
        own = method.to_collections(method.from_collections(variables)) if method is not None else ()
        return jax.vmap(lambda variables: forward(variables, *args, **kwargs), in_axes=(_axes(variables, own),))(dict(variables))

    return run


def _axes(collections: Mapping[str, Any], adapter: Collection[str] = ()) -> dict[str, int | None]:
    """The axis of members in each collection: an adapter, and what it wrote into a cache, are a member's own; all else is shared."""
    return {name: 0 if name in adapter or name == "cache" else None for name in collections}


def majority(logits: Float[Array, "members batch labels"]) -> Int[Array, " batch"]:
    """The label that most members vote for; among equals the one of the highest mean probability.

    >>> import jax.numpy as jnp, jpeft
    >>> jpeft.majority(jnp.array([[[2.0, 1.0, 0.0]], [[2.0, 1.0, 0.0]], [[0.0, 0.0, 99.0]]]))
    Array([0], dtype=int32)

    Reference: Lester, Al-Rfou and Constant, The Power of Scale for Parameter-Efficient Prompt Tuning, 2021,
    https://arxiv.org/abs/2104.08691, section 6: five prompts beat the best of them.
    """
    votes = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    # A mean probability is below 1, which is what one vote more is worth.
    return (votes + jax.nn.softmax(logits, axis=-1).mean(0)).argmax(-1).astype(jnp.int32)

"""What is checked: a model, a method on its parameters, and inputs, run in one form whatever the host."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.method import FREEZE, Method
from jpeft.core.peft import Peft, check_peft, penalty, wrap
from jpeft.hosts.base import Host
from jpeft.tree.adapters import Adapter, split
from jpeft.tree.paths import Params, flatten, replace


class Nothing(Method):
    """No method at all: a model wrapped with it is the model, in every host."""

    name = "nothing"
    summary = "the model as it is"
    why_no_merge = None

    def init(self, key: jax.Array, params: Params, *, stats: Any = None) -> Adapter:
        """No leaves."""
        del key, params, stats
        return {}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that can be run with any adapter, or without one.

    Attributes:
      forward: ``jpeft.wrap(fn)``.
      peft: Base, adapter and method.
      inputs: Of the model.
      keywords: Of the model.
    """

    forward: Callable[..., Any]
    peft: Peft
    inputs: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def run(self, adapter: Adapter, params: Params | None = None) -> Any:
        """The outputs with an adapter."""
        given = {"adapter": adapter} | ({} if params is None else {"params": params})
        return self.forward(self.peft.replace(**given), *self.inputs, **self.keywords)

    def run_base(self, params: Params | None = None) -> Any:
        """The outputs without any method."""
        return self.forward(Peft(self.peft.params if params is None else params, {}, Nothing()), *self.inputs, **self.keywords)

    def score(self, adapter: Adapter, params: Params) -> tuple[jax.Array, Any]:
        """A scalar that every output and the method's penalty move, and the outputs."""
        out = self.run(adapter, params)
        return score(out) + penalty(self.peft.replace(adapter=adapter)), out

    @functools.cached_property
    def base_program(self) -> Any:
        """The model as it is, ``params -> outputs``, traced."""
        return jax.jit(self.run_base).trace(self.peft.params)

    @functools.cached_property
    def program(self) -> Any:
        """The model with the method, ``(adapter, params) -> outputs``, traced."""
        return jax.jit(self.run).trace(self.peft.adapter, self.peft.params)

    @functools.cached_property
    def gradient_program(self) -> Any:
        """The gradient, ``(adapter, params) -> (gradient, outputs)``, traced."""
        return jax.jit(jax.grad(self.score, has_aux=True)).trace(self.peft.adapter, self.peft.params)

    @functools.cached_property
    def places(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Parameters that are adapted, those among them with leaves beside them, and modules that leaves are added to."""
        method, adapter = self.peft.method, self.peft.adapter
        each = [split(self.peft.params, part) for part in ([adapter[name] for name, _ in method.parts] or [adapter])]
        joined = lambda paths: tuple(dict.fromkeys(path for part in paths for path in part))
        return joined([{**r, **b} for r, b, _ in each]), joined([b for _, b, _ in each]), joined([a for *_, a in each])

    @property
    def trained(self) -> list[str]:
        """The leaves of the adapter that are trained."""
        labels = flatten(self.peft.method.labels(self.peft.adapter))
        return [path for path, label in labels.items() if label != FREEZE]


def subject(model: Any, peft: Any, inputs: tuple[Any, ...], keywords: Mapping[str, Any], host: str | Host = "auto") -> Subject:
    """Return what is to be checked.

    Raises:
      ValueError: if `peft` is no `Peft`, or `model` is wrapped with one method already.
    """
    check_peft(peft, "check")
    if hasattr(model, "host") and hasattr(model, "method"):
        if model.method is not None:
            raise ValueError(
                "The check runs the model with and without the method, so it takes the model itself, such as model.apply, or "
                f"jpeft.wrap(model.apply), and was given a function that was wrapped with {model.method!r}."
            )
        return Subject(model, peft, inputs, keywords)
    return Subject(wrap(model, host=host), peft, inputs, keywords)


def floats(outputs: Any) -> list[jax.Array]:
    """The arrays of real numbers among outputs of any structure."""
    return [leaf for leaf in jax.tree.leaves(outputs) if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)]


def score(outputs: Any) -> jax.Array:
    """A sum of all outputs with random weights: a scalar that every output moves.

    Raises:
      ValueError: if there is no real number among the outputs.
    """
    found = floats(outputs)
    if not found:
        raise ValueError("The model returns no real numbers for these inputs, so nothing can be differentiated. Check what it is given.")
    weights = (np.random.default_rng(number).standard_normal(leaf.shape) for number, leaf in enumerate(found))
    return sum(
        (jnp.sum(leaf.astype(jnp.float32) * weight.astype(np.float32)) for leaf, weight in zip(found, weights, strict=True)), jnp.zeros(())
    )


def noised(adapter: Adapter, paths: list[str], seed: int = 0) -> Adapter:
    """The adapter with noise on some leaves: a leaf of zeros would hide what is wrong with the others."""
    random, leaves, changed = np.random.default_rng(seed), flatten(adapter), {}
    for path in paths:
        leaf = leaves[path]
        size = float(jnp.sqrt(jnp.mean(jnp.square(leaf.astype(jnp.float32))))) if leaf.size else 0.0
        noise = random.standard_normal(leaf.shape).astype(np.float32) * (0.3 * size or 0.1)
        changed[path] = (leaf + noise).astype(leaf.dtype)
    return replace(adapter, changed)

"""A host to copy: the least that a framework needs, for a framework in which a model is a list of layers.

Copy the file to `jpeft/hosts/<framework>.py` and replace what is marked. `docs/guides/adding_a_host.md` explains each step.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jpeft.core.layer import Layer, Linear
from jpeft.core.method import Method
from jpeft.hosts.base import Host, dropout_key
from jpeft.tree.adapters import GRAFT, pop_grafts
from jpeft.tree.kernels import KernelAxes


# REPLACE by the framework: here a model holds named layers, and `apply` runs them one after the other.
class Model:
    """A list of layers ``(name, fn)``, each run as ``fn(params[name], x)``."""

    def __init__(self, *layers: tuple[str, Callable[[Any, jax.Array], jax.Array]]):
        self.layers = layers

    def apply(self, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        """Run all layers."""
        for name, fn in self.layers:
            x = fn(params[name], x)
        return x


def dense(own: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """``x W + b``."""
    return x @ own["kernel"] + own["bias"][None]


class ListHost(Host):
    """REPLACE: models of <framework>."""

    name = "list"  # REPLACE: as in jpeft.wrap(fn, host="list")

    def recognises(self, target: Any) -> bool:
        """Whether a model, or a function that runs one, belongs to the framework."""
        return isinstance(target, Model) or isinstance(getattr(target, "__self__", None), Model)

    def wrap(self, fn: Callable[..., Any], method: Method) -> Callable[..., Any]:
        """The model with the method's `call` around every layer that has leaves."""
        model: Model = fn.__self__  # type: ignore[attr-defined]

        @functools.wraps(fn)
        def forward(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            # 1. The base with the adapter's leaves in place of, or beside, its own.
            rng = dropout_key(kwargs.pop("rngs", None))
            bound = method.bind(self.unwrap(variables["params"]), method.from_collections(variables), rng=rng)
            # 2. REPLACE by the framework's own way to stand around each of its layers.
            ran: set[str] = set()
            layers = [(name, functools.partial(_run_layer, method, rng, ran, name, layer)) for name, layer in model.layers]
            out = Model(*layers).apply(bound, *args, **kwargs)
            # 3. Leaves that no layer has read would be lost.
            lost = pop_grafts(bound)[1].keys() - ran
            if lost:
                raise ValueError(f"{method.name} adds to {sorted(lost)}, but no such layer ran.")
            return out

        return forward


def _run_layer(
    method: Method, rng: jax.Array | None, ran: set[str], name: str, fn: Callable[..., Any], params: Mapping[str, Any], x: jax.Array
) -> Any:
    """Run one layer, with the method around it if the layer finds leaves of the method among its parameters."""
    own = {key: value for key, value in params.items() if key != GRAFT}
    ran.add(name)
    if GRAFT not in params:
        return fn(own, x)
    # A `Layer` is a pure function of the layer's parameters and inputs: methods run it again, on other parameters, and differentiate it.
    return method.call(Layer(run=fn, params=own, path=name, linear=_linear(fn), dtype=x.dtype), (x,), params[GRAFT], rng)


def _linear(fn: Callable[..., Any]) -> Linear | None:
    """REPLACE by the framework's layer classes. A layer that is left out still works, at the cost of full fine-tuning."""
    if fn is dense:
        return Linear("kernel", KernelAxes(stack=(), inputs=(0,), outputs=(1,)), apply_low_rank=lambda x, a, b: (x @ a) @ b)
    return None

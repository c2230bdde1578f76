"""A framework of plain functions with named layers, and its host: what a new host has to bring, in one file.

A model is a function ``model(params, x)`` over nested dicts. It runs each layer through ``layer(name, fn, params, x)``. The framework lets
others stand around its layers, by `around_layers`, as linen does by `nn.intercept_methods`.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import KernelAxes, Layer, Linear, flatten
from jpeft.core.method import Method
from jpeft.hosts.base import Host, dropout_key
from jpeft.tree.adapters import GRAFT

# --- the framework ----------------------------------------------------------------------------------------------------------------------

_around: contextvars.ContextVar[tuple[Callable[..., Any], ...]] = contextvars.ContextVar("around", default=())


def layer(name: str, fn: Callable[[Any, jax.Array], jax.Array], params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """Run the layer called `name`, ``fn(params[name], x)``."""
    run = lambda own, x: fn(own, x)
    for hook in _around.get():
        run = functools.partial(hook, name, fn, run)
    return run(params[name], x)


@contextlib.contextmanager
def around_layers(hook: Callable[..., Any]) -> Iterator[None]:
    """Call ``hook(name, fn, run, own, x)`` in place of ``run(own, x)`` for every layer; the outermost hook last."""
    token = _around.set((*_around.get(), hook))
    try:
        yield
    finally:
        _around.reset(token)


def dense(own: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """``x W + b``."""
    return x @ own["kernel"] + own["bias"][None]


def heads(own: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """x [b, d] and a kernel [d, n, h] to [b, n h]."""
    return jnp.einsum("bd,dnh->bnh", x, own["kernel"]).reshape(x.shape[0], -1)


def scale(own: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """A layer that is not linear in a kernel."""
    return x * jnp.tanh(own["scale"])[None]


# --- the host ---------------------------------------------------------------------------------------------------------------------------


class ToyHost(Host):
    """Models whose layers run through `layer`."""

    name = "toy"

    def recognises(self, target: Any) -> bool:
        """Whether a function stands in a file that uses `layer`."""
        return getattr(target, "__globals__", {}).get("layer") is layer

    def wrap(self, fn: Callable[..., Any], method: Method) -> Callable[..., Any]:
        """The method's `call` around every layer that has leaves."""

        @functools.wraps(fn)
        def forward(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            rng = dropout_key(kwargs.pop("rngs", None))
            params = method.bind(variables["params"], method.from_collections(variables), rng=rng)
            unread = {path.partition(f"/{GRAFT}/")[0] for path in flatten(params) if f"/{GRAFT}/" in path}

            def hook(name: str, fn: Any, run: Any, own: Mapping[str, Any], x: jax.Array) -> Any:
                unread.discard(name)
                leaves, own = own.get(GRAFT), {key: value for key, value in own.items() if key != GRAFT}
                if leaves is None:
                    return run(own, x)
                return method.call(Layer(run, own, name, linear=linear_of(fn, own), dtype=x.dtype), (x,), leaves, rng)

            with around_layers(hook):
                out = fn(params, *args, **kwargs)
            if unread:
                raise ValueError(f"{method.name} adds to the layers {sorted(unread)}, which did not run.")
            return out

        return forward

    def kernel_axes(self, model: Any, params: Any, *args: Any, **kwargs: Any) -> tuple[tuple[str, KernelAxes], ...]:
        """Read off the layers that run."""
        found: dict[str, KernelAxes] = {}

        def hook(name: str, fn: Any, run: Any, own: Mapping[str, Any], x: jax.Array) -> Any:
            linear = linear_of(fn, own)
            if linear is not None:
                found[f"{name}/{linear.name}"] = linear.axes
            return run(own, x)

        with around_layers(hook):
            jax.eval_shape(lambda params, *args: model(params, *args, **kwargs), params, *args)
        return tuple(found.items())

    def inputs_of(self, model: Any, params: Any, name: str, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        """What the layer of that name is given."""
        found: dict[str, list[Any]] = {}

        def hook(layer_name: str, fn: Any, run: Any, own: Any, x: jax.Array) -> Any:
            if layer_name == name:
                found.setdefault(name, [x])
            return run(own, x)

        with around_layers(hook):
            model(params, *args, **kwargs)
        return found

    def map_outputs(self, fn: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
        """`change` after every layer."""

        @functools.wraps(fn)
        def run(*args: Any, **kwargs: Any) -> Any:
            with around_layers(lambda name, fn, run, own, x: change(run(own, x))):
                return fn(*args, **kwargs)

        return run


def linear_of(fn: Any, own: Mapping[str, Any]) -> Linear | None:
    """The geometry of a layer, by its function."""
    if fn is dense:
        return Linear("kernel", KernelAxes((), (0,), (1,)), lambda x, a, b: (x @ a) @ b)
    if fn is heads:
        branch = lambda x, a, b: heads({"kernel": b}, x @ a)  # [b, d] . [d, r] -> [b, r] . [r, n, h]
        return Linear("kernel", KernelAxes((), (0,), (1, 2)), branch)
    return None

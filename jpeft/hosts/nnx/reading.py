"""Reading an NNX model: the inputs of its modules, and the geometry of its kernels."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jpeft.hosts.nnx.patching import public_methods, subclass
from jpeft.hosts.nnx.targets import Target
from jpeft.hosts.products.find import find_products, geometry
from jpeft.hosts.products.layer_mark import mark
from jpeft.tree.kernels import KernelAxes
from jpeft.tree.paths import Params, flatten

PREFIX = "jpeft_input_"  # of the names under which inputs are recorded


def kernel_axes(model: Any, params: Params, *args: Any, **kwargs: Any) -> tuple[tuple[str, KernelAxes], ...]:
    """The geometry of every kernel, read off the products of the model in one abstract pass; see `jpeft.hosts.base.Host.kernel_axes`."""
    target = Target.of(model)
    others = target.model.with_others({})

    def run(params: Any, others: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        copy = target.model.merge(target.model.with_params(params), others)
        for _, node in nnx.iter_graph(copy):
            if isinstance(node, nnx.Module) and not isinstance(node, nnx.bridge.ToNNX):
                object.__setattr__(node, "__class__", _marking(type(node)))
        return target.call(copy, *args, **kwargs)

    products = find_products(run, flatten(params), others, args, kwargs)
    return tuple((re.escape(path), axes) for path, axes in geometry(products).items())


def inputs_of(model: Any, params: Params, name: str, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
    """The arrays that each module called `name` is given when it first runs; see `jpeft.hosts.base.Host.inputs_of`."""
    target = Target.of(model)
    copy = target.model.merge(target.model.with_params(flatten(params)), target.model.with_others({}))
    for path, node in nnx.iter_graph(copy):
        if isinstance(node, nnx.Module) and str(path[-1] if path else "") == name:
            object.__setattr__(node, "__class__", _recording(type(node)))
    target.call(copy, *args, **kwargs)
    found: dict[str, list[Any]] = {}
    for path, leaf in flatten(nnx.state(copy, nnx.Intermediate)).items():
        module, here, _ = path.rpartition(f"/{PREFIX}")
        if here:
            found.setdefault(module, []).append(leaf)
    return found


@functools.cache
def _marking(cls: type) -> type:
    """A class whose methods mark the parameters of the module, as the module sees them; see `jpeft.hosts.products.layer_mark`."""

    def patch(name: str) -> Callable[..., Any]:
        original = inspect.getattr_static(cls, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            for value in vars(self).values():
                if isinstance(value, nnx.Param):
                    mark(value.get_value())
            return original.__get__(self, type(self))(*args, **kwargs)

        return functools.update_wrapper(method, original, updated=())

    return subclass(cls, {name: patch(name) for name in public_methods(cls)})


@functools.cache
def _recording(cls: type) -> type:
    """A class that records what the module is given by position."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        for i, x in enumerate(args):
            if isinstance(x, jax.Array) and not hasattr(self, f"{PREFIX}{i}"):
                # A variable and not a list in Python: inside of a scan x is one layer's, and the scan stacks what variables hold.
                setattr(self, f"{PREFIX}{i}", nnx.Intermediate(x))
        return cls.__call__(self, *args, **kwargs)  # pyright: ignore[reportCallIssue]

    return subclass(cls, {"__call__": functools.update_wrapper(call, cls.__call__, updated=())})

"""Reading a linen model: the inputs of its modules, and the geometry of its kernels."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import DenyList

from jpeft.hosts.linen.calls import bind_by_position, is_layer_call, own_params
from jpeft.hosts.linen.layers import linear_of
from jpeft.tree.kernels import KernelAxes
from jpeft.tree.paths import Params, flatten

INTERMEDIATES = "intermediates"
PREFIX = "jpeft_input_"  # of the names under which inputs are recorded


def inputs_of(
    model: nn.Module, params: Params, collections: Mapping[str, Any], name: str, *args: Any, **kwargs: Any
) -> dict[str, list[Any]]:
    """The arrays that each module called `name` is given when it first runs; see `jpeft.hosts.base.Host.inputs_of`."""

    def record(next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if module.name == name and context.method_name == "__call__" and is_layer_call(context):
            for i, x in enumerate(bind_by_position(module, "__call__", args, kwargs)[0]):
                if isinstance(x, jax.Array):
                    # `sow` and not a list in Python: inside `nn.scan` x is one layer's tracer, and linen stacks what is sown.
                    module.sow(INTERMEDIATES, f"{PREFIX}{i}", x)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        _, state = model.apply({**collections, "params": params}, *args, **{"mutable": _writable(collections), **kwargs})
    found: dict[str, list[Any]] = {}
    for path, leaf in flatten(state.get(INTERMEDIATES, {})).items():
        module, _, rest = path.rpartition(f"/{PREFIX}")
        if module and rest.endswith("/0"):  # linen numbers the calls of a module; 0 is the first
            found.setdefault(module, []).append(leaf)
    return found


def kernel_axes(
    model: nn.Module, params: Params, collections: Mapping[str, Any], *args: Any, **kwargs: Any
) -> tuple[tuple[str, KernelAxes], ...]:
    """The geometry of every kernel, read off the layers in one abstract pass; see `jpeft.hosts.base.Host.kernel_axes`."""
    outer = flatten(params)
    found: dict[str, KernelAxes] = {}

    def record(next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module, method_name = context.module, context.method_name
        if is_layer_call(context):
            # Inside the layer, where scans and maps have sliced their axes away.
            own = own_params(module)
            inputs, rest = bind_by_position(module, method_name, args, kwargs)
            linear = linear_of(module.clone(parent=None, name=None), method_name, own, inputs, rest)
            if linear is not None:
                path = "/".join((*module.path, linear.name))
                found[path] = add_stack_axes(linear.axes, own[linear.name].shape, outer[path].shape)
        return next_fun(*args, **kwargs)

    def apply(params: Params, *args: Any) -> Any:
        with nn.intercept_methods(record):
            return model.apply({**collections, "params": params}, *args, **{"mutable": _writable(collections), **kwargs})

    # Shapes suffice: nothing is computed, and the parameters may be abstract.
    jax.eval_shape(apply, params, *args)
    return tuple((re.escape(path), axes) for path, axes in found.items())


def _writable(collections: Mapping[str, Any]) -> DenyList:
    """Which collections a model may write: all but its parameters. Running means that are not given are made; a cache is not."""
    return DenyList(tuple({"params", "cache"} - collections.keys()))


def add_stack_axes(axes: KernelAxes, inner: tuple[int, ...], outer: tuple[int, ...]) -> KernelAxes:
    """The geometry of a kernel as it stands in the parameters, from that inside its layer, where loops have sliced axes away.

    A single sliced axis is the first whose removal from the outer shape leaves the inner one. Several are taken to be the leading ones.

    >>> add_stack_axes(KernelAxes((), (0,), (1,)), (16, 32), (16, 24, 32))     # 24 layers, scanned along axis 1
    KernelAxes(stack=(1,), inputs=(0,), outputs=(2,))
    """
    count = len(outer) - len(inner)
    if not count:
        return axes
    sliced = list(range(count)) if count > 1 else [i for i in range(len(outer)) if outer[:i] + outer[i + 1 :] == inner][:1]
    # Axis i inside the layer is axis kept[i] in the parameters.
    kept = [i for i in range(len(outer)) if i not in sliced]
    stack, inputs, outputs = (tuple(kept[i] for i in part) for part in axes)
    return KernelAxes((*sliced, *stack), inputs, outputs)

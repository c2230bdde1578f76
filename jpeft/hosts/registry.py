"""Hosts by name, and the questions that are put to all of them. Every `Host` whose class stands in a file of this folder is found.

A host of several files is a folder; its `__init__.py` imports the class.
"""

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from typing import Any

from jpeft import hosts as package
from jpeft.hosts.base import Host, innermost
from jpeft.tree.kernels import KernelAxes, axes_of
from jpeft.tree.paths import Params, flatten

AUTO = "auto"


@functools.cache
def hosts() -> tuple[Host, ...]:
    """All hosts in the order in which they are asked: hosts of one framework by name, then those that take any function.

    >>> [host.name for host in hosts()]
    ['linen', 'nnx', 'dense']
    """
    found: list[Host] = []
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            own = f"{cls.__module__}.".startswith(f"{module.name}.")  # not what the file imports from elsewhere
            if own and issubclass(cls, Host) and not inspect.isabstract(cls):
                found.append(cls())
    return tuple(sorted(found, key=lambda host: (host.takes_any, host.name)))


def host_for(target: Any, host: str | Host = AUTO) -> Host:
    """The host of a model or function: the one that is given, or the first that recognises the target.

    Raises:
      ValueError: for an unknown name.

    >>> import jax.numpy as jnp
    >>> host_for(jnp.tanh).name
    'dense'
    """
    if isinstance(host, Host):
        return host
    by_name = {each.name: each for each in hosts()}
    if host == AUTO:
        return next(each for each in hosts() if each.recognises(target))
    if host not in by_name:
        raise ValueError(f"host={host!r} is not one of {', '.join(map(repr, (AUTO, *by_name)))}, nor a jpeft.hosts.base.Host.")
    return by_name[host]


def host_inside(
    fn: Callable[..., Any], params: Params, collections: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Host, Callable[..., Any]]:
    """The host of the models that a function runs inside, and the function in the form that the host takes; see `Host.form_inside`."""
    for host in hosts():
        form = host.form_inside(fn, params, collections, args, kwargs)
        if form is not None:
            return host, functools.update_wrapper(form, innermost(fn))
    return next(host for host in hosts() if host.takes_any), fn


def unwrap(params: Params) -> Params:
    """Parameters as a tree of arrays, without the wrappers of any framework."""
    return functools.reduce(lambda tree, host: host.unwrap(tree), hosts(), params)


def kernel_axes(model: Any, params: Params, *args: Any, **kwargs: Any) -> tuple[tuple[str, KernelAxes], ...]:
    """The geometry of every kernel of a model, read off its layers in one abstract forward pass.

    Args:
      model: A linen module, or a model of another framework that a host knows.
      params: Its parameters, or their shapes.
      *args: Example inputs, or their shapes; as for ``model.apply`` after the variables.
      **kwargs: Further arguments of the model.

    Returns:
      Rules for the option `axes` of any method that factorises kernels, one for each kernel, stack axes of `nn.scan` included.

    Raises:
      ValueError: if no host can read this model.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> from flax import linen as nn
    >>> model = nn.DenseGeneral((4, 8))
    >>> x = jnp.ones((2, 32))
    >>> jpeft.kernel_axes(model, model.init(jax.random.key(0), x)["params"], x)
    (('kernel', KernelAxes(stack=(), inputs=(0,), outputs=(1, 2))),)
    """
    return host_for(model).kernel_axes(model, params, *args, **kwargs)


def unknown_axes(model: Any, params: Params, inputs: Any) -> tuple[tuple[str, KernelAxes], ...]:
    """The rules of `kernel_axes` for the kernels whose names do not tell their geometry, or tell another.

    Args:
      model: As for `kernel_axes`.
      params: Likewise.
      inputs: A tuple of inputs, a dict of keyword arguments, or one array.
    """
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs if isinstance(inputs, tuple | list) else (inputs,), {})
    shapes = {re.escape(path): (path, tuple(leaf.shape)) for path, leaf in flatten(params).items()}
    return tuple((pattern, axes) for pattern, axes in kernel_axes(model, params, *args, **kwargs) if _by_name(*shapes[pattern]) != axes)


def _by_name(path: str, shape: tuple[int, ...]) -> KernelAxes | None:
    try:
        return axes_of(path, shape)
    except ValueError:
        return None


def inputs_of(model: Any, params: Params, name: str, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
    """The arrays that each module called `name` is given in one forward pass, by the path of the module; see `Host.inputs_of`.

    >>> from jpeft.hosts.registry import inputs_of
    >>> from flax import linen as nn
    >>> model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), jnp.ones((1, 8))
    >>> {path: inputs[0].shape for path, inputs in inputs_of(model, model.init(key, x)["params"], "layers_2", x).items()}
    {'layers_2': (1, 4)}
    """
    return host_for(model).inputs_of(model, params, name, *args, **kwargs)


def map_outputs(fn: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """`fn` with `change` applied to the outputs of every module that runs inside, whatever its framework.

    Any function may run a model, so all hosts are asked, and with them the host that `jpeft.wrap` used for `fn`.
    """
    own = getattr(fn, "host", None)
    others = (own,) if isinstance(own, Host) and own not in hosts() else ()
    return functools.reduce(lambda run, host: host.map_outputs(run, change), (*hosts(), *others), fn)

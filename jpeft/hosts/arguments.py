"""The arguments of one call of a module's method, by position, as `Method.call` sees them whatever the spelling of the model."""

import functools
import inspect
from typing import Any


def bind_by_position(
    module: Any, method_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Move keyword arguments that may be positional to their places, so that `Method.call` need not know how a model spells its calls.

    ``dense(inputs=x)`` becomes ``dense(x)``.
    """
    if not kwargs:
        return args, kwargs  # the common case, without the cost of a signature
    try:
        signature = _signature(type(module), method_name)
        bound = signature.bind(module, *args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs  # the module itself will say what is wrong with the call
    # An argument that is left out in front of one that is given gets its default: without it the later one could not be positional.
    names = argument_names(type(module), method_name)
    given = [i for i, name in enumerate(names) if name in bound.arguments]
    for name in names[: max(given, default=0)]:
        bound.arguments.setdefault(name, signature.parameters[name].default)
    return bound.args[1:], bound.kwargs


@functools.cache
def _signature(cls: type, method_name: str) -> inspect.Signature:
    return inspect.signature(getattr(cls, method_name))


@functools.cache
def argument_names(cls: type, method_name: str) -> tuple[str, ...]:
    """The names of a method's positional arguments, without self."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = _signature(cls, method_name).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in positional)[1:]

"""What `jpeft.wrap` is given of an NNX model: the model, and what of it to call."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from jpeft.hosts.nnx.states import Snapshot

CALL = "__call__"


@dataclasses.dataclass(frozen=True, slots=True)  # without a `__dict__`, which `functools.wraps` would copy
class Target:
    """A model, as it was when it was wrapped, and one way of calling it.

    Attributes:
      model: The model.
      call: ``(copy, *args, **kwargs)``: the same call of a copy of the module.
      signature: That of the call, without the module; None if it is not known.
    """

    model: Snapshot
    call: Callable[..., Any]
    signature: inspect.Signature | None

    @classmethod
    def of(cls, fn: Any) -> "Target":
        """The target in a module, a graphdef, a bound method of a module, or partial applications of these and of functions of a module."""
        filled: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []
        inner: Any = fn
        while isinstance(inner, functools.partial) and not (inner.args and isinstance(inner.args[0], nnx.Module)):
            filled.append((inner.args, inner.keywords))
            inner = inner.func
        if isinstance(inner, functools.partial):  # a function whose first argument is the module, as a method made by `nnx.jit` is
            (model, *args), keywords, function = inner.args, inner.keywords, inner.func
            filled.append((tuple(args), keywords))
            call = function
            name = getattr(function, "__name__", "")
            if inspect.getattr_static(type(model), name, None) is function:
                call = _method(name)
        elif isinstance(inner, nnx.Module | nnx.GraphDef):
            model, call = inner, _method(CALL)
            first = inner.nodes[0] if isinstance(inner, nnx.GraphDef) else None
            function = getattr(type(inner) if first is None else getattr(first, "type", None), CALL, None)
        elif not isinstance(getattr(inner, "__self__", None), nnx.Module):
            raise ValueError(
                f"host='nnx' takes a module, its graphdef, a method of it, or functools.partial(function, module), not {fn!r}. "
                "A function of parameters that merges a model itself runs through host='dense'."
            )
        else:
            model, function = getattr(inner, "__self__"), getattr(inner, "__func__")  # noqa: B009  # a checker takes it for a function
            own = getattr(type(model), inner.__name__, None) is function
            call = _method(inner.__name__) if own else function
        for args, keywords in reversed(filled):
            call = _fill(call, args, keywords)
        return cls(Snapshot.of(model), call, _signature(function))

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the call, for `inspect.signature`."""
        return self.signature or inspect.Signature()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call a copy of the model as it was."""
        return self.call(self.model.merge(self.model.params, self.model.with_others({})), *args, **kwargs)

    def takes(self, name: str) -> bool:
        """Whether the call has an argument of that name."""
        return self.signature is not None and name in self.signature.parameters


def _method(name: str) -> Callable[..., Any]:
    return lambda model, *args, **kwargs: getattr(model, name)(*args, **kwargs)


def _fill(call: Callable[..., Any], args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Callable[..., Any]:
    return lambda model, *more, **others: call(model, *args, *more, **{**keywords, **others})


def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None

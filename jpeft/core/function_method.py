"""Deprecated: a method made of functions, ``jpeft.Method(name=..., init=..., call=...)``. Subclass `jpeft.Method` instead."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import jax

from jpeft.core import options as opt
from jpeft.core.groups import Group
from jpeft.core.layer import Layer
from jpeft.core.method import Method, with_head
from jpeft.core.stages import Stage
from jpeft.core.statistics import Statistic, kinds_of
from jpeft.deprecation import warn_renamed
from jpeft.tree.adapters import Adapter
from jpeft.tree.paths import Params

P = ParamSpec("P")

FUNCTIONS = ("init", "bind", "call", "merge", "labels", "penalty", "changed", "shapes", "fold")


class FunctionMethod(Method):
    """A method whose functions are values.

    Attributes:
      functions: The functions that were given, as pairs of the old field's name and function.
      settings: The other values that were given, as pairs.
      given: The options of a factory; None for a method made by hand.
    """

    functions: tuple[tuple[str, Any], ...]
    settings: tuple[tuple[str, Any], ...] = ()
    given: Any = None

    @classmethod
    def deprecated(cls, **fields: Any) -> "FunctionMethod":
        """The method that ``jpeft.Method(...)`` made in earlier versions."""
        warn_renamed("jpeft.Method(init=..., ...)", "a subclass of jpeft.Method with the function init", stacklevel=4)
        given_functions = {name: fields.pop(name, None) for name in FUNCTIONS}
        functions = tuple((name, fn) for name, fn in given_functions.items() if fn is not None)
        needs = fields.pop("needs", None)
        given = fields.pop("options", None)
        settings = {"requires_stats": kinds_of(needs), **fields}
        return cls(functions=functions, settings=tuple(settings.items()), given=given)

    def _function(self, name: str) -> Callable[..., Any] | None:
        return dict(self.functions).get(name)

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The name that was given."""
        return dict(self.settings).get("name", "custom")

    def init(self, key: jax.Array, params: Params, *, stats: Any = None) -> Adapter:
        """The function `init`."""
        return dict(self.functions)["init"](key, params, stats=stats)

    def bind(self, params: Params, adapter: Adapter, *, rng: jax.Array | None = None) -> Params:
        """The function `bind`, or the default."""
        bind = self._function("bind") or super().bind
        return bind(params, adapter, rng=rng)

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """The function `call`, or the default."""
        return (self._function("call") or super().call)(layer, inputs, leaves, rng)

    @property
    def wraps_layers(self) -> bool:
        """Whether a function `call` was given."""
        return self._function("call") is not None

    def merge(self, params: Params, adapter: Adapter) -> Params:
        """The function `merge`, or the default, which refuses."""
        return (self._function("merge") or super().merge)(params, adapter)

    def labels(self, adapter: Adapter) -> Any:
        """The function `labels`, or the default."""
        return (self._function("labels") or super().labels)(adapter)

    def penalty(self, adapter: Adapter) -> jax.Array:
        """The function `penalty`, or the default."""
        return (self._function("penalty") or super().penalty)(adapter)

    def count_changed(self, params: Params, adapter: Adapter) -> int:
        """The function `changed`, or the default."""
        return (self._function("changed") or super().count_changed)(params, adapter)

    def expected(self, params: Params, adapter: Adapter) -> Adapter:
        """The function `shapes`, or the default."""
        return (self._function("shapes") or super().expected)(params, adapter)

    @property
    def folds(self) -> bool:
        """Whether a function `fold` was given."""
        return self._function("fold") is not None

    def fold(self, params: Params, adapter: Adapter) -> tuple[Method, Adapter]:
        """The function `fold`, or the default."""
        return (self._function("fold") or super().fold)(params, adapter)

    @property
    def requires_stats(self) -> tuple[type[Statistic], ...]:
        """The kind that `needs` named."""
        return dict(self.settings).get("requires_stats", ())

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that were given."""
        return dict(self.settings).get("stages", ())

    @property
    def groups(self) -> tuple[tuple[str, Group], ...]:
        """The groups that were given."""
        return dict(self.settings).get("groups", ())

    @property
    def reduce_grads_locally(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The old field `reduces`."""
        return dict(self.settings).get("reduces", False)

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """The options of the factory; none for a method made by hand."""
        return self.given or ()

    def config(self) -> dict[str, Any]:
        """The factory's name and options.

        Raises:
          ValueError: for a method made by hand.
        """
        if self.given is None:
            raise ValueError(f"The method '{self.name}' was made by hand and has no configuration: pass the Method itself, method=...")
        return {"method": self.name, **{name: opt.plain(value) for name, value in self.given}}

    def replace(self, **options: Any) -> "FunctionMethod":
        """A copy with some functions or settings exchanged."""
        fields = {**dict(self.functions), **dict(self.settings), **options}
        kinds = fields.pop("requires_stats", ())
        copy = self.deprecated(**fields)
        return FunctionMethod(functions=copy.functions, settings=tuple({**dict(copy.settings), "requires_stats": kinds}.items()))


def factory(fn: Callable[P, Method]) -> Callable[P, Method]:
    """Decorate a function of keyword options that returns ``jpeft.Method(...)``: the result gets the function's name and options."""
    warn_renamed("jpeft.method.factory", "a subclass of jpeft.Method whose fields are the options")
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def make(*args: P.args, **options: P.kwargs) -> Method:
        opt.refuse_unknown(fn.__name__, signature.parameters, args, options)
        bound = signature.bind(**options)
        bound.apply_defaults()
        frozen = {name: opt.hashable(value) for name, value in bound.arguments.items()}
        made = fn(**frozen)  # pyright: ignore[reportCallIssue]
        assert isinstance(made, FunctionMethod)
        settings = tuple((dict(made.settings) | {"name": fn.__name__}).items())
        given = tuple(sorted(frozen.items(), key=lambda item: item[0]))
        return FunctionMethod(functions=made.functions, settings=settings, given=given)

    return make


def init_with_head(init: Callable[..., Adapter], head: str | None) -> Callable[..., Adapter]:
    """The old form of `with_head`: an `init` whose adapter also holds the task head."""

    def init_fn(key: jax.Array, params: Params, *, stats: Any = None) -> Mapping[str, Any]:
        return with_head(init(key, params, stats=stats), params, head)

    return init_fn

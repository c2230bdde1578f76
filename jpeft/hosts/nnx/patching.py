"""Leaves of a method in the modules of a copy, and classes that run the method around the modules that hold them.

A module with leaves has a static attribute, `Around`, that says what goes around it, and a variable for each leaf. Both stand in the
module, so whatever a transform does to the module it does to them, and two methods with equal leaves but another alpha make graphs that
differ. Everything static compares equal from call to call, so caches of traces work.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from jpeft.core.method import Method
from jpeft.hosts.nnx.outputs import Changes, changed
from jpeft.tree.adapters import GRAFT
from jpeft.tree.paths import Path

LAYER_METHODS = ("__call__", "attend")  # the methods by which layers are run; `attend` is that of `nnx.Embed`
KEY = "rng"  # the name of the random key among the leaves of a module
_LEAF = f"{GRAFT}/"  # the beginning of the names of the variables that are leaves


@dataclasses.dataclass(frozen=True)
class Around:
    """What goes around a module.

    Attributes:
      method: The method.
      path: The module's path.
      structure: That of the leaves, with all that is static in it.
      narrow: For the module's own parameters that a wider leaf replaces, the dtype of the base.
      trace: Empty, or a name that no other trace has: no cache then knows the module.
    """

    method: Method
    path: Path
    structure: Any = None
    narrow: tuple[tuple[str, Any], ...] = ()
    trace: str = ""

    @property
    def scope(self) -> str:
        """The name of the scope of all operations that the method runs here, in a trace."""
        return f"{GRAFT}[{self.path.replace('/', '.')}]"


@dataclasses.dataclass
class Record:
    """What is seen while a model is traced.

    Attributes:
      ran: For each module with leaves that ran, the methods of it that ran with the method around them.
      inner: The shapes of its leaves inside, where loops have sliced axes away.
      costly: The kernels that the method must exchange whole, each with the reason.
      drew: Whether a random stream of the model gave a key.
    """

    ran: dict[Path, set[str]] = dataclasses.field(default_factory=dict)
    inner: dict[Path, dict[str, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    costly: dict[Path, str] = dataclasses.field(default_factory=dict)
    drew: bool = False


_record: contextvars.ContextVar[Record | None] = contextvars.ContextVar("record", default=None)


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    """Record what the modules that run inside do."""
    record = Record()
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def current_record() -> Record | None:
    """The record of the trace that is being made, if one is wanted."""
    return _record.get()


# --- into the modules -------------------------------------------------------------------------------------------------------------------


def put_on(module: nnx.Module, around: Around, leaves: Mapping[str, Any]) -> None:
    """Put leaves on a module of a copy, and the class around it."""
    kind, key = _kind(module), leaves.get(KEY)
    values, structure = jax.tree.flatten({name: leaf for name, leaf in leaves.items() if name != KEY})
    attributes: dict[str, Any] = {f"{_LEAF}{i}": kind(value) for i, value in enumerate(values)}
    if key is not None:
        attributes[f"{_LEAF}{KEY}"] = kind(key)
    for name, value in (attributes | {GRAFT: dataclasses.replace(around, structure=structure)}).items():
        nnx.Module.__setattr__(module, name, value)
    object.__setattr__(module, "__class__", patched(type(module)))


def _kind(module: nnx.Module) -> Any:
    """The type of a module's parameters, and so of its leaves: the filters of a model then choose both."""
    own = [value for value in vars(module).values() if isinstance(value, nnx.Param)]
    below = own or [leaf for leaf in jax.tree.leaves(nnx.state(module, nnx.Param), is_leaf=_is_variable) if _is_variable(leaf)]
    return type(below[0]) if below else nnx.Param


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


@contextlib.contextmanager
def leaves_off(module: nnx.Module) -> Iterator[tuple[Around, dict[str, Any], Any]]:
    """Take leaves and class off a module while it runs, so that it is met once, and is itself when it is copied.

    Yields:
      ``(around, leaves, key)``, with a random key or None.
    """
    attributes = vars(module)
    held = {name: attributes.pop(name) for name in [*attributes] if name == GRAFT or name.startswith(_LEAF)}
    cls = type(module)
    object.__setattr__(module, "__class__", cls.__mro__[1])
    around = held[GRAFT]
    leaves = jax.tree.unflatten(around.structure, [held[f"{_LEAF}{i}"].get_value() for i in range(around.structure.num_leaves)])
    key = held.get(f"{_LEAF}{KEY}")
    try:
        yield around, leaves, None if key is None else key.get_value().reshape(())
    finally:
        attributes.update(held)
        object.__setattr__(module, "__class__", cls)


# --- the classes ------------------------------------------------------------------------------------------------------------------------


@functools.cache
def patched(cls: type) -> type:
    """The class of a module with leaves. It is made once, so that graphs of equal models are equal."""
    return subclass(cls, {name: _patch(cls, name) for name in public_methods(cls)})


def change_outputs(model: nnx.Module, changes: Changes) -> None:
    """Let all modules of a copy change what they return."""
    for _, node in nnx.iter_graph(model) if changes else ():
        if isinstance(node, nnx.Module):
            object.__setattr__(node, "__class__", _changed(type(node), changes))


@functools.lru_cache(maxsize=256)
def _changed(cls: type, changes: Changes) -> type:
    names = [name for name in LAYER_METHODS if name in public_methods(cls)]
    return subclass(cls, {name: changed(inspect.getattr_static(cls, name), changes) for name in names})


def subclass(cls: type, methods: Mapping[str, Any]) -> type:
    """A class of modules like another, with other methods."""
    body = {**methods, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls)(cls.__name__, (cls,), body, pytree=cls._pytree__is_pytree)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def public_methods(cls: type) -> tuple[str, ...]:
    """The methods by which a class computes: public functions of its own and `__call__`, not those that every module has."""
    names = [name for name in dir(cls) if (not name.startswith("_") and not hasattr(nnx.Module, name)) or name == "__call__"]
    return tuple(name for name in names if _is_method(inspect.getattr_static(cls, name)))


def _is_method(value: Any) -> bool:
    """Whether a value in a class becomes a method: a function, or one that `nnx.jit` and the like have made of it."""
    return callable(value) and hasattr(value, "__get__") and not isinstance(value, staticmethod | classmethod | type)


def _patch(cls: type, name: str) -> Callable[..., Any]:
    original = inspect.getattr_static(cls, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if GRAFT not in vars(self):
            return original.__get__(self, type(self))(*args, **kwargs)
        from jpeft.hosts.nnx.calls import run_around

        with leaves_off(self) as held:
            return run_around(self, name, args, kwargs, *held)

    return functools.update_wrapper(method, original, updated=())


class RecordedStream(nnx.RngStream):
    """A random stream that says that it was used."""

    def __call__(self) -> jax.Array:
        """Give the next key."""
        record = current_record()
        if record is not None:
            record.drew = True
        return super().__call__()

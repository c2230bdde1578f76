"""The interceptor that puts a method's middleware around the modules that have leaves of the method in their scope."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax.core import FrozenDict

from jpeft.core.method import Method
from jpeft.hosts.arguments import bind_by_position
from jpeft.hosts.linen import flax_internals
from jpeft.hosts.linen.calls import LAYER_METHODS, as_layer, dropout_key, dtypes_of, is_call, own_params
from jpeft.hosts.linen.elsewhere import mark_leaves, marked
from jpeft.hosts.linen.named_methods import has_added, leaves_for
from jpeft.hosts.linen.nested import call_nested
from jpeft.tree.adapters import GRAFT, pop_grafts, put_grafts
from jpeft.tree.paths import Params, Path, flatten


@dataclasses.dataclass(frozen=True)
class Interceptor:
    """Runs a method's `call` around every module that finds leaves of the method in its scope.

    Attributes:
      method: The method.
      tags: The keys under which the leaves stand, see `tag_grafts`, each with the path of its module, or None for leaves at any path.
      narrow: For leaves of the base that a wider one replaces, the base's dtype, by path.
      marks: Whether middleware runs in marked scopes; see `jpeft.hosts.linen.elsewhere`.
      ran: The paths of the modules that found leaves, each with the methods that ran, filled while the model is traced.
      costly: The kernels that the method must exchange whole, each with the reason, filled likewise.
      active: The modules that are being run with the method around them; None where no module is to be changed.
    """

    method: Method
    tags: Mapping[str, Path | None]
    narrow: Mapping[Path, Any] = dataclasses.field(default_factory=dict)
    marks: bool = False
    ran: dict[Path, set[str]] = dataclasses.field(default_factory=dict)
    costly: dict[Path, str] = dataclasses.field(default_factory=dict)
    active: list[Any] = dataclasses.field(default_factory=list)

    def __call__(self, next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        """Run one method of one module."""
        if not is_call(context):
            # What `setup` makes of parameters is for the methods to use.
            with marked(self.marks and context.method_name == "setup" and self._tag(context.module) is not None):
                return next_fun(*args, **kwargs)
        if not self.narrow:
            return self._run(next_fun, args, kwargs, context)
        # A trained float32 leaf in place of one in half precision widens the outputs of a layer that declares no dtype of its own.
        wide, narrow = dtypes_of(context.module, self.narrow, args)
        out = self._run(next_fun, args, kwargs, context)
        if wide == narrow:
            return out
        return jax.tree.map(lambda y: y.astype(narrow) if getattr(y, "dtype", None) == wide else y, out)

    def _run(self, next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        """Run it, with the method around it if it has leaves of the method."""
        module, name = context.module, context.method_name
        if flax_internals.holds_nnx(module):
            return self._run_nested(next_fun, args, kwargs, context)
        tag = self._tag(module)
        if tag is None or self._is_active(module):
            return next_fun(*args, **kwargs)
        # The method sees arguments in one form, however the model spells the call.
        inputs, keywords = bind_by_position(module, name, args, kwargs)
        # Inside a scan these are the leaves of one layer: linen has sliced them with the kernel.
        leaves = module.scope.get_variable("params", GRAFT)[tag]
        leaves = leaves.unfreeze() if isinstance(leaves, FrozenDict) else leaves  # as loops have them
        if name not in LAYER_METHODS:
            # A module may have any number of other methods. Those that do not compute with what the leaves change run as they are.
            with self._paused():
                leaves = leaves_for(self.method, leaves, module, name, own_params(module), inputs, keywords)
            if not leaves:
                return next_fun(*args, **kwargs)
        path = self.tags[tag]
        self._note("/".join(module.path) if path is None else path, name, leaves)
        layer = as_layer(context, next_fun, inputs, keywords, self.costly)
        if self.marks:
            mark_leaves({part: value for part, value in layer.params.items() if part in leaves}, leaves)
        self.active.append(module)
        # A random key is drawn only where the model draws some, so a method is random exactly when the model's dropout is.
        try:
            with marked(self.marks):
                return self.method.call(layer, inputs, leaves, dropout_key(module))
        finally:
            self.active.pop()

    def _run_nested(self, next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        """The same for a module whose nested parameters, and the leaves among them, are all its own; see `jpeft.hosts.linen.nested`."""
        module, name = context.module, context.method_name
        found = pop_grafts(dict(flax_internals.collection(module, "params")))[1]
        mine = {path: (tag, tagged[tag]) for path, tagged in found.items() for tag in self.tags if tag in tagged}
        if not mine or self._is_active(module):
            return next_fun(*args, **kwargs)
        leaves: dict[Path, dict[str, Any]] = {}
        for path, (tag, own) in mine.items():
            # What is added to a part of the module would have to go around that part.
            leaves[path] = {part: leaf for part, leaf in own.items() if not path or not has_added(self.method, {part: leaf})}
            if leaves[path]:
                whole = "/".join(filter(None, (*module.path, path)))
                self._note(whole if self.tags[tag] is None else self.tags[tag] or "", name, leaves[path])
        inputs, keywords = bind_by_position(module, name, args, kwargs)
        layer = as_layer(context, next_fun, inputs, keywords)
        self.active.append(module)
        try:
            with marked(self.marks):
                return call_nested(self.method, layer, inputs, {path: own for path, own in leaves.items() if own}, dropout_key(module))
        finally:
            self.active.pop()

    def _tag(self, module: Any) -> str | None:
        """The key of this method's leaves at a module, if there are some."""
        if module.scope is None or not module.scope.has_variable("params", GRAFT):
            return None
        # Without a tag of its own: the leaves of another wrap, a wrapped model inside a wrapped model.
        tagged = module.scope.get_variable("params", GRAFT)
        return next((tag for tag in self.tags if tag in tagged), None)

    def _is_active(self, module: Any) -> bool:
        """Whether a module with these parameters is being run with the method around it already. Leaves count once.

        A layer's method may call another method in the same scope, as a subclass of Dense calls `super().__call__`, and `nn.share_scope`
        gives two modules one scope. A lifted transform inside makes a copy of the scope, with the same path and the same entries.
        """
        for other in self.active:
            if other is None or flax_internals.origin(other.scope) is flax_internals.origin(module.scope):
                return True
            # By itself the path does not tell: inside an `apply` that a model calls, paths begin anew.
            if other.path == module.path and _entries(other) == _entries(module):
                return True
        return False

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Let modules run as they are, while one is only looked at."""
        self.active.append(None)
        try:
            yield
        finally:
            self.active.pop()

    def _note(self, path: Path, name: str, leaves: Mapping[str, Any]) -> None:
        """Record that a method ran with leaves around it.

        Raises:
          ValueError: if leaves that were added to a module have gone around another of its methods in the same call of the model.
        """
        names = self.ran.setdefault(path, set())
        others = sorted(names - {name, "attend"})
        if others and name != "attend" and has_added(self.method, leaves):
            raise ValueError(
                f"{self.method.name} adds to the module '{path}', and this call runs several methods of it that give activations: "
                f"`{others[0]}` and `{name}`. It cannot tell which of them to change: choose a module inside or around it with target=."
            )
        names.add(name)


def _entries(module: Any) -> Any:
    return jax.tree.structure(dict(flax_internals.collection(module, "params")))


def narrower(params: Params, bound: Params) -> dict[Path, Any]:
    """The dtypes of the base's leaves that are wider where a method is bound, by path."""
    leaves = flatten(bound)
    dtypes = {path: leaf.dtype for path, leaf in flatten(params).items() if path in leaves and hasattr(leaf, "dtype")}
    return {path: dtype for path, dtype in dtypes.items() if leaves[path].dtype != dtype}


def tag_grafts(params: Params, tags: Mapping[Path, str]) -> Params:
    """Put all leaves that were added to parameters under one more key, which is given by the path of their module.

    `nn.jit` looks its traces up by the *structure* of what it is given. Two methods with equal leaves but another alpha must not share a
    trace, so their trees must differ in structure.
    """
    # {"dense": {"jpeft": leaves}} becomes {"dense": {"jpeft": {tag: leaves}}}.
    clean, grafts = pop_grafts(params)
    return put_grafts(clean, {path: {tags[path]: leaves} for path, leaves in grafts.items()})

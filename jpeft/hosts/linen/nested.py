"""Modules whose nested parameters are all their own: NNX modules inside linen, wrapped by `nnx.bridge.ToLinen`.

Linen sees one module. Its parameters form a tree, such as ``{"attention": {"query": {"kernel": ...}}}``, whose inner dicts are no modules
of linen, so no interceptor runs there. The leaves beside a parameter in the tree go around the module as a whole: it runs with a change of
that parameter's products, or on a new parameter.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jpeft.core.layer import Change, Layer, NoProductError
from jpeft.core.method import Method
from jpeft.tree.adapters import key_of
from jpeft.tree.paths import Path

Leaves = Mapping[Path, Mapping[str, Any]]  # by the path of a dict inside the module's parameters; "" for the module itself


def call_nested(method: Method, layer: Layer, inputs: tuple[Any, ...], leaves: Leaves, rng: jax.Array | None) -> Any:
    """Run a module with the method around it, and around each dict of its parameters that has leaves.

    Args:
      method: The method.
      layer: The module, with its tree of parameters.
      inputs: Its inputs.
      leaves: The leaves.
      rng: A random key, or None.
    """
    return _Levels(method, layer, sorted(leaves), leaves, rng).run(0, layer.params, {}, inputs, {})


class _Foreign(Exception):
    """A parameter that is no kernel, and for which an outer level has asked."""

    def __init__(self, error: NoProductError):
        super().__init__(str(error))
        self.error = error


@dataclasses.dataclass(frozen=True)
class _Levels:
    """One middleware inside the other, each around one dict of parameters. The innermost runs the module with all changes at once."""

    method: Method
    layer: Layer
    paths: list[Path]
    leaves: Leaves
    rng: jax.Array | None

    def run(
        self, level: int, params: Mapping[str, Any], changes: Mapping[Path, Change], inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        """Run the middleware from one level on.

        Args:
          level: The level.
          params: The module's parameters, as outer levels have changed them.
          changes: The changes of products that outer levels ask for, by path.
          inputs: The module's inputs.
          keywords: Arguments that outer levels replace.
        """
        if level == len(self.paths):
            if not changes:
                return self.layer.run(params, *inputs, **keywords)
            assert self.layer.run_changed is not None
            return self.layer.run_changed(params, changes, *inputs, **keywords)
        path = self.paths[level]
        inside = f"{path}/" if path else ""

        def run(own: Mapping[str, Any], *inputs: Any, **keywords: Any) -> Any:
            return self.run(level + 1, _put(params, path, own), changes, inputs, keywords)

        def run_changed(own: Mapping[str, Any], asked: Mapping[str, Change], *inputs: Any, **keywords: Any) -> Any:
            mine = {f"{inside}{name}": change for name, change in asked.items()}
            try:
                return self.run(level + 1, _put(params, path, own), {**changes, **mine}, inputs, keywords)
            # Only the level that asked for a change can do without it.
            except NoProductError as error:
                if error.name in mine:
                    raise
                raise _Foreign(error) from error
            except _Foreign as foreign:
                if foreign.error.name in mine:
                    raise foreign.error from foreign
                raise

        whole = "/".join(filter(None, (self.layer.path, path)))
        own = dataclasses.replace(self.layer, run=run, run_changed=run_changed, params=_get(params, path), path=whole)
        rng = None if self.rng is None else jax.random.fold_in(self.rng, level)
        return self.method.call(own, inputs, dict(self.leaves[path]), rng)


def _get(params: Mapping[Any, Any], path: Path) -> Any:
    for name in path.split("/") if path else ():
        params = params[key_of(params, name)]
    return params


def _put(params: Mapping[Any, Any], path: Path, new: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The tree with a dict in it exchanged; the very same object if the dict is the one that is there."""
    if _get(params, path) is new:
        return params
    if not path:
        return new
    name, _, rest = path.partition("/")
    key = key_of(params, name)
    return {**params, key: _put(params[key], rest, new)}

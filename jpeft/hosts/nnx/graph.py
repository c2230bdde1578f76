"""Leaves of a method at their places in the graph of a model."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from jpeft.core.method import Method
from jpeft.hosts.nnx.bridge import put_inside
from jpeft.hosts.nnx.calls import held_names
from jpeft.hosts.nnx.patching import KEY, Around, put_on
from jpeft.tree.adapters import pop_grafts
from jpeft.tree.paths import Path, flatten, key_for


@dataclasses.dataclass(frozen=True)
class Grafts:
    """The parameters of one call, and the leaves that stand beside them.

    Attributes:
      method: The method.
      params: The model's parameters by path, with those that the adapter replaces.
      leaves: The leaves of each module that has some, by its path.
      narrow: For the parameters of a module that a wider leaf replaces, name and dtype of the base's, by the module's path.
    """

    method: Method
    params: Mapping[Path, Any]
    leaves: Mapping[Path, Any]
    narrow: Mapping[Path, tuple[tuple[str, Any], ...]]

    @classmethod
    def of(cls, method: Method, base: Mapping[Path, Any], bound: Any) -> "Grafts":
        """Take apart what `Method.bind` returns."""
        clean, leaves = pop_grafts(bound)
        params, narrow = flatten(clean), {}
        for path, leaf in params.items():
            if hasattr(base[path], "dtype") and base[path].dtype != leaf.dtype:
                module, _, name = path.rpartition("/")
                narrow[module] = (*narrow.get(module, ()), (name, base[path].dtype))
        return cls(method, params, leaves, narrow)

    def with_keys(self, key: jax.Array | None, inner: Mapping[Path, Mapping[Path, tuple[int, ...]]]) -> "Grafts":
        """With a random key for each module: one for each entry of a stack, where a loop takes them apart like the leaves.

        Args:
          key: The key of the call; None where nothing may be random.
          inner: The shapes of the leaves inside their modules.
        """
        if key is None:
            return self
        with_key = lambda path, leaves: {**leaves, KEY: _keys(key_for(key, path), flatten(leaves), inner.get(path, {}))}
        return dataclasses.replace(self, leaves={path: with_key(path, leaves) for path, leaves in self.leaves.items()})

    def adapted(self) -> list[Path]:
        """The parameters with leaves beside them."""
        found = ((path, name) for path, leaves in self.leaves.items() for name in sorted(held_names(self.method, leaves)))
        return [full for path, name in found if (full := "/".join(filter(None, (path, name)))) in self.params]

    def put_on(self, model: nnx.Module, trace: str) -> None:
        """Put all leaves on the modules of a copy.

        Raises:
          ValueError: for leaves on a module that does not exist, or beside a parameter that another module has under another name.
        """
        modules = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Pytree)}
        others = _holders(modules) if self.leaves else {}
        linen = {path: module for path, module in modules.items() if isinstance(module, nnx.bridge.ToNNX)}
        for path in [*self.leaves, *(path for path in self.narrow if path not in self.leaves)]:
            module = modules.get(path)
            if _inside(path, linen) is not None:
                continue
            if not isinstance(module, nnx.Module) or isinstance(module, nnx.List | nnx.Dict):
                raise ValueError(self._lost(path, module))
            around = Around(self.method, path, narrow=self.narrow.get(path, ()), trace=trace)
            leaves = self.leaves.get(path, {})
            put_on(module, around, leaves)
            for name in leaves:
                self._put_on_holders(others.get(id(vars(module).get(name)), []), module, name, around)
        for path, module in linen.items():
            below = lambda own, path=path: {_below(each, path): part for each, part in own.items() if _inside(each, linen) == path}
            narrow = tuple(("/".join(filter(None, (part, name))), dtype) for part, own in below(self.narrow).items() for name, dtype in own)
            if narrow or below(self.leaves):
                put_inside(module, Around(self.method, path, narrow=narrow, trace=trace), below(self.leaves))

    def _put_on_holders(self, holders: list[tuple[Path, Any, str]], module: nnx.Module, name: str, around: Around) -> None:
        """Put the leaves beside a shared parameter on all other modules that hold it."""
        for path, holder, held_as in holders:
            if holder is module:
                continue
            if held_as != name or path in self.leaves:
                raise ValueError(
                    f"{self.method.name} adapts '{around.path}/{name}', which '{path}/{held_as}' shares, and cannot adapt both in the same "
                    "way. Leave it out of the target, or train it whole, as freeze and bitfit do."
                )
            put_on(holder, around, {name: self.leaves[around.path][name]})

    def _lost(self, path: Path, node: Any) -> str:
        """Why leaves on something that is no module are refused."""
        if node is not None:
            return (
                f"{self.method.name} adds to '{path}', a {type(node).__name__} of parameters in the NNX model. Only parameters that are "
                "attributes of a module can be adapted: put each of them into a module, or leave it out of the target. Methods that "
                "replace whole parameters, such as freeze, work on these, too."
            )
        return (
            f"{self.method.name} adds to the module '{path}', but the NNX model has no such module. Putting keys in front of a layer's own "
            "needs a model with parameterless modules there, called `core` and `positions`, as those of jpeft.models have: "
            "jpeft/models/common/contract.py."
        )


def _holders(modules: Mapping[Path, Any]) -> dict[int, list[tuple[Path, Any, str]]]:
    """The modules that hold each parameter which several hold, by the identity of its variable."""
    found: dict[int, list[tuple[Path, Any, str]]] = {}
    for path, module in modules.items():
        for name, value in vars(module).items():
            if isinstance(value, nnx.Param):
                found.setdefault(id(value), []).append((path, module, name))
    return {key: holders for key, holders in found.items() if len(holders) > 1}


def _inside(path: Path, modules: Iterable[Path]) -> Path | None:
    """The first of these modules that a path leads to or into."""
    return next((module for module in modules if not module or path == module or path.startswith(f"{module}/")), None)


def _below(path: Path, module: Path) -> Path:
    return path[len(module) :].lstrip("/")


def _keys(key: jax.Array, leaves: Mapping[Path, Any], inner: Mapping[Path, tuple[int, ...]]) -> jax.Array:
    """Random keys with the axes that a loop slices away from all leaves of a module; one key without a loop.

    A single such axis is the first that all shapes allow. Several are taken to be the leading ones.
    """
    shapes = [(tuple(leaf.shape), tuple(inner[path])) for path, leaf in leaves.items() if path in inner]
    counts = {len(outer) - len(inside) for outer, inside in shapes}
    count = max(counts, default=0)
    if not count:
        return key
    if count > 1:
        return jax.random.split(key, shapes[0][0][:count])
    axes = [{i for i in range(len(outer)) if outer[:i] + outer[i + 1 :] == inside} for outer, inside in shapes]
    axis = min(set.intersection(*axes), default=0)
    keys = jax.random.split(key, shapes[0][0][axis])
    return keys.reshape((1,) * axis + keys.shape)

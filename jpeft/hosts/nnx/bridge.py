"""Linen modules inside an NNX model, `nnx.bridge.ToNNX`: their layers are adapted as the linen host does it.

The variables of such a module are the linen module's own, as nested dicts, and become its collections in each call. So leaves are put where
the linen host would graft them, and its interceptor is entered around the call.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from jpeft.core.layer import Layer
from jpeft.core.method import Method
from jpeft.hosts.linen.interceptor import Interceptor
from jpeft.hosts.nnx.patching import KEY, Around, current_record, subclass
from jpeft.tree.adapters import GRAFT, Adapter
from jpeft.tree.paths import Params, Path, flatten, unflatten

_AROUND = f"to_nnx__{GRAFT}"  # what begins so is no variable of the linen module


class Placed(Method):
    """A method whose layers have the paths that they have in the whole model.

    Attributes:
      inner: The method.
      prefix: The path of the linen module.
    """

    inner: Method
    prefix: str

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The method's own."""
        return self.inner.name

    @property
    def parts(self) -> tuple[tuple[str, Method], ...]:
        """The method's own."""
        return self.inner.parts

    def init(self, key: jax.Array, params: Params, *, stats: Any = None) -> Adapter:
        """The method's own."""
        return self.inner.init(key, params, stats=stats)

    def goes_around(self, inputs: tuple[Any, ...], outputs: Any, leaves: dict[str, Any]) -> bool:
        """The method's own."""
        return self.inner.goes_around(inputs, outputs, leaves)

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: Any) -> Any:
        """Run the method around a layer."""
        layer = dataclasses.replace(layer, path=_join(self.prefix, layer.path))
        with jax.named_scope(Around(self.inner, layer.path).scope):
            return self.inner.call(layer, inputs, leaves, rng)


def put_inside(module: nnx.bridge.ToNNX, around: Around, leaves: Mapping[Path, Mapping[str, Any]]) -> None:
    """Put leaves on modules inside a linen module.

    Args:
      module: The linen module, as a module of NNX in a copy of the model.
      around: What goes around it; `narrow` has paths below the module.
      leaves: The leaves of each linen module that has some, by its path below.

    Raises:
      ValueError: for a method that puts more than arrays into the model, as prompts do.
    """
    tag = _tag(around)
    for path, own in leaves.items():
        if jax.tree.structure(dict(own)) != jax.tree.structure(unflatten(flatten(dict(own)))):
            raise ValueError(
                f"{around.method.name} adds to '{_join(around.path, path)}', which is inside a linen module (nnx.bridge.ToNNX). It cannot "
                "be told there where its tokens stand. Apply it to the linen model itself, or to a model whose embedding is an NNX module."
            )
        # linen draws keys of its own, at each layer.
        variables = unflatten({name: nnx.Param(leaf) for name, leaf in flatten(own).items() if name != KEY})
        *parents, name = [*filter(None, path.split("/")), GRAFT]
        if not parents:
            setattr(module, name, nnx.data({tag: variables}))
            continue
        inner = getattr(module, parents[0], {})
        node = inner
        for key in parents[1:]:
            node = node.setdefault(key, {})
        node[name] = {tag: variables}
        setattr(module, parents[0], nnx.data(inner))
    setattr(module, _AROUND, around)
    object.__setattr__(module, "__class__", _patched(type(module)))


def _tag(around: Around) -> str:
    """The key that stands above the leaves, by which the interceptor knows those of its method."""
    return f"{hash(around.method):x}{around.trace}"


@functools.cache
def _patched(cls: type) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        around = vars(self)[_AROUND]
        interceptor = Interceptor(Placed(inner=around.method, prefix=around.path), {_tag(around): None}, dict(around.narrow))
        with nn.intercept_methods(interceptor):
            out = cls.__call__(self, *args, **kwargs)
        record = current_record()
        if record is not None:
            for path, names in interceptor.ran.items():
                record.ran.setdefault(_join(around.path, path), set()).update(names)
        return out

    return subclass(cls, {"__call__": call})


def _join(prefix: Path, path: Path) -> Path:
    return "/".join(filter(None, (prefix, path)))

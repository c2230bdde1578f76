"""All uses of what flax keeps private. No other file of jpeft reaches below flax's public interface.

`tests/test_hosts.py` checks each function of this file against the installed flax, so that a version which changes what the functions rely
on fails there, by name.
"""

import functools
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax.linen import transforms


def collection(module: nn.Module, name: str) -> Mapping[str, Any]:
    """The variables of one collection in a bound module's own scope; empty if there are none.

    flax's public `nn.Module.variables` copies all collections, at every layer. `Scope._collection` gives one of them as it is.
    """
    assert module.scope is not None, "Only a bound module, one that runs in `apply` or `init`, has variables."
    return module.scope._collection(name)


def enters_transform(module: nn.Module, method_name: str) -> bool:
    """Whether calling this method of a module only enters a lifted class, as made by ``nn.remat(Block)`` or ``nn.scan(Block)``.

    Such a module is called twice: once around the transform, with the parameters of all layers, and once inside, with those of one layer.
    A module whose method is *decorated* (``@nn.remat`` above ``def __call__``) is called once, so it does not count.
    """
    return _class_enters_transform(type(module), method_name)


@functools.cache
def _class_enters_transform(cls: type, method_name: str) -> bool:
    # flax marks lifted classes nowhere. Their methods are closures of two functions in flax's file of transforms,
    # `module_class_lift_transform` and `module_class_lift_transform_cached`. Decorated methods are closures of `decorator_lift_transform`.
    code = getattr(getattr(cls, method_name), "__code__", None)
    return code is not None and code.co_filename == transforms.__file__ and code.co_qualname.startswith("module_class_lift_transform")

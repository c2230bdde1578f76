"""All uses of what flax keeps private. No other file of jpeft reaches below flax's public interface.

`tests/test_flax_internals.py` checks each function of this file against the installed flax. A version of flax that changes what the
functions rely on fails there, with a message that names the function.
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
    """Whether calling this method of a module enters a lifted class, as made by ``nn.remat(Block)`` or ``nn.scan(Block)``.

    Inside, a module of the class that was lifted runs under the same path. It sees the parameters of one layer, where the module around a
    scan sees those of all layers. flax shows interceptors the inner call alone, except where a subclass of the lifted class has a method
    of that name. A module whose method is *decorated* (``@nn.remat`` above ``def __call__``) runs once and has no module inside.
    """
    return _class_enters_transform(type(module), method_name)


@functools.cache
def _class_enters_transform(cls: type, method_name: str) -> bool:
    # flax marks lifted classes nowhere. Their methods are closures of two functions in flax's file of transforms,
    # `module_class_lift_transform` and `module_class_lift_transform_cached`. Decorated methods are closures of `decorator_lift_transform`.
    codes = [getattr(vars(base).get(method_name), "__code__", None) for base in cls.__mro__]
    lifted = "module_class_lift_transform"
    return any(code is not None and code.co_filename == transforms.__file__ and code.co_qualname.startswith(lifted) for code in codes)

"""Layer classes that a user has taught to jpeft."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jpeft.core.layer import Linear

Fn = TypeVar("Fn", bound=Callable[..., Linear | None])


@functools.singledispatch
def linear_of(layer: Any, params: Mapping[str, Any], inputs: tuple[Any, ...], method: str) -> Linear | None:
    """What is linear about a layer, by its class; None for a class that was not taught."""
    del layer, params, inputs, method
    return None


def register_layer(cls: type) -> Callable[[Fn], Fn]:
    """Teach jpeft what a layer class is linear in: a decorator of a function that says it.

    jpeft finds the product of a kernel with the inputs by itself, in the layer's jaxpr, whatever the class. A class must be taught only
    where there is none to find: a kernel of a device written in Pallas, a product with several kernels put together, a normalised kernel.
    What is said is taken as it is; `jpeft.check` compares it with the merged parameters.

    The function is called with the layer, its own parameters by name, the inputs of the call, and the name of the method that is called. It
    returns a `jpeft.Linear`, or None for a call of which nothing can be said. `apply_low_rank(x, a, b)` must be the layer's result, without
    its bias, on the kernel ``a b``.

    Args:
      cls: A class of linen or NNX modules. Its subclasses are meant, too.

    Returns:
      The decorator, which returns the function.

    Raises:
      ValueError: if `cls` is no class.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> from flax import linen as nn
    >>> class Glued(nn.Module):  # two kernels in one product, y = x [left, right]
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         left, right = (self.param(name, nn.initializers.lecun_normal(), (4, 3)) for name in ("left", "right"))
    ...         return x @ jnp.concatenate([left, right], axis=1)
    >>> @jpeft.register_layer(Glued)
    ... def glued(layer, params, inputs, method):
    ...     left = lambda x, a, b: jnp.pad(x @ a @ b, ((0, 0), (0, 3)))
    ...     return jpeft.Linear("left", jpeft.KernelAxes((), (0,), (1,)), left)
    >>> model, x = Glued(), jnp.ones((2, 4))
    >>> peft = jpeft.apply(model.init(jax.random.key(0), x)["params"], "lora", rank=1, target="left")
    >>> jpeft.wrap(model.apply)(peft, x).shape
    (2, 6)
    """
    if not isinstance(cls, type):
        raise ValueError(f"register_layer takes the class of a layer, and was given {cls!r}.")

    def register(fn: Fn) -> Fn:
        linear_of.register(cls, fn)
        return fn

    return register

"""The verb that gives each example of a batch an index."""

from typing import Any

from jpeft.core.peft import Peft, check_peft


def assign(peft: Peft, index: Any) -> Peft:
    """The `Peft` with an index for each example of the batches that it is then called with.

    Args:
      peft: Of a method that takes an index, such as what `jpeft.mix` makes.
      index: A whole number for each example, [batch]. A traced one is taken too, for use inside of your own `jit`.

    Returns:
      A `Peft` with the index in its adapter; the other leaves are the very same. Another index of the same length compiles nothing anew.

    Raises:
      ValueError: for a method that takes none, anything else than one axis of whole numbers, or a number that the method does not know.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((8, 4))}}
    >>> pool = jpeft.mix(params, [jpeft.apply(params, method="lora", rank=2)], slots=4)
    >>> jpeft.assign(pool, [0, -1, 0]).adapter["+"]["index"].shape
    (3,)
    """
    check_peft(peft, "assign")
    return peft.replace(adapter=peft.method.assign(peft.adapter, index))

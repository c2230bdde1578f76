"""All randomness of a run, from its seed."""

from typing import NamedTuple

import jax


class Keys(NamedTuple):
    """Independent sources of randomness.

    Attributes:
      head: Key of a newly initialised head.
      adapter: Key of the adapter.
      dropout: Key of dropout.
      data: Seed of the data order, a number.
    """

    head: jax.Array
    adapter: jax.Array
    dropout: jax.Array
    data: int


def keys(seed: int) -> Keys:
    """Return independent keys for the new head, the adapter, dropout and the data order.

    >>> keys(0).data == keys(1).data
    False
    """
    head, adapter, dropout, data = jax.random.split(jax.random.key(seed), 4)
    return Keys(head, adapter, dropout, int(jax.random.bits(data)))

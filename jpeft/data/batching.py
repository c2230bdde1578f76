"""Batches of arrays in an order that depends on the seed alone: the same on every machine and in every process.

    ds = batches(arrays, 32, seed=0)                                    # ds[step] is batch number `step`

A run resumed at step k therefore sees the same batches as an unbroken run.
"""

import functools
import sys
from collections.abc import Iterator, Mapping

import numpy as np

from jpeft.extras import explained

with explained():
    import grain


def batches(arrays: Mapping[str, np.ndarray], batch_size: int, *, seed: int) -> grain.MapDataset:
    """Return endless training batches of one shape; `ds[step]` is batch number `step`.

    The examples form one endless stream, shuffled anew in every epoch, and each batch holds the next `batch_size` of them. So every example
    is seen exactly once per epoch, none is dropped, and a batch at the border of two epochs holds the end of one and the start of the next.
    A run resumed at step k continues with `ds[k]`: nothing has to be stored or skipped.

    Args:
      arrays: Columns [N, ...], as `encode` makes them.
      batch_size: Rows B of a batch; may exceed N.
      seed: Seed of the order, 0 ... 2^32 - 1.

    Returns:
      A `grain.MapDataset` of dictionaries of arrays [B, ...].

    Raises:
      ValueError: for no rows, columns of different lengths, or a batch size below 1.

    >>> import numpy as np
    >>> from jpeft.data import batches
    >>> ds = batches({"x": np.arange(5)}, 2, seed=0)
    >>> sorted(np.concatenate([ds[step]["x"] for step in range(5)]).tolist())    # two epochs
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    """
    return batch_rows(arrays, batch_size, seed=seed).map(functools.partial(_take, dict(arrays)))


def _take(arrays: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[rows] for name, column in arrays.items()}


def batch_rows(arrays: Mapping[str, np.ndarray], batch_size: int, *, seed: int) -> grain.MapDataset:
    """Return the row numbers of each batch of `batches`, for processes that read only some of its rows.

    Args:
      arrays: Columns [N, ...].
      batch_size: Rows B of a batch.
      seed: Seed of the order.

    Returns:
      A `grain.MapDataset` of arrays [B].

    Raises:
      ValueError: see `batches`.

    >>> import numpy as np
    >>> from jpeft.data import batch_rows, batches
    >>> x = np.arange(5) * 10
    >>> bool((x[batch_rows({"x": x}, 2, seed=0)[7]] == batches({"x": x}, 2, seed=0)[7]["x"]).all())
    True
    """
    size = _size(arrays, batch_size)
    if size == 0:
        raise ValueError("There are no rows to train on.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be a whole number from 0 to 2^32 - 1.")
    take = functools.partial(_batch_rows, size=size, batch_size=batch_size, seed=seed)
    return grain.MapDataset.range(sys.maxsize // batch_size).map(take)


def _batch_rows(step: int, *, size: int, batch_size: int, seed: int) -> np.ndarray:
    position = np.arange(step * batch_size, (step + 1) * batch_size)  # positions in the endless stream, [batch_size]
    epoch, offset = np.divmod(position, size)
    rows = np.empty(batch_size, np.int64)
    for number in range(int(epoch[0]), int(epoch[-1]) + 1):
        rows[epoch == number] = _order(size, seed, number)[offset[epoch == number]]
    return rows


# Not grain's shuffle: it takes milliseconds per example on small data sets and gives epoch 1 of seed 0 and epoch 0 of seed 1 the same
# order. And not numpy's `permutation`, whose result may change between versions of numpy; raw bits and their ranks do not. The cache holds
# the two epochs that a batch at their border needs; a lost entry is computed again.
@functools.lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the row numbers [size] in the order of one epoch."""
    order = np.argsort(np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(size), kind="stable")
    order.flags.writeable = False  # shared by all callers
    return order


def eval_batches(arrays: Mapping[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Iterate over all rows once and in order, in batches of one shape.

    Args:
      arrays: Columns [N, ...].
      batch_size: Rows B of a batch.

    Yields:
      ceil(N / B) dictionaries of arrays [B, ...] with a further column `weight` [B], float32: 1 for a row of the data,
      0 for the copies of the last row that fill the last batch. A mean over the data is sum(weight * x) / sum(weight).

    Raises:
      ValueError: for columns of different lengths, or a batch size below 1.

    >>> import numpy as np
    >>> from jpeft.data import eval_batches
    >>> [batch["weight"].tolist() for batch in eval_batches({"x": np.arange(3)}, 2)]
    [[1.0, 1.0], [1.0, 0.0]]
    """
    size = _size(arrays, batch_size)
    for start in range(0, size, batch_size):
        index = np.arange(start, start + batch_size)
        weight = (index < size).astype(np.float32)
        index = np.minimum(index, size - 1)
        yield {**{name: column[index] for name, column in arrays.items()}, "weight": weight}


def steps_per_epoch(arrays: Mapping[str, np.ndarray], batch_size: int) -> int:
    """Return the number of batches until every example was seen once, ceil(N / B); the last one may begin the next epoch.

    >>> import numpy as np
    >>> from jpeft.data import steps_per_epoch
    >>> steps_per_epoch({"x": np.arange(5)}, 2)
    3
    """
    return -(-_size(arrays, batch_size) // batch_size)


def _size(arrays: Mapping[str, np.ndarray], batch_size: int) -> int:
    """Return the number of rows N, after checking that all columns have it."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    sizes = {name: len(column) for name, column in arrays.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"All columns must have the same number of rows, got {sizes or 'no columns'}.")
    return next(iter(sizes.values()))

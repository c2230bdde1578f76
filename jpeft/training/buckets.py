"""Batches for a server: few shapes, whatever the number and the length of the texts.

Every shape is compiled once. Rows are filled up to 1, 4, 16, ... and the batch size; columns of tokens are cut or filled up to 16, 32, 64,
... and the longest row allowed. So a text costs at most four times what it needs, and a model has a dozen shapes.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from jpeft import data

ROWS, LENGTHS = (1, 4), (16, 2)  # the smallest size, and how many times larger the next one is


def round_up(size: int, limit: int, sizes: tuple[int, int]) -> int:
    """Return the smallest of the sizes that holds `size`, at most the limit.

    >>> [round_up(size, 100, LENGTHS) for size in (1, 17, 70)], [round_up(size, 64, ROWS) for size in (1, 3, 17)]
    ([16, 32, 100], [1, 4, 64])
    """
    smallest, factor = sizes
    while smallest < size:
        smallest *= factor
    return max(size, min(smallest, limit))


def fit_length(arrays: Mapping[str, np.ndarray], longest: int | None = None) -> dict[str, np.ndarray]:
    """Return columns of tokens with one of few lengths.

    Columns without a mask, of other than texts, are returned as they are. What is cut is padding on the right.

    Args:
      arrays: Columns of a task's `encode`.
      longest: The longest length to fill up to, with zeros: no model attends to a token whose mask is 0. None only cuts.
    """
    if "attention_mask" not in arrays:
        return dict(arrays)
    mask = arrays["attention_mask"]
    length = mask.shape[1]
    used = np.flatnonzero(mask.any(0))
    new = round_up(int(used[-1]) + 1 if len(used) else 1, longest or length, LENGTHS)
    fit = lambda column: np.pad(column[:, :new], [(0, 0), (0, max(0, new - length))])
    return {name: fit(column) if column.ndim == 2 and column.shape[1] == length else column for name, column in arrays.items()}


def batches(arrays: Mapping[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Iterate over all rows in order, as `jpeft.data.eval_batches` does, with a last batch of one of few sizes."""
    rows = len(next(iter(arrays.values())))
    for start in range(0, rows, batch_size):
        part = {name: column[start : start + batch_size] for name, column in arrays.items()}
        yield from data.eval_batches(part, round_up(min(batch_size, rows - start), batch_size, ROWS))

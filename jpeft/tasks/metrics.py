"""Classification metrics in plain numpy."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def accuracy(predicted: Int[np.ndarray, " n"], expected: Int[np.ndarray, " n"]) -> float:
    """Return the share of equal entries.

    >>> accuracy(np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1]))
    0.75
    """
    return float(np.mean(predicted == expected))


def macro_f1(predicted: Int[np.ndarray, " n"], expected: Int[np.ndarray, " n"]) -> float:
    """Return the unweighted mean of F1 = 2·tp / (2·tp + fp + fn) over the classes that occur in either array, as scikit-learn does.

    >>> macro_f1(np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1]))
    0.7333333333333334
    """
    scores = []
    for label in np.union1d(predicted, expected):
        hits = np.sum((predicted == label) & (expected == label))
        scores.append(2 * hits / (np.sum(predicted == label) + np.sum(expected == label)))
    return float(np.mean(scores))

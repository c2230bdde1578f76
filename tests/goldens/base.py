"""The weights of the tiny models, made from the names of the tensors: the same in every process, with torch and without."""

import zlib

import numpy as np

IDS = np.array([[3, 11, 7, 19, 28, 5, 13], [9, 2, 23, 17, 6, 0, 0], [14, 30, 8, 1, 21, 12, 0]])
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
# The task of each row, for the one method that has several.
TASKS = np.array([2, 0, 1])


def uniform(name: str, shape: tuple[int, ...], *, low: float = -1, high: float = 1) -> np.ndarray:
    """Return float32 numbers that depend on the name alone; NumPy promises that RandomState draws the same numbers in every version."""
    return np.random.RandomState(zlib.crc32(name.encode())).uniform(low, high, shape).astype(np.float32)


def base_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the tensor of the base with a name in torch. Scales are such that every part of a model matters to its logits."""
    if "norm" in name.lower() or ".ln_" in name:
        return uniform(name, shape, low=0.7, high=1.3) if name.endswith("weight") else uniform(name, shape, low=-0.2, high=0.2)
    return uniform(name, shape) * np.float32(0.1 if name.endswith("bias") else 0.3)

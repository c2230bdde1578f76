"""Which tensors of a Hugging Face checkpoint make up which parameter.

Parameter paths are Hugging Face's tensor names with slashes in place of dots, so one function, `checkpoint_layout`, serves loading and
saving. A Linear's weight is (out, in) there and (in, out) here, except where the family says otherwise. The parameters of scanned blocks
are the blocks' tensors stacked.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jpeft.models import families
from jpeft.tree.paths import flatten

# Last component of a parameter's path -> last component of the tensor's name.
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter and the checkpoint tensors that make it up."""

    path: str  # "bert/pooler/dense/kernel"
    names: tuple[str, ...]  # ("bert.pooler.dense.weight",); one name for each block where blocks are stacked
    transposed: bool
    stacked: bool
    shape: tuple[int, ...]  # of the parameter
    dtype: Any

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the checkpoint."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    def find_part(self, part: tuple[slice, ...]) -> tuple[tuple[str, ...], tuple[slice, ...]]:
        """Return the tensors that a part of the parameter is made of, and which part of each tensor it needs."""
        names, within = (self.names[part[0]], part[1:]) if self.stacked else (self.names, part)
        return names, within[::-1] if self.transposed else within

    def fill(self, out: np.ndarray, read: Callable[[str, np.ndarray], None], names: Sequence[str] | None = None) -> None:
        """Fill an array that is this parameter, or a part of it, from its tensors.

        Args:
          out: the array.
          read: ``read(name, out)`` reads one tensor, or its part, into an array of the tensor's form.
          names: the tensors of the part; by default all of them.
        """
        names = self.names if names is None else names
        for name, place in zip(names, out if self.stacked else [out], strict=True):
            read(name, place.T if self.transposed else place)

    def tensor(self, leaf: jax.Array | np.ndarray, name: str) -> np.ndarray:
        """Return one of the tensors that this parameter is made of, by its name; the inverse of `fill`."""
        part = np.asarray(leaf[self.names.index(name)] if self.stacked else leaf)
        # safetensors writes the underlying buffer whatever the strides: a transposed view would be stored untransposed.
        return np.ascontiguousarray(part.T if self.transposed else part)


def checkpoint_layout(model: nn.Module) -> list[Entry]:
    """Return every parameter of a model with the names of its tensors in a Hugging Face checkpoint.

    >>> from jpeft.models import BertConfig, BertModel
    >>> entry = checkpoint_layout(BertModel(BertConfig(scan=True, num_hidden_layers=2)))[-1]
    >>> entry.path, entry.names
    ('pooler/dense/kernel', ('pooler.dense.weight',))
    """
    return list(_layout(model))


@functools.lru_cache(maxsize=8)  # tracing a deep model takes seconds, and several parts of a program ask
def _layout(model: nn.Module) -> tuple[Entry, ...]:
    config: Any = model.config  # pyright: ignore[reportAttributeAccessIssue]
    family = families.family_of(config.model_type)
    entries = []
    for path, leaf in flatten(families.abstract_params(model)).items():
        *modules, last = path.split("/")
        transposed = last == "kernel" and not re.fullmatch(family.names.untransposed, path)
        owners, stacked = [modules], False
        for stack in family.stacks if config.scan else ():
            if (depth := stack.find(modules)) is not None:
                # "layer/output/kernel" is made of "layer.0.output.weight", "layer.1.output.weight", ...
                owners = [[*modules[:depth], str(i), *modules[depth:]] for i in range(getattr(config, stack.num_layers))]
                stacked = True
        names = tuple(".".join([*owner, _LEAVES[last]]) for owner in owners)
        if not family.names.prefixed:
            names = tuple(name.removeprefix(f"{family.names.body_of(config.model_type)}.") for name in names)
        entries.append(Entry(path, names, transposed, stacked, leaf.shape, leaf.dtype))
    return tuple(entries)

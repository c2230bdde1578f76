"""Sizes in a config.json against the tensors of its checkpoint, before anything of that size is made."""

import re
from collections.abc import Iterable
from pathlib import Path

from jpeft.models.checkpoints.layout import Entry
from jpeft.models.checkpoints.tensors import Tensors
from jpeft.models.common.config import ModelConfig
from jpeft.models.common.family import BlockStack, Family


def check_blocks(folder: Path, family: Family, config: ModelConfig, names: Iterable[str]) -> None:
    """Refuse a configuration with more blocks than the checkpoint has, before so many are traced.

    Raises:
      ValueError: with both numbers, or if no tensor is in a block.
    """
    names = list(names)
    for stack in family.stacks:
        found = _count_blocks(stack, names)
        asked = getattr(config, stack.num_layers)
        if found == 0:
            continue
        if asked > found:
            raise ValueError(
                f"{folder / 'config.json'}: {stack.num_layers} is {asked}, but the checkpoint holds {found} blocks "
                f"({stack.path.replace('/', '.')}.0 to {found - 1})."
            )


def has_blocks(family: Family, names: Iterable[str]) -> bool:
    """Return whether some tensor is in a block of each of the family's stacks, whatever prefix stands in front."""
    names = list(names)
    return all(_count_blocks(stack, names) for stack in family.stacks)


def _count_blocks(stack: BlockStack, names: Iterable[str]) -> int:
    """Return one more than the largest number of a block."""
    pattern = re.compile(rf"(?:.*\.)?{re.escape(stack.path.replace('/', '.'))}\.(\d{{1,9}})\..*")
    return max((int(match[1]) + 1 for name in names if (match := pattern.fullmatch(name))), default=0)


def check_tensors(entries: Iterable[Entry], tensors: Tensors) -> None:
    """Check shape and type of all tensors that will be read, from the headers of the files alone.

    Raises:
      ValueError: naming file and tensor.
    """
    for entry in entries:
        for name in entry.names:
            if name in tensors:
                tensors.check(name, entry.tensor_shape)

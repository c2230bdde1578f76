"""Reads the tensors of a folder's safetensors files by name."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.extras import explained
from jpeft.models import families
from jpeft.models.checkpoints.folder import read_json


class Tensors:
    """The tensors in a folder's safetensors files, found by name whatever the checkpoint's age or head.

    The checkpoint of a model with a head has a prefix ("bert.", "transformer.", ...) in front of the tensors of the body; that of a body
    alone has none. Old checkpoints have old names. The family says which (`CheckpointNames`). A canonical name is the present name without
    the prefix.
    """

    def __init__(self, folder: Path, model_type: str):
        self._family = families.family_of(model_type)
        self._prefix = f"{self._family.names.body or model_type}."
        self._files: dict[Path, Any] = {}
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            names: Iterable[tuple[str, Path]] = [(name, single) for name in self._names(single)]
        else:
            missing = f"{folder} has neither model.safetensors nor model.safetensors.index.json."
            shards = read_json(index, missing).get("weight_map", {})
            names = [(name, folder / shard) for name, shard in shards.items()]
        # Canonical name -> the name in the file, and the file.
        self._where = {self._canonical(name): (name, file) for name, file in names}
        self._read: set[str] = set()  # canonical names

    def _canonical(self, name: str) -> str:
        """Return the present name without the prefix."""
        name = name.removeprefix(self._prefix)
        for pattern, replacement in self._family.names.old_names:
            name = re.sub(pattern, replacement, name)
        return name

    def _find(self, name: str) -> str | None:
        """Return the canonical name under which the files hold a tensor; None if they do not hold it."""
        name = self._canonical(name)
        seconds = [re.sub(pattern, replacement, name) for pattern, replacement in self._family.names.second_names]
        return next((candidate for candidate in (name, *seconds) if candidate in self._where), None)

    def _open(self, file: Path) -> Any:
        """Return a file, opened once: opening reads the header, and tensors are mapped into memory when they are read."""
        with explained():
            from safetensors import SafetensorError, safe_open

        if file not in self._files:
            if not file.is_file():
                raise ValueError(f"{file} is missing, though the index beside it names it.")
            try:
                self._files[file] = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is damaged or not a safetensors file: {error}.") from error
        return self._files[file]

    def _names(self, file: Path) -> list[str]:
        """Return the names of the tensors in a file."""
        return list(self._open(file).keys())

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] | None = None) -> np.ndarray:
        """Return one tensor, or a part of it. Only that part is read from the file.

        Args:
          name: a name that is `in` these tensors.
          shape: the shape of the whole tensor.
          part: a slice for each axis; None for the whole tensor.

        Raises:
          ValueError: if the file does not hold the tensor, or holds it with another shape.
        """
        canonical = self._find(name)
        assert canonical is not None, f"{name} was not asked for with `in` first"
        stored, file = self._where[canonical]
        opened = self._open(file)
        if stored not in self._names(file):
            raise ValueError(f"{file} does not hold {stored}, though the index beside it says so.")
        tensor = opened.get_slice(stored)
        found = tuple(tensor.get_shape())
        if found != shape:
            in_head = self._family.roles.matches("head", name.replace(".", "/"))
            hint = " Pass fresh_head=True to leave out the checkpoint's head." if in_head else ""
            raise ValueError(f"{file}: {stored} has shape {found}, the model needs {shape}.{hint}")
        self._read.add(canonical)
        return opened.get_tensor(stored) if part is None else tensor[part]

    def unused(self, *, scores_words: bool) -> frozenset[str]:
        """Return the names, as in the files, of tensors that were not read.

        Buffers are left out. So are copies of a tied word embedding if the model scores words, because the embedding itself was read.
        """
        names = self._family.names
        ignored = f"{names.buffers}|{names.tied}" if scores_words else names.buffers
        left = [name for name in self._where.keys() - self._read if not re.fullmatch(ignored, name)]
        return frozenset(self._where[name][0] for name in left)

"""Reads the tensors of a folder's safetensors files by name."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jpeft.extras import explained
from jpeft.models import families
from jpeft.models.checkpoints.folder import read_json
from jpeft.models.checkpoints.foreign import NEEDS_FLOATS, list_weights

# The types of weights that are read, as safetensors writes them. Integers and floats of 8 bits or fewer are quantised weights.
_FLOATS = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_BLOCK = 16 * 2**20  # bytes that are read at once
_TILE = 16  # rows that are transposed at once


class Header(NamedTuple):
    """What a file says of one tensor."""

    name: str  # in the file
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # the first byte of its numbers in the file


class Tensors:
    """The tensors in a folder's safetensors files, found by name whatever the checkpoint's age or head.

    The checkpoint of a model with a head has a prefix ("bert.", "transformer.", ...) in front of the tensors of the body; that of a body
    alone has none. Old checkpoints have old names. The family says which (`CheckpointNames`). A canonical name is the present name without
    the prefix.

    Raises:
      ValueError: if files are missing, damaged or at odds with their index, or hold one parameter twice.
    """

    def __init__(self, folder: Path, model_type: str):
        self._family = families.family_of(model_type)
        self._prefix = f"{self._family.names.body_of(model_type)}."
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Header] = {}  # by canonical name
        self._read: set[str] = set()  # canonical names
        for file in self._find_files(folder):
            for header in self._headers(file):
                self._add(header)

    def _find_files(self, folder: Path) -> list[Path]:
        """Return the files of the checkpoint, each opened once, so that those that are missing or damaged are found now."""
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            self._open(single)
            return [single]
        hint = list_weights(folder) or "Weights in other formats, such as pytorch_model.bin, are not read: write them as safetensors."
        missing = f"{folder} has neither model.safetensors nor model.safetensors.index.json. {hint}"
        shards = read_json(index, missing).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{index}: weight_map must be an object of names of tensors and files, and not empty.")
        files = {shard: find_shard(index, shard) for shard in dict.fromkeys(shards.values())}
        held = {shard: set(self._open(file).keys()) for shard, file in files.items()}
        for name, shard in shards.items():
            if name not in held[shard]:
                raise ValueError(f"{files[shard]} does not hold {name!r:.200}, though the index beside it says so.")
        return list(files.values())

    def _open(self, file: Path) -> Any:
        """Return a file, opened once: opening reads the header, and tensors are mapped into memory when they are read."""
        with explained():
            from safetensors import SafetensorError, safe_open

        if file not in self._files:
            if not file.is_file():
                raise ValueError(f"{file} is missing, though the index beside it names it.")
            try:
                self._files[file] = safe_open(file, framework="numpy")
            except (SafetensorError, OSError, ValueError) as error:
                raise ValueError(f"{file} is damaged or not a safetensors file: {error}.") from error
        return self._files[file]

    def _headers(self, file: Path) -> list[Header]:
        """Return what the file says of each of its tensors. It has been opened, so its header is whole."""
        with open(file, "rb") as raw:
            (size,) = struct.unpack("<Q", raw.read(8))
            content = json.loads(raw.read(size))
        content.pop("__metadata__", None)
        begin = lambda about: 8 + size + about["data_offsets"][0]
        return [Header(name, file, about["dtype"], tuple(about["shape"]), begin(about)) for name, about in content.items()]

    def _add(self, header: Header) -> None:
        """Note where a tensor is."""
        canonical = self._canonical(header.name)
        if (other := self._where.get(canonical)) is not None and not re.fullmatch(self._family.names.buffers, canonical):
            where = header.file if other.file == header.file else f"{header.file} and {other.file}"
            both = header.name if other.name == header.name else f"{other.name} and {header.name}, which are one parameter"
            raise ValueError(f"{where}: the checkpoint holds twice {both}. Remove the wrong one.")
        self._where[canonical] = header

    def _canonical(self, name: str) -> str:
        """Return the present name without the prefix."""
        name = name.removeprefix(self._prefix)
        for pattern, replacement in self._family.names.old_names:
            name = re.sub(pattern, replacement, name)
        return name

    def _find(self, name: str) -> str | None:
        """Return the canonical name under which the files hold a tensor; None if they do not hold it."""
        name = self._canonical(name)
        seconds = [
            second for pattern, replacement in self._family.names.second_names if (second := re.sub(pattern, replacement, name)) != name
        ]
        return next((candidate for candidate in (*seconds, name) if candidate in self._where), None)

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    @property
    def stored(self) -> list[str]:
        """The names of all tensors, as in the files."""
        return [header.name for header in self._where.values()]

    def bare(self, name: str) -> str:
        """Return a name without the prefix of the body."""
        return self._canonical(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that is `in` these tensors."""
        return self._header(name).shape

    def dtype(self, name: str) -> np.dtype[Any] | None:
        """Return the type of a tensor that is `in` these tensors; None if it is none of floats."""
        return _FLOATS.get(self._header(name).dtype)

    def most_common_dtype(self) -> np.dtype[Any] | None:
        """Return the type of floats that the most bytes are stored in; None without floats."""
        sizes: dict[str, int] = {}
        for header in self._where.values():
            if header.dtype in _FLOATS:
                sizes[header.dtype] = sizes.get(header.dtype, 0) + int(np.prod(header.shape)) * _FLOATS[header.dtype].itemsize
        return _FLOATS[max(sizes, key=lambda dtype: sizes[dtype])] if sizes else None

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor that is `in` these tensors."""
        return self._header(name).file

    def has_tied_copies(self) -> bool:
        """Return whether the files hold tensors that may be copies of the word embedding."""
        return any(re.fullmatch(self._family.names.tied, name) for name in self._where)

    def _header(self, name: str) -> Header:
        canonical = self._find(name)
        assert canonical is not None, f"{name} was not asked for with `in` first"
        return self._where[canonical]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Check shape and type of a tensor that is `in` these tensors, without reading it.

        Raises:
          ValueError: naming the file and the tensor.
        """
        stored, file, dtype, found, _ = self._header(name)
        if dtype not in _FLOATS:
            raise ValueError(f"{file}: {stored} holds numbers of the type {dtype}, which are no weights but quantised ones. {NEEDS_FLOATS}")
        if found != shape:
            in_head = self._family.roles.matches("head", name.replace(".", "/"))
            hint = " Pass fresh_head=True (--fresh-head) to leave out the checkpoint's head." if in_head else ""
            raise ValueError(f"{file}: {stored} has shape {found}, the model needs {shape} by its config.json.{hint}")

    def read(self, name: str, out: np.ndarray, part: tuple[slice, ...] | None = None) -> None:
        """Read one tensor, or a part of it, into an array, whose type the numbers take.

        The file is read a block at a time and not mapped: mapped pages count as memory of this process for as long as the file is open.

        Args:
          name: a name that is `in` these tensors, and was checked.
          out: the array, of the shape of the tensor or the part. It may be a transposed view.
          part: a slice for each axis; None for the whole tensor. Only that part is read from the file.
        """
        header = self._header(name)
        canonical = self._find(name)
        assert canonical is not None
        self._read.add(canonical)
        if part is not None:
            out[...] = self._open(header.file).get_slice(header.name)[part]
        elif not header.shape:
            out[...] = next(_blocks(header))[1].reshape(())
        else:
            # Into a transposed array a few rows at a time, so that what is written to stays in the processor's cache.
            step = _TILE if out.ndim == 2 and out.flags.f_contiguous else _BLOCK
            for start, block in _blocks(header):
                for row in range(0, len(block), step):
                    part_of_block = block[row : row + step]
                    out[start + row : start + row + len(part_of_block)] = part_of_block

    def release(self) -> None:
        """Close the files, which ends their maps and frees the memory that these hold. Reading opens them again."""
        self._files.clear()

    def equal(self, one: str, other: str) -> bool:
        """Return whether two tensors that are `in` these tensors hold the same numbers, comparing a block at a time."""
        first, second = self._header(one), self._header(other)
        if first.shape != second.shape:
            return False
        rows = _rows(first, second)
        pairs = zip(_blocks(first, rows), _blocks(second, rows), strict=True)
        return all(np.array_equal(left.astype(np.float32), right.astype(np.float32)) for (_, left), (_, right) in pairs)

    def unused(self, *, scores_words: bool) -> frozenset[str]:
        """Return the names, as in the files, of tensors that were not read.

        Buffers are left out. So are copies of a tied word embedding if the model scores words, because the embedding itself was read.
        """
        names = self._family.names
        ignored = f"{names.buffers}|{names.tied}" if scores_words else names.buffers
        # A tensor that stands in the file under a second name too has been read under that.
        left = [name for name in self._where.keys() - self._read if not re.fullmatch(ignored, name) and self._find(name) not in self._read]
        return frozenset(self._where[name].name for name in left)


def _rows(*headers: Header) -> int:
    """Return how many rows of tensors of one shape make a block."""
    width = int(np.prod(headers[0].shape[1:])) * max(_FLOATS[header.dtype].itemsize for header in headers)
    return max(1, _BLOCK // max(width, 1))


def _blocks(header: Header, rows: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the rows of a tensor, some at a time, each block with the number of its first row. A scalar is one row.

    Raises:
      ValueError: if the file ends before the tensor does.
    """
    dtype, rows = _FLOATS[header.dtype], rows or _rows(header)
    count, *width = header.shape or (1,)
    with open(header.file, "rb", buffering=0) as raw:
        raw.seek(header.start)
        for start in range(0, count, rows):
            block = np.empty((min(rows, count - start), *width), dtype)
            left: Any = memoryview(block.reshape(-1).view(np.uint8).data)
            while left:
                if not (done := raw.readinto(left)):
                    raise ValueError(f"{header.file} ends before {header.name} does: it was changed while it was read.")
                left = left[done:]
            yield start, block


def find_shard(index: Path, shard: str) -> Path:
    """Return the file that an index names; it must be in the folder of the index.

    Raises:
      ValueError: for a path that leads out of the folder, by its name or by a symbolic link.
    """
    folder = index.parent
    if not shard or not shard.isprintable() or Path(shard).is_absolute() or ".." in Path(shard).parts:
        raise ValueError(f"{index}: weight_map names {shard!r}, which is no file in this folder.")
    file, inside = folder / shard, folder.resolve()
    # The hub's cache keeps the files of a repository in `blobs` and links to them from `snapshots/COMMIT`.
    cached = inside.parent.name == "snapshots" and inside.parents[1].name.startswith("models--")
    allowed = (inside, inside.parents[1] / "blobs") if cached else (inside,)
    if not any(file.resolve().is_relative_to(root) for root in allowed):
        raise ValueError(f"{index}: {shard} is a link to {file.resolve()}, outside of this folder: put the file itself here.")
    return file

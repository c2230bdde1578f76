"""Ways to damage a file. Each takes the file and a random generator, changes it in place, and returns what it did in words.

`Unchanged` says that a way does not apply to this file, or that it left the file as it was.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Damage = Callable[[Path, np.random.Generator], str]


class Unchanged(Exception):
    """The file is as it was; try another way."""


# --- bytes ------------------------------------------------------------------------------------------------------------


def flip_bit(path: Path, rng: np.random.Generator) -> str:
    content = bytearray(path.read_bytes())
    at = _place(content, rng)
    bit = int(rng.integers(8))
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at}"


def change_byte(path: Path, rng: np.random.Generator) -> str:
    content = bytearray(path.read_bytes())
    at, new = _place(content, rng), int(rng.choice([0, 9, 10, 13, 32, 34, 39, 44, 48, 92, 123, 125, 127, 128, 255]))
    if content[at] == new:
        raise Unchanged
    content[at] = new
    path.write_bytes(content)
    return f"byte {at} is {new}"


def insert_bytes(path: Path, rng: np.random.Generator) -> str:
    content = path.read_bytes()
    at = int(rng.integers(len(content) + 1))
    new = [b"\0", b'"', b"\xff\xfe", b"\n", b"\r\n", b"\xef\xbb\xbf", rng.bytes(7)][rng.integers(7)]
    path.write_bytes(content[:at] + new + content[at:])
    return f"{new!r} before byte {at}"


def delete_bytes(path: Path, rng: np.random.Generator) -> str:
    content = path.read_bytes()
    at, count = _place(content, rng), int(rng.integers(1, 8))
    path.write_bytes(content[:at] + content[at + count :])
    return f"{count} bytes fewer at {at}"


def cut_short(path: Path, rng: np.random.Generator) -> str:
    content = path.read_bytes()
    size = _place(content, rng)
    path.write_bytes(content[:size])
    return f"cut to {size} of {len(content)} bytes"


def empty(path: Path, rng: np.random.Generator) -> str:
    _place(path.read_bytes(), rng)
    path.write_bytes(b"")
    return "empty"


def blank_out(path: Path, rng: np.random.Generator) -> str:
    content = bytearray(path.read_bytes())
    at = _place(content, rng)
    end = min(len(content), at + 512)
    if not any(content[at:end]):
        raise Unchanged
    content[at:end] = bytes(end - at)
    path.write_bytes(content)
    return f"zeros from {at} to {end}"


def lengthen(path: Path, rng: np.random.Generator) -> str:
    new = [b"\0" * 16, b"}", rng.bytes(64)][rng.integers(3)]
    with open(path, "ab") as file:
        file.write(new)
    return f"{new[:8]!r}... behind the end"


def _place(content: bytes | bytearray, rng: np.random.Generator) -> int:
    """A position in a file, often among its first bytes."""
    if not content:
        raise Unchanged
    return int(rng.integers(min(len(content), 64) if rng.random() < 0.25 else len(content)))


BYTES: dict[str, Damage] = {
    "bit": flip_bit,
    "byte": change_byte,
    "inserted": insert_bytes,
    "deleted": delete_bytes,
    "cut": cut_short,
    "empty": empty,
    "zeros": blank_out,
    "longer": lengthen,
}

# --- places -----------------------------------------------------------------------------------------------------------


def remove(path: Path, rng: np.random.Generator) -> str:
    path.unlink()
    return "missing"


def make_folder(path: Path, rng: np.random.Generator) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


def dangle(path: Path, rng: np.random.Generator) -> str:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")
    return "a link to nothing"


def loop(path: Path, rng: np.random.Generator) -> str:
    path.unlink()
    path.symlink_to(path.name)
    return "a link to itself"


def link_away(path: Path, rng: np.random.Generator) -> str:
    """The same content, but outside the folder: reading it is right, writing through it or deleting it is not."""
    away = outside(path)
    shutil.move(path, away)
    path.symlink_to(away)
    return "a link to the same content elsewhere"


def link_device(path: Path, rng: np.random.Generator) -> str:
    path.unlink()
    path.symlink_to("/dev/null")
    return "a link to /dev/null"


def make_pipe(path: Path, rng: np.random.Generator) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a pipe"


def forbid(path: Path, rng: np.random.Generator) -> str:
    if os.geteuid() == 0:  # may read everything
        raise Unchanged
    path.chmod(0)
    return "unreadable"


def outside(path: Path) -> Path:
    """A place beside the folders that are damaged, for what a link points to."""
    world = next(parent for parent in path.parents if (parent / "elsewhere").is_dir())
    return world / "elsewhere" / path.name


PLACES: dict[str, Damage] = {
    "missing": remove,
    "folder": make_folder,
    "dangling": dangle,
    "loop": loop,
    "linked": link_away,
    "device": link_device,
    "pipe": make_pipe,
    "forbidden": forbid,
}


def swap(path: Path, other: Path) -> str:
    """Exchange two files."""
    first, second = path.read_bytes(), other.read_bytes()
    if first == second:
        raise Unchanged
    path.write_bytes(second)
    other.write_bytes(first)
    return f"swapped with {other.parent.name}/{other.name}"


# --- JSON -------------------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**30, 1e308, 0.5, -0.5, 1.0, float("nan"), float("inf"),
    "", "x", "0", "1e9", "../../etc/passwd", "/dev/zero", "float32", "\ud83d", "a\nb", "x" * 5000, [], [0], ["x"], [[]], {}, {"x": 1},
)  # fmt: skip


def json_value(path: Path, rng: np.random.Generator) -> str:
    return _edit(path, rng, lambda parent, key: _put(parent, key, VALUES[rng.integers(len(VALUES))]))


def json_number(path: Path, rng: np.random.Generator) -> str:
    """Another number where there is one: right in type and often in range."""

    def edit(parent: Any, key: Any) -> str:
        old = parent[key]
        if isinstance(old, bool) or not isinstance(old, (int, float)):
            raise Unchanged
        scale = [2, 0, -1, 1.5, 10**6, 10**12][rng.integers(6)]
        return _put(parent, key, type(old)(old * scale) if rng.random() < 0.6 else old + int(rng.choice([-1, 1])))

    return _edit(path, rng, edit)


def json_removed(path: Path, rng: np.random.Generator) -> str:
    def edit(parent: Any, key: Any) -> str:
        del parent[key]
        return f"without {key!r}"

    return _edit(path, rng, edit)


def json_added(path: Path, rng: np.random.Generator) -> str:
    def edit(parent: Any, key: Any) -> str:
        value = VALUES[rng.integers(len(VALUES))]
        if isinstance(parent, list):
            parent.insert(key, value)
            return f"{value!r:.40} inserted at {key}"
        name = ["extra", "", "auto_map", "quantization_config", "__class__", "dtype", "\ud83d", f"{key}2"][rng.integers(8)]
        if name in parent:
            raise Unchanged
        parent[name] = value
        return f"{name!r} added: {value!r:.40}"

    return _edit(path, rng, edit)


def json_renamed(path: Path, rng: np.random.Generator) -> str:
    def edit(parent: Any, key: Any) -> str:
        if isinstance(parent, list):
            raise Unchanged
        parent[f"{key}_"] = parent.pop(key)
        return f"{key!r} renamed"

    return _edit(path, rng, edit)


def json_exchanged(path: Path, rng: np.random.Generator) -> str:
    def edit(parent: Any, key: Any) -> str:
        other = _keys(parent)[rng.integers(len(parent))]
        if parent[other] == parent[key]:
            raise Unchanged
        parent[other], parent[key] = parent[key], parent[other]
        return f"{key!r} and {other!r} exchanged"

    return _edit(path, rng, edit)


def json_deep(path: Path, rng: np.random.Generator) -> str:
    content = _content(path)
    parent, key = _spot(content, rng)
    parent[key] = "DEEP"
    depth = 100_000
    path.write_text(json.dumps(content).replace('"DEEP"', "[" * depth + "]" * depth))
    return f"{key!r} is {depth} lists deep"


def json_huge_number(path: Path, rng: np.random.Generator) -> str:
    content = _content(path)
    parent, key = _spot(content, rng)
    parent[key] = "HUGE"
    path.write_text(json.dumps(content).replace('"HUGE"', "9" * 6000))
    return f"{key!r} has 6,000 digits"


def json_twice(path: Path, rng: np.random.Generator) -> str:
    """The same key twice in the outermost object, with two values."""
    content = _content(path)
    if not isinstance(content, dict) or not content:
        raise Unchanged
    key = _keys(content)[rng.integers(len(content))]
    text = json.dumps(content)
    path.write_text(text[:-1] + f", {json.dumps(key)}: {json.dumps(VALUES[rng.integers(len(VALUES))])}}}")
    return f"{key!r} given twice"


def json_spaced(path: Path, rng: np.random.Generator) -> str:
    content, before = _content(path), path.read_bytes()
    path.write_text(json.dumps(content, indent=7, sort_keys=bool(rng.integers(2))) + "\n\n")
    if path.read_bytes() == before:
        raise Unchanged
    return "other spaces and order"


def json_whole(path: Path, rng: np.random.Generator) -> str:
    _content(path)
    value = [[], {}, None, 5, "x", [{}]][rng.integers(6)]
    path.write_text(json.dumps(value))
    return f"the whole file is {value!r}"


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise Unchanged from None


def _keys(parent: Any) -> list[Any]:
    return list(parent) if isinstance(parent, dict) else list(range(len(parent)))


def _spot(content: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """A container somewhere in the content, often near the top, and one of its keys."""
    if not isinstance(content, (dict, list)) or not content:
        raise Unchanged
    parent = content
    while True:
        key = _keys(parent)[rng.integers(len(parent))]
        inner = parent[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
            return parent, key
        parent = inner


def _edit(path: Path, rng: np.random.Generator, change: Callable[[Any, Any], str]) -> str:
    content = _content(path)
    before = json.dumps(content)
    said = change(*_spot(content, rng))
    if json.dumps(content) == before:
        raise Unchanged
    path.write_text(json.dumps(content, indent=1))
    return said


def _put(parent: Any, key: Any, value: Any) -> str:
    old, parent[key] = parent[key], value
    return f"{key!r} is {value!r:.60} instead of {old!r:.40}"


JSON: dict[str, Damage] = {
    "JSON value": json_value,
    "JSON number": json_number,
    "JSON key removed": json_removed,
    "JSON key added": json_added,
    "JSON key renamed": json_renamed,
    "JSON values exchanged": json_exchanged,
    "JSON deep": json_deep,
    "JSON huge number": json_huge_number,
    "JSON key twice": json_twice,
    "JSON spaces": json_spaced,
    "JSON other content": json_whole,
}

# --- folders ----------------------------------------------------------------------------------------------------------


def remove_folder(path: Path, rng: np.random.Generator) -> str:
    shutil.rmtree(path)
    return "missing"


def empty_folder(path: Path, rng: np.random.Generator) -> str:
    shutil.rmtree(path)
    path.mkdir()
    return "an empty folder"


def make_file(path: Path, rng: np.random.Generator) -> str:
    shutil.rmtree(path)
    path.write_text("{}")
    return "a file"


def dangle_folder(path: Path, rng: np.random.Generator) -> str:
    shutil.rmtree(path)
    path.symlink_to(path.parent / "nowhere")
    return "a link to nothing"


def add_file(path: Path, rng: np.random.Generator) -> str:
    name = [".DS_Store", "notes.txt", "desktop.ini", "tmp123"][rng.integers(4)]
    (path / name).write_text("x")
    return f"with a file {name} of somebody's"


def remove_one(path: Path, rng: np.random.Generator) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        raise Unchanged
    file = files[rng.integers(len(files))]
    file.unlink()
    return f"without {file.name}"


FOLDERS: dict[str, Damage] = {
    "missing": remove_folder,
    "emptied": empty_folder,
    "file": make_file,
    "dangling": dangle_folder,
    "linked": link_away,
    "stranger": add_file,
    "one missing": remove_one,
}

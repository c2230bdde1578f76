"""Ways to damage a safetensors file in its header: eight bytes of length, JSON, then the tensors' bytes."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.mutations import Damage, Unchanged

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "X9", "")


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    try:
        size = struct.unpack("<Q", content[:8])[0]
        return json.loads(content[8 : 8 + size]), content[8 + size :]
    except (ValueError, struct.error):
        raise Unchanged from None


def write(path: Path, header: dict[str, Any], tensors: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)


def _on_a_tensor(change: Callable[[dict[str, Any], str, np.random.Generator], str]) -> Damage:
    """A change of one tensor's entry in the header."""

    def damage(path: Path, rng: np.random.Generator) -> str:
        header, tensors = read(path)
        before = json.dumps(header)
        name = sorted(header.keys() - {"__metadata__"})[rng.integers(len(header.keys() - {"__metadata__"}))]
        said = change(header, name, rng)
        if json.dumps(header) == before:
            raise Unchanged
        write(path, header, tensors)
        return f"{name}: {said}"

    return damage


def _dtype(header: dict[str, Any], name: str, rng: np.random.Generator) -> str:
    header[name]["dtype"] = DTYPES[rng.integers(len(DTYPES))]
    return f"dtype {header[name]['dtype']}"


def _same_width(header: dict[str, Any], name: str, rng: np.random.Generator) -> str:
    """The same bytes as whole numbers: every size is right, every value wrong."""
    header[name]["dtype"] = ["I32", "U32"][rng.integers(2)]
    return f"dtype {header[name]['dtype']}"


def _shape(header: dict[str, Any], name: str, rng: np.random.Generator) -> str:
    shape = header[name]["shape"]
    size = int(np.prod(shape))
    options = [shape[::-1], [size], [1, *shape], [*shape, 1], [-1], [2**62, 4], shape[:-1], [], [0], ["x"], [1.5], None]
    header[name]["shape"] = options[rng.integers(len(options))]
    return f"shape {header[name]['shape']} instead of {shape}"


def _offsets(header: dict[str, Any], name: str, rng: np.random.Generator) -> str:
    begin, end = header[name]["data_offsets"]
    options = [
        [begin + 4, end + 4],
        [0, end - begin],
        [end, begin],
        [begin, end + 4],
        [-4, end],
        [begin, 2**63],
        [2**64, 2**65],
        [begin],
        "x",
    ]
    header[name]["data_offsets"] = options[rng.integers(len(options))]
    return f"offsets {header[name]['data_offsets']} instead of {[begin, end]}"


def _name(header: dict[str, Any], name: str, rng: np.random.Generator) -> str:
    options = [f"module.{name}", f"x.{name}", name.upper(), "", name.split(".", 1)[-1], name + "_scale"]
    new = options[rng.integers(len(options))]
    if new in header:
        raise Unchanged
    header[new] = header.pop(name)
    return f"renamed to {new!r}"


def _exchange(header: dict[str, Any], name: str, rng: np.random.Generator) -> str:
    other = sorted(header.keys() - {"__metadata__"})[rng.integers(len(header.keys() - {"__metadata__"}))]
    header[name], header[other] = header[other], header[name]
    return f"exchanged with {other}"


def _left_out(header: dict[str, Any], name: str, rng: np.random.Generator) -> str:
    del header[name]
    return "not in the header"


def _about(header: dict[str, Any], name: str, rng: np.random.Generator) -> str:
    options = [None, {}, {"format": "tf"}, {"format": 5}, "x", {"x": "y" * 1000}]
    header["__metadata__"] = options[rng.integers(len(options))]
    return f"metadata {header['__metadata__']!r:.40}"


def length(path: Path, rng: np.random.Generator) -> str:
    content = path.read_bytes()
    sizes = [0, 1, 2**62, 2**64 - 1, 100_000_001, len(content), len(content) - 8, struct.unpack("<Q", content[:8])[0] + 8]
    size = sizes[rng.integers(len(sizes))]
    path.write_bytes(struct.pack("<Q", size) + content[8:])
    return f"header of {size} bytes"


def deep(path: Path, rng: np.random.Generator) -> str:
    _, tensors = read(path)
    text = b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    return "a header 100,000 lists deep"


def weight(path: Path, rng: np.random.Generator) -> str:
    """Another value in the middle of a tensor: nothing but a fingerprint can tell."""
    content = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    at = start + 4 * int(rng.integers((len(content) - start) // 4))
    value = [0.0, 1.0, -3.5, float("nan"), float("inf"), 1e30][rng.integers(6)]
    new = struct.pack("<f", value)
    if content[at : at + 4] == new:
        raise Unchanged
    content[at : at + 4] = new
    path.write_bytes(content)
    return f"the weight at {at} is {value}"


TENSORS: dict[str, Damage] = {
    "tensor dtype": _on_a_tensor(_dtype),
    "tensor as integers": _on_a_tensor(_same_width),
    "tensor shape": _on_a_tensor(_shape),
    "tensor offsets": _on_a_tensor(_offsets),
    "tensor name": _on_a_tensor(_name),
    "tensors exchanged": _on_a_tensor(_exchange),
    "tensor left out": _on_a_tensor(_left_out),
    "tensor metadata": _on_a_tensor(_about),
    "header length": length,
    "header deep": deep,
    "weight": weight,
}

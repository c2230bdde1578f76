"""The layout of a block that no naming scheme covers, read off its structure and shapes.

Of attention, queries, keys and values go from the model's width to heads, and one projection goes back; in flax's own attention these
kernels have an axis of heads. A feed-forward layer goes from the width to an inner one, once or twice, and back. Names tell what shapes
leave open: which of four square kernels leaves attention. Where neither tells, nothing is read.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jpeft.layouts.layout import Layout

Shape = tuple[int, ...]

STRUCTURE = "structure"  # name of the layouts that are read here

_ATTENTION = re.compile(r"(?i)att(n|ention|entive|$|(?=[_\d]))|mha|mhsa|mhdpa")
_CROSS = re.compile(r"(?i)cross|enc(oder)?_?dec|encoder_att|context_att|src_att")
_FEED_FORWARD = re.compile(r"(?i)(^|_)(mlp|ffn?|ffw|feed_?forward)(_|block|layer|network|\d|$)|mlp|feed_?forward|ffn")
_SUFFIX = r"(_?(proj|projection|lin|linear|einsum|fc|dense|kernel|w|layer|\d+))?(_\d+)?"
_INPUT = rf"(w|to|in|linear|fc|dense)?_?({{}}){_SUFFIX}"
_QUERY, _KEY, _VALUE, _QKV, _KV = (
    re.compile(_INPUT.format(names)) for names in ("q|query|queries", "k|key|keys", "v|value|values", "qkv|c_attn|in", "kv")
)
_OUT = re.compile(rf"(?i)((w|to|linear|fc|dense|attn)_?)?_?(o|out|output|proj|projection|c_proj){_SUFFIX}|dense|final")
_LATER = re.compile(r"(?i).*(out|down|2|_1|wo|proj|final|second).*")
_NORM = re.compile(r"(?i)[^/]*norm[^/]*|ln(_?\w+)?")
_WEIGHTS = ("kernel", "w", "weight")


class _Kernel(NamedTuple):
    """A kernel of a block: its module, and how many features come in and go out, where shapes tell."""

    module: str
    inputs: int
    outputs: int
    shape: Shape

    @property
    def name(self) -> str:
        return self.module.rpartition("/")[2]

    @property
    def makes_heads(self) -> bool:
        """Whether it is [width, heads, head_dim], as only projections into attention are."""
        return len(self.shape) == 3 and self.shape[0] == self.inputs


class Reading(NamedTuple):
    """The modules of a block by what they do."""

    attention_in: dict[str, list[str]]  # by field of `Layout`: query, key, value, qkv, kv
    attention_out: list[str]
    cross_attention_out: list[str]
    ffn_in: list[str]
    ffn_out: list[str]
    ffn: list[str]
    unread: tuple[str, ...]  # groups of kernels that look like attention or a feed-forward layer, and are ambiguous


def read(leaves: Mapping[str, Shape | None]) -> Reading | None:
    """Read one block, whose leaves are given by their paths from the block on, without an axis of layers; None if shapes are missing.

    >>> block = {"mix/q/kernel": (8, 2, 4), "mix/k/kernel": (8, 2, 4), "mix/v/kernel": (8, 2, 4), "mix/o/kernel": (2, 4, 8)}
    >>> reading = read(block | {"wide/a/kernel": (8, 32), "wide/b/kernel": (32, 8), "norm/scale": (8,)})
    >>> reading.attention_out, reading.ffn_in, reading.ffn_out
    (['mix/o'], ['wide/a'], ['wide/b'])
    """
    shapes = {path: shape for path, shape in leaves.items() if shape is not None}
    width = _width(shapes)
    if width is None:
        return None
    kernels = [kernel for path, shape in shapes.items() if (kernel := _kernel(path, shape, width)) is not None]
    out = Reading({}, [], [], [], [], [], ())
    unread: list[str] = []
    for group, members in _groups(kernels, width):
        if _is_attention(group, members, width):
            found = _attention_out(members, width)
            if found is None:
                unread.append(group or ".")
                continue
            (out.cross_attention_out if _CROSS.search(group) else out.attention_out).append(found.module)
            _read_inputs([kernel for kernel in members if kernel is not found], out.attention_in)
        elif (pair := _feed_forward(members, width)) is not None:
            ins, last = pair
            out.ffn_in.extend(kernel.module for kernel in ins)
            out.ffn_out.append(last.module)
            if group and all(kernel in (*ins, last) or kernel.outputs < width for kernel in members):
                out.ffn.append(group)
        elif _FEED_FORWARD.search(group):
            unread.append(group)
    if out.cross_attention_out and not out.attention_out:  # there is no other attention that it could be told from
        out.attention_out.extend(out.cross_attention_out)
        out.cross_attention_out.clear()
    return out._replace(unread=tuple(unread))


def layout_of(leaves: Mapping[str, Shape | None]) -> Layout | None:
    """The layout of a block as its structure shows it; None if it has no feed-forward layer and no attention that can be told.

    >>> layout_of({"wide/a/kernel": (8, 32), "wide/b/kernel": (32, 8), "norm/scale": (8,)}).ffn_out
    'wide/b'
    """
    reading = read(leaves)
    if reading is None or reading.unread or not (reading.ffn_out or reading.attention_out):
        return None
    pattern = lambda modules: "|".join(map(re.escape, modules))
    ins = {name: pattern(modules) for name, modules in reading.attention_in.items()}
    return Layout(
        name=STRUCTURE,
        families="blocks that are read by structure and shapes",
        query=ins.get("query", ""),
        key=ins.get("key", ""),
        value=ins.get("value", ""),
        qkv=ins.get("qkv", ""),
        kv=ins.get("kv", ""),
        attention_out=pattern(reading.attention_out),
        cross_attention_out=pattern(reading.cross_attention_out),
        ffn_in=pattern(reading.ffn_in),
        ffn_out=pattern(reading.ffn_out),
        ffn=pattern(reading.ffn),
        weights=(*_WEIGHTS, ""),
    )


def _width(shapes: Mapping[str, Shape]) -> int | None:
    """The width of the model: that of the block's normalisations, or else the size that most kernels take and give."""
    norms = [shape[0] for path, shape in shapes.items() if len(shape) == 1 and _in_norm(path)]
    ends = Counter(size for path, shape in shapes.items() if _is_kernel(path, shape) for size in {shape[0], shape[-1]})
    # Norms of queries and keys are as wide as a head, which is no size of a feed-forward layer.
    counts = Counter(size for size in norms if size in ends) or ends
    return counts.most_common(1)[0][0] if counts else None


def _in_norm(path: str) -> bool:
    *_, module, leaf = ("", *path.split("/"))
    return leaf == "scale" or (_NORM.fullmatch(module) is not None and leaf != "bias") or _NORM.fullmatch(leaf) is not None


def _is_kernel(path: str, shape: Shape) -> bool:
    return len(shape) in (2, 3) and path.rpartition("/")[2] not in ("bias", "scale", "embedding") and not _in_norm(path)


def _kernel(path: str, shape: Shape, width: int) -> _Kernel | None:
    """A leaf as a kernel; None for what is none, or does not touch the width."""
    if not _is_kernel(path, shape):
        return None
    owner, _, leaf = path.rpartition("/")
    module = owner if leaf in _WEIGHTS else path
    if len(shape) == 2:
        return _Kernel(module, *shape, shape) if width in shape else None
    first, middle, last = shape
    if first == width and (last != width or not _OUT.fullmatch(module.rpartition("/")[2])):
        return _Kernel(module, width, middle * last, shape)
    if last == width:
        return _Kernel(module, first * middle, width, shape)
    return _Kernel(module, width, first * last, shape) if middle == width else None


def _groups(kernels: Iterable[_Kernel], width: int) -> list[tuple[str, list[_Kernel]]]:
    """Kernels by the module that they work in: the outermost one that is named as attention or a feed-forward layer, or the one around."""
    groups: dict[str, list[_Kernel]] = {}
    for kernel in kernels:
        parts = kernel.module.split("/")
        named = next((i for i, part in enumerate(parts[:-1]) if _ATTENTION.search(part) or _FEED_FORWARD.search(part)), None)
        groups.setdefault("/".join(parts[: len(parts) - 1 if named is None else named + 1]), []).append(kernel)
    out = []
    for group, members in groups.items():
        named = _ATTENTION.search(group) or _FEED_FORWARD.search(group)
        # Attention and a feed-forward layer may stand side by side in the block itself.
        parts = [members] if named else [part for part in _apart(members, width) if part]
        out += [(group, part) for part in parts]
    return out


def _apart(members: list[_Kernel], width: int) -> tuple[list[_Kernel], list[_Kernel]]:
    """The kernels of attention and those of a feed-forward layer, which stand in one module."""
    attention = [kernel for kernel in members if kernel.makes_heads or _kind_of_input(kernel.name) is not None]
    if not attention:
        return [], members
    rest = [kernel for kernel in members if kernel not in attention]
    outs = [kernel for kernel in rest if kernel.outputs == width]
    with_heads = [kernel for kernel in outs if len(kernel.shape) == 3]
    square = [kernel for kernel in outs if kernel.inputs == width]
    named = [kernel for kernel in outs if _OUT.fullmatch(kernel.name)]
    out = next((found for found in (with_heads, square, named) if found), [])
    return [*attention, *out], [kernel for kernel in rest if kernel not in out]


def _kind_of_input(name: str) -> str | None:
    """Which projection into attention a module is, by its name: the field of `Layout`."""
    kinds = (("query", _QUERY), ("key", _KEY), ("value", _VALUE), ("qkv", _QKV), ("kv", _KV))
    return next((kind for kind, pattern in kinds if pattern.fullmatch(name)), None)


def _is_attention(group: str, members: list[_Kernel], width: int) -> bool:
    """Whether a group of kernels is attention: by an axis of heads, by names, or by three projections in beside one out."""
    if _FEED_FORWARD.search(group.rpartition("/")[2]):
        return False
    kinds = {_kind_of_input(kernel.name) for kernel in members} - {None}
    if any(kernel.makes_heads for kernel in members) or {"query", "key"} <= kinds or "kv" in kinds:
        return True
    if _ATTENTION.search(group):
        return len(members) > 1
    # One kernel for queries, keys and values is three times as wide as what leaves attention takes.
    return len(members) == 2 and any(a.outputs == 3 * b.inputs and a.inputs == b.outputs == width for a in members for b in members)


def _attention_out(members: list[_Kernel], width: int) -> _Kernel | None:
    """The projection out of attention; None if there are several that could be."""
    back = [kernel for kernel in members if kernel.outputs == width and not kernel.makes_heads and _kind_of_input(kernel.name) is None]
    with_heads = [kernel for kernel in back if len(kernel.shape) == 3]
    narrowing = [kernel for kernel in back if kernel.inputs != width]
    named = [kernel for kernel in back if _OUT.fullmatch(kernel.name)]
    return next((found[0] for found in (with_heads, narrowing, back, named) if len(found) == 1), None)


def _read_inputs(members: Iterable[_Kernel], out: dict[str, list[str]]) -> None:
    for kernel in members:
        if (kind := _kind_of_input(kernel.name)) is not None:
            out.setdefault(kind, []).append(kernel.module)


def _feed_forward(members: list[_Kernel], width: int) -> tuple[list[_Kernel], _Kernel] | None:
    """The projections into a feed-forward layer and the one out of it; None if there is none, or it is ambiguous."""
    outs = [kernel for kernel in members if kernel.outputs == width and kernel.inputs != width]
    if len(outs) == 1:
        (last,) = outs
        ins = [k for k in members if k.inputs == width and k.outputs in (last.inputs, 2 * last.inputs) and k is not last]
        return (ins, last) if 1 <= len(ins) <= 2 else None
    square = [kernel for kernel in members if kernel.inputs == kernel.outputs == width]
    if not outs and len(square) == len(members) in (2, 3):
        later = [kernel for kernel in square if _LATER.fullmatch(kernel.name)]
        if len(later) == 1:
            return [kernel for kernel in square if kernel is not later[0]], later[0]
    return None

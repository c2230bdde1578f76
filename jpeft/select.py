"""Choosing parameters by path, and the geometry of kernels.

One idiom everywhere: ordered ``(regex, value)`` rules over '/'-joined paths, `re.fullmatch`, first match wins. A selection that matches
nothing is an error that names what was asked for and what there is.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from .tree import Params, Path, flatten

T = TypeVar("T")
Rules = Mapping[str, Any] | Sequence[Any]  # {regex: value} or ((regex, value), ...)

# Where task heads are found in the families that people fine-tune. They are made fresh for every task, so every method trains them.
HEAD = r"(pre_classifier|classifier|score|qa_outputs|classification_head)(/.*)?"


class KernelAxes(NamedTuple):
    """Which axes of a kernel are which: the geometry that a low-rank factorisation needs.

    ``stack`` are batch axes (layers of an `nn.scan`, experts), ``inputs`` are contracted with the layer's input, ``outputs`` are produced.

    >>> KernelAxes((), (0,), (1, 2)).factor_shapes((768, 12, 64), rank=8)      # DenseGeneral query
    ((768, 8), (8, 12, 64))
    >>> KernelAxes((0,), (1,), (2,)).factor_shapes((24, 768, 3072), rank=8)    # 24 scanned layers
    ((24, 768, 8), (24, 8, 3072))
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def factor_shapes(self, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``a`` (outputs collapsed to the rank) and ``b`` (inputs collapsed to the rank); the stack axes keep their places."""
        return self.factors(shape, rank)

    def factors(self, kernel: Sequence[T], rank: T) -> tuple[tuple[T, ...], tuple[T, ...]]:
        """Anything that the kernel has one of for each axis (size, letter, place), as ``a`` and ``b`` have it.

        >>> KernelAxes((), (0,), (1, 2)).factors("dnh", "r")
        (('d', 'r'), ('r', 'n', 'h'))
        """
        return tuple(_collapsed(kernel, self.outputs, rank)), tuple(_collapsed(kernel, self.inputs, rank))

    def fan_in(self, shape: tuple[int, ...]) -> int:
        """Number of inputs that are summed into one output."""
        return math.prod(shape[i] for i in self.inputs)

    def fan_out(self, shape: tuple[int, ...]) -> int:
        """Number of outputs."""
        return math.prod(shape[i] for i in self.outputs)

    def letters(self, kernel: str, rank: str) -> tuple[str, str]:
        """The subscripts of ``a`` and ``b``, given those of the kernel and of the rank axis.

        >>> KernelAxes((), (0,), (1, 2)).letters("dnh", "r")
        ('dr', 'rnh')
        """
        a, b = self.factors(kernel, rank)
        return "".join(a), "".join(b)

    def product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """``a b`` in the shape of the kernel, summed over the rank axis."""
        kernel = "abcdefghijklm"[: len(self.stack) + len(self.inputs) + len(self.outputs)]
        left, right = self.letters(kernel, "r")
        return jnp.einsum(f"{left},{right}->{kernel}", a, b)


def _collapsed(values: Sequence[T], axes: tuple[int, ...], by: T) -> list[T]:
    """`values` with those of `axes` removed and `by` in the place of the first."""
    return [by if i == axes[0] else v for i, v in enumerate(values) if i == axes[0] or i not in axes]


# (regex on the path, number of axes, geometry). A stacked container is one whose layers share a single subtree: no index follows its name.
STACKED = r"(?P<stack>(.*/)?(layers?|blocks?|h|stack|Scan[A-Z]\w*_\d+))/(?!\d+(/|$)).*"
_QKV = r"(.*/)?(query|key|value)/kernel"
_OUT = r"(.*/)?out/kernel"
_CONV = r"(.*/)?([Cc]onv[^/]*|patch_embed[^/]*|projection|embedding)/kernel"
DEFAULT_AXES: tuple[tuple[str, int, KernelAxes], ...] = (
    (_QKV, 3, KernelAxes((), (0,), (1, 2))),  # nn.MultiHeadDotProductAttention
    (_OUT, 3, KernelAxes((), (0, 1), (2,))),
    (_CONV, 3, KernelAxes((), (0, 1), (2,))),
    (_CONV, 4, KernelAxes((), (0, 1, 2), (3,))),
    (_CONV, 5, KernelAxes((), (0, 1, 2, 3), (4,))),
    (r".*", 2, KernelAxes((), (0,), (1,))),
)

AxesRules = tuple[tuple[str, KernelAxes], ...]


def kernel_axes(path: Path, shape: tuple[int, ...], rules: AxesRules = ()) -> KernelAxes:
    """The geometry of one kernel: from the caller's rules, else from the known layouts; never guessed from the number of axes.

    Names alone can mislead (two models may both call a kernel ``query``), so every host compares the answer with the real layer at the
    first call and refuses a wrong one.

    Raises:
      ValueError: if no rule covers the kernel.
    """
    for pattern, axes in rules:
        if re.fullmatch(pattern, path):
            if sorted(axes.stack + axes.inputs + axes.outputs) != list(range(len(shape))):
                raise ValueError(f"axes rule '{pattern}': {axes} does not name each of the {len(shape)} axes of '{path}' {shape} once.")
            return axes
    stacked = re.fullmatch(STACKED, path) is not None and len(shape) > 2
    for pattern, ndim, axes in DEFAULT_AXES:
        if ndim + stacked == len(shape) and re.fullmatch(pattern, path):
            return KernelAxes((0,), *(tuple(i + 1 for i in part) for part in axes[1:])) if stacked else axes
    raise ValueError(
        f"The geometry of '{path}' with shape {shape} is not known: which axes are inputs and which outputs? "
        f"Say it with a rule, axes=(('{re.escape(path)}', jpeft.KernelAxes(stack=(), inputs=(0,), outputs=(1, 2))),), "
        "or let the model tell: axes=jpeft.kernel_axes(model, params, *example_inputs)."
    )


def first_match(path: Path, rules: Any, what: str) -> Any:
    """The value of the first ``(regex, value)`` rule that matches; a plain value stands for every path.

    Raises:
      ValueError: if rules were given and none matches.
    """
    if not isinstance(rules, (tuple, Mapping)):
        return rules
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    for pattern, value in pairs:
        if matches(pattern, path):
            return value
    raise ValueError(f"No {what} rule matches '{path}'. Rules: {[p for p, _ in pairs]}. End them with ('.*', {what}) for all the others.")


def matches(pattern: str, path: Path) -> bool:
    """Whether a regex matches the whole path of a leaf, or of the module that owns it."""
    return re.fullmatch(pattern, path) is not None or re.fullmatch(pattern, path.rpartition("/")[0]) is not None


def named(name: str, path: Path) -> bool:
    """Whether `name` is the leaf, its module, or a '/'-suffix of either: ``query`` and ``self/query`` name ``.../self/query/kernel``."""
    module = path.rpartition("/")[0]
    return f"/{path}".endswith(f"/{name}") or f"/{module}".endswith(f"/{name}")


def select(paths: Iterable[Path], target: str | Sequence[str], *, option: str = "target", params: Params | None = None) -> list[Path]:
    """The paths that a target names.

    Args:
      paths: Candidates.
      target: A string is a regex that must match a whole path, of the leaf or of its module. A sequence is a list of names, each a module
        or leaf name or a '/'-suffix of a path, as HF PEFT's ``target_modules``; every one of them must be found.
      option: Name of the option, for the message.
      params: The tree the candidates come from, to name what exists when they themselves say too little.

    Raises:
      ValueError: if the regex is not one, or something matches nothing.
    """
    paths = list(paths)
    if isinstance(target, str):
        try:
            found = [path for path in paths if matches(target, path)]
        except re.error as e:
            raise ValueError(f"{option}={target!r} is not a regular expression: {e}.") from e
        if not found:
            raise ValueError(_nothing(option, target, paths, params))
        return found
    for name in target:
        if not any(named(name, path) for path in paths):
            raise ValueError(_nothing(option, name, paths, params))
    return [path for path in paths if any(named(name, path) for name in target)]


def head_leaves(params: Params, head: str | None) -> dict[Path, Any]:
    """The leaves of the task head: ``"auto"`` looks for the usual names at the top of the tree, a regex must match, None is no head.

    Raises:
      ValueError: if a head was named that the model does not have.
    """
    if head is None:
        return {}
    flat = flatten(params)
    if head == "auto":
        return {path: leaf for path, leaf in flat.items() if re.fullmatch(HEAD, path)}
    chosen = select(flat, head, option="head", params=params)
    return {path: flat[path] for path in chosen}


def _nothing(option: str, target: str, paths: list[Path], params: Params | None) -> str:
    everything = paths or (list(flatten(params)) if params is not None else [])
    modules = sorted({re.sub(r"(^|/)\d+(?=/|$)", r"\1*", p) for p in everything})
    close = difflib.get_close_matches(target, {part for p in everything for part in p.split("/")} | set(modules), n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    shown = ", ".join(f"'{m}'" for m in modules[:12]) + (f", ... ({len(modules)} kinds)" if len(modules) > 12 else "")
    return (
        f"{option}={target!r} matches none of the {len(everything)} parameters it could.{hint} They are: {shown or '(none)'}. "
        "A string must match a whole path as a regular expression (begin it with '.*/'); a list holds names."
    )

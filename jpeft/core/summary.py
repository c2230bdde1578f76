"""What a method trains, stores and changes, counted."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jpeft import layouts, tree
from jpeft.core.method import FREEZE
from jpeft.core.peft import Peft, check_peft


class Row(NamedTuple):
    """The counts of one module."""

    module: str
    trained: int
    stored: int
    bytes: int


class Placement(NamedTuple):
    """Where the adapter stands in some blocks of a stack, which are alike in this.

    Attributes:
      stack: The stack, as in `jpeft.layouts.Stack.path`.
      blocks: Which of its blocks: "0-10", "11", or "all 12".
      modules: The modules with leaves, by their paths from the block on; "." is the block itself.
    """

    stack: str
    blocks: str
    modules: tuple[str, ...]


class Summary(NamedTuple):
    """Three counts that are easily confused, and what they are a part of.

    Attributes:
      trained: Scalars that the optimizer moves.
      stored: Scalars in the adapter, which is what a checkpoint holds.
      changed: Scalars of the base that take another value: r (D + F) trained ones change D F in LoRA.
      base: Scalars of the base.
      bytes: Bytes of the adapter.
      base_bytes: Bytes of the base.
      rows: `trained`, `stored` and `bytes` for each module.
      placement: Where the adapter stands in the blocks; more than one entry for a stack says that its blocks differ.
    """

    trained: int
    stored: int
    changed: int
    base: int
    bytes: int
    base_bytes: int
    rows: tuple[Row, ...]
    placement: tuple[Placement, ...] = ()

    def __str__(self) -> str:
        """A table for the terminal."""
        width = max([len(row.module) for row in self.rows] + [len("module")])
        share = lambda n: f"{100 * n / self.base:.4g} %" if self.base else "-"
        lines = [f"{'module':<{width}} {'trained':>14} {'stored':>14} {'size':>12} {'of the base':>12}"]
        lines += [
            f"{row.module:<{width}} {row.trained:>14,} {row.stored:>14,} {readable_bytes(row.bytes):>12} {share(row.stored):>12}"
            for row in self.rows
        ]
        lines += [
            "",
            f"base     {self.base:>14,}  {readable_bytes(self.base_bytes)}",
            f"trained  {self.trained:>14,}  {share(self.trained)} of the base",
            f"stored   {self.stored:>14,}  {share(self.stored)}, {readable_bytes(self.bytes)}",
            f"changed  {self.changed:>14,}  {share(self.changed)}",
        ]
        differ = [stack for stack, count in Counter(entry.stack for entry in self.placement).items() if count > 1]
        lines += ["", *(_line(entry) for entry in self.placement)] if self.placement else []
        lines += [f"note: the blocks of '{stack}' differ in where the adapter stands" for stack in differ]
        return "\n".join(lines)


def summary(peft: Peft, *, depth: int | None = None) -> Summary:
    """Count what is trained, stored and changed, in all and for each module.

    Args:
      peft: Concrete or abstract (from `jax.eval_shape`): nothing is computed.
      depth: Longest module path, in components, that rows are told apart by; all of it by default. Numbered layers count as one row,
        ``layer/*``.

    Returns:
      A `Summary`; ``print`` it for the table.

    >>> import jax.numpy as jnp, jpeft
    >>> s = jpeft.summary(jpeft.apply({"dense": {"kernel": jnp.ones((8, 4))}}, method="lora", rank=2))
    >>> s.trained, s.stored, s.changed, s.base
    (24, 24, 32, 32)
    """
    check_peft(peft, "summary")
    labels = tree.flatten(peft.method.labels(peft.adapter))
    leaves = tree.flatten(peft.adapter)
    counts: dict[str, list[int]] = {}
    for path, leaf in leaves.items():
        row = counts.setdefault(_module(path, depth), [0, 0, 0])
        row[0] += leaf.size if labels[path] != FREEZE else 0
        row[1] += leaf.size
        row[2] += tree.nbytes(leaf)
    return Summary(
        trained=sum(leaf.size for path, leaf in leaves.items() if labels[path] != FREEZE),
        stored=tree.size(peft.adapter),
        changed=peft.method.count_changed(peft.params, peft.adapter),
        base=tree.size(peft.params),
        bytes=tree.nbytes(peft.adapter),
        base_bytes=tree.nbytes(peft.params),
        rows=tuple(Row(module, *row) for module, row in counts.items()),
        placement=tuple(_placement(peft.params, leaves)),
    )


def _placement(params: tree.Params, adapter: Mapping[str, Any]) -> Iterator[Placement]:
    """Where the leaves of an adapter stand in the blocks of each stack."""
    base = {path: tuple(leaf.shape) for path, leaf in tree.flatten(params).items() if hasattr(leaf, "shape")}
    parents = {parent for path in base for parent in _parents(path)}
    modules = {_owner(path, base, parents) for path in adapter}
    for stack in layouts.stacks(base):
        if stack.count < 2:
            continue
        blocks: dict[int | None, list[str]] = {number: [] for number in dict.fromkeys(stack.leaves.values())}
        for path, number in {stack.module(path): number for path, number in stack.leaves.items()}.items():
            blocks[number] = sorted(module[len(path) + 1 :] or "." for module in modules if f"{module}/".startswith(f"{path}/"))
        # A leaf in the place of stacked ones may hold the top layers alone.
        tops = {adapter[path].shape[stack.axis] for path in stack.leaves if path in adapter} if stack.axis is not None else set()
        if len(tops) == 1 and (top := tops.pop()) < stack.count:
            blocks = {number: blocks[None] if number >= stack.count - top else [] for number in range(stack.count)}
        alike: dict[tuple[str, ...], list[int | None]] = {}
        for number, found in blocks.items():
            alike.setdefault(tuple(found), []).append(number)
        if any(alike):
            for found, numbers in alike.items():
                yield Placement(stack.path, _numbers(numbers, stack.count), found)


def _parents(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition("/")[0]
        yield path


def _owner(path: str, base: Mapping[str, Any], parents: Collection[str]) -> str:
    """The module of the base that a leaf of an adapter belongs to."""
    while path not in base and path not in parents:
        path = path.rpartition("/")[0]
    return path.rpartition("/")[0] if path in base else path


def _numbers(numbers: Sequence[int | None], count: int) -> str:
    """Some blocks in words.

    >>> _numbers([0, 1, 2, 5], 12), _numbers([None], 12), _numbers([0, 1], 2)
    ('0-2, 5', 'all 12', 'all 2')
    """
    known = sorted(number for number in numbers if number is not None)
    if not known or len(known) == count:
        return f"all {count}"
    runs: list[list[int]] = []
    for number in known:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _line(entry: Placement) -> str:
    return f"blocks of {entry.stack or 'the model'}, {entry.blocks}: {', '.join(entry.modules) or 'nothing'}"


def _module(path: str, depth: int | None) -> str:
    parts = ["*" if part.isdigit() else part for part in path.split("/")[:-1]]
    return "/".join(parts[:depth]) or "(root)"


def readable_bytes(n: float | int) -> str:
    """A number of bytes in a unit that suits it.

    >>> readable_bytes(3 * 2**19)
    '1.5 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            break
        n /= 1024
    return f"{n:,.0f} B" if unit == "B" else f"{n:,.1f} {unit}"

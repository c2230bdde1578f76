"""What a method trains, stores and changes, counted."""

from typing import NamedTuple

from jpeft import tree
from jpeft.core.method import FREEZE
from jpeft.core.peft import Peft, check_peft


class Row(NamedTuple):
    """The counts of one module."""

    module: str
    trained: int
    stored: int
    bytes: int


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
    """

    trained: int
    stored: int
    changed: int
    base: int
    bytes: int
    base_bytes: int
    rows: tuple[Row, ...]

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
    )


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

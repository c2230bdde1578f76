"""What each device will hold: a table, made from shapes alone."""

import math
import re
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import PartitionSpec as P

from jpeft import tree
from jpeft.core.method import FREEZE
from jpeft.core.optimizer import optimizer
from jpeft.core.peft import Peft
from jpeft.core.summary import readable_bytes
from jpeft.sharding.mesh import AnyMesh
from jpeft.sharding.specs import Placement, Rules, entries_of, placements, shard, state_shardings


class Row(NamedTuple):
    """Equal arrays: those whose paths differ in layer numbers only, and that have one shape, dtype and placement.

    Attributes:
      group: "base" or "adapter".
      path: Their path, with ``*`` for the number of a layer.
      number: How many there are.
      shape: Shape of one.
      dtype: Its dtype.
      spec: How it is kept.
      why: Why it is not split as the rule says; empty if it is.
      bytes: Bytes of all of them on one device.
    """

    group: str
    path: str
    number: int
    shape: tuple[int, ...]
    dtype: str
    spec: P
    why: str
    bytes: int


class Plan(NamedTuple):
    """What one device holds, in bytes; ``print`` it for the table.

    Attributes:
      mesh: Sizes of the mesh's axes.
      base: Bytes of the frozen base.
      adapter: Bytes of the adapter.
      gradients: Bytes of the gradients, which what is trained has.
      optimizer: Bytes of the optimizer's state.
      rows: All arrays of base and adapter.
    """

    mesh: dict[str, int]
    base: int
    adapter: int
    gradients: int
    optimizer: int
    rows: tuple[Row, ...]

    @property
    def total(self) -> int:
        """Bytes of all of it; activations are not in it."""
        return self.base + self.adapter + self.gradients + self.optimizer

    def __str__(self) -> str:
        """A table for the terminal."""
        sizes = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        lines = [f"{math.prod(self.mesh.values())} devices: {sizes}"]
        for group in dict.fromkeys(row.group for row in self.rows):
            rows = [row for row in self.rows if row.group == group]
            cells = [(group, "count", "shape", "dtype", "spec", "per device")]
            cells += [
                (r.path, f"{r.number}", f"{r.shape}", r.dtype, show_spec(r.spec, len(r.shape)), readable_bytes(r.bytes)) for r in rows
            ]
            width = [max(len(row[i]) for row in cells) for i in range(6)]
            table = [f"{row[0]:<{width[0]}}  " + "  ".join(f"{row[i]:>{width[i]}}" for i in range(1, 6)) for row in cells]
            notes = ["", *(f"  ({row.why})" if row.why else "" for row in rows)]
            lines += ["", *(line + note for line, note in zip(table, notes, strict=True))]
        parts = {"base": self.base, "adapter": self.adapter, "gradients": self.gradients, "optimizer": self.optimizer, "total": self.total}
        lines += ["", *(f"{name:<10} {readable_bytes(size):>12} per device" for name, size in parts.items() if size or name == "total")]
        return "\n".join(lines)


def plan(
    of: tree.Params | Peft,
    mesh: AnyMesh,
    rules: Rules = (),
    *,
    tx: optax.GradientTransformation | None = None,
) -> Plan:
    """What each device holds of a base, an adapter, its gradients and its optimizer's state. Nothing is computed or allocated.

    Args:
      of: Parameters or a `Peft`; abstract ones (`jax.eval_shape`) will do.
      mesh: `make_mesh`, or `abstract_mesh` for devices that one does not have.
      rules: Of the base; see `place`.
      tx: The optimizer, for its state; `jpeft.optimizer` is put around it.

    >>> import jax, jax.numpy as jnp, jpeft, optax
    >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)}}
    >>> peft = jax.eval_shape(lambda params: jpeft.apply(params, method="lora", rank=2), params)
    >>> made = jpeft.sharding.plan(peft, jpeft.sharding.abstract_mesh(8), tx=optax.adam(1e-3))
    >>> made.base, made.adapter, made.gradients, made.optimizer  # 64*32*2/8, (64/8+32)*2*4, as much, twice that and a counter
    (512, 320, 320, 644)
    """
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), of)
    placed, there = placements(abstract, mesh, rules), shard(abstract, mesh, rules)
    params = abstract.params if isinstance(abstract, Peft) else abstract
    rows = _rows("base", params, placed.params if isinstance(placed, Peft) else placed, mesh)
    if not isinstance(there, Peft):
        return Plan(dict(mesh.shape), _total(there), 0, 0, 0, rows)
    labels = tree.flatten(there.method.labels(there.adapter))
    trained = [leaf for path, leaf in tree.flatten(there.adapter).items() if labels[path] != FREEZE]
    state = 0
    if tx is not None:
        shapes = jax.eval_shape(optimizer(tx, there).init, there.adapter)
        where = state_shardings(shapes, there.adapter)
        state = _total(jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, where))
    rows += _rows("adapter", there.adapter, placed.adapter, mesh)
    return Plan(dict(mesh.shape), _total(there.params), _total(there.adapter), _total(trained), state, rows)


def show_spec(spec: P, ndim: int) -> str:
    """A spec in one short word for each axis.

    >>> show_spec(P(None, ("fsdp", "tensor")), 3)
    '(·, (fsdp, tensor), ·)'
    """
    words = [f"({', '.join(names)})" if len(names) > 1 else "".join(names) or "·" for names in entries_of(spec, ndim)]
    return f"({', '.join(words)})"


def _rows(group: str, leaves: Any, placed: Any, mesh: AnyMesh) -> tuple[Row, ...]:
    where = jax.tree.leaves(placed, is_leaf=lambda x: isinstance(x, Placement))
    counts: dict[tuple[Any, ...], list[int]] = {}
    for (path, leaf), at in zip(tree.flatten(leaves).items(), where, strict=True):
        pattern = re.sub(r"(^|/)\d+(?=/|$)", r"\1*", path)
        size = _bytes(leaf, jax.sharding.NamedSharding(mesh, at.spec))
        counts.setdefault((pattern, leaf.shape, str(leaf.dtype), at), []).append(size)
    return tuple(
        Row(group, path, len(sizes), shape, dtype, at.spec, at.why, sum(sizes)) for (path, shape, dtype, at), sizes in counts.items()
    )


def _bytes(leaf: Any, at: jax.sharding.Sharding) -> int:
    return math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _total(leaves: Any) -> int:
    return sum(_bytes(leaf, leaf.sharding) for leaf in jax.tree.leaves(leaves))

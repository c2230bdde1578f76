"""Find what a function computes with each of its parameters, in one abstract trace."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jax.extend import core

from jpeft.hosts.products.layer_mark import MARK
from jpeft.hosts.products.traced import Traced, trace
from jpeft.hosts.products.view import Atom, View, through
from jpeft.tree.kernels import KernelAxes
from jpeft.tree.paths import Path

Kind = Literal["dot", "convolution", "lookup"]


class Product(NamedTuple):
    """An operation that contracts a parameter with activations, or looks rows of it up.

    Attributes:
      path: Of the parameter.
      kind: What operation it is.
      axes: The geometry of the parameter, as it stands in the parameters: axes of loops are among ``stack``.
    """

    path: Path
    kind: Kind
    axes: KernelAxes


class Read(NamedTuple):
    """One use of a parameter.

    Attributes:
      path: Of the parameter.
      primitive: The operation that uses it.
      scopes: The names of the scopes in which it stands, '/'-joined: the modules that run it.
      product: The product that it is, if it is one.
    """

    path: Path
    primitive: str
    scopes: str
    product: Product | None


def find_products(fn: Callable[..., Any], params: Any, *args: Any) -> dict[Path, tuple[Product, ...]]:
    """The products of each parameter in ``fn(params, *args)``, in the order in which they are computed.

    Args:
      fn: A function of parameters and arrays. Nothing is computed.
      params: A tree of arrays, or of shapes.
      *args: Trees of arrays or shapes.

    >>> import jax.numpy as jnp
    >>> attention = lambda params, x: jnp.einsum("btd,ndh->btnh", x, params["w"])
    >>> find_products(attention, {"w": jnp.ones((4, 32, 8))}, jnp.ones((2, 5, 32)))["w"][0].axes
    KernelAxes(stack=(), inputs=(1,), outputs=(0, 2))
    """
    found: dict[Path, list[Product]] = defaultdict(list)
    for read in reads(fn, params, *args):
        if read.product is not None:
            found[read.path].append(read.product)
    return {path: tuple(products) for path, products in found.items()}


def reads(fn: Callable[..., Any], params: Any, *args: Any) -> list[Read]:
    """Every use of every parameter in ``fn(params, *args)``.

    Casts, transposes and the like are no uses: what becomes of the parameter after them is.
    """
    traced = trace(fn, params, *args)
    views = whole_views(traced)
    uses: list[tuple[Use, str]] = []
    lifted: dict[Path, set[int]] = defaultdict(set)

    def visit(use: Use, scopes: str) -> None:
        if use.eqn.primitive is MARK:
            inside = use.eqn.params["axes"]
            lifted[use.view.path] |= {atom.axis for i, part in enumerate(use.view.parts) if i not in inside for atom in part}
        else:
            uses.append((use, scopes))

    walk(traced.closed.jaxpr, views, visit)
    return [Read(use.view.path, use.eqn.primitive.name, scopes, product_of(use, frozenset(lifted[use.view.path]))) for use, scopes in uses]


def whole_views(traced: Traced, only: Collection[Path] | None = None) -> list[View | None]:
    """The views of a traced call's inputs: each parameter, or only some, as a whole."""
    return [
        None if path is None or (only is not None and path not in only) else View.whole(path, array.shape, array.dtype.itemsize * 8)
        for path, array in zip(traced.paths, traced.arrays, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Use:
    """An equation that uses a view, and does not make another view of it."""

    eqn: Any
    position: int
    view: View


Visit = Callable[[Use, str], None]


def walk(jaxpr: Any, views: Sequence[View | None], visit: Visit, scopes: str = "") -> list[View | None]:
    """Follow views through a jaxpr and all that it calls.

    Args:
      jaxpr: The jaxpr.
      views: Of its inputs.
      visit: Called with each use, and the scopes in which it stands.
      scopes: Those around the jaxpr.

    Returns:
      The views among its outputs.
    """
    known = {var: view for var, view in zip(jaxpr.invars, views, strict=True) if view is not None}
    spread: dict[Any, tuple[int, ...]] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "broadcast_in_dim":
            spread[eqn.outvars[0]] = varying_axes(eqn)
        mine = [known.get(var) if isinstance(var, core.Var) else None for var in eqn.invars]
        if not any(mine):
            continue
        here = "/".join(filter(None, (scopes, str(eqn.source_info.name_stack))))
        called = calls(eqn)
        out: list[View | None] = [None] * len(eqn.outvars)
        if called is not None:
            out = _walk_call(eqn, called, mine, visit, here)
        else:
            for position, view in enumerate(mine):
                after = None if view is None else through(eqn, position, view, spread, None)
                if view is not None and after is None:
                    visit(Use(eqn, position, view), here)
                elif after is not None:
                    out[0] = after
        known |= {var: view for var, view in zip(eqn.outvars, out, strict=True) if view is not None}
    return [known.get(var) if isinstance(var, core.Var) else None for var in jaxpr.outvars]


def varying_axes(eqn: Any) -> tuple[int, ...]:
    """The axes of a broadcast's result along which it varies."""
    source = eqn.invars[0].aval.shape
    return tuple(int(axis) for axis, size in zip(eqn.params["broadcast_dimensions"], source, strict=True) if size > 1)


def calls(eqn: Any) -> tuple[Any, ...] | None:
    """The jaxprs that an equation runs, or None if it runs none."""
    inner = [getattr(value, "jaxpr", value) for value in eqn.params.values() if isinstance(value, (core.ClosedJaxpr, core.Jaxpr))]
    branches = eqn.params.get("branches")
    if branches is not None:
        inner += [branch.jaxpr for branch in branches]
    return tuple(inner) or None


def loop_counts(eqn: Any) -> tuple[int, int]:
    """How many inputs of a `scan` are the same in every round, and how many are carried from one to the next. They stand in this order."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carries, _ = eqn.params["ft_in"].unpack()  # from jax 0.12 on
    return len(consts), len(carries)


def _walk_call(eqn: Any, called: Sequence[Any], mine: list[View | None], visit: Visit, scopes: str) -> list[View | None]:
    """Follow views into what an equation runs, and out of it."""
    name = eqn.primitive.name
    nothing: list[View | None] = [None] * len(eqn.outvars)
    if name == "scan":
        consts, carries = loop_counts(eqn)
        return _walk_loop(called[0], mine, consts, carries, len(eqn.outvars), visit, scopes)
    if name == "while":
        tests, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        walk(eqn.params["cond_jaxpr"].jaxpr, mine[:tests] + mine[tests + bodies :], visit, scopes)
        walk(eqn.params["body_jaxpr"].jaxpr, mine[tests:], visit, scopes)
        return nothing
    if name == "cond":
        for branch in eqn.params["branches"]:
            walk(branch.jaxpr, mine[1:], visit, scopes)
        return nothing
    inner = called[0]
    if len(inner.invars) != len(mine):  # not one jaxpr of the equation's own inputs
        for position, view in enumerate(mine):
            if view is not None:
                visit(Use(eqn, position, view), scopes)
        return nothing
    out = walk(inner, mine, visit, scopes)
    return out if len(out) == len(nothing) else nothing


def _walk_loop(body: Any, mine: list[View | None], consts: int, carries: int, outs: int, visit: Visit, scopes: str) -> list[View | None]:
    """Follow views through `scan`: it slices the first axis of what it goes over, and may carry a parameter along unchanged."""
    carried = [view if body.outvars[i] is body.invars[consts + i] else None for i, view in enumerate(mine[consts : consts + carries])]
    sliced = [None if view is None else view.sliced() for view in mine[consts + carries :]]
    walk(body, [*mine[:consts], *carried, *sliced], visit, scopes)
    return [*carried, *[None] * (outs - carries)]


# --- what a use is ---------------------------------------------------------------------------------------------------------------------


def product_of(use: Use, lifted: frozenset[int] = frozenset()) -> Product | None:
    """The product that a use is; None for one that is no product, or one whose geometry no `KernelAxes` says."""
    roles = axis_roles(use)
    if roles is None:
        return None
    kind, inputs, batch = roles
    contracted = _axes(use.view, inputs)
    stack = lifted | use.view.stack | _axes(use.view, batch)
    # An axis of which one entry is taken: each entry is a kernel of its own.
    present = {atom.axis for atom in use.view.atoms()}
    stack |= {axis for axis, (start, limit) in use.view.slices.items() if axis not in present and limit - start == 1}
    contracted -= stack
    outputs = set(range(len(use.view.shape))) - contracted - stack
    free = {atom for i, part in enumerate(use.view.parts) if i not in inputs and i not in batch for atom in part}
    mixed = contracted & {atom.axis for atom in free}
    if mixed or not contracted or not outputs:
        return None
    return Product(use.view.path, kind, KernelAxes(*(tuple(sorted(axes)) for axes in (stack, contracted, outputs))))


def axis_roles(use: Use) -> tuple[Kind, frozenset[int], frozenset[int]] | None:
    """The kind of a product, and which axes of the view it contracts and which are those of a batch; None if it is none."""
    params, view = use.eqn.params, use.view
    match use.eqn.primitive.name:
        case "dot_general":
            contracted, batch = params["dimension_numbers"]
            return "dot", frozenset(contracted[use.position]), frozenset(batch[use.position])
        case "conv_general_dilated" if use.position == 1:
            spec = params["dimension_numbers"].rhs_spec  # the axes of outputs, inputs, and the window
            if params["batch_group_count"] != 1:
                return None
            return "convolution", frozenset(spec[1:]), frozenset()
        case "gather" if use.position == 0:
            table = looked_up_axis(use.eqn, view)
            return None if table is None else ("lookup", frozenset({table}), frozenset())
    return None


def looked_up_axis(eqn: Any, view: View) -> int | None:
    """The axis of a table by which a `gather` looks entries up, all other axes being taken whole; None for another kind of `gather`."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    if len(numbers.start_index_map) != 1 or numbers.collapsed_slice_dims != numbers.start_index_map or numbers.operand_batching_dims:
        return None
    axis = numbers.start_index_map[0]
    whole = all(size == shape[i] for i, size in enumerate(sizes) if i != axis)
    return axis if whole and len(view.parts[axis]) == 1 else None


def _axes(view: View, places: frozenset[int]) -> frozenset[int]:
    """The axes of the parameter that stand at some axes of the view."""
    return frozenset(atom.axis for i in places for atom in view.parts[i])


def geometry(products: Mapping[Path, Sequence[Product]]) -> dict[Path, KernelAxes]:
    """One geometry for each parameter: that of its lookups, else that of its first product.

    A table of embeddings whose scores are the model's output is used in both directions.
    """
    return {path: next((each for each in all_ if each.kind == "lookup"), all_[0]).axes for path, all_ in products.items() if all_}


def all_atoms(view: View, axis: int) -> list[Atom]:
    """The atoms of one axis of the parameter, the slowest first."""
    return sorted((atom for atom in view.atoms() if atom.axis == axis), key=lambda atom: -atom.stride)

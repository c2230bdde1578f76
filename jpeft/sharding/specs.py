"""Where each array is kept: the base by rules, the adapter as its base, the optimizer's state as the adapter."""

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpeft import distributed, tree
from jpeft.core.method import Method
from jpeft.core.peft import Peft
from jpeft.layouts import layer_axes
from jpeft.sharding.mesh import AXES, FSDP, TENSOR, AnyMesh
from jpeft.tree.kernels import STACKED, KernelAxes, axes_of
from jpeft.tree.paths import Path
from jpeft.tree.select import first_match

Layers = Mapping[Path, int | None]
Rules = Sequence[tuple[str, P | None]]  # ordered (regex, spec), the first that matches a leaf's path or its module; None: the default

# Leaves of an adapter that follow no weight are copied to every device below this number of scalars: splitting them would save little.
SMALL = 2**20


class Placement(NamedTuple):
    """How one array is kept.

    Attributes:
      spec: For each axis, the axes of the mesh it is split over.
      why: Why that is less than the rule says; empty if it is not.
    """

    spec: P
    why: str = ""


# --- the base ------------------------------------------------------------------------------------------------------------------------


def place(path: Path, shape: tuple[int, ...], mesh: AnyMesh, rules: Rules = (), *, layers: Layers = MappingProxyType({})) -> Placement:
    """How one parameter of the base is kept.

    Args:
      path: Its path.
      shape: Its shape.
      mesh: Concrete or abstract.
      rules: Ordered ``(regex, PartitionSpec)``. A spec is written for one layer: where layers are stacked on an axis (`nn.scan`), that axis
        is put into a spec that is shorter than the parameter, and is not split. Parameters that no rule matches, or whose spec is None,
        are split along their largest axis that can be, by fsdp and tensor together if possible; vectors are not.
      layers: The axis of stacked layers by path (`jpeft.layouts.layer_axes`). Where it does not say, the name of the container does.

    Returns:
      The placement. A mesh axis that does not divide the parameter's axis is left out, and `Placement.why` says so.

    Raises:
      ValueError: if a rule's spec has more entries than the parameter has axes, or names an unknown mesh axis.

    >>> from jax.sharding import PartitionSpec as P
    >>> from jpeft.sharding import abstract_mesh, place
    >>> mesh, rules = abstract_mesh(8, fsdp=4, tensor=2), ((".*query/kernel", P("fsdp", "tensor")),)
    >>> place("layer/query/kernel", (12, 64, 64), mesh, rules)
    Placement(spec=P(None, 'fsdp', 'tensor'), why='')
    >>> place("0/query/kernel", (64, 7), mesh, rules)
    Placement(spec=P('fsdp',), why='axis 1 (7) is not divisible by tensor=2')
    >>> place("embedding", (50257, 768), mesh)
    Placement(spec=P(None, ('fsdp', 'tensor')), why='')
    """
    spec = first_match(path, (*rules, (".*", None)), "sharding")
    axis = layers[path] if layers.get(path) is not None else 0 if re.fullmatch(STACKED, path) is not None else None
    at = None if axis is None else axis % max(1, len(shape))
    if spec is None:
        return _largest(shape, mesh, layers=at)
    if at is not None and len(spec) < len(shape):
        entries = [*spec, *[None] * (len(shape) - 1 - len(spec))]
        spec = P(*entries[:at], None, *entries[at:])
    if len(spec) > len(shape):
        raise ValueError(f"The sharding rule {spec} for '{path}' has {len(spec)} entries, and the parameter has the shape {shape}.")
    return fit(spec, shape, mesh, path)


def fit(spec: P, shape: tuple[int, ...], mesh: AnyMesh, path: Path = "") -> Placement:
    """The spec with those mesh axes left out that do not divide the array's, and why.

    Raises:
      ValueError: for a mesh axis that neither `mesh` nor jpeft knows.
    """
    entries, why = [], []
    for i, names in enumerate(entries_of(spec, len(shape))):
        for name in names:
            if name not in mesh.shape and name not in AXES:
                raise ValueError(f"The sharding rule {spec} for '{path}' names the axis '{name}'; the mesh has {tuple(mesh.shape)}.")
        kept = tuple(name for name in names if name in mesh.shape)
        while kept and shape[i] % _parts(kept, mesh):
            why.append(f"axis {i} ({shape[i]}) is not divisible by {' * '.join(f'{name}={mesh.shape[name]}' for name in kept)}")
            kept = kept[:-1]
        entries.append(kept)
    return Placement(_spec(entries), "; ".join(why))


def entries_of(spec: P, ndim: int) -> list[tuple[str, ...]]:
    """For each of `ndim` axes the mesh axes it is split over."""
    entries = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]
    return entries + [()] * (ndim - len(entries))


def _spec(entries: Sequence[tuple[str, ...]]) -> P:
    while entries and not entries[-1]:
        entries = entries[:-1]
    return P(*(None if not names else names[0] if len(names) == 1 else names for names in entries))


def _parts(names: tuple[str, ...], mesh: AnyMesh) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _largest(shape: tuple[int, ...], mesh: AnyMesh, *, layers: int | None = None, vectors: bool = False) -> Placement:
    """The largest axis that can be split, the first of equal ones; that of stacked layers is not."""
    axes = sorted((i for i in range(len(shape)) if i != layers), key=lambda i: -shape[i])
    if len(axes) < 2 and not vectors:
        return Placement(P())
    choices = [names for names in ((FSDP, TENSOR), (FSDP,), (TENSOR,)) if all(mesh.shape.get(name, 1) > 1 for name in names)]
    for names in choices:
        for i in axes:
            if shape[i] and shape[i] % _parts(names, mesh) == 0:
                return Placement(_spec([names if j == i else () for j in range(len(shape))]))
    tried = " or ".join(f"{name}={mesh.shape[name]}" for name in (FSDP, TENSOR) if mesh.shape.get(name, 1) > 1)
    return Placement(P(), f"no axis of {tuple(shape[i] for i in sorted(axes))} is divisible by {tried}" if choices else "")


# --- the adapter ---------------------------------------------------------------------------------------------------------------------


def _adapter(params: tree.Params, adapter: tree.Adapter, method: Method, mesh: AnyMesh, rules: Rules) -> dict[Path, Placement]:
    """How the leaves of an adapter are kept, by path."""
    if method.parts:
        found = {name: _adapter(params, adapter[name], part, mesh, rules) for name, part in method.parts}
        return {f"{name}/{path}": placement for name, placements in found.items() for path, placement in placements.items()}
    axes = dict(method.options or ()).get("axes") or ()
    geometry = tuple((pattern, KernelAxes(*map(tuple, parts))) for pattern, parts in axes)  # pyright: ignore[reportGeneralTypeIssues]
    replaced, beside, _ = tree.split(params, adapter)
    base = {path: leaf.shape for path, leaf in tree.flatten(params).items() if path in replaced or path in beside}
    # A leaf in a weight's place may be a part of it, such as the uppermost layers of a stack.
    layers = layer_axes(params)
    out = {path: place(path, leaf.shape, mesh, rules, layers=layers) for path, leaf in replaced.items() if leaf.ndim == len(base[path])}
    for owner, leaves in beside.items():
        spec = place(owner, base[owner], mesh, rules, layers=layers).spec
        for name, leaf in tree.flatten(leaves).items():
            derived = _beside(owner, base[owner], spec, leaf.shape, geometry, layers)
            out[f"{owner}/{name}"] = _alone(leaf, mesh) if derived is None else fit(derived, leaf.shape, mesh)
    return {path: out[path] if path in out else _alone(leaf, mesh) for path, leaf in tree.flatten(adapter).items()}


def _alone(leaf: Any, mesh: AnyMesh) -> Placement:
    """A leaf that follows no weight."""
    return _largest(leaf.shape, mesh, vectors=True) if leaf.size >= SMALL else Placement(P())


def _beside(path: Path, shape: tuple[int, ...], spec: P, leaf: tuple[int, ...], rules: Any, layers: Layers) -> P | None:
    """The spec of a leaf beside a weight: the weight's own along the axes that they share; None if its shape tells of none.

    A factor of the kernel has its inputs or its outputs collapsed into one axis of any length, the rank, which is not split. A leaf with
    the outputs alone (a magnitude, a scale) or the inputs alone is split as these are. Where several fit, the first is taken.
    """
    entries = entries_of(spec, len(shape))
    if leaf == shape:
        return spec
    try:
        geometry = axes_of(path, shape, rules, layers=layers)
    except ValueError:  # a weight of unknown geometry, which the method knows how to treat
        return None
    sizes, names = geometry.factors(shape, -1), geometry.factors(entries, ())
    for part in (0, 1):
        if len(leaf) == len(sizes[part]) and all(want in (-1, got) for want, got in zip(sizes[part], leaf, strict=True)):
            return _spec(names[part])
    for axes in (geometry.outputs, geometry.inputs):
        kept = sorted(geometry.stack + axes)
        if leaf == tuple(shape[i] for i in kept):
            return _spec([entries[i] for i in kept])
    return None


# --- all together ----------------------------------------------------------------------------------------------------------------------


def placements(of: tree.Params | Peft, mesh: AnyMesh, rules: Rules = ()) -> Any:
    """How all leaves are kept and why: `of`, parameters or a `Peft`, with a `Placement` in the place of each array.

    Args:
      of: Arrays, or their shapes.
      mesh: Concrete or abstract.
      rules: For the base; see `place`. A leaf of the adapter that replaces a weight is kept like it. A leaf beside a kernel is split along
        the axes that it shares with it: LoRA's ``a`` keeps the input axes, ``b`` the output axes, and the rank is on every device. All
        others are on every device, or split along their largest axis from 2^20 scalars on.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> from jax.sharding import PartitionSpec as P
    >>> params = {"query": {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.float32)}}
    >>> peft = jax.eval_shape(lambda params: jpeft.apply(params, method="lora", rank=2), params)
    >>> mesh = jpeft.sharding.abstract_mesh(8, fsdp=4, tensor=2)
    >>> placed = jpeft.sharding.placements(peft, mesh, ((".*query/kernel", P("fsdp", "tensor")),))
    >>> {name: leaf.spec for name, leaf in placed.adapter["query"]["kernel"].items()}
    {'a': P('fsdp',), 'b': P(None, 'tensor')}
    """
    if isinstance(of, Peft):
        found = _adapter(of.params, of.adapter, of.method, mesh, rules)
        return Peft(placements(of.params, mesh, rules), _by_path(lambda path, leaf: found[path], of.adapter), of.method)
    layers = layer_axes(of)
    return _by_path(lambda path, leaf: place(path, leaf.shape, mesh, rules, layers=layers), of)


def shardings(of: tree.Params | Peft, mesh: AnyMesh, rules: Rules = ()) -> Any:
    """`placements` as `jax.sharding.NamedSharding`, for `jax.jit(..., in_shardings=, out_shardings=)` and `jax.device_put`."""
    placed = placements(of, mesh, rules)
    return jax.tree.map(lambda p: NamedSharding(mesh, p.spec), placed, is_leaf=lambda x: isinstance(x, Placement))


def shard(of: tree.Params | Peft, mesh: AnyMesh, rules: Rules = ()) -> Any:
    """Parameters or a `Peft` put on the mesh; shapes get their sharding.

    Base arrays that are in place already stay the same buffers. The adapter's are always new, since a step may donate them.
    """
    where = shardings(of, mesh, rules)
    if isinstance(of, Peft):
        return Peft(_put(of.params, where.params), _put(of.adapter, where.adapter, may_alias=False), of.method)
    return _put(of, where)


def _put(arrays: Any, where: Any, may_alias: bool | None = None) -> Any:
    abstract = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    if any(abstract(leaf) for leaf in jax.tree.leaves(arrays)):
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), arrays, where)
    if jax.process_count() > 1:
        return jax.tree.map(distributed.place, arrays, where)
    return jax.device_put(arrays, where, may_alias=may_alias)


def state_shardings(state: Any, adapter: tree.Adapter) -> Any:
    """Shardings for an optimizer's state: a moment is kept like the leaf that it belongs to, counters are on every device.

    Args:
      state: The state, or its shapes: ``jax.eval_shape(tx.init, adapter)``. A leaf belongs to the adapter's leaf whose path ends its own,
        if they have one shape.
      adapter: Sharded, as `shard` gives it; arrays or shapes. Or all `Peft.variables`, for a state over these.

    Raises:
      ValueError: if the adapter is not sharded.
    """
    leaves = tree.flatten(adapter)
    meshes = {leaf.sharding.mesh for leaf in leaves.values() if isinstance(getattr(leaf, "sharding", None), NamedSharding)}
    if len(meshes) != 1:
        raise ValueError("state_shardings needs an adapter on one mesh: adapter = sharding.shard(peft, mesh).adapter.")
    everywhere = NamedSharding(meshes.pop(), P())

    def follow(path: Path, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        for start in range(len(parts)):
            owner = leaves.get("/".join(parts[start:]))
            if owner is not None and owner.shape == leaf.shape:
                return owner.sharding
        return everywhere

    return _by_path(follow, state)


def _by_path(fn: Any, of: Mapping[str, Any] | Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: fn(tree.path_str(keys), leaf), of)

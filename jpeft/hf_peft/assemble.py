"""The leaves of single layers, as matrices, and the leaves of an adapter, in which layers may be stacked."""

from collections.abc import Mapping, Sequence

import numpy as np

from jpeft.hf_peft.sites import Base, Site
from jpeft.reparameterized.matrix_form import INPUTS, OUTPUTS, LeafAxes
from jpeft.tree.paths import Path

Arrays = dict[str, np.ndarray]
LeafAxesByName = Mapping[str, LeafAxes]


def join(
    leaves: Mapping[str, Arrays], sites: Sequence[Site], base: Base, leaf_axes: LeafAxesByName, *, pads: bool, what: str
) -> dict[Path, np.ndarray]:
    """The leaves of an adapter by path.

    Args:
      leaves: Those of each site as matrices, by the site's module.
      sites: The sites.
      base: The base.
      leaf_axes: The axes of each leaf.
      pads: Whether zeros in all leaves of a layer change nothing.
      what: Name of the type, for the message.

    Raises:
      ValueError: if layers are stacked, some of them have no leaves or leaves of other shapes, and zeros would change something.
    """
    out: dict[Path, np.ndarray] = {}
    by_path: dict[Path, dict[int | None, Site]] = {}
    for site in sites:
        by_path.setdefault(site.path, {})[site.index] = site
    for path, own in by_path.items():
        first, count = next(iter(own.values())), base.count(path)
        assert first.form is not None
        kinds = {tuple(leaves[site.module]) for site in own.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"The layers of '{path}' are stacked, and the adapter has {what} of different kinds for them: load the base with "
                "scan=False (--scan False)."
            )
        for name in leaves[first.module]:
            if count is None:
                stacked = leaves[first.module][name]
            else:
                layers = [leaves[own[i].module][name] if i in own else None for i in range(count)]
                shapes = {layer.shape if layer is not None else None for layer in layers}
                # A leaf without a rank, such as a magnitude or a bias, has no number that stands for none.
                has_rank = any(axis not in (INPUTS, OUTPUTS) for axis in leaf_axes[name])
                if len(shapes) > 1 and not (pads and has_rank):
                    raise ValueError(
                        f"The layers of '{path}' are stacked, and the adapter has {what} for some of them, or of different sizes, which no "
                        "number stands for: load the base with scan=False (--scan False)."
                    )
                stacked = _padded(layers)
            out[f"{path}/{name}"] = np.asarray(first.form.leaf_from_matrix(stacked, leaf_axes[name]))
    return out


def _padded(layers: Sequence[np.ndarray | None]) -> np.ndarray:
    """Layers as one array, filled up with zeros."""
    there = [layer for layer in layers if layer is not None]
    shape = tuple(max(sizes) for sizes in zip(*(layer.shape for layer in there)))
    out = np.zeros((len(layers), *shape), there[0].dtype)
    for i, layer in enumerate(layers):
        if layer is not None:
            out[(i, *(slice(size) for size in layer.shape))] = layer
    return out


def take_apart(leaves: Mapping[Path, object], base: Base, leaf_axes: LeafAxesByName, *, pads: bool) -> tuple[dict[str, Arrays], list[Site]]:
    """The leaves of each site as matrices, by the site's module, and the sites; the inverse of `join`.

    Layers whose leaves are all zero have no adapter, and components that are zero in all leaves are left out, where zeros change nothing.

    Raises:
      ValueError: for leaves at a path that has no torch name.
    """
    by_path: dict[Path, dict[str, np.ndarray]] = {}
    for path, leaf in leaves.items():
        owner, name = path.rpartition("/")[::2]
        by_path.setdefault(owner, {})[name] = np.asarray(leaf)
    parts: dict[str, Arrays] = {}
    found: list[Site] = []
    for path, own in by_path.items():
        sites = base.at(path)
        if not sites or sites[0].form is None:
            raise ValueError(f"'{path}' has no name in the torch model, so its adapter cannot be written for HF PEFT.")
        matrices = {name: np.asarray(sites[0].form.leaf_to_matrix(leaf, leaf_axes[name])) for name, leaf in own.items()}
        for site in sites:
            layer = matrices if site.index is None else {name: leaf[site.index] for name, leaf in matrices.items()}
            if site.index is not None and pads:
                layer = _trimmed(layer, leaf_axes)
            if layer:
                parts[site.module] = layer
                found.append(site)
    order = {name: i for i, name in enumerate(base.sites)}
    return parts, sorted(found, key=lambda site: order[site.name])


def _trimmed(layer: Arrays, leaf_axes: LeafAxesByName) -> Arrays:
    """A layer without the components of its rank, from the last on, that are zero in all leaves; empty if all are zero."""
    own = {axis for name in layer for axis in leaf_axes[name] if axis not in (INPUTS, OUTPUTS)}
    if all(not leaf.any() for leaf in layer.values()):
        return {}
    for axis in own:
        # Counted from the end: the leaves of experts have an axis for these in front.
        with_axis = {name: leaf_axes[name].index(axis) - len(leaf_axes[name]) for name in layer if axis in leaf_axes[name]}
        used = [np.flatnonzero(np.moveaxis(layer[name], at, 0).reshape(layer[name].shape[at], -1).any(1)) for name, at in with_axis.items()]
        size = max((int(index[-1]) + 1 for index in used if len(index)), default=1)
        for name, at in with_axis.items():
            layer = layer | {name: np.take(layer[name], range(size), at)}
    return layer

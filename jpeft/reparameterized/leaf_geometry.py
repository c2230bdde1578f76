"""Whether leaves beside a kernel fit its geometry, as the layer shows it."""

from collections.abc import Callable, Mapping
from typing import Any

from jpeft.core.layer import Layer
from jpeft.core.options import Axes
from jpeft.reparameterized.matrix_form import LeafAxes, MatrixForm
from jpeft.tree.kernels import KernelAxes, axes_inside, axes_of, axes_rules


def axes_in_layer(layer: Layer, name: str, axes: Axes | None, fitting: Callable[[MatrixForm], bool]) -> KernelAxes:
    """The geometry of a kernel inside a layer of an unknown class, where a scan may have sliced its stack axes away.

    Args:
      layer: The layer.
      name: Of the kernel.
      axes: The method's rules.
      fitting: Whether the leaves beside the kernel fit it in a form. A name may stand for several geometries, with and without a stack
        axis. The shapes of the leaves, which a scan slices along with the kernel, show which of them is meant.
    """
    path, shape = "/".join(filter(None, (layer.path, name))), tuple(layer.params[name].shape)
    rules = axes_rules(axes)
    found = next((axes for axes in axes_inside(path, shape, rules) if fitting(MatrixForm(shape, axes))), None)
    return axes_of(path, shape, rules) if found is None else found


def fits(form: MatrixForm, leaves: Mapping[str, Any], leaf_axes: Mapping[str, LeafAxes]) -> bool:
    """Whether leaves with these axes have the sizes of the kernel's own; on other axes any size will do."""
    return all(_fits(form.stored_axes(leaf_axes[name]), form.shape, tuple(leaf.shape)) for name, leaf in leaves.items())


def _fits(stored: list[Any], kernel: tuple[int, ...], leaf: tuple[int, ...]) -> bool:
    # Numbers are axes of the kernel, names are axes of the leaf alone.
    return len(stored) == len(leaf) and all(kernel[axis] == size for axis, size in zip(stored, leaf) if isinstance(axis, int))


def misfit(path: str, form: MatrixForm, leaves: Mapping[str, Any], leaf_axes: Mapping[str, LeafAxes]) -> ValueError:
    """The error for leaves that do not fit, with the rule that describes the kernel."""
    sizes = {name: [form.shape[i] if isinstance(i, int) else i for i in form.stored_axes(leaf_axes[name])] for name in leaves}
    expected = " and ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in sizes.items())
    found = " and ".join(f"{name} {leaf.shape}" for name, leaf in leaves.items())
    return ValueError(
        f"'{path}': the layer's kernel {form.shape} has inputs {form.axes.inputs} and outputs {form.axes.outputs}, which asks for "
        f"leaves of shapes {expected}, but the adapter holds {found}. The axes were taken from the kernel's name; "
        "let the model tell them: axes=jpeft.kernel_axes(model, params, *example_inputs)."
    )

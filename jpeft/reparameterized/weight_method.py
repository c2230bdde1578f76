"""Weight methods: some leaves beside one kernel, and a new value of the kernel.

LoRA and most of its relatives are of this kind. Such a method says what happens to ONE kernel, seen as a matrix ``W`` [inputs, outputs]:
which leaves stand beside it at the start (`init_kernel`) and which value it then has (`new_kernel`). The base class below does the rest: it
finds the kernels, splits stacks of layers and experts, folds head axes into inputs and outputs, keeps dtypes, merges, trains the head, and
runs layers. By default a layer runs on its new kernel, which is right everywhere; `call_linear` may find a cheaper way.
"""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.core.layer import Change, Layer, Linear, NoProductError
from jpeft.core.method import Method, with_head
from jpeft.core.options import Axes, Names, Pattern, per_path
from jpeft.layouts import layer_axes
from jpeft.reparameterized.leaf_geometry import axes_in_layer, fits, misfit
from jpeft.reparameterized.matrix_form import OUTPUTS, LeafAxes, MatrixForm
from jpeft.tree.head import not_head
from jpeft.tree.kernels import KernelAxes, axes_of, axes_rules
from jpeft.tree.select import check_rules, select

Matrix = Float[Array, "inputs outputs"]  # one kernel
Vector = Float[Array, " outputs"]  # the bias beside it
Leaves = dict[str, Any]  # those of one kernel by name
Inputs = tuple[Any, ...]  # of a layer
Key = jax.Array


class WeightMethod(Method):
    """The base of methods that give one kernel leaves and a new value.

    Attributes:
      leaf_axes: The axes of each leaf as a matrix, e.g. ``{"a": ("inputs", "rank"), "b": ("rank", "outputs")}``.
      target: Which kernels: a regex for whole paths, a list of names, or roles such as ``"@attention_in"`` (`jpeft.layouts`).
      axes: Geometry of kernels with more than two axes, ``((regex, KernelAxes), ...)``, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.
    """

    target: Names = r"(.*/)?kernel"
    axes: Axes | None = None
    head: Pattern | None = "auto"

    leaf_axes: ClassVar[Mapping[str, LeafAxes]]
    family = "reparameterized"
    why_no_merge = None
    begins_within = 0.0

    # --- what a weight method defines -------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """The leaves of one kernel, each with its `leaf_axes`.

        Args:
          key: The kernel's own random key.
          kernel: Its value; only its shape is known where the base is abstract.
          path: Its path, for options that differ between layers.
        """

    @abc.abstractmethod
    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """The new value of one kernel. It comes and goes in float32 or wider, whatever the dtype of the base."""

    def new_bias(self, bias: Vector, leaves: Leaves, path: str) -> Vector:
        """The new value of the bias beside the kernel, for a method that changes it: by leaves that have one number an output."""
        del leaves, path
        return bias

    def as_low_rank(self, leaves: Leaves, path: str) -> tuple[Array, Array] | None:
        """Factors of the whole change, ``W' = W + a b`` with every scale in them; None for a method whose change has no such form.

        Args:
          leaves: Those of one kernel, or of a stack of them, as matrices.
          path: The kernel's path.
        """
        del leaves, path
        return None

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """Run a layer whose geometry is known, which is where a method can be cheaper than its new kernel.

        Args:
          layer: The layer.
          linear: Its geometry.
          inputs: Its inputs.
          leaves: The leaves beside its kernel, as the adapter holds them.
          path: The kernel's path.
          rng: A random key, or None.
        """
        del path, rng
        return self._run_on_new_params(layer, inputs, {linear.name: leaves}, {linear.name: linear.axes})

    def kernels(self, params: tree.Params) -> list[str]:
        """The paths of the kernels that get leaves.

        Raises:
          ValueError: if the target matches nothing.
        """
        return select(self.candidates(params), self.target, params=params)

    def candidates(self, params: tree.Params) -> list[str]:
        """The paths of everything that could be a kernel: what has two axes or more and is not the head's."""
        leaves = not_head(params, self.head)
        return [path for path, leaf in leaves.items() if len(leaf.shape) > 1 and not path.endswith("bias")]

    def forms(self, params: tree.Params) -> dict[str, MatrixForm]:
        """The matrix form of each kernel that gets leaves.

        Raises:
          ValueError: if the geometry of one is not known.
        """
        shapes = {path: tuple(leaf.shape) for path, leaf in tree.flatten(params).items()}
        rules, layers = axes_rules(self.axes), layer_axes(params)
        return {path: MatrixForm(shapes[path], axes_of(path, shapes[path], rules, layers=layers)) for path in self.kernels(params)}

    # --- the contract of a method -----------------------------------------------------------------------------------------------------

    def check_base(self, params: tree.Params) -> None:
        """Refuse kernels without real numbers to change, and rules (`PerPath`) that are for none of the chosen kernels.

        Raises:
          ValueError: with the kernel, or with the rule and the kernels that there are.
        """
        base, kernels = tree.flatten(params), self.kernels(params)
        for leaf, path in ((base[path], path) for path in kernels):
            if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
                what = f"numbers of {leaf.dtype}" if leaf.size else f"no numbers, in the shape {tuple(leaf.shape)}"
                raise ValueError(f"{self.name}: '{path}' holds {what}, which cannot be changed a little. Leave it out of the target.")
        for name, field in per_path(type(self)).items():
            check_rules(getattr(self, field), kernels, name)

    def init(self, key: Key, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Leaves for each chosen kernel, and the task head."""
        del stats
        base = tree.flatten(params)
        out: dict[str, Any] = {}
        for path, form in self.forms(params).items():
            leaves = self.init_leaves(tree.key_for(key, path), base[path], form, path)
            out |= {f"{path}/{name}": leaf for name, leaf in leaves.items()}
        return with_head(out, params, self.head)

    def init_leaves(self, key: Key, kernel: Any, form: MatrixForm, path: str) -> dict[str, Any]:
        """The leaves beside a kernel as the adapter holds them: `init_kernel` for each kernel of the stack."""
        # `init_kernel` sees one matrix; `each` maps it over layers and experts, with a random key for each of them.
        one = form.each(lambda key, w: self.init_kernel(key, w, path))
        leaves = one(form.keys(key), form.to_matrix(_wide(jnp.asarray(kernel))))
        return {name: form.leaf_from_matrix(leaf, self.leaf_axes[name]) for name, leaf in leaves.items()}

    def call(self, layer: Layer, inputs: Inputs, leaves: Leaves, rng: Key | None) -> Any:
        """`call_linear` where the layer's geometry is known, else the layer on its new parameters."""
        linear = layer.linear
        if linear is None or list(leaves) != [linear.name]:
            axes = {name: self._axes_inside(layer, name, part) for name, part in leaves.items()}
            return self._call_unknown(layer, inputs, leaves, axes, rng)
        path = f"{layer.path}/{linear.name}"
        self.check_geometry(path, MatrixForm(layer.params[linear.name].shape, linear.axes), leaves[linear.name])
        return self.call_linear(layer, linear, inputs, leaves[linear.name], path, rng)

    def merge(self, params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        """The new kernels, and biases where the method changes them, in the base's tree and dtypes."""
        replaced, beside, _ = tree.split(params, adapter)
        base = tree.flatten(params) | replaced
        for path, leaves in beside.items():
            module, _, name = path.rpartition("/")
            prefix = f"{module}/" if module else ""
            # As a layer sees them: the kernel and, if there is one, the bias beside it.
            own = {name: base[path]} | ({"bias": base[f"{prefix}bias"]} if f"{prefix}bias" in base else {})
            axes = axes_of(path, tuple(base[path].shape), axes_rules(self.axes), layers=layer_axes(params))
            new = self._new_params(own, {name: leaves}, {name: axes}, module)
            replaced |= {f"{prefix}{key}": value for key, value in new.items() if value is not own[key]}
        return tree.replace(params, replaced)

    def merge_layer(self, layer: Layer, leaves: Leaves) -> Mapping[str, Any] | None:
        """The layer's parameters, as other middleware leaves them, with the new kernel."""
        params = layer.merged(layer.params)
        if params is None:
            return None
        known = layer.linear if layer.linear is not None and layer.linear.name in leaves else None
        axes = {name: known.axes if known else self._axes_inside(layer, name, part) for name, part in leaves.items()}
        return self._new_params(params, leaves, axes, layer.path)

    def adapted_paths(self, params: tree.Params, adapter: tree.Adapter) -> set[str]:
        """Replaced leaves, kernels with leaves beside them, and their biases where the method changes those."""
        _, beside, _ = tree.split(params, adapter)
        biases = {"/".join([*path.split("/")[:-1], "bias"]) for path, leaves in beside.items() if self.changes_bias(leaves)}
        return super().adapted_paths(params, adapter) | (biases & tree.flatten(params).keys())

    def changes_bias(self, leaves: Mapping[str, Any]) -> bool:
        """Whether the bias beside a kernel with these leaves takes a new value, too."""
        return type(self).new_bias is not WeightMethod.new_bias and any(self.leaf_axes[name] == (OUTPUTS,) for name in leaves)

    # --- for `call_linear` ------------------------------------------------------------------------------------------------------------

    def kernel_inside(self, layer: Layer, linear: Linear) -> Float[Array, "*stack inputs outputs"] | None:
        """The kernel that a layer computes with, as a matrix, after the changes of other middleware.

        None if that middleware is more than a change of the kernel, such as a bottleneck or a change of the bias.
        """
        merged = layer.merged(layer.params)
        if merged is None or merged.get("bias") is not layer.params.get("bias"):
            return None
        return MatrixForm(tuple(merged[linear.name].shape), linear.axes).to_matrix(_wide(merged[linear.name]))

    def to_matrices(self, form: MatrixForm, leaves: Mapping[str, Any]) -> Leaves:
        """The leaves of a kernel as matrices, [*stack, *leaf_axes]."""
        return {name: form.leaf_to_matrix(leaf, self.leaf_axes[name]) for name, leaf in leaves.items()}

    # --- one layer --------------------------------------------------------------------------------------------------------------------

    def _call_unknown(
        self, layer: Layer, inputs: Inputs, leaves: Mapping[str, Any], axes: Mapping[str, KernelAxes], rng: Key | None
    ) -> Any:
        """A layer of an unknown class: each product of its kernels as a layer by itself, else the layer on its new parameters."""
        if layer.run_changed is None:
            return self._run_on_new_params(layer, inputs, leaves, axes)

        def change(name: str) -> Change:
            path = "/".join(filter(None, (layer.path, name)))
            return Change(axes[name], lambda product, x: self.call_linear(product, _linear(product), (x,), leaves[name], path, rng))

        # A bias beside the kernel takes its new value, as in `merge`: where the layer adds it is the layer's own affair.
        own = {name: part for name, part in leaves.items() if self.changes_bias(part) and "bias" in layer.params}
        params = {**layer.params, "bias": self._new_params(layer.params, own, axes, layer.path)["bias"]} if own else layer.params
        try:
            return layer.run_changed(params, {name: change(name) for name in leaves}, *inputs)
        except NoProductError:  # the host has noted it, to say it once for all layers
            return self._run_on_new_params(layer, inputs, leaves, axes)

    def _run_on_new_params(self, layer: Layer, inputs: Inputs, leaves: Mapping[str, Any], axes: Mapping[str, KernelAxes]) -> Any:
        """Run a layer on its new parameters, made from those that other middleware leaves, as in `merge`."""
        merged = layer.merged(layer.params) if layer.is_wrapped else None
        if merged is not None:
            # The new kernel contains the changes of the middleware in between, so that middleware must not run again.
            return layer.innermost.run(self._new_params(merged, leaves, axes, layer.path), *inputs)
        return layer.run(self._new_params(layer.params, leaves, axes, layer.path), *inputs)

    def _new_params(
        self, params: Mapping[str, Any], leaves: Mapping[str, Any], axes: Mapping[str, KernelAxes], module: str
    ) -> dict[str, Any]:
        """A module's parameters with new kernels, and with a new bias where the method changes it."""
        new = dict(params)
        for name, part in leaves.items():
            path = "/".join(filter(None, (module, name)))
            kernel, form = params[name], MatrixForm(tuple(params[name].shape), axes[name])
            # Leaves and kernel as matrices, with the stack axes in front: a [*stack, inputs, rank], W [*stack, inputs, outputs].
            matrices = self.to_matrices(form, part)
            run = form.each(lambda w, leaves, path=path: self.new_kernel(w, leaves, path))
            # Summed in the dtype of the leaves, float32 as a rule, and rounded once to the kernel's own: bfloat16 would lose small updates.
            wide = jnp.promote_types(kernel.dtype, jnp.result_type(*part.values()))
            new[name] = form.from_matrix(run(form.to_matrix(kernel.astype(wide)), matrices)).astype(kernel.dtype)
            bias = params.get("bias")
            # [*stack, *outputs]: what has another shape is no bias of the kernel's outputs.
            if bias is not None and self.changes_bias(part) and tuple(bias.shape) == form.leaf_shape((OUTPUTS,), {}):
                run = form.each(lambda b, leaves, path=path: self.new_bias(b, leaves, path))
                changed = run(form.leaf_to_matrix(bias.astype(wide), (OUTPUTS,)), matrices)
                new["bias"] = form.leaf_from_matrix(changed, (OUTPUTS,)).astype(bias.dtype)
        return new

    def _axes_inside(self, layer: Layer, name: str, leaves: Mapping[str, Any]) -> KernelAxes:
        """The geometry of a kernel inside a layer of an unknown class."""
        return axes_in_layer(layer, name, self.axes, lambda form: fits(form, leaves, self.leaf_axes))

    def check_geometry(self, path: str, form: MatrixForm, leaves: Mapping[str, Any]) -> None:
        """Compare the leaves with what the real layer says of its kernel: a name may have promised another geometry.

        Raises:
          ValueError: if they differ, with the rule that describes the kernel.
        """
        if not fits(form, leaves, self.leaf_axes):
            raise misfit(path, form, leaves, self.leaf_axes)


def _linear(layer: Layer) -> Linear:
    """What is linear about a product."""
    assert layer.linear is not None
    return layer.linear


def _wide(kernel: jax.Array) -> jax.Array:
    """A kernel in float32 or wider, in which leaves are made."""
    return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))

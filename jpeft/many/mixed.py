"""The method of a pool: one of several adapters for each example of a batch."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jpeft import tree
from jpeft.core.index import as_leaf, rows_of
from jpeft.core.layer import Layer, Linear
from jpeft.core.method import FREEZE, TRAIN, Method
from jpeft.core.options import Axes, Count, Pattern, PerPath
from jpeft.core.residuals import changed
from jpeft.layouts import layer_axes
from jpeft.many.by_row import by_row, pick, pick_rows
from jpeft.reparameterized.ia3 import IA3
from jpeft.reparameterized.leaf_geometry import axes_in_layer, misfit
from jpeft.reparameterized.lora import LoRA
from jpeft.reparameterized.matrix_form import INPUTS, OUTPUTS, MatrixForm
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves
from jpeft.tree.adapters import ADDED
from jpeft.tree.kernels import AxesRules, KernelAxes, axes_of, axes_rules
from jpeft.tree.select import first_match

SLOT, VALUE, INDEX, BASE = "slot", "value", "index", -1
# As [*stack, slot, ...]: what is picked for an example lies in one piece.
LEAF_AXES = {
    "a": (SLOT, "in", "rank"),
    "b": (SLOT, "rank", "out"),
    "l_in": (SLOT, "in"),
    "l_out": (SLOT, "out"),
    VALUE: (SLOT, "numbers"),
    INDEX: ("example",),
}
_AXES = (0, 1, -1)  # of the layers of a stack
# The same leaf of one adapter alone, in the axes of the kernel.
ALONE = {"a": (INPUTS, "rank"), "b": ("rank", OUTPUTS), "l_in": (INPUTS,), "l_out": (OUTPUTS,)}


class Mixed(Method):
    r"""Several adapters side by side: ``y_i = l_out * layer(l_in * x_i) + (x_i a) b`` for example i, with the leaves of slot ``index_i``.

    A slot holds an adapter of LoRA, whose scale is in ``a``, or of (IA)³; in a slot of the one kind the leaves of the other are zero or
    one. Leaves that adapters hold whole, such as those of a trained head, stand there once for each slot. An index of -1 is the base. The
    factors of an example are fetched and multiplied with it, so a mixed batch costs the multiplications of one adapter.

    Made by `jpeft.mix`, filled by `jpeft.swap`, called after `jpeft.assign`.

    Args:
      slots: Number of adapters.
      rank: The highest rank of each kernel; or rules.
      low_rank: The kernels that have factors, as a regex of their paths; None for none.
      outputs: The kernels whose outputs are scaled.
      inputs: The kernels whose inputs are scaled.
      replaced: The leaves that each slot has its own value of.
      axes: Geometry of kernels with more than two axes.
    """

    slots: Count = 1
    rank: PerPath[Count] = 8
    low_rank: Pattern | None = None
    outputs: Pattern | None = None
    inputs: Pattern | None = None
    replaced: Pattern | None = None
    axes: Axes | None = None

    name = "mixed"
    family = "reparameterized"
    begins_within = 0.0
    summary = "one of several adapters for each example of a batch"
    takes_index = True
    why_no_merge = "each example has an adapter of its own; merge the one that you want, jpeft.merge(adapter)"

    # --- the leaves -------------------------------------------------------------------------------------------------------------------

    def init(self, key: Key, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Empty slots: no change, and the base's own values."""
        del key, stats
        base, leaves = tree.flatten(params), {}
        for path, form in self.all_forms(params).items():
            sizes = {SLOT: self.slots, "in": form.sizes[0], "out": form.sizes[1]}
            for name in self.leaves_at(path):
                if name == VALUE:
                    value = base[path].astype(jnp.promote_types(base[path].dtype, jnp.float32))
                    leaves[f"{path}/{name}"] = self.of_slots(form, numbers_of(form, value))
                    continue
                rank = {"rank": first_match(path, self.rank, "rank")} if name in "ab" else {}
                shape = form.leaf_shape(LEAF_AXES[name], sizes | rank)
                leaves[f"{path}/{name}"] = jnp.zeros(shape) if rank else jnp.ones(shape)
        return tree.unflatten(leaves)

    def expected(self, params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        """What `init` makes, and the index, if one is there."""
        return super().expected(params, adapter) | {name: own for name, own in adapter.items() if name == ADDED}

    def leaves_at(self, path: str) -> list[str]:
        """The names of the leaves beside one leaf of the base."""
        chosen = {"a": self.low_rank, "b": self.low_rank, "l_in": self.inputs, "l_out": self.outputs, VALUE: self.replaced}
        return [name for name, pattern in chosen.items() if pattern is not None and re.fullmatch(pattern, path)]

    def all_forms(self, params: tree.Params) -> dict[str, MatrixForm]:
        """The form of each kernel, and of each leaf that slots have their own value of: [*stack, numbers, 1] as a matrix."""
        base, layers = tree.flatten(params), layer_axes(params)
        paths = {path: self.leaves_at(path) for path in base}
        rules, forms = axes_rules(self.axes), {}
        for path, names in paths.items():
            shape = tuple(base[path].shape)
            if VALUE in names:
                forms[path] = whole_form(shape, layers[path] if path in layers else _axis_beside(path, base, rules))
            elif names:
                forms[path] = MatrixForm(shape, axes_of(path, shape, rules, layers=layers))
        return forms

    def of_slots(self, form: MatrixForm, value: Any) -> Any:
        """A value of a leaf, [*stack, numbers], the same in each slot."""
        at = len(form.stack)
        every = jnp.broadcast_to(jnp.expand_dims(value, at), (*value.shape[:at], self.slots, *value.shape[at:]))
        return form.leaf_from_matrix(every, LEAF_AXES[VALUE])

    def assign(self, adapter: tree.Adapter, index: Any) -> tree.Adapter:
        """Put the index at the root of the adapter, once."""
        leaf = as_leaf(index, low=BASE, high=self.slots - 1, what=f"slots 0 to {self.slots - 1}, or -1 for the base")
        return {**adapter, ADDED: {INDEX: leaf}}

    def assigned(self, adapter: tree.Adapter) -> jax.Array | None:
        """The index."""
        return adapter.get(ADDED, {}).get(INDEX)

    def labels(self, adapter: tree.Adapter) -> Any:
        """All slots are trained, where there is a gradient for them; the index is none to train."""
        labels = jax.tree.map(lambda _: TRAIN, adapter)
        return {**labels, ADDED: {INDEX: FREEZE}} if ADDED in adapter else labels

    def bind(self, params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        """Put the index beside each kernel, once for each layer of a stack, so that loops over layers pass it on."""
        index = self.assigned(adapter)
        if index is None:
            raise ValueError(f"{self.name} needs an index for each example of the batch: peft = jpeft.assign(peft, [0, 2, ...]).")
        leaves = tree.flatten({name: own for name, own in adapter.items() if name != ADDED})
        for path, form in self.all_forms(params).items():
            spread = jnp.broadcast_to(index.reshape(*[1] * len(form.stack), -1), (*form.stack, len(index)))
            leaves[f"{path}/{INDEX}"] = form.leaf_from_matrix(spread, LEAF_AXES[INDEX])
        return super().bind(params, tree.unflatten(leaves), rng=rng)

    # --- one layer --------------------------------------------------------------------------------------------------------------------

    def call(self, layer: Layer, inputs: Inputs, leaves: Leaves, rng: Key | None) -> Any:
        """Each row of the batch with the leaves of its slot."""
        del rng
        linear = layer.linear
        rows = self._rows(layer, inputs, leaves)
        if linear is not None and list(leaves) == [linear.name] and VALUE not in leaves[linear.name]:
            own = leaves[linear.name]
            if ("l_in" not in own or linear.scale_inputs is not None) and ("l_out" not in own or linear.scale_outputs is not None):
                return self._factored(layer, linear, inputs, own, rows)
        return self._by_example(layer, inputs, leaves, rows)

    def _rows(self, layer: Layer, inputs: Inputs, leaves: Mapping[str, Leaves]) -> Int[Array, " rows"]:
        """The slot of each row of the layer's first input.

        Raises:
          ValueError: if it cannot be told which rows belong to which example.
        """
        x = next((x for x in inputs if getattr(x, "ndim", 0)), None)
        if x is None or (x.ndim == 1 and not jnp.issubdtype(x.dtype, jnp.floating)):
            given = "no array" if x is None else f"an array of {x.dtype} with one axis"
            raise ValueError(f"'{layer.path}' is given {given}, so mixed adapters cannot tell the examples of the batch apart.")
        if layer.linear is not None and layer.linear.reads_once and layer.linear.axes.stack:
            raise ValueError(
                f"'{layer.path}' has a kernel for each entry of the first axis of its inputs, so mixed adapters cannot tell the examples "
                "of the batch apart. Leave the layer out of the target."
            )
        name, own = next(iter(leaves.items()))
        form = self._form_inside(layer, name, own)
        if own[INDEX].ndim != len(form.stack) + 1:
            raise ValueError(
                f"'{layer.path}' stands in a stack that is seen neither from its names nor from a rule, so mixed adapters cannot tell the "
                "examples of the batch apart. Give axes=jpeft.kernel_axes(...), or leave the layer out."
            )
        index = form.leaf_to_matrix(own[INDEX], LEAF_AXES[INDEX])[(0,) * len(form.stack)]  # the same for all experts of a stack
        return rows_of(index, x.shape[0], layer.path)

    def _factored(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, rows: Int[Array, " rows"]) -> Any:
        """The layer as it is, its inputs and outputs scaled, and the product of each row with the factors of its slot."""
        x, *others = inputs
        form = self._form_inside(layer, linear.name, leaves)
        table = leaves.get("a") if jnp.issubdtype(x.dtype, jnp.integer) else None  # of which each token takes a row
        own = self._picked(form, {name: leaf for name, leaf in leaves.items() if leaf is not table}, rows)

        def each(fn: Callable[..., jax.Array], x: jax.Array, *names: str) -> jax.Array:
            return by_row(lambda own, x: fn(x, *own), [own[name] for name in names], x, rows=len(rows), path=layer.path)

        scaled = each(linear.scale_inputs, x, "l_in") if "l_in" in own and linear.scale_inputs is not None else x
        y = layer(scaled, *others)
        if table is not None:
            ids = jnp.broadcast_to(x, (len(rows), *x.shape[1:]))
            hidden, b = pick_rows(table.astype(layer.dtype), rows, ids), own["b"].astype(layer.dtype)
            y = changed(y + by_row(lambda b, hidden: hidden @ b, b, hidden, rows=len(rows), path=layer.path).astype(y.dtype))
        elif "a" in own:
            own |= {name: own[name].astype(layer.dtype) for name in "ab"}  # the branch computes in the layer's own dtype
            y = changed(y + each(linear.apply_low_rank, x, "a", "b").astype(y.dtype))
        return each(linear.scale_outputs, y, "l_out") if "l_out" in own and linear.scale_outputs is not None else y

    def _by_example(self, layer: Layer, inputs: Inputs, leaves: Mapping[str, Leaves], rows: Int[Array, " rows"]) -> Any:
        """The layer row by row, each with the change of its slot alone; what the rows have in common is one product again."""
        own = {name: self._picked(self._form_inside(layer, name, part), part, rows, layer.params[name]) for name, part in leaves.items()}
        parts = (
            (LoRA(rank=1, alpha=1.0, view="factored", axes=self.axes, head=None), ("a", "b")),
            (
                IA3(axes=self.axes, head=None),
                ("l_in", "l_out"),
            ),
        )

        def one(own: dict[str, Leaves], inputs: Inputs, keywords: Mapping[str, Any]) -> Any:
            # A copy of the parameters makes the layer a pure function of them. It computes in float32 if a value is, as for one adapter.
            values = {name: part[VALUE] for name, part in own.items() if VALUE in part}
            alone = dataclasses.replace(layer.with_params(values), dtype=jnp.result_type(layer.dtype, *values.values()))
            for method, names in parts:
                beside = {name: {key: part[key] for key in names if key in part} for name, part in own.items()}
                beside = {name: part for name, part in beside.items() if part}
                alone = alone.with_middleware(method, method.name, beside, None) if beside else alone
            return alone(*inputs, **keywords)

        out = by_row(one, own, inputs, dict(layer.keywords), rows=len(rows), path=layer.path)
        # A value in float32 in the place of one in half precision would widen the outputs.
        narrow = lambda y: jnp.issubdtype(y.dtype, jnp.floating) and jnp.finfo(y.dtype).bits > jnp.finfo(layer.dtype).bits
        return jax.tree.map(lambda y: y.astype(layer.dtype) if narrow(y) else y, out)

    def _picked(self, form: MatrixForm, leaves: Leaves, rows: Int[Array, " rows"], param: Any = None) -> Leaves:
        """The leaves of the slot of each row, [rows, ...], in the axes that they have in an adapter of their own."""
        own: Leaves = {}
        for name, leaf in leaves.items():
            if name == VALUE:
                found = pick(form.leaf_to_matrix(leaf, LEAF_AXES[VALUE]), rows, len(form.stack), numbers_of(form, param))
                own[name] = jax.vmap(lambda value: form.from_matrix(value[..., None]).reshape(param.shape))(found)
            elif name != INDEX:
                found = pick(form.leaf_to_matrix(leaf, LEAF_AXES[name]), rows, len(form.stack), 0 if name in "ab" else 1)
                own[name] = jax.vmap(functools.partial(form.leaf_from_matrix, leaf_axes=ALONE[name]))(found)
        return own

    def _form_inside(self, layer: Layer, name: str, leaves: Leaves) -> MatrixForm:
        """The form of a parameter as its layer has it.

        Raises:
          ValueError: if the layer shows another geometry than the name of its kernel had promised.
        """
        shape = tuple(layer.params[name].shape)
        if VALUE in leaves:
            return next(form for form in (whole_form(shape, axis) for axis in (None, *_AXES)) if _fits(form, leaves))
        known = layer.linear if layer.linear is not None and layer.linear.name == name else None
        form = MatrixForm(shape, known.axes if known else axes_in_layer(layer, name, self.axes, lambda form: _fits(form, leaves)))
        if not _fits(form, leaves):
            raise misfit("/".join(filter(None, (layer.path, name))), form, _one_slot(form, leaves), ALONE)
        return form


def whole_form(shape: tuple[int, ...], axis: int | None) -> MatrixForm:
    """Any leaf of a base as a matrix [*stack, numbers, 1], where `axis` is that of a stack of layers; see `numbers_of`."""
    if axis is None:
        return MatrixForm(shape, KernelAxes((), tuple(range(len(shape))), ()))
    # An axis of one number behind the others: a stack on the last axis would be taken for one that is counted from the end.
    padded, at = (shape, axis % len(shape)) if axis < 0 else ((*shape, 1), axis)
    return MatrixForm(padded, KernelAxes((at,), tuple(i for i in range(len(padded)) if i != at), ()))


def numbers_of(form: MatrixForm, leaf: Any) -> Any:
    """A leaf of the base as [*stack, numbers]."""
    return form.to_matrix(leaf.reshape(form.shape))[..., 0]


def _axis_beside(path: str, base: Mapping[str, Any], rules: AxesRules) -> int | None:
    """The stack axis of a leaf, such as a bias, beside a kernel of which a rule says that its first axis is a stack."""
    kernel = f"{path.rpartition('/')[0]}/kernel".removeprefix("/")
    if kernel not in base or not any(re.fullmatch(pattern, kernel) for pattern, _ in rules):
        return None
    size = base[kernel].shape[0]
    return 0 if axes_of(kernel, tuple(base[kernel].shape), rules).stack == (0,) and base[path].shape[:1] == (size,) else None


def _one_slot(form: MatrixForm, leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves as one slot has them, for a message."""
    at = {name: form.stored_axes(LEAF_AXES[name]).index(SLOT) for name in leaves if name in ALONE}
    shapes = {name: (*leaves[name].shape[:i], *leaves[name].shape[i + 1 :]) for name, i in at.items()}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def _fits(form: MatrixForm, leaves: Mapping[str, Any]) -> bool:
    """Whether the leaves of a pool have the sizes of a kernel."""
    ends = {"in": form.sizes[0], "out": form.sizes[1], "numbers": form.sizes[0]}

    def fits(name: str, shape: tuple[int, ...]) -> bool:
        stored = form.stored_axes(LEAF_AXES[name])
        known = [form.shape[axis] if isinstance(axis, int) else ends.get(axis) for axis in stored]
        return len(shape) == len(known) and all(n in (size, None) for size, n in zip(shape, known, strict=True))

    return all(fits(name, tuple(leaf.shape)) for name, leaf in leaves.items())

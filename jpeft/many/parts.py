"""What an adapter does to its base, in the three forms that several adapters can be put together in."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.core.method import Method
from jpeft.core.peft import Peft
from jpeft.layouts import layer_axes
from jpeft.reparameterized.ia3 import IA3
from jpeft.reparameterized.lora import BIAS, LoRA
from jpeft.reparameterized.matrix_form import MatrixForm
from jpeft.reparameterized.weight_method import WeightMethod
from jpeft.tree.kernels import AxesRules, axes_of, axes_rules
from jpeft.tree.paths import Params, Path


class Factors(NamedTuple):
    """A change ``W' = W + a b`` of one kernel, or of each in a stack."""

    a: Float[Array, "*stack inputs rank"]
    b: Float[Array, "*stack rank outputs"]

    @property
    def rank(self) -> int:
        """The number of columns of a."""
        return self.a.shape[-1]


class Parts(NamedTuple):
    """An adapter taken apart, by path of the base.

    Attributes:
      updates: Low-rank changes of kernels.
      scales: Vectors that scale a kernel's outputs, ``l_out`` [*stack, outputs], or its inputs, ``l_in`` [*stack, inputs].
      replaced: Leaves that the adapter holds whole, such as those of a trained head.
      axes: The rules that its methods know the geometry of kernels by.
    """

    updates: dict[Path, Factors]
    scales: dict[Path, dict[str, Any]]
    replaced: dict[Path, Any]
    axes: AxesRules


def parts_of(peft: Peft, verb: str) -> Parts:
    """Take an adapter apart.

    Raises:
      ValueError: for a method that has none of the three forms, with the way out.
    """
    updates, scales, replaced, axes = {}, {}, {}, ()
    biases: dict[Path, Any] = {}  # what is added to the biases of the base, or to those that another part holds
    for method, adapter in _simple_methods(peft):
        own, beside, added = tree.split(peft.params, adapter)
        # A leaf that an earlier part holds belongs to it, and one that it has factors of takes both changes.
        replaced = own | replaced
        if beside or added:
            if added or not isinstance(method, WeightMethod) or scales:
                raise ValueError(_no_form(method, verb))
            axes = axes + tuple(rule for rule in axes_rules(method.axes) if rule not in axes)
            forms = forms_of(peft.params, list(beside), axes_rules(method.axes))
            for path, leaves in beside.items():
                if isinstance(method, LoRA) and BIAS in leaves:
                    leaves = dict(leaves)
                    at, change = _own_bias(method, path, leaves.pop(BIAS), peft.params, verb)
                    biases[at] = biases.get(at, 0) + change
                matrices = method.to_matrices(forms[path], leaves)
                if isinstance(method, IA3) and not updates:
                    scales[path] = matrices
                    continue
                found = method.as_low_rank(matrices, path)
                if found is None:
                    raise ValueError(_no_form(method, verb, path))
                updates[path] = concatenated([updates[path], Factors(*found)] if path in updates else [Factors(*found)])
    base = tree.flatten(peft.params) if biases else {}
    for path, change in biases.items():
        own = replaced.get(path, base[path])
        replaced[path] = own.astype(jnp.promote_types(own.dtype, change.dtype)) + change
    return Parts(updates, scales, replaced, axes)


def forms_of(params: Params, paths: list[Path], rules: AxesRules) -> dict[Path, MatrixForm]:
    """The matrix form of some kernels of a base."""
    base, layers = tree.flatten(params), layer_axes(params)
    shapes = {path: tuple(base[path].shape) for path in paths}
    return {path: MatrixForm(shape, axes_of(path, shape, rules, layers=layers)) for path, shape in shapes.items()}


def concatenated(factors: list[Factors]) -> Factors:
    """Factors of the sum of several changes of one kernel."""
    if len(factors) == 1:
        return factors[0]
    return Factors(jnp.concatenate([a for a, _ in factors], -1), jnp.concatenate([b for _, b in factors], -2))


def _simple_methods(peft: Peft) -> list[tuple[Method, Any]]:
    """The method with its adapter, or each part of a chain with its own."""
    return [(part, peft.adapter[name]) for name, part in peft.method.parts] or [(peft.method, peft.adapter)]


def _own_bias(method: LoRA, path: Path, bias: Any, params: Params, verb: str) -> tuple[Path, Any]:
    """The path of the bias that takes up LoRA's own, and the change of it.

    Raises:
      ValueError: for a layer without a bias.
    """
    at, base = "/".join([*path.split("/")[:-1], "bias"]), tree.flatten(params)
    if at not in base or base[at].shape != bias.shape:
        raise ValueError(f"{verb} puts a bias of LoRA's own (lora_bias=True) into that of the layer, and the layer of '{path}' has none.")
    return at, method.scale(path) * bias


def _no_form(method: Method, verb: str, path: Path = "") -> str:
    if isinstance(method, LoRA):
        return (
            f"{verb} takes changes of whole kernels, and {method.name} has tied='lookup', which changes the look-ups of '{path}' and not "
            "the scores that it gives as the head. Leave the table out of the target, or give tied='both' and train anew."
        )
    if method.why_no_merge is not None:
        return f"{verb} takes adapters that change weights, and {method.name} does more: {method.why_no_merge}."
    return f"{verb} takes adapters of LoRA and (IA)³, and was given {method.name}. Turn it into LoRA first: jpeft.to_lora(peft, rank=...)."

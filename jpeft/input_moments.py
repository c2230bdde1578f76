"""Moments of the inputs of kernels, measured through the gradient of leaves that stand beside them.

Whatever runs a model differentiates it, too: scans, rematerialised blocks, any host. So the sums are had as the gradient of leaves on which
nothing depends: the input of each kernel goes through a function that returns it as it is, and whose backward pass gives the sums of what
went through.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.core.layer import Layer, Linear
from jpeft.core.method import Method
from jpeft.core.peft import Peft, wrap
from jpeft.core.statistics import InputMoments, Moments
from jpeft.hosts import registry as hosts
from jpeft.reparameterized.matrix_form import INPUTS, MatrixForm
from jpeft.reparameterized.tied_tables import is_table
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves, Matrix, WeightMethod
from jpeft.tree.paths import first_few

MASK = "mask"


def input_moments(
    model: Any, params: tree.Params, batches: Iterable[Any], *, method: Method, mask: str | None = "attention_mask"
) -> InputMoments:
    """Sum the inputs of each kernel of a method, and their products, over some batches.

    Args:
      model: What `jpeft.wrap` takes: ``model.apply``, an NNX module, or a function of variables that runs a model, without dropout.
      params: The base.
      batches: Inputs of the model: dicts of keyword arguments, tuples of positional ones, or single arrays.
      method: A weight method, such as ``jpeft.lora(init="eva")``: its target says which kernels. Embeddings have no such inputs.
      mask: Name of the keyword argument [batch, length] that is zero where a position is padding and does not count.

    Returns:
      `InputMoments`: for each kernel ``sum x xᵀ``, ``sum x`` and the number of inputs x, in float32. It needs the square of the number of
      inputs for each kernel: as much memory as the base, for square kernels.

    Raises:
      ValueError: without batches, or for a method that has no target.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> from flax import linen as nn
    >>> from jpeft.stats import input_moments
    >>> model, x = nn.Dense(2), jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> found = input_moments(model.apply, params, [x], method=jpeft.lora(init="eva", head=None)).values["kernel"]
    >>> found.gram.tolist(), found.total.tolist(), float(found.count)
    ([[2.0, 2.0], [2.0, 4.0]], [2.0, 2.0], 2.0)
    """
    if not isinstance(method, WeightMethod):
        raise ValueError(f"input_moments: method={method!r} is none that changes kernels, such as jpeft.lora(init='eva').")
    probe = Probe(target=method.target, axes=method.axes, head=method.head)
    params = hosts.unwrap(params)
    zeros, forward, total = probe.init(jax.random.key(0), params), wrap(model), None

    def score(adapter: Any, params: Any, args: tuple[Any, ...], named: dict[str, Any]) -> jax.Array:
        leaves = jax.tree.leaves(forward(Peft(params, adapter, probe), *args, **named))
        floats = [leaf for leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
        return sum((leaf.astype(jnp.float32).sum() for leaf in floats), jnp.zeros(()))

    step = jax.jit(jax.grad(score))
    for batch in batches:
        named = dict(batch) if isinstance(batch, Mapping) else {}
        args = () if named else tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        adapter = with_mask(zeros, probe.forms(params), named[mask]) if mask in named and np.ndim(named[mask]) == 2 else zeros
        sums = tree.flatten(step(adapter, params, args, named))
        sums = {path: leaf for path, leaf in sums.items() if not path.endswith(f"/{MASK}")}
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise ValueError("input_moments: there are no batches.")
    return InputMoments({path: probe.moments(form, path, total) for path, form in probe.forms(params).items()})


class Probe(WeightMethod):
    """Leaves whose gradient are the moments of a kernel's inputs. The model stays as it is."""

    name = "probe"
    leaf_axes: ClassVar[Mapping[str, Any]] = {
        "gram": (INPUTS, "others"),
        "total": (INPUTS,),
        "count": (),
        MASK: ("batch", "length"),
    }

    def kernels(self, params: tree.Params) -> list[str]:
        """The kernels of the target without tables of embeddings, whose inputs are ids.

        Raises:
          ValueError: if the target names nothing, or such tables alone.
        """
        found = super().kernels(params)
        kernels = [path for path in found if not is_table(path)]
        if not kernels:
            raise ValueError(
                f"input_moments: the target names {first_few(found)} alone. A table of embeddings is given ids, which have no moments: "
                "choose other kernels, too, or another init."
            )
        return kernels

    def init(self, key: Key, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Zeros for each kernel."""
        sizes = lambda form: {"others": form.sizes[0]}
        shapes = {
            f"{path}/{name}": form.leaf_shape(self.leaf_axes[name], sizes(form))
            for path, form in self.forms(params).items()
            for name in Moments._fields
        }
        return tree.unflatten({path: jnp.zeros(shape) for path, shape in shapes.items()})

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """Nothing: see `init`."""
        return {}

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """The kernel."""
        return kernel

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """The layer on inputs that are summed on the way. A layer whose inputs cannot be had as vectors is not seen."""
        form, (x, *rest) = MatrixForm(layer.params[linear.name].shape, linear.axes), inputs
        weights = _weights(form, x, self.to_matrices(form, {MASK: leaves[MASK]})[MASK] if MASK in leaves else None)
        sums = {name: leaves[name] for name in Moments._fields}
        if linear.map_inputs is not None:
            return layer(linear.map_inputs(x, lambda vectors: _observed(self, form, vectors, sums, weights)), *rest)
        if form.stack or x.shape[-1] != form.shape[-2]:  # the groups of a convolution see different inputs
            return layer(x, *rest)
        # A convolution: the windows that its kernel is multiplied with, as the outputs of a kernel that is the identity.
        size = form.sizes[0]
        eye = jnp.eye(size, dtype=x.dtype)
        windows = linear.apply_low_rank(x, eye.reshape(*form.shape[:-1], size), eye)
        seen = jnp.asarray(_observed(self, form, windows.reshape(-1, size), sums, None))
        return layer(x, *rest) + 0.0 * seen.sum().astype(x.dtype)

    def moments(self, form: MatrixForm, path: str, sums: Mapping[str, Any]) -> Moments:
        """The moments of one kernel among all, with the axes of its stack in front."""
        return Moments(*(form.leaf_to_matrix(sums[f"{path}/{name}"], self.leaf_axes[name]) for name in Moments._fields))


def with_mask(zeros: tree.Adapter, forms: Mapping[str, MatrixForm], mask: Any) -> tree.Adapter:
    """The leaves with a mask beside each kernel, and for each kernel of a stack."""
    mask = jnp.asarray(mask, jnp.float32)
    leaves = {
        f"{path}/{MASK}": form.leaf_from_matrix(jnp.broadcast_to(mask, (*form.stack, *mask.shape)), Probe.leaf_axes[MASK])
        for path, form in forms.items()
    }
    return tree.unflatten(tree.flatten(zeros) | leaves)


def _weights(form: MatrixForm, x: jax.Array, mask: jax.Array | None) -> Float[Array, " rows"] | None:
    """What each input counts; None where the inputs are not the positions of the mask."""
    fits = mask is not None and not form.stack and x.ndim > 2 and x.shape[:2] == mask.shape
    rows = x.size // form.sizes[0]
    return jnp.repeat(mask.reshape(-1), rows // mask.size) if fits and mask is not None else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _observed(probe: Probe, form: MatrixForm, vectors: jax.Array, sums: Any, weights: jax.Array | None) -> jax.Array:
    return vectors


def _forward(probe: Probe, form: MatrixForm, vectors: jax.Array, sums: Any, weights: jax.Array | None) -> tuple[jax.Array, Any]:
    return vectors, (vectors, sums, weights)


def _backward(probe: Probe, form: MatrixForm, kept: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    vectors, sums, weights = kept
    x = vectors.astype(jnp.float32)
    ones = jnp.ones(x.shape[:-1]) if weights is None else weights
    weighted = x * ones[..., None]
    found = {"gram": jnp.swapaxes(weighted, -1, -2) @ x, "total": weighted.sum(-2), "count": ones.sum(-1)}
    grads = {name: form.leaf_from_matrix(found[name], probe.leaf_axes[name]).astype(leaf.dtype) for name, leaf in sums.items()}
    return cotangent, grads, None if weights is None else jnp.zeros_like(weights)


_observed.defvjp(_forward, _backward)

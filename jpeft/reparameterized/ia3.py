"""(IA)³: the outputs of keys and values and the inputs of the last feed-forward layer, scaled by trained vectors."""

from typing import Any

import jax.numpy as jnp

from jpeft import tree
from jpeft.core.layer import Layer, Linear
from jpeft.core.options import Names
from jpeft.reparameterized.matrix_form import INPUTS, OUTPUTS
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves, Matrix, Vector, WeightMethod
from jpeft.tree.select import select


class IA3(WeightMethod):
    r"""(IA)³: ``y = l * (x W + b)`` for keys and values, and ``y = (l * x) W + b`` for the last layer of the MLP.

    l begins as ones, so the adapted model begins as the base. It has one number for each output of a key or value kernel, every head's own,
    and one for each input of a feed-forward kernel.

    Args:
      target: The kernels whose *outputs* are scaled: a regex, a list of names, or roles (`jpeft.layouts`). By default the keys
        and values.
      feedforward: The kernels whose *inputs* are scaled; None for attention only. By default the last kernels of the MLPs. A kernel that
        both options name is one of these.
      axes: Geometry of kernels with more than two axes, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A mergeable `Method`: l goes into the columns of W and the bias, or into the rows of W.

    Raises:
      ValueError: from `init`, if a target matches no kernel.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"attn": {"key": {"kernel": jnp.ones((32, 4, 8))}}, "down": {"kernel": jnp.ones((128, 32))}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method="ia3", target=["key"], feedforward=["down"]).adapter)
    {'attn': {'key': {'kernel': {'l_out': (4, 8)}}}, 'down': {'kernel': {'l_in': (128,)}}}

    Reference: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022,
    https://arxiv.org/abs/2205.05638.

    The inputs of the last feed-forward kernel are what follows the nonlinearity, as in the paper. Scaling the outputs of the first kernel
    would act in front of it.
    """

    target: Names = "@key|@value|@qkv"
    feedforward: Names | None = "@ffn_out"

    name = "ia3"
    summary = "vectors that scale keys, values and the inner activations of the MLP, merged for inference"
    learning_rate = 1e-2
    leaf_axes = {"l_out": (OUTPUTS,), "l_in": (INPUTS,)}

    def kernels(self, params: tree.Params) -> list[str]:
        """The kernels of both options."""
        return list(dict.fromkeys([*super().kernels(params), *self.inner_kernels(params)]))

    def inner_kernels(self, params: tree.Params) -> list[str]:
        """The kernels whose inputs are scaled."""
        target = self.feedforward
        return [] if target is None else select(self.candidates(params), target, option="feedforward", params=params)

    def init(self, key: Key, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Ones for the outputs of each kernel, or for the inputs of those of `feedforward`."""
        leaves, forms = tree.flatten(super().init(key, params, stats=stats)), self.forms(params)
        for path in self.inner_kernels(params):
            del leaves[f"{path}/l_out"]
            leaves[f"{path}/l_in"] = jnp.ones(forms[path].leaf_shape((INPUTS,), {}))
        return tree.unflatten(leaves)

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """Ones for the outputs."""
        return {"l_out": jnp.ones(kernel.shape[1])}

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """``W diag(l)``, or ``diag(l) W``."""
        return kernel * leaves["l_out"][None] if "l_out" in leaves else kernel * leaves["l_in"][:, None]

    def new_bias(self, bias: Vector, leaves: Leaves, path: str) -> Vector:
        """``l b`` where the outputs are scaled."""
        return bias * leaves["l_out"]

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """Scale the layer's outputs or its inputs; the kernel stays as it is."""
        if "l_out" in leaves and linear.scale_outputs is not None:
            return linear.scale_outputs(layer(*inputs), leaves["l_out"])
        if "l_in" in leaves and linear.scale_inputs is not None:
            return layer(linear.scale_inputs(inputs[0], leaves["l_in"]), *inputs[1:])
        return super().call_linear(layer, linear, inputs, leaves, path, rng)


ia3 = IA3

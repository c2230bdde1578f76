"""(IA)³: the outputs of keys and values and the inputs of the last feed-forward layer, scaled by trained vectors."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.core.layer import Layer, Linear
from jpeft.core.options import Names
from jpeft.reparameterized.matrix_form import INPUTS, OUTPUTS, LeafAxes
from jpeft.reparameterized.weight_method import WeightMethod
from jpeft.tree.select import chooses, select

OUT, IN = "l_out", "l_in"
KEYS_AND_VALUES = r"(.*/)?(key|value|k_proj|v_proj|k_lin|v_lin|(SelfAttention|EncDecAttention)/[kv]|c_attn|query_key_value|qkv)/kernel"
LAST_FEED_FORWARD = r"(.*/)?((?<!attention/)output/dense|lin2|mlp/c_proj|down_proj|fc2|wo|down)/kernel"


class IA3(WeightMethod):
    r"""(IA)³: ``y = l * (x W + b)`` for keys and values, and ``y = (l * x) W + b`` for the last layer of the MLP.

    l begins as ones, so the adapted model begins as the base. It has one number for each output of a key or value kernel, every head's own,
    and one for each input of a feed-forward kernel.

    Args:
      target: The kernels whose *outputs* are scaled: a regex for whole paths, or a list of names. By default the keys and values.
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

    target: Names = KEYS_AND_VALUES
    feedforward: Names | None = LAST_FEED_FORWARD

    name = "ia3"
    summary = "vectors that scale keys, values and the inner activations of the MLP, merged for inference"
    learning_rate = 1e-2
    leaf_axes: ClassVar[Mapping[str, LeafAxes]] = {OUT: (OUTPUTS,), IN: (INPUTS,)}
    changes_bias = True

    def kernels(self, params: tree.Params) -> list[str]:
        """The kernels of both options."""
        outer = super().kernels(params)
        if self.feedforward is None:
            return outer
        inner = select(self.candidates(params), self.feedforward, option="feedforward", params=params)
        return list(dict.fromkeys([*outer, *inner]))

    def init_kernel(self, key: jax.Array, kernel: Float[Array, "inputs outputs"], path: str) -> dict[str, jax.Array]:
        """Ones."""
        inner = self.feedforward is not None and chooses(self.feedforward, path)
        return {IN: jnp.ones(kernel.shape[0])} if inner else {OUT: jnp.ones(kernel.shape[1])}

    def new_kernel(self, kernel: Float[Array, "inputs outputs"], leaves: dict[str, jax.Array], path: str) -> Float[Array, "inputs outputs"]:
        """``W diag(l)``, or ``diag(l) W``."""
        return kernel * leaves[OUT][None] if OUT in leaves else kernel * leaves[IN][:, None]

    def new_bias(self, bias: Float[Array, " outputs"], leaves: dict[str, jax.Array], path: str) -> Float[Array, " outputs"]:
        """``l b`` where the outputs are scaled."""
        return bias * leaves[OUT] if OUT in leaves else bias

    def scales_bias(self, leaves: Mapping[str, Any]) -> bool:
        """Where the outputs are scaled."""
        return OUT in leaves

    def call_linear(
        self, layer: Layer, linear: Linear, inputs: tuple[Any, ...], leaves: dict[str, Any], path: str, rng: jax.Array | None
    ) -> Any:
        """Scale the layer's outputs or its inputs; the kernel stays as it is."""
        if OUT in leaves and linear.scale_outputs is not None:
            return linear.scale_outputs(layer(*inputs), leaves[OUT])
        if IN in leaves and linear.scale_inputs is not None:
            return layer(linear.scale_inputs(inputs[0], leaves[IN]), *inputs[1:])
        return super().call_linear(layer, linear, inputs, leaves, path, rng)


ia3 = IA3

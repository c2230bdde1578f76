"""DoRA: LoRA that learns the size of each output's weights apart from their direction."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.core.dropout import inverted_dropout
from jpeft.core.layer import Layer, Linear
from jpeft.core.options import Count, PerPath, Positive, Probability, option
from jpeft.reparameterized import low_rank, tied_tables, two_view
from jpeft.reparameterized.matrix_form import OUTPUTS, MatrixForm
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves, Matrix, WeightMethod
from jpeft.tree.select import first_match


class DoRA(WeightMethod):
    r"""DoRA: ``W' = m * V / ||V||`` with ``V = W + s a b``, ``||V||`` the norm over the inputs of each output.

    The magnitude m, one number an output, and the low-rank factors of the direction V are trained. m begins as ``||W||`` and ``b`` as zero,
    so the adapted model begins as the base. The norm is treated as a constant by the gradient, as the paper does in section 4.3: that costs
    no accuracy there, and no gradient of the size of W is formed.

    Args:
      rank: r; or rules ``{regex or name: r}``, first match wins: with ``{"query": 16, ".*": 4}`` the queries have 16. Each rule must match.
      alpha: Scale before the division by r; or rules. ``s = alpha / r``.
      rslora: ``s = alpha / sqrt(r)``.
      dropout: Rate on the inputs of the change ``x (W' - W)``, as in HF PEFT; active when the model is given a ``dropout`` rng. It costs
        another product of the layer.
      init: How ``a`` begins: "kaiming" or "gaussian", as in `jpeft.lora`.
      target: Which kernels: a regex for whole paths, or a list of names; by default every kernel but the head's.
      axes: Geometry of kernels with more than two axes, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.
      tied: Of a table of embeddings that is the head, too: "both" changes look-ups and scores, "lookup" the look-ups alone, and does not
        merge; as in `jpeft.lora`.

    Returns:
      A mergeable `Method`.

    Raises:
      ValueError: for a rank below 1 or an unknown init; from `init`, for a target that matches nothing or a kernel whose geometry is not
        known.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method=jpeft.dora(rank=4)).adapter)
    {'query': {'kernel': {'a': (32, 4), 'b': (4, 16), 'm': (16,)}}}

    Reference: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, https://arxiv.org/abs/2402.09353.

    Follows the authors' code and HF PEFT in the axis of the norm: one magnitude for each output. The paper's text speaks of columns.
    """

    rank: PerPath[Count] = 8
    alpha: PerPath[Positive] = 16.0
    rslora: bool = False
    initializer: low_rank.Initializer = option(default="kaiming", alias="init")
    dropout: Probability = 0.0
    tied: tied_tables.Tied = "both"

    name = "dora"
    summary = "low-rank updates of the direction of kernels, and a trained magnitude for each output"
    learning_rate = 3e-3
    leaf_axes = low_rank.LEAF_AXES | {"m": (OUTPUTS,)}

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """``a`` random, ``b`` zero, ``m`` the norms of W."""
        rank = first_match(path, self.rank, "rank")
        return low_rank.factors(key, path, kernel.shape, low_rank.MATRIX, rank, self.initializer) | {"m": _norms(kernel)}

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """``m V / ||V||``."""
        direction = low_rank.update(kernel, leaves, self._scale(path))
        return direction * (leaves["m"] / _divisors(direction))[None]

    def merge(self, params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        """The new kernels.

        Raises:
          ValueError: for a change of the look-ups of a table alone.
        """
        tied_tables.check_merge(self.tied, tree.split(params, adapter)[1], self.name)
        return super().merge(params, adapter)

    def merge_layer(self, layer: Layer, leaves: Leaves) -> Mapping[str, Any] | None:
        """The layer's parameters with the new kernel; as they are where the scores of a table stay."""
        return layer.merged(layer.params) if self.tied == "lookup" and layer.method == "attend" else super().merge_layer(layer, leaves)

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """``g * (x V) + bias`` with ``g = m / ||V||``: the product as in LoRA, its outputs scaled."""
        if tied_tables.scores(self.tied, path, inputs[0]):
            return layer(*inputs)
        if not self.dropout or rng is None or not jnp.issubdtype(jnp.result_type(inputs[0]), jnp.floating):
            return self._run(layer, linear, inputs, leaves, path)
        # layer(x) + x_d (W' - W), with the thinned x_d: the bias is added once, and what the layer does without the change is not thinned.
        thinned, bare = (inverted_dropout(rng, inputs[0], self.dropout), *inputs[1:]), layer.without_bias()
        return layer(*inputs) + (self._run(bare, linear, thinned, leaves, path) - bare(*thinned))

    def _run(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str) -> Any:
        """The layer on its new kernel."""
        kernel = self.kernel_inside(layer, linear)
        if kernel is None or linear.scale_outputs is None or linear.add_bias is None:
            return super().call_linear(layer, linear, inputs, leaves, path, None)
        form, s = MatrixForm(layer.params[linear.name].shape, linear.axes), self._scale(path)
        norms = _divisors(low_rank.update(kernel, self.to_matrices(form, leaves), s))  # [*stack, outputs]
        y = two_view.low_rank(layer.without_bias(), linear, s, inputs, leaves["a"], leaves["b"])
        y = linear.scale_outputs(y, leaves["m"] / form.leaf_from_matrix(norms, (OUTPUTS,)))
        return linear.add_bias(y, layer.params["bias"]) if "bias" in layer.params else y

    def _scale(self, path: str) -> float:
        return low_rank.scale(path, self.rank, self.alpha, self.rslora)


def _norms(kernel: Float[Array, "*stack inputs outputs"]) -> Float[Array, "*stack outputs"]:
    """The norm of each output's weights, a constant to the gradient."""
    return jnp.linalg.norm(jax.lax.stop_gradient(kernel), axis=-2)


def _divisors(kernel: Float[Array, "*stack inputs outputs"]) -> Float[Array, "*stack outputs"]:
    """The norms; one where all weights of an output are zero, as in a layer that begins so: it stays zero."""
    norms = _norms(kernel)
    return jnp.where(norms > 0, norms, 1)


dora = DoRA

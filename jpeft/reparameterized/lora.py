"""LoRA: low-rank updates of kernels."""

from typing import Any, Literal

from jaxtyping import Array

from jpeft.core.layer import Layer, Linear
from jpeft.core.options import Count, Names, PerPath, Positive, Probability, option
from jpeft.reparameterized import low_rank, two_view
from jpeft.reparameterized.matrix_form import MatrixForm
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves, Matrix, WeightMethod
from jpeft.tree.select import first_match


class LoRA(WeightMethod):
    r"""LoRA: ``W' = W + s a b`` with a low-rank ``a b``, trained in place of ``W``.

    ``h = W x + (alpha / r) b a dropout(x)`` in the paper's symbols; here, with Flax's (in, out) kernels, ``y = layer(x) + s (x a) b``,
    ``a`` of shape ``[*stack, *inputs, r]``, ``b`` of shape ``[*stack, r, *outputs]``, ``s = alpha / r``. ``b`` is zero at the start, so
    the adapted model begins as the base. One ``a`` is shared by all heads of a kernel with a head axis.

    Args:
      rank: r; or rules ``{regex or name: r}``, first match wins: with ``{"query": 16, ".*": 4}`` the queries have 16. Each rule must match.
      alpha: Scale before the division by r; or rules. 16 for rank 8 is what the authors' GLUE scripts use.
      target: Which kernels. A regex for whole paths, or a list of names as in HF PEFT, ``["query", "value"]``; by default every kernel
        but the head's, which reaches full fine-tuning's quality where query and value alone do not (Schulman et al., 2025,
        https://thinkingmachines.ai/blog/lora). ``embedding`` leaves can be targets too.
      dropout: Rate on the input of the branch alone; active when the model is given a ``dropout`` rng.
      rslora: ``s = alpha / sqrt(r)``, which keeps the update's size as r grows (https://arxiv.org/abs/2312.03732).
      init: ``a`` is uniform in +-1/sqrt(fan_in) ("kaiming", the authors' code) or N(0, 1/r^2) ("gaussian"). For embeddings it is ``b``
        that is random, N(0, 1), and ``a`` that is zero.
      view: How training computes it. "two-view" takes forward and dX from the merged kernel and da, db from the factors
        (`jpeft.reparameterized.two_view`); "factored" is the equation above, and the one for forward-mode derivatives; "joined" adds
        the update inside the layer's product, which spares bfloat16 a trip of the outputs and a rounding for copies of inputs and kernel
        (`jpeft.reparameterized.joined`); "auto" takes the cheaper one of the first two for each layer's shape and dtypes.
      axes: Geometry of kernels with more than two axes, ``((regex, KernelAxes), ...)``, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A mergeable `Method`.

    Raises:
      ValueError: for a rank below 1, a dropout rate outside [0, 1), an unknown view or init; from `init` for a target that matches nothing
        or a kernel whose geometry is not known.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}}
    >>> peft = jpeft.apply(params, method=jpeft.lora(rank=4))
    >>> jax.tree.map(jnp.shape, peft.adapter)
    {'query': {'kernel': {'a': (32, 4), 'b': (4, 16)}}}

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, https://arxiv.org/abs/2106.09685.

    Differs from HF PEFT in the default target (there query and value, by architecture) and alpha (there 8), and in computing in the
    layer's own dtype with float32 factors (there a bfloat16 input is cast to float32 for the branch).
    """

    rank: PerPath[Count] = 8
    alpha: PerPath[Positive] = 16.0
    target: Names = r"(.*/)?kernel"
    dropout: Probability = 0.0
    rslora: bool = False
    initializer: low_rank.Initializer = option(default="kaiming", alias="init")
    view: Literal["auto", "two-view", "factored", "joined"] = "auto"

    name = "lora"
    summary = "low-rank updates of kernels, merged for inference"
    learning_rate = 3e-3
    adds_to_kernel = True
    leaf_axes = low_rank.LEAF_AXES

    def scale(self, path: str) -> float:
        """``s`` of the kernel at a path."""
        return low_rank.scale(path, self.rank, self.alpha, self.rslora)

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """``a`` random, ``b`` zero."""
        rank = first_match(path, self.rank, "rank")
        return low_rank.factors(key, path, kernel.shape, low_rank.MATRIX, rank, self.initializer)

    def init_leaves(self, key: Key, kernel: Any, form: MatrixForm, path: str) -> Leaves:
        """As `init_kernel`, drawn for all kernels of a stack at once: only the shape of the kernel is needed."""
        return low_rank.factors(key, path, form.shape, form.axes, first_match(path, self.rank, "rank"), self.initializer)

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """``W + s a b``."""
        return low_rank.update(kernel, leaves, self.scale(path))

    def as_low_rank(self, leaves: Leaves, path: str) -> tuple[Array, Array]:
        """``s a`` and ``b``."""
        return self.scale(path) * leaves["a"], leaves["b"]

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """One of the views, whichever is cheaper for the layer's shape."""
        a, b, s = leaves["a"], leaves["b"], self.scale(path)
        return two_view.low_rank(layer, linear, s, inputs, a, b, view=self.view, dropout=self.dropout, rng=rng)


lora = LoRA

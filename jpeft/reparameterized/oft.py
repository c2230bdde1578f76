"""OFT: the inputs of kernels rotated, in blocks."""

import functools
import math
import warnings
from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.core.layer import Layer, Linear
from jpeft.core.limits import Range
from jpeft.core.options import Count, Positive, Probability
from jpeft.reparameterized import rotation
from jpeft.reparameterized.matrix_form import MatrixForm
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves, Matrix, WeightMethod
from jpeft.tree.paths import first_few

BLOCKS, ENTRIES = "blocks", "entries"


class OFT(WeightMethod):
    r"""OFT: ``W' = R W`` with R block-diagonal and orthogonal: ``y = layer(x R)``, the inputs rotated in blocks of size b.

    Each block is made from a skew-symmetric matrix Q, whose b (b - 1) / 2 entries above the diagonal are trained. They are zero at the
    start, so the adapted model begins as the base. With `terms` the rotation is a cut-off series, which needs no inverse and is orthogonal
    up to its last power: ``1 + 2 Q + 2 Q^2 + 2 Q^3 + Q^4`` for five; without, Cayley's ``(1 - Q) (1 + Q)^-1``. The two turn opposite ways.

    Of an ``embedding``, whose inputs are ids, the outputs are rotated: ``W' = W R``.

    The leaf ``q`` [blocks, b (b - 1) / 2], with `block_share` [1, b (b - 1) / 2], is HF PEFT's ``oft_R.weight`` (of an embedding
    ``oft_embedding_R.weight``): the entries row by row.

    Args:
      block_size: b. Where it does not divide the inputs of a kernel, the nearest size that does is taken there, as in HF PEFT, and a
        warning says so. Kernels with fewer inputs have one block.
      block_num: The number of blocks of each kernel, instead of their size: HF PEFT's ``r``.
      block_share: One Q for all blocks of a kernel.
      terms: Terms of the series; None for Cayley's transform. HF PEFT calls them ``use_cayley_neumann`` and ``num_cayley_neumann_terms``.
      coft: Keep the rotation near the identity: a Q of a Frobenius norm above ``eps / sqrt(blocks)`` is scaled down to that.
      eps: The freedom that `coft` leaves.
      block_dropout: Share of the blocks that do not turn in a step of training, drawn anew for each layer; active when the model is given a
        ``dropout`` rng. HF PEFT calls it ``module_dropout``. One block that is shared by all turns always.
      target: Which kernels: a regex for whole paths, or a list of names; by default every kernel but the head's.
      axes: Geometry of kernels with more than two axes, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A mergeable `Method`.

    Raises:
      ValueError: for options out of range; from `init`, for a target that matches nothing or a kernel whose geometry is not known.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method=jpeft.oft(block_size=8)).adapter)
    {'query': {'kernel': {'q': (4, 28)}}}

    Reference: Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023, https://arxiv.org/abs/2306.07280; Qiu et al.,
    Orthogonal Finetuning Made Scalable, 2025, https://arxiv.org/abs/2506.19847 (rotated inputs and the series).

    Differs from HF PEFT in `coft`, where the gradient is that of the scaled Q (there Q itself is overwritten in each forward pass), and in
    convolutions, where blocks are of the inputs in the order (window, channel).
    """

    block_size: Count = 32
    block_num: Count | None = None
    block_share: bool = False
    terms: Annotated[int, Range(2, 64)] | None = 5
    coft: bool = False
    eps: Positive = 6e-5
    block_dropout: Probability = 0.0

    name = "oft"
    summary = "rotations of the inputs of kernels, in blocks"
    learning_rate = 1e-3
    reduce_grads_locally = True
    leaf_axes = {"q": (BLOCKS, ENTRIES)}

    def check_base(self, params: tree.Params) -> None:
        """Say where blocks of another size are taken."""
        super().check_base(params)
        ins = {path: form.sizes[_side(path)] for path, form in self.forms(params).items()}
        given, what = (self.block_num, "block_num") if self.block_num else (self.block_size, "block_size")
        other = {path: size for path, size in ins.items() if size % given and size > given}
        if other:
            path, size = next(iter(other.items()))
            count, block = self._cut(size)
            warnings.warn(
                f"oft: {what}={given} does not divide the inputs of {first_few(other)}. The nearest number that does is taken: '{path}', "
                f"with {size} inputs, has {count} blocks of {block}.",
                stacklevel=3,
            )

    def _cut(self, ins: int) -> tuple[int, int]:
        """The number of blocks of so many inputs, and their size."""
        if self.block_num is not None:
            count = nearest_divisor(ins, self.block_num)
            return count, ins // count
        size = nearest_divisor(ins, self.block_size)
        return ins // size, size

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """Zeros."""
        ins = kernel.shape[_side(path)]
        count, size = self._cut(ins)
        if size == 1:
            given = f"block_num={self.block_num}" if self.block_num is not None else f"block_size={self.block_size}"
            raise ValueError(f"oft: {given} cuts the {ins} inputs of '{path}' into blocks of 1, which cannot turn. {_advice(ins)}")
        return {"q": jnp.zeros((1 if self.block_share else count, size * (size - 1) // 2))}

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """``R W``, or ``W R`` of a table."""
        if _side(path):
            return kernel + rotation.turn_blocks(kernel, self._turn(leaves["q"], kernel.shape[1]))
        return kernel + rotation.turn_blocks(kernel.T, self._turn(leaves["q"], len(kernel)).swapaxes(1, 2)).T

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """The layer on rotated inputs."""
        if linear.map_inputs is None or _side(path):
            return super().call_linear(layer, linear, inputs, leaves, path, rng)
        form = MatrixForm(layer.params[linear.name].shape, linear.axes)
        blocks = form.each(functools.partial(self._turn, ins=form.sizes[0]))(self.to_matrices(form, leaves)["q"])
        if self.block_dropout and rng is not None:
            blocks = form.each(functools.partial(rotation.without_some, share=self.block_dropout))(form.keys(rng), blocks)
        turn = lambda v, own: rotation.turn_blocks(v, own["blocks"])
        return rotation.rotated(layer, linear, inputs, turn, {"blocks": blocks})

    def _turn(self, q: Float[Array, "blocks entries"], ins: int) -> rotation.Blocks:
        """The blocks of ``R - 1``."""
        _, size = self._cut(ins)
        skew = rotation.skew(_shortened(q, self.eps) if self.coft else q, size)
        return rotation.cayley(skew) if self.terms is None else rotation.neumann(skew, self.terms)


def _side(path: str) -> int:
    """Which side of a kernel is rotated: 0 for the inputs, 1 for the outputs of a table."""
    return int(path.rpartition("/")[2] == "embedding")


def _advice(ins: int) -> str:
    """Which blocks so many inputs can have."""
    sizes = [size for size in range(2, ins + 1) if ins % size == 0]
    if not sizes:
        return "Leave it out of the target."
    return f"Give a block_size that divides them, such as {' or '.join(map(str, sizes[:2]))}, or leave it out of the target."


def nearest_divisor(ins: int, wanted: int) -> int:
    """The divisor of a number of inputs that is nearest to a wanted one, the smaller of two; all inputs where more are wanted.

    >>> nearest_divisor(768, 32), nearest_divisor(48, 32), nearest_divisor(30, 8), nearest_divisor(16, 32)
    (32, 24, 6, 16)
    """
    if wanted >= ins:
        return ins
    divisors = [size for size in range(1, ins + 1) if ins % size == 0]
    return min(divisors, key=lambda size: (abs(size - wanted), size))


def _shortened(q: Float[Array, "blocks entries"], eps: float) -> Float[Array, "blocks entries"]:
    """Q with a Frobenius norm of at most ``eps / sqrt(blocks)``; each entry stands twice in it."""
    most = eps / math.sqrt(len(q))
    square = 2 * jnp.sum(q**2, axis=1, keepdims=True)
    long = square > most**2
    # A norm of zero has no gradient: the root is taken of long ones only.
    return jnp.where(long, q * (most / jnp.sqrt(jnp.where(long, square, 1))), q)


oft = OFT

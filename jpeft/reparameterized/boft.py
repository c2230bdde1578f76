"""BOFT: OFT with several factors, whose blocks reach across each other like the steps of a Fourier transform."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.core.layer import Layer, Linear
from jpeft.core.options import Count, Probability
from jpeft.reparameterized import rotation
from jpeft.reparameterized.matrix_form import OUTPUTS, MatrixForm
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves, Matrix, WeightMethod

FACTORS, BLOCKS, ROWS, COLUMNS = "factors", "blocks", "rows", "columns"


class BOFT(WeightMethod):
    r"""BOFT: ``W' = B_m ... B_1 W diag(s)``, a product of m sparse rotations of the inputs, and a scale for each output.

    Each factor is ``B_i = P_i diag(R_i1, R_i2, ...) P_i^T``: blocks of size b, each ``(1 - Q) (1 + Q)^-1`` with ``Q = (r - r^T) / 2`` of a
    trained r [b, b]. ``P_1`` is the identity; ``P_i`` brings half a block next to one that lies ``2^(i - 2)`` blocks further, so that m
    factors mix ``2^(m - 1)`` blocks. r begins as zero and s as ones, so the adapted model begins as the base.

    The leaves are HF PEFT's: ``r`` [m, blocks, b, b] is ``boft_R``, and ``s`` [outputs] is ``boft_s[:, 0]``.

    Args:
      block_size: b, which must divide the inputs of each kernel.
      block_num: The number of blocks of each kernel, instead of their size.
      n_butterfly_factor: m. With more than one, b must be even, and ``2^(m - 1)`` must divide the number of blocks.
      block_dropout: Share of the blocks of one factor, drawn for each layer, that do not turn in a step of training; active when the model
        is given a ``dropout`` rng. HF PEFT calls it ``boft_dropout``.
      target: Which kernels: a regex for whole paths, or a list of names; by default every kernel but the head's.
      axes: Geometry of kernels with more than two axes, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A mergeable `Method`.

    Raises:
      ValueError: for options out of range; from `init`, for a target that matches nothing, a kernel whose geometry is not known, or a
        kernel whose inputs cannot be cut so.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method=jpeft.boft(block_size=8, n_butterfly_factor=2)).adapter)
    {'query': {'kernel': {'r': (2, 4, 8, 8), 's': (16,)}}}

    Reference: Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, 2023, https://arxiv.org/abs/2311.06243.

    HF PEFT takes one factor, whatever was asked for, where its CUDA kernel is not there. Here the factors are reshapes and small products
    on every device, and rotate the inputs: no matrix [inputs, inputs] is formed.
    """

    block_size: Count = 4
    block_num: Count | None = None
    n_butterfly_factor: Count = 1
    block_dropout: Probability = 0.0

    name = "boft"
    summary = "products of sparse rotations of the inputs of kernels, and a scale for each output"
    learning_rate = 1e-3
    reduce_grads_locally = True
    leaf_axes = {"r": (FACTORS, BLOCKS, ROWS, COLUMNS), "s": (OUTPUTS,)}

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """No rotation, and a scale of one."""
        ins, outs = kernel.shape
        given, what = (self.block_num, "block_num") if self.block_num else (self.block_size, "block_size")
        if ins % given:
            raise ValueError(f"boft: {what}={given} does not divide the {ins} inputs of '{path}'.")
        count, size = (given, ins // given) if self.block_num else (ins // given, given)
        if size == 1:
            raise ValueError(f"boft: {what}={given} cuts the {ins} inputs of '{path}' into blocks of 1, which cannot turn.")
        # 2 ** m without its value: m may be any number.
        if self.n_butterfly_factor > 1 and (size % 2 or self.n_butterfly_factor > 32 or count % 2 ** (self.n_butterfly_factor - 1)):
            raise ValueError(
                f"boft: n_butterfly_factor={self.n_butterfly_factor} asks for blocks of an even size, whose number 2^"
                f"{self.n_butterfly_factor - 1} divides; {what}={given} cuts the {ins} inputs of '{path}' into {count} blocks of {size}."
            )
        return {"r": jnp.zeros((self.n_butterfly_factor, count, size, size)), "s": jnp.ones(outs)}

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """``B_m ... B_1 W diag(s)``."""
        turned = kernel + _turn(kernel.T, _blocks(leaves["r"]).swapaxes(2, 3)[::-1], last=0).T
        return turned * leaves["s"][None]

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """``s * (layer(x B_m ... B_1) - bias) + bias``."""
        # Other middleware may change the bias, which s must not scale.
        whole = linear.scale_outputs is not None and linear.add_bias is not None and self.kernel_inside(layer, linear) is not None
        if linear.map_inputs is None or not whole:
            return super().call_linear(layer, linear, inputs, leaves, path, rng)
        assert linear.scale_outputs is not None
        assert linear.add_bias is not None
        form = MatrixForm(layer.params[linear.name].shape, linear.axes)
        blocks = form.each(_blocks)(self.to_matrices(form, leaves)["r"])
        if self.block_dropout and rng is not None:
            blocks = form.each(functools.partial(_without_some, share=self.block_dropout))(form.keys(rng), blocks)
        y = rotation.rotated(layer.without_bias(), linear, inputs, lambda v, own: _turn(v, own["blocks"]), {"blocks": blocks})
        y = linear.scale_outputs(y, leaves["s"])
        return linear.add_bias(y, layer.params["bias"]) if "bias" in layer.params else y


def _blocks(r: Float[Array, "factors blocks size size"]) -> Float[Array, "factors blocks size size"]:
    """The blocks of ``R - 1`` of each factor."""
    skew = (r - r.swapaxes(2, 3)) / 2
    return rotation.cayley(skew.reshape(-1, *r.shape[2:])).reshape(r.shape)


def _without_some(key: Key, blocks: Float[Array, "factors blocks size size"], share: float) -> Float[Array, "factors blocks size size"]:
    """The blocks with some of one factor that do not turn."""
    key_factor, key_blocks = jax.random.split(key)
    factor = jax.random.randint(key_factor, (), 0, len(blocks))
    return blocks.at[factor].set(rotation.without_some(key_blocks, blocks[factor], share))


def _turn(v: Float[Array, "rows inputs"], blocks: Float[Array, "factors blocks size size"], last: int | None = None) -> jax.Array:
    """What ``B_m ... B_1`` adds to rows v; with `last` the blocks are in reverse order, and their permutations count from there."""
    total = jnp.zeros_like(v)
    for i in reversed(range(len(blocks))):
        level = i if last is None else len(blocks) - 1 - i + last
        total = total + _shuffled(
            rotation.turn_blocks(_shuffled(v + total, blocks.shape[2], level, back=False), blocks[i]), blocks.shape[2], level
        )
    return total


def _shuffled(v: Float[Array, "rows inputs"], size: int, level: int, *, back: bool = True) -> Float[Array, "rows inputs"]:
    """Rows v times ``P^T``, or times P: in each group of 2^level blocks, the first half blocks of all pairs and then the second ones."""
    pairs = 2**level
    cut = (pairs, 2) if back else (2, pairs)
    return v.reshape(len(v), -1, *cut, size // 2).swapaxes(2, 3).reshape(v.shape) if level else v


boft = BOFT

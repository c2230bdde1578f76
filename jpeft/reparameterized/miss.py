"""MiSS (Bone): one small block, added to all parts of a kernel."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jpeft.core.dropout import inverted_dropout
from jpeft.core.layer import Layer, Linear
from jpeft.core.options import Count, PerPath, Probability
from jpeft.core.residuals import changed
from jpeft.reparameterized.added import Update, added
from jpeft.reparameterized.matrix_form import OUTPUTS, MatrixForm
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves, Matrix, WeightMethod
from jpeft.tree.select import first_match

RANK, MINI, BLOCKS, ROWS, COLUMNS = "rank", "mini", "blocks", "rows", "columns"


class MiSS(WeightMethod):
    r"""MiSS: ``W' = W + [D; D; ...]``: one block D of r rows, added to every r rows of W. Bone is its first name.

    ``x [D; D; ...]`` is ``(x_1 + x_2 + ...) D``, the sum of the inputs' parts of size r times D: a low-rank update whose ``a`` costs
    additions only. If r does not divide the inputs, the last part is short. D begins as zero, so the adapted model begins as the base.

    The variant "bat" multiplies as well: with W cut into blocks ``W_ji`` [r, r] of inputs j and outputs i, ``W'_ji = W_ji + D_i^T W_ji +
    D_i^T``. The variant "mini" has D of `mini_rank` columns, which is repeated along the outputs, too.

    The leaves are HF PEFT's ``miss_block``, as it is: ``d`` [r, outputs]; ``d_bat`` [outputs / r, r, r]; ``d_mini`` [r, mini_rank].

    Args:
      rank: r; or rules ``{regex or name: r}``, first match wins. Each rule must match.
      variant: "miss", "bat" or "mini": HF PEFT's ``init_weights`` of True, "bat" or "mini".
      mini_rank: The columns of D in "mini", which must divide the outputs: HF PEFT's ``mini_r``.
      dropout: Rate on the input of the update alone; active when the model is given a ``dropout`` rng.
      target: Which kernels: a regex for whole paths, or a list of names; by default every kernel but the head's.
      axes: Geometry of kernels with more than two axes, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A mergeable `Method`.

    Raises:
      ValueError: for a rank below 1 or an unknown variant; from `init`, for a target that matches nothing, a kernel whose geometry is not
        known, or a kernel that cannot be cut so.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method=jpeft.miss(rank=8)).adapter)
    {'query': {'kernel': {'d': (8, 16)}}}

    Reference: Kang and Yin, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure, 2024,
    https://arxiv.org/abs/2409.15371.
    """

    rank: PerPath[Count] = 64
    variant: Literal["miss", "bat", "mini"] = "miss"
    mini_rank: Count = 1
    dropout: Probability = 0.0

    name = "miss"
    summary = "one small block that is added to all parts of a kernel (MiSS, Bone)"
    learning_rate = 5e-4
    leaf_axes = {"d": (RANK, OUTPUTS), "d_bat": (BLOCKS, ROWS, COLUMNS), "d_mini": (RANK, MINI)}

    @property
    def adds_to_kernel(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All but "bat", which multiplies with the kernel."""
        return self.variant != "bat"

    def check(self) -> None:
        """Refuse a dropout that has no input of its own.

        Raises:
          ValueError: for "bat", which changes the kernel.
        """
        if self.dropout and self.variant == "bat":
            raise ValueError("miss: dropout is on the inputs of the update, and variant='bat' changes the kernel: give dropout=0.")

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """Zeros."""
        (ins, outs), r = kernel.shape, first_match(path, self.rank, "rank")
        if r > ins:
            raise ValueError(f"miss: rank={r} is more than the {ins} inputs of '{path}'.")
        if self.variant == "bat":
            if ins % r or outs % r:
                raise ValueError(
                    f"miss: variant='bat' cuts kernels into blocks of {r} x {r}, which '{path}', {ins} x {outs}, does not allow."
                )
            return {"d_bat": jnp.zeros((outs // r, r, r))}
        if self.variant == "mini":
            if outs % self.mini_rank:
                raise ValueError(f"miss: mini_rank={self.mini_rank} does not divide the {outs} outputs of '{path}'.")
            return {"d_mini": jnp.zeros((r, self.mini_rank))}
        return {"d": jnp.zeros((r, outs))}

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """``W + [D; D; ...]``; with "bat", ``W + D^T W + D^T`` block by block."""
        if "d_bat" not in leaves:
            return kernel + _repeated(leaves, *kernel.shape)
        d = leaves["d_bat"]  # [i, r, r]
        blocks = kernel.reshape(-1, d.shape[1], *d.shape[:2])  # [j, input, i, output]
        change = jnp.einsum("jpio,ipq->jqio", blocks, d) + d.transpose(2, 0, 1)[None]
        return kernel + change.reshape(kernel.shape)

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """By the sum of the inputs' parts, with the two views of `added`; "bat" runs on its new kernel, which costs least."""
        if linear.apply_vectors is None or "d_bat" in leaves:
            return super().call_linear(layer, linear, inputs, leaves, path, rng)
        apply, form = linear.apply_vectors, MatrixForm(layer.params[linear.name].shape, linear.axes)
        (ins, outs), outputs = form.sizes, tuple(form.shape[i] for i in form.axes.outputs)

        def delta(leaves: Any) -> jax.Array:
            return form.from_matrix(form.each(functools.partial(_repeated, ins=ins, outs=outs))(self.to_matrices(form, leaves)))

        def branch(x: jax.Array, leaves: Any) -> jax.Array:
            own = {name: leaf.astype(layer.dtype) for name, leaf in self.to_matrices(form, leaves).items()}
            through = form.each(functools.partial(_product, outs=outs))
            return apply(x, lambda v: through(v.astype(layer.dtype), own).reshape(*v.shape[:-1], *outputs))

        rank, columns = leaves["d" if "d" in leaves else "d_mini"].shape[0], self.mini_rank if "d_mini" in leaves else outs
        if self.dropout and rng is not None:
            y = layer(*inputs)
            return changed(y + branch(inverted_dropout(rng, inputs[0], self.dropout), leaves).astype(y.dtype))
        return added(layer, linear, inputs, leaves, Update(delta, branch, ins + 2 * rank * columns, 0))


def _repeated(leaves: Mapping[str, Any], ins: int, outs: int) -> Matrix:
    """D one below the other, and side by side in "mini"."""
    d = leaves["d"] if "d" in leaves else jnp.tile(leaves["d_mini"], (1, outs // leaves["d_mini"].shape[1]))
    return jnp.tile(d, (-(-ins // len(d)), 1))[:ins]


def _product(v: jax.Array, leaves: Mapping[str, Any], outs: int) -> jax.Array:
    """``(v_1 + v_2 + ...) D`` for rows v."""
    d = leaves["d"] if "d" in leaves else leaves["d_mini"]
    parts = jnp.pad(v, ((0, 0), (0, -v.shape[1] % len(d)))).reshape(len(v), -1, len(d))
    return jnp.tile(parts.sum(axis=1) @ d, (1, outs // d.shape[1]))


miss = MiSS

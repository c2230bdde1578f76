"""HRA: the inputs of kernels reflected several times, which is a rotation and close to a low-rank update."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.core.initializers import kaiming_uniform
from jpeft.core.layer import Layer, Linear
from jpeft.core.options import Count, PerPath
from jpeft.reparameterized import rotation
from jpeft.reparameterized.matrix_form import INPUTS, MatrixForm
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves, Matrix, WeightMethod
from jpeft.tree.select import first_match

RANK = "rank"


class HRA(WeightMethod):
    r"""HRA: ``W' = H_r ... H_1 W`` with r Householder reflections ``H_i = 1 - 2 u_i u_i^T / ||u_i||^2`` of the inputs.

    The first and second u begin as equal, the third and fourth too, and so on: two equal reflections cancel, so for an even r the adapted
    model begins as the base. All r reflections are one product through a rank, ``x - (x U) (U T)^T`` with a triangular T [r, r].

    The leaf ``u`` [inputs, r] is HF PEFT's ``hra_u``.

    Args:
      rank: r, an even number; or rules ``{regex or name: r}``, first match wins. Each rule must match.
      apply_gs: Make the u orthogonal to each other, by Gram and Schmidt, as HF PEFT's ``apply_GS``: then ``R = 1 - 2 P`` with P the
        projection on what the u span. No such R is the identity, so the adapted model does not begin as the base; the u begin at random.
      target: Which kernels: a regex for whole paths, or a list of names; by default every kernel but the head's.
      axes: Geometry of kernels with more than two axes, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A mergeable `Method`.

    Raises:
      ValueError: for a rank below 1; from `init`, for a target that matches nothing, a kernel whose geometry is not known, or a kernel with
        fewer inputs than r.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method=jpeft.hra(rank=4)).adapter)
    {'query': {'kernel': {'u': (32, 4)}}}

    Reference: Yuan et al., Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation, 2024,
    https://arxiv.org/abs/2405.17484.

    The paper's penalty that draws the u towards orthogonality is left out, as in HF PEFT.
    """

    rank: PerPath[Count] = 8
    apply_gs: bool = False

    name = "hra"
    summary = "Householder reflections of the inputs of kernels"
    learning_rate = 3e-3
    reduce_grads_locally = True
    leaf_axes = {"u": (INPUTS, RANK)}

    @property
    def begins_within(self) -> float | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Not as the base, if it is an odd number of reflections, or orthogonal ones."""
        ranks = [self.rank] if isinstance(self.rank, int) else [rank for _, rank in self.rank]  # pyright: ignore[reportGeneralTypeIssues]
        return None if self.apply_gs or any(rank % 2 for rank in ranks) else 0.0

    def check_base(self, params: tree.Params) -> None:
        """Say if the adapted model cannot begin as the base."""
        super().check_base(params)
        if self.begins_within is None:
            why = "apply_gs=True makes a reflection" if self.apply_gs else f"rank={self.rank} makes an odd number of reflections"
            warnings.warn(f"hra: {why}, which is never the identity, so the adapted model does not begin as the base.", stacklevel=3)

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """Pairs of equal vectors, so that their reflections cancel."""
        ins, r = kernel.shape[0], first_match(path, self.rank, "rank")
        if r > ins:
            raise ValueError(f"hra: rank={r} is more than the {ins} inputs of '{path}'.")
        if r % 2 or self.apply_gs:
            return {"u": kaiming_uniform(key, (ins, r), fan_in=r)}
        return {"u": jnp.repeat(kaiming_uniform(key, (ins, r // 2), fan_in=r // 2), 2, axis=1)}

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """``H_r ... H_1 W``."""
        factors = self._factors(leaves["u"])
        return kernel - factors["u"] @ (factors["ut"].T @ kernel)

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """The layer on reflected inputs."""
        if linear.map_inputs is None:
            return super().call_linear(layer, linear, inputs, leaves, path, rng)
        form = MatrixForm(layer.params[linear.name].shape, linear.axes)
        factors = form.each(self._factors)(self.to_matrices(form, leaves)["u"])
        return rotation.rotated(layer, linear, inputs, lambda v, f: -((v @ f["u"]) @ f["ut"].T), factors)

    def _factors(self, u: Float[Array, "inputs rank"]) -> Mapping[str, jax.Array]:
        """U of unit length and ``U T``: the product of the reflections in reverse order is ``1 - U (U T)^T``."""
        u = u / jnp.linalg.norm(u, axis=0, keepdims=True)
        gram, one = u.T @ u, jnp.eye(u.shape[1], dtype=u.dtype)
        if self.apply_gs:
            # The projection on the span of U is U (U^T U)^-1 U^T, whatever basis Gram and Schmidt would find for it.
            return {"u": u, "ut": 2 * jnp.linalg.solve(gram, u.T).T}
        # Schreiber and Van Loan's compact form: H_1 ... H_r = 1 - U T U^T, with T^-1 the upper triangle of U^T U, its diagonal halved.
        t = jax.scipy.linalg.solve_triangular(jnp.triu(gram, 1) + one / 2, one)
        return {"u": u, "ut": u @ t}


hra = HRA

"""VeRA: one pair of random matrices for all kernels, scaled by trained vectors."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import tree
from jpeft.core.dropout import inverted_dropout
from jpeft.core.layer import Layer, Linear
from jpeft.core.method import FREEZE
from jpeft.core.options import Count, CountOrZero, Positive, Probability
from jpeft.reparameterized import two_view
from jpeft.reparameterized.matrix_form import INPUTS, OUTPUTS, MatrixForm
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves, Matrix, WeightMethod
from jpeft.tree.adapters import ADDED

RANK = "rank"
A, B = "shared_a", "shared_b"  # beside a kernel: its parts of the shared matrices


class VeRA(WeightMethod):
    r"""VeRA: ``W' = W + A diag(d) B diag(b)`` with random A and B that all kernels share and nobody trains; d and b are trained.

    A has a row for each input of the widest kernel and B a column for each output; a kernel takes the first of them. d begins as
    `d_initial` and b as zeros, so the adapted model begins as the base.

    A and B stand once in the adapter, under ``"+"`` at its root: ``a`` [most inputs, r] is HF PEFT's ``base_model.vera_A.T`` and ``b``
    [r, most outputs] is ``base_model.vera_B.T``. Beside a kernel ``d`` [r] is ``vera_lambda_d`` and ``b`` [outputs] is ``vera_lambda_b``.

    Args:
      rank: r.
      d_initial: What d begins as.
      seed: Of A and B, which do not depend on the key of the other methods: equal seeds and widths give equal matrices.
      dropout: Rate on the input of the update alone; active when the model is given a ``dropout`` rng.
      target: Which kernels: a regex for whole paths, or a list of names; by default every kernel but the head's.
      axes: Geometry of kernels with more than two axes, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A mergeable `Method`.

    Raises:
      ValueError: for a rank below 1; from `init`, for a target that matches nothing or a kernel whose geometry is not known.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method=jpeft.vera(rank=64)).adapter)
    {'+': {'a': (32, 64), 'b': (64, 16)}, 'query': {'kernel': {'b': (16,), 'd': (64,)}}}

    Reference: Kopiczko, Blankevoort and Asano, VeRA: Vector-based Random Matrix Adaptation, 2023, https://arxiv.org/abs/2310.11454.

    A and B are saved with the adapter. They are drawn by JAX's generator, so a seed (HF PEFT's ``projection_prng_key``) gives other
    matrices than torch's.
    """

    rank: Count = 256
    d_initial: Positive = 0.1
    seed: CountOrZero = 0
    dropout: Probability = 0.0

    name = "vera"
    summary = "vectors that scale random matrices, which all kernels share"
    learning_rate = 1e-2
    reduce_grads_locally = True
    adds_to_kernel = True
    leaf_axes = {"d": (RANK,), "b": (OUTPUTS,), A: (INPUTS, RANK), B: (RANK, OUTPUTS)}

    def init(self, key: Key, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """The vectors of each kernel, the shared matrices, and the task head."""
        ins, outs = (max(sizes) for sizes in zip(*(form.sizes for form in self.forms(params).values()), strict=True))
        key_a, key_b = jax.random.split(jax.random.key(self.seed))
        uniform = lambda key, shape, fan_in: math.sqrt(6 / fan_in) * jax.random.uniform(key, shape, minval=-1.0)
        shared = {"a": uniform(key_a, (ins, self.rank), ins), "b": uniform(key_b, (self.rank, outs), self.rank)}
        return {ADDED: shared, **super().init(key, params, stats=stats)}

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """``d`` as `d_initial` says, ``b`` zero."""
        return {"d": jnp.full(self.rank, self.d_initial, jnp.float32), "b": jnp.zeros(kernel.shape[1])}

    def labels(self, adapter: tree.Adapter) -> Any:
        """The shared matrices are not trained."""
        return {**super().labels(adapter), ADDED: jax.tree.map(lambda _: FREEZE, adapter[ADDED])}

    def bind(self, params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        """As all methods, with its parts of the shared matrices beside each kernel."""
        return super().bind(params, self._spread(params, adapter), rng=rng)

    def merge(self, params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        """As all weight methods, with the shared matrices."""
        return super().merge(params, self._spread(params, adapter))

    def _spread(self, params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        """The adapter with the parts of A and B that each kernel takes beside it, in place of those at the root."""
        out, shared = {name: part for name, part in adapter.items() if name != ADDED}, adapter[ADDED]
        leaves, forms = tree.flatten(out), self.forms(params)
        for path, form in forms.items():
            ins, outs = form.sizes
            for name, part in ((A, shared["a"][:ins]), (B, shared["b"][:, :outs])):
                # Each layer of a stack gets the same matrices: `nn.scan` slices them like the kernel.
                everywhere = jnp.broadcast_to(part.reshape((1,) * len(form.stack) + part.shape), (*form.stack, *part.shape))
                leaves[f"{path}/{name}"] = form.leaf_from_matrix(everywhere, self.leaf_axes[name])
        return tree.unflatten(leaves)

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """``W + A diag(d) B diag(b)``."""
        return kernel + jax.lax.stop_gradient(leaves[A]) @ _second(leaves)

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """The views of LoRA with a frozen ``a``, whose gradient nobody asks for."""
        form = MatrixForm(layer.params[linear.name].shape, linear.axes)
        second = form.each(_second)(self.to_matrices(form, leaves))
        a, b, x = jax.lax.stop_gradient(leaves[A]), form.leaf_from_matrix(second, self.leaf_axes[B]), inputs[0]
        if self.dropout and rng is not None and jnp.issubdtype(x.dtype, jnp.floating):
            return two_view.factored(layer, linear, 1.0, inputs, inverted_dropout(rng, x, self.dropout), a, b)
        return two_view.low_rank(layer, linear, 1.0, inputs, a, b)


def _second(leaves: Leaves) -> jax.Array:
    """``diag(d) B diag(b)``."""
    return leaves["d"][:, None] * jax.lax.stop_gradient(leaves[B]) * leaves["b"][None, :]


vera = VeRA

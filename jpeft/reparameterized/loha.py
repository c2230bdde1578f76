"""LoHa: the elementwise product of two low-rank updates."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.initializers import kaiming_uniform
from jpeft.core.layer import Layer, Linear
from jpeft.core.options import Count, PerPath, Positive, Probability
from jpeft.reparameterized.added import Thinning, Update, added, thinned
from jpeft.reparameterized.matrix_form import INPUTS, OUTPUTS, MatrixForm
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves, Matrix, WeightMethod
from jpeft.tree.kernels import window_of
from jpeft.tree.select import first_match

RANK, RANK_IN, CHANNELS, WINDOW = "rank", "rank_in", "channels", "window"


class LoHa(WeightMethod):
    r"""LoHa: ``W' = W + s (w1_b w1_a) * (w2_b w2_a)``, the elementwise product of two updates of rank r, ``s = alpha / r``.

    The product has a rank of up to r², at the cost of two LoRAs of rank r. ``w2_b`` is zero at the start, so the adapted model begins as
    the base. With ``effective_conv`` the input factor of a convolution is itself a product, of a core for the window and a matrix for the
    channels: ``w_b[window, channel, r] = sum_q t[r, q, window] c[channel, q]``.

    The leaves are HF PEFT's, transposed: ``w1_a`` [r, out] is ``hada_w1_a.T``, ``w1_b`` [in, r] is ``hada_w1_b.T``, and so for ``w2``. Of a
    convolution the inputs of ``hada_w1_b`` lie in the order (channel, window), here (window, channel). With ``effective_conv``, ``w1_a`` is
    ``hada_w1_a`` as it is, ``c1`` [channels, r] is ``hada_w1_b.T``, and ``t1`` [r, r, window] is ``hada_t1`` with its window flattened.

    Args:
      rank: r; or rules ``{regex or name: r}``, first match wins. Each rule must match.
      alpha: Scale before the division by r; or rules.
      effective_conv: Factorise the window of convolutions, as in FedPara's proposition 3. HF PEFT calls it ``use_effective_conv2d``.
      rank_dropout: Probability that a step leaves out an output of the update, where the update is a product of its own; active when the
        model is given a ``dropout`` rng. The others are divided by their share.
      module_dropout: Probability that a step leaves out the whole update of a layer, likewise.
      target: Which kernels: a regex for whole paths, or a list of names; by default every kernel but the head's.
      axes: Geometry of kernels with more than two axes, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A mergeable `Method`.

    Raises:
      ValueError: for a rank below 1; from `init`, for a target that matches nothing or a kernel whose geometry is not known.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method=jpeft.loha(rank=4)).adapter)["query"]["kernel"]
    {'w1_a': (4, 16), 'w1_b': (32, 4), 'w2_a': (4, 16), 'w2_b': (32, 4)}

    Reference: Hyeon-Woo et al., FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning, 2021,
    https://arxiv.org/abs/2108.06098; Yeh et al., LyCORIS, 2023, https://arxiv.org/abs/2309.14859.

    Begins as HF PEFT does, with He's uniform numbers, where LyCORIS draws normal ones.
    """

    rank: PerPath[Count] = 8
    alpha: PerPath[Positive] = 8.0
    effective_conv: bool = False
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0

    name = "loha"
    summary = "elementwise products of two low-rank updates"
    learning_rate = 3e-3
    adds_to_kernel = True
    leaf_axes = (
        {f"w{i}_a": (RANK, OUTPUTS) for i in (1, 2)}
        | {f"w{i}_b": (INPUTS, RANK) for i in (1, 2)}
        | {f"t{i}": (RANK, RANK_IN, WINDOW) for i in (1, 2)}
        | {f"c{i}": (CHANNELS, RANK_IN) for i in (1, 2)}
    )

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """All random but ``w2_b``."""
        return self._begin(key, kernel.shape, 1, path)

    def init_leaves(self, key: Key, kernel: Any, form: MatrixForm, path: str) -> Leaves:
        """As `init_kernel`, with a core for the window of a convolution; only the shape of the kernel is needed."""
        window = window_of(path, form.shape, form.axes) if self.effective_conv else 1
        leaves = form.each(lambda key: self._begin(key, form.sizes, window, path))(form.keys(key))
        return {name: form.leaf_from_matrix(leaf, self.leaf_axes[name]) for name, leaf in leaves.items()}

    def _begin(self, key: Key, shape: tuple[int, ...], window: int, path: str) -> Leaves:
        (ins, outs), r = shape, first_match(path, self.rank, "rank")
        keys = iter(jax.random.split(key, 6))
        out: Leaves = {}
        for i in (1, 2):
            out[f"w{i}_a"] = kaiming_uniform(next(keys), (r, outs), fan_in=r)
            if window > 1:
                # torch's rule takes all axes but the first for inputs.
                out[f"t{i}"] = kaiming_uniform(next(keys), (r, r, window), fan_in=r * window)
            name, size = (f"c{i}", ins // window) if window > 1 else (f"w{i}_b", ins)
            out[name] = kaiming_uniform(next(keys), (size, r), fan_in=size) if i == 1 else jnp.zeros((size, r))
        return out

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """``W + s (w1_b w1_a) * (w2_b w2_a)``."""
        return kernel + self._delta(leaves, path=path)

    def _delta(self, leaves: Mapping[str, Any], *, path: str) -> Matrix:
        return self._scale(path) * (_input_factor(leaves, 1) @ leaves["w1_a"]) * (_input_factor(leaves, 2) @ leaves["w2_a"])

    def _as_low_rank(self, leaves: Mapping[str, Any], *, path: str) -> tuple[jax.Array, jax.Array]:
        """The update as ``a b`` of rank r²: row by row the products of all pairs of columns."""
        one, two = _input_factor(leaves, 1), _input_factor(leaves, 2)
        a = (one[:, :, None] * two[:, None, :]).reshape(len(one), -1)
        b = (leaves["w1_a"][:, None, :] * leaves["w2_a"][None, :, :]).reshape(a.shape[1], -1)
        return a, self._scale(path) * b

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """As a product of rank r² where that is cheaper than a dense one, with the two views of `added`."""
        form = MatrixForm(layer.params[linear.name].shape, linear.axes)
        (ins, outs), r = form.sizes, first_match(path, self.rank, "rank")
        cheap = r * r * (ins + outs) < ins * outs
        if not cheap and linear.apply_vectors is None:
            return super().call_linear(layer, linear, inputs, leaves, path, rng)
        outputs = tuple(form.shape[i] for i in form.axes.outputs)
        delta = lambda leaves: form.each(functools.partial(self._delta, path=path))(self.to_matrices(form, leaves))

        def branch(x: jax.Array, leaves: Any) -> jax.Array:
            if not cheap:
                assert linear.apply_vectors is not None
                dense = delta(leaves).astype(layer.dtype)
                return linear.apply_vectors(x, lambda v: (v.astype(layer.dtype) @ dense).reshape(*v.shape[:-1], *outputs))
            a, b = form.each(functools.partial(self._as_low_rank, path=path))(self.to_matrices(form, leaves))
            a, b = form.leaf_from_matrix(a, (INPUTS, RANK)), form.leaf_from_matrix(b, (RANK, OUTPUTS))
            return linear.apply_low_rank(x, a.astype(layer.dtype), b.astype(layer.dtype))

        per_row = 2 * min(r * r * (ins + outs), ins * outs)
        update = Update(lambda leaves: form.from_matrix(delta(leaves)), branch, per_row, 4 * r * ins * outs)
        if rng is not None and (self.rank_dropout or self.module_dropout):
            return thinned(layer, linear, inputs, leaves, update, rng, Thinning(self.rank_dropout, self.module_dropout))
        return added(layer, linear, inputs, leaves, update)

    def _scale(self, path: str) -> float:
        return first_match(path, self.alpha, "alpha") / first_match(path, self.rank, "rank")


def _input_factor(leaves: Mapping[str, Any], i: int) -> jax.Array:
    """``w_b`` [in, r], made from core and channels where it is factorised itself."""
    if f"w{i}_b" in leaves:
        return leaves[f"w{i}_b"]
    factor = jnp.einsum("pqw,cq->wcp", leaves[f"t{i}"], leaves[f"c{i}"])
    return factor.reshape(-1, factor.shape[-1])


loha = LoHa

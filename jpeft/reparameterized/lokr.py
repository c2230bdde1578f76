"""LoKr: an update that is a Kronecker product of two small matrices."""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from jpeft.core.initializers import kaiming_uniform
from jpeft.core.layer import Layer, Linear
from jpeft.core.limits import WIDEST, Range
from jpeft.core.options import Count, PerPath, Positive, Probability
from jpeft.reparameterized.added import Thinning, Update, added, thinned
from jpeft.reparameterized.matrix_form import MatrixForm
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves, Matrix, WeightMethod
from jpeft.tree.kernels import window_of
from jpeft.tree.select import first_match

# The axes of the factors: inputs are cut into `m` parts of `n`, outputs into `l` parts of `k`.
L, K, M, N, RANK, RANK_IN, WINDOW = "l", "k", "m", "n", "rank", "rank_in", "window"


class Split(NamedTuple):
    """How a kernel is cut: ``out = l k`` and ``channels = m n``, with a window of a convolution's size, 1 for other kernels."""

    outer_out: int
    inner_out: int
    outer_in: int
    inner_in: int
    window: int


class LoKr(WeightMethod):
    r"""LoKr: ``W' = W + s (w1 ⊗ w2)^T``, a Kronecker product of a small matrix [l, m] and a larger one [k, n], ``s = alpha / r``.

    There are ``l k`` outputs and ``m n`` inputs; l, k and m, n are near the square roots, or as `decompose_factor` says. ``w2`` is
    ``w2_a w2_b`` of rank r where ``r < max(k, n) / 2``, and so is ``w1`` with `decompose_both` where ``r < max(l, m) / 2``; s stays
    ``alpha / r`` where nothing is of low rank. ``w1`` (or ``w1_a``) is zero at the start, so the adapted model begins as the base.

    The leaves have HF PEFT's names and shapes: ``w1`` [l, m] is ``lokr_w1``, ``w1_a`` [l, r], ``w1_b`` [r, m], ``w2`` [k, n], ``w2_a``
    [k, r], ``w2_b`` [r, n]. Of a convolution, with the window's axes flattened, ``w2_conv`` [k, n, window] is ``lokr_w2`` and
    ``w2_b_conv`` [r, n, window] is ``lokr_w2_b``; with `effective_conv`, ``w2_a`` and ``w2_b`` are ``lokr_w2_a.T`` and ``lokr_w2_b``,
    and ``t2`` [r, r, window] is ``lokr_t2``.

    Args:
      rank: r; or rules ``{regex or name: r}``, first match wins. Each rule must match.
      alpha: Scale before the division by r; or rules.
      decompose_both: Whether ``w1`` may be of low rank, too.
      decompose_factor: The number of parts, m and l, where it divides the size, else the nearest below that does; -1 for the square root.
      effective_conv: Factorise the window of convolutions. HF PEFT calls it ``use_effective_conv2d``.
      rank_dropout: Probability that a step leaves out an output of the update, where the update is a product of its own; active when the
        model is given a ``dropout`` rng.
      rank_dropout_scale: Whether the outputs that `rank_dropout` keeps are divided by their share.
      module_dropout: Probability that a step leaves out the whole update of a layer, likewise.
      target: Which kernels: a regex for whole paths, or a list of names; by default every kernel but the head's.
      axes: Geometry of kernels with more than two axes, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A mergeable `Method`.

    Raises:
      ValueError: for a rank below 1 or a factor that is neither -1 nor above 0; from `init`, for a target that matches nothing or a kernel
        whose geometry is not known.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((32, 128)), "bias": jnp.zeros(128)}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method=jpeft.lokr(rank=4)).adapter)["query"]["kernel"]
    {'w1': (8, 4), 'w2_a': (16, 4), 'w2_b': (4, 8)}

    Reference: Yeh et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, 2023,
    https://arxiv.org/abs/2309.14859.

    Begins as HF PEFT does by default; LyCORIS makes ``w2_b`` zero and not ``w1``. ``x (w1 ⊗ w2)^T`` is computed as two small products.
    """

    rank: PerPath[Count] = 8
    alpha: PerPath[Positive] = 8.0
    decompose_both: bool = False
    decompose_factor: Annotated[int, Range(-1, WIDEST)] = -1
    effective_conv: bool = False
    rank_dropout: Probability = 0.0
    rank_dropout_scale: bool = False
    module_dropout: Probability = 0.0

    name = "lokr"
    summary = "Kronecker products of two small matrices, one of them of low rank"
    learning_rate = 3e-3
    reduce_grads_locally = True
    adds_to_kernel = True
    leaf_axes = {
        "w1": (L, M), "w1_a": (L, RANK), "w1_b": (RANK, M), "w2": (K, N), "w2_a": (K, RANK), "w2_b": (RANK, N),
        "w2_conv": (K, N, WINDOW), "w2_b_conv": (RANK, N, WINDOW), "t2": (RANK, RANK_IN, WINDOW),
    }  # fmt: skip

    def check(self) -> None:
        """Refuse a number of parts that is none.

        Raises:
          ValueError: with what is allowed.
        """
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise ValueError(f"lokr: decompose_factor={self.decompose_factor} must be -1, for the square root, or at least 1.")

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """``w1`` zero, all else random."""
        return self._begin(key, self._split(kernel.shape, 1), path)

    def init_leaves(self, key: Key, kernel: Any, form: MatrixForm, path: str) -> Leaves:
        """As `init_kernel`, with the window of a convolution in ``w2``; only the shape of the kernel is needed."""
        split = self._split(form.sizes, window_of(path, form.shape, form.axes))
        leaves = form.each(lambda key: self._begin(key, split, path))(form.keys(key))
        return {name: form.leaf_from_matrix(leaf, self.leaf_axes[name]) for name, leaf in leaves.items()}

    def _split(self, shape: tuple[int, ...], window: int) -> Split:
        ins, outs = shape
        outer_in, inner_in = factorization(ins // window, self.decompose_factor)
        return Split(*factorization(outs, self.decompose_factor), outer_in, inner_in, window)

    def _begin(self, key: Key, split: Split, path: str) -> Leaves:
        r, (l, k, m, n, window) = first_match(path, self.rank, "rank"), split
        key1, key2, key3 = jax.random.split(key, 3)
        if self.decompose_both and r < max(l, m) / 2:
            out: Leaves = {"w1_a": jnp.zeros((l, r)), "w1_b": kaiming_uniform(key1, (r, m), fan_in=m)}
        else:
            out = {"w1": jnp.zeros((l, m))}
        if r >= max(k, n) / 2:
            name, shape = ("w2", (k, n)) if window == 1 else ("w2_conv", (k, n, window))
            return out | {name: kaiming_uniform(key2, shape, fan_in=n * window)}
        out["w2_a"] = kaiming_uniform(key2, (k, r), fan_in=r)
        if window == 1 or self.effective_conv:
            out["w2_b"] = kaiming_uniform(key3, (r, n), fan_in=n)
        else:
            out["w2_b_conv"] = kaiming_uniform(key3, (r, n, window), fan_in=n * window)
        if window > 1 and self.effective_conv:
            out["t2"] = kaiming_uniform(key1, (r, r, window), fan_in=r * window)
        return out

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """``W + s (w1 ⊗ w2)^T``."""
        return kernel + self._delta(leaves, path=path)

    def _delta(self, leaves: Mapping[str, Any], *, path: str) -> Matrix:
        w1 = leaves["w1"] if "w1" in leaves else leaves["w1_a"] @ leaves["w1_b"]
        w2 = _inner(leaves)  # [k, n, window]
        (l, m), (k, n, window) = w1.shape, w2.shape
        # A convolution's inputs lie in the order (window, channel).
        return self._scale(path) * jnp.einsum("lm,knw->wmnlk", w1, w2).reshape(window * m * n, l * k)

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """By two small products, with the two views of `added`."""
        if linear.apply_vectors is None:
            return super().call_linear(layer, linear, inputs, leaves, path, rng)
        apply, form = linear.apply_vectors, MatrixForm(layer.params[linear.name].shape, linear.axes)
        outputs = tuple(form.shape[i] for i in form.axes.outputs)

        def delta(leaves: Any) -> jax.Array:
            return form.from_matrix(form.each(functools.partial(self._delta, path=path))(self.to_matrices(form, leaves)))

        def branch(x: jax.Array, leaves: Any) -> jax.Array:
            w = {name: leaf.astype(layer.dtype) for name, leaf in self.to_matrices(form, leaves).items()}
            through = lambda v: form.each(_product)(v.astype(layer.dtype), w).reshape(*v.shape[:-1], *outputs)
            return jnp.asarray(self._scale(path), layer.dtype) * apply(x, through)

        (ins, outs), (l, k, m, n, _) = form.sizes, self._split(form.sizes, 1)
        per_row = 2 * min(ins * k + m * k * l, ins * l + l * n * k)
        update = Update(delta, branch, per_row, ins * outs)
        if rng is not None and (self.rank_dropout or self.module_dropout):
            thinning = Thinning(self.rank_dropout, self.module_dropout, self.rank_dropout_scale)
            return thinned(layer, linear, inputs, leaves, update, rng, thinning)
        return added(layer, linear, inputs, leaves, update)

    def _scale(self, path: str) -> float:
        return first_match(path, self.alpha, "alpha") / first_match(path, self.rank, "rank")


def _inner(leaves: Mapping[str, Any]) -> jax.Array:
    """``w2`` as [k, n, window]."""
    if "w2_conv" in leaves:
        return leaves["w2_conv"]
    if "w2" in leaves:
        return leaves["w2"][:, :, None]
    if "t2" in leaves:
        return jnp.einsum("pqw,kp,qn->knw", leaves["t2"], leaves["w2_a"], leaves["w2_b"])
    if "w2_b_conv" in leaves:
        return jnp.einsum("kp,pnw->knw", leaves["w2_a"], leaves["w2_b_conv"])
    return (leaves["w2_a"] @ leaves["w2_b"])[:, :, None]


def _product(v: jax.Array, leaves: Mapping[str, Any]) -> jax.Array:
    """``v (w1 ⊗ w2)^T`` for rows v, with the small products in the cheapest order."""
    letters = {"w1": "lm", "w1_a": "lp", "w1_b": "pm", "w2": "kn", "w2_a": "kq", "w2_b": "qn"}
    sizes = {letter: size for name, leaf in leaves.items() for letter, size in zip(letters[name], leaf.shape, strict=True)}
    v = v.reshape(-1, sizes["m"], sizes["n"])
    equation = ",".join(["bmn", *(letters[name] for name in leaves)])
    return jnp.einsum(f"{equation}->blk", v, *leaves.values(), optimize="optimal").reshape(len(v), -1)


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """A size as a product of two, the first not above the second and near `factor`, or near the square root for -1, as in LyCORIS.

    >>> factorization(256), factorization(128), factorization(127), factorization(128, 4), factorization(128, 64)
    ((16, 16), (8, 16), (1, 127), (4, 32), (64, 2))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    # Of the divisors up to the limit and the square root, the largest.
    first = max(d for d in range(1, int(size**0.5) + 1) if size % d == 0 and d <= limit)
    return first, size // first


lokr = LoKr

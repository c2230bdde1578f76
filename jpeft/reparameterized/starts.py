"""Where the factors of LoRA begin, if not at random: in the kernel's own directions, or in those of its inputs.

Some of these starts have a product ``a b`` that is not zero. HF PEFT takes it off the base. Here the base stays as it is, and the adapter
keeps the factors of the start, ``a0`` and ``b0``, which are never trained: ``W' = W + s (a b - a0 b0)``.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.core.statistics import InputMoments, Moments
from jpeft.reparameterized import low_rank
from jpeft.reparameterized.matrix_form import MatrixForm
from jpeft.tree.paths import Path, first_few

Kind = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "corda", "corda-kpm", "eva"]
NEED_INPUTS = ("corda", "corda-kpm", "eva")  # kinds that look at the inputs of the kernel
# Kinds whose two factors are both far from zero. A step of Adam, which is as large for every number, then moves their product further.
FAR_FROM_ZERO = ("orthogonal", "pissa", "olora", "corda", "corda-kpm")
# The share of the mean variance that is added to each input's, so that the covariance has an inverse; doubled until it has a good one.
DAMPING, INVERSE_ERROR = 0.01, 0.05
LEAF_AXES = low_rank.LEAF_AXES | {"a0": low_rank.LEAF_AXES["a"], "b0": low_rank.LEAF_AXES["b"]}

Kernel = Float[Array, "inputs outputs"]
Leaves = dict[str, Float[Array, "..."]]


def of_kernel(kind: Kind, key: jax.Array, kernel: Kernel, path: Path, rank: int, scale: float) -> Leaves:
    """The factors of one kernel, in a start that asks nothing of its inputs.

    Raises:
      ValueError: for a rank that the start cannot have.
    """
    if kind == "orthogonal":
        return orthogonal(key, kernel.shape, path, rank)
    _check_rank(kind, path, kernel.shape, rank)
    return with_start(*(pissa(kernel, rank, scale) if kind == "pissa" else olora(kernel, rank)))


def with_start(a: Float[Array, "*stack inputs rank"], b: Float[Array, "*stack rank outputs"]) -> Leaves:
    """Factors to train, and the same ones to take off."""
    # Copies: a step may be given the adapter's arrays to overwrite, each once.
    return {"a": a, "b": b, "a0": jnp.copy(a), "b0": jnp.copy(b)}


def pissa(kernel: Kernel, rank: int, scale: float) -> tuple[Array, Array]:
    """The kernel's largest singular values with their directions, ``a b = U S V / s`` (Meng et al., https://arxiv.org/abs/2404.02948)."""
    u, s, v = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * root[None], root[:, None] * v[:rank]


def olora(kernel: Kernel, rank: int) -> tuple[Array, Array]:
    """The first rows and columns of the QR decomposition ``Wᵀ = Q R`` (Büyükakyüz, https://arxiv.org/abs/2406.01775)."""
    q, r = jnp.linalg.qr(kernel.T)
    return r[:rank].T, q[:, :rank].T


def orthogonal(key: jax.Array, shape: tuple[int, ...], path: Path, rank: int) -> Leaves:
    """Random factors, both different from zero, whose product is zero: they use two halves of one rotation of the ranks.

    Raises:
      ValueError: for an odd rank.
    """
    if rank % 2:
        raise ValueError(f"lora: init='orthogonal' halves the ranks, and '{path}' has rank={rank}: give an even one.")
    key_q, key_a, key_b = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(key_q, (rank, rank)))
    a = jax.random.normal(key_a, (shape[0], rank // 2)) @ q[0::2] / 10
    b = q[1::2].T @ jax.random.normal(key_b, (rank // 2, shape[1])) / 10
    return {"a": a, "b": b}


# --- by the inputs ----------------------------------------------------------------------------------------------------------------------


def by_inputs(
    kind: Kind,
    key: jax.Array,
    base: Mapping[Path, Any],
    forms: Mapping[Path, MatrixForm],
    moments: Mapping[Path, Moments],
    ranks: Mapping[Path, int],
    scales: Mapping[Path, float],
    rho: float,
) -> dict[Path, Any]:
    """The leaves of a start that looks at the inputs of the kernels, by path. Embeddings, whose inputs are ids, begin as with "kaiming".

    Raises:
      ValueError: if the statistics are not those of these kernels.
    """
    lookups = {path for path in forms if path.rpartition("/")[2] == "embedding"}
    for path in forms.keys() - lookups:
        if path not in moments or np.shape(moments[path].total) != (*forms[path].stack, forms[path].sizes[0]):
            raise ValueError(
                f"lora: the statistics of init={kind!r} hold no inputs of '{path}': make them on the same base, with the same method, by "
                f"{InputMoments.made_by}."
            )
    if any(isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)) for leaf in jax.tree.leaves(dict(moments))):
        raise ValueError(
            f"lora: init={kind!r} looks at the values of stats, and these are abstract. The parameters may be abstract, but stats must be "
            "arrays: make them outside of jit and eval_shape and close over them."
        )
    unseen = [path for path in forms if path not in lookups and not np.all(np.asarray(moments[path].count))]
    if unseen:
        warnings.warn(
            f"lora: init={kind!r} saw no inputs of {first_few(unseen)}, so their factors begin as with init='kaiming'.", stacklevel=4
        )
    known = [path for path in forms if path not in lookups and path not in unseen]
    found = {path: principal(moments[path]) for path in known} if kind == "eva" else {}
    chosen = eva_ranks({path: shares for path, (_, shares) in found.items()}, {path: ranks[path] for path in found}, rho)
    out: dict[Path, Any] = {}
    for path, form in forms.items():
        if path not in known:
            leaves = low_rank.factors(tree.key_for(key, path), path, form.shape, form.axes, ranks[path], "kaiming")
            out |= {f"{path}/{name}": leaf for name, leaf in leaves.items()}
            continue
        if kind == "eva":
            made = eva(found[path][0], chosen[path], form.sizes[1])
        else:
            wide = jnp.asarray(base[path]).astype(jnp.promote_types(base[path].dtype, jnp.float32))
            made = corda(kind, form.to_matrix(wide), moments[path], path, ranks[path], scales[path])
        out |= {f"{path}/{name}": form.leaf_from_matrix(leaf, LEAF_AXES[name]) for name, leaf in made.items()}
    return out


def corda(
    kind: Kind,
    kernel: Float[Array, "*stack inputs outputs"],
    inputs: Moments,
    path: Path,
    rank: int,
    scale: float,
) -> Leaves:
    """The singular directions of ``C W``, with C taken off again; C are the second moments of the inputs.

    "corda" takes those of the largest values, in which the layer answers to these inputs most; "corda-kpm" those of the smallest, so that
    the answers to these inputs are kept (Yang et al., https://arxiv.org/abs/2406.05223).
    """
    _check_rank(kind, path, kernel.shape[-2:], rank)
    covariance, inverse = (jnp.asarray(each, kernel.dtype) for each in damped(np.asarray(inputs.gram)))
    u, s, v = jnp.linalg.svd(covariance @ kernel, full_matrices=False)
    chosen = slice(0, rank) if kind == "corda" else slice(s.shape[-1] - rank, None)
    root = jnp.sqrt(s[..., chosen] / scale)
    return with_start((inverse @ u[..., chosen]) * root[..., None, :], root[..., :, None] * v[..., chosen, :])


def damped(gram: Float[np.ndarray, "*stack inputs inputs"]) -> tuple[np.ndarray, np.ndarray]:
    """Second moments with a mean of one on the diagonal and something added there, and their inverse."""
    size, flat = gram.shape[-1], gram.reshape(-1, *gram.shape[-2:]).astype(np.float64)
    found = [_damped(each, np.eye(size)) for each in flat]
    return tuple(np.stack(each).reshape(gram.shape) for each in zip(*found, strict=True))  # pyright: ignore[reportReturnType]


def _damped(gram: np.ndarray, eye: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, share = np.diag(gram).mean(), DAMPING
    gram = gram / mean if mean > 0 else eye  # a layer that never saw anything but zeros
    while True:
        sum_ = gram + share * eye
        inverse = np.linalg.inv(sum_)
        if np.linalg.norm(sum_ @ inverse - eye) < INVERSE_ERROR:
            return sum_, inverse
        share *= 2


def principal(inputs: Moments) -> tuple[Float[np.ndarray, "*stack inputs inputs"], Float[np.ndarray, "*stack inputs"]]:
    """The directions in which the inputs of a kernel vary, as columns, and the share of the variance in each; the largest first."""
    gram, total, count = (np.asarray(each, np.float64) for each in (inputs.gram, inputs.total, inputs.count))
    count = np.maximum(count, 1)[..., None]
    mean = total / count
    values, vectors = np.linalg.eigh(gram / count[..., None] - mean[..., :, None] * mean[..., None, :])
    values = np.maximum(values[..., ::-1], 0)
    return vectors[..., ::-1], values / np.maximum(values.sum(-1, keepdims=True), np.finfo(np.float64).tiny)


def eva_ranks(shares: Mapping[Path, np.ndarray], ranks: Mapping[Path, int], rho: float) -> dict[Path, np.ndarray]:
    """How many ranks each kernel gets, [*stack]: they go to the largest shares of variance, at most rho times its own number to a kernel.

    >>> eva_ranks({"x": np.array([0.9, 0.1]), "y": np.array([0.6, 0.4])}, {"x": 1, "y": 1}, 2.0)
    {'x': array(1), 'y': array(1)}
    """
    most = {path: min(round(rank * rho), shares[path].shape[-1]) for path, rank in ranks.items()}
    offered = {path: shares[path][..., : most[path]] for path in ranks}
    budget = sum(ranks[path] * offered[path][..., 0].size for path in ranks)
    if not ranks:
        return {}
    # By share and, among equal shares, in the order of the kernels.
    flat = np.concatenate([each.ravel() for each in offered.values()])
    taken = np.zeros(flat.size, bool)
    taken[np.argsort(-flat, kind="stable")[:budget]] = True
    ends = np.cumsum([each.size for each in offered.values()])[:-1]
    return {path: np.asarray(part.reshape(offered[path].shape).sum(-1)) for path, part in zip(ranks, np.split(taken, ends), strict=True)}


def eva(directions: np.ndarray, ranks: np.ndarray, outputs: int) -> Leaves:
    """The first directions of the inputs as ``a``, and ``b`` zero (Paischer et al., https://arxiv.org/abs/2410.07170).

    Args:
      directions: Those of one kernel or of a stack.
      ranks: How many of them, [*stack]. In a stack all have as many columns as the most; those beyond a kernel's own are zero, as are the
        rows of ``b`` beside them, so that nothing ever moves them.
      outputs: Of the kernel.

    Returns:
      The factors; none for kernels without any rank.
    """
    most = int(ranks.max())
    if not most:
        return {}
    a = np.where(np.arange(most) < ranks[..., None, None], directions[..., :most], 0)
    return {"a": jnp.asarray(a, jnp.float32), "b": jnp.zeros((*ranks.shape, most, outputs))}


def _check_rank(kind: Kind, path: Path, shape: tuple[int, ...], rank: int) -> None:
    if rank > min(shape):
        raise ValueError(
            f"lora: init={kind!r} takes directions of the kernel, and '{path}' with {shape[0]} inputs and {shape[1]} outputs has "
            f"{min(shape)}, fewer than rank={rank}."
        )

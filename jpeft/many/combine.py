"""Several adapters as one."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import tree
from jpeft.core.options import shown
from jpeft.core.peft import Peft, check_peft
from jpeft.layouts import layer_axes
from jpeft.many.as_lora import as_ia3, as_lora
from jpeft.many.mixed import numbers_of, whole_form
from jpeft.many.numbers import check_numbers
from jpeft.many.parts import Factors, Parts, concatenated, parts_of
from jpeft.many.same_base import check_same_base
from jpeft.many.task_vectors import WAYS, Options, Weights
from jpeft.many.to_lora import check_budget, reduced
from jpeft.reparameterized.lora import LoRA
from jpeft.tree.paths import Path, first_few

METHODS = ("cat", "svd", *WAYS, *(f"{way}_svd" for way in WAYS if way != "linear"))
_EXACT = 1e-6  # the error of a result of no given rank


def combine(
    pefts: Sequence[Peft],
    weights: Weights,
    method: str = "cat",
    *,
    rank: Any = None,
    error: float | int | None = None,
    density: float | int | None = None,
    majority_sign: str = "total",
    key: Any = None,
    factors: bool = False,
) -> Peft:
    r"""Several adapters of LoRA, or of (IA)³, on one base as one adapter.

    With ``d_i`` the whole change that adapter i makes to a kernel, its scale included, and ``w_i`` its weight:

    | method | the new change | rank |
    |---|---|---|
    | ``cat`` | ``sum w_i d_i``, by factors side by side: exact | the sum of the ranks |
    | ``linear`` | the same, exact | what the sum has |
    | ``svd`` | the same, its best approximation | the highest of the ranks |
    | ``magnitude_prune`` | the sum of the `density` largest numbers of each ``d_i`` | what it has |
    | ``ties`` | of those numbers, the mean of the ones whose sign is elected, each times its weight | what it has |
    | ``dare_linear`` | the sum of ``d_i`` with numbers dropped at random, the others divided by `density` | what it has |
    | ``dare_ties`` | TIES with numbers dropped at random in the place of small ones | what it has |
    | ``..._svd`` | any of the last four, its best approximation | the highest of the ranks |

    Trimmed changes are no longer of low rank: "what it has" may be as much as a kernel has inputs. `rank` or `error` bounds it.

    Args:
      pefts: The adapters. Those of other methods are turned into LoRA first: `jpeft.to_lora`.
      weights: A number for each, also negative ones.
      method: As in the table.
      rank: The rank of the result, a number or rules ``{regex or name: r}``, as for `jpeft.to_lora`.
      error: Or the share of the new change, by its Frobenius norm, that may be lost.
      density: The share of the numbers that is kept, in (0, 1], kernel by kernel.
      majority_sign: How TIES elects a sign: "total", of the sum, or "frequency", of the majority.
      key: For DARE; `jax.random.key(0)` if not given.
      factors: Do as HF PEFT does by the same name: combine the a's and the b's by themselves, each times ``sqrt(|w_i| s_i)``. Of
        ``linear`` this leaves terms ``a_i b_j`` of different adapters in the product, which none of them has learnt, and TIES and DARE
        see factors, which another pair with the same product has other numbers for. For results that must be those of HF PEFT.

    Returns:
      A `Peft` of `jpeft.lora` with ``alpha = rank``, or of `jpeft.ia3`. Leaves that the adapters hold whole, such as trained heads, are
      combined as changes of the base's, in the same way.

    Raises:
      ValueError: for other methods, bases or ranks that do not go together, or options that have no effect.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.zeros((8, 4))}}
    >>> one, two = (jpeft.apply(params, method="lora", rank=2, key=jax.random.key(i)) for i in range(2))
    >>> jpeft.combine([one, two], [0.7, 0.3]).adapter["query"]["kernel"]["a"].shape
    (8, 4)

    References: Yadav et al., TIES-Merging, 2023, https://arxiv.org/abs/2306.01708; Yu et al., Language Models are Super Mario (DARE),
    2023, https://arxiv.org/abs/2311.03099.
    """
    pefts = [pefts] if isinstance(pefts, Peft) else list(pefts)
    way = method.removesuffix("_svd") if method != "svd" else "linear"
    weights = checked_weights(weights, len(pefts))
    _check(pefts, method, density, majority_sign, factors, key)
    check_budget(rank, error)
    if rank is not None and error is not None:
        raise ValueError("combine() takes one of rank= and error=, and was given both.")
    found = [parts_of(peft, "combine()") for peft in pefts]
    for i, (peft, parts) in enumerate(zip(pefts, found, strict=True)):
        check_numbers(peft, f"Adapter {i} of combine()")
        check_same_base(pefts[0].params, peft.params, f"Adapter {i} of combine()", skip=parts.replaced)
    options = Options(1.0 if density is None else density, majority_sign, jax.random.key(0) if key is None else key)
    base, axes = pefts[0].params, tuple(dict.fromkeys(rule for parts in found for rule in parts.axes))
    replaced = _replaced(base, found, weights, "linear" if way == "cat" else way, options)
    if not any(parts.scales or parts.updates for parts in found):
        raise ValueError(f"combine() takes adapters of LoRA and (IA)³, and these change no kernel, but {first_few(sorted(replaced))}.")
    if any(parts.scales for parts in found):
        return as_ia3(base, _scales(found, weights, method, factors), replaced, axes)
    changes: dict[Path, Any] = {}
    for path in sorted({path for parts in found for path in parts.updates}):
        own = [i for i, parts in enumerate(found) if path in parts.updates]
        terms, shares = [found[i].updates[path] for i in own], [weights[i] for i in own]
        if factors:
            changes[path] = _by_factors(path, terms, shares, [pefts[i] for i in own], way, _keyed(options, path))
        elif way in ("cat", "linear"):
            changes[path] = concatenated([Factors(w * a, b) for w, (a, b) in zip(shares, terms, strict=True)])
        else:
            deltas = np.stack([np.matmul(*(np.asarray(leaf, np.float32) for leaf in term)) for term in terms])
            changes[path] = _each_matrix(way, deltas, shares, _keyed(options, path))
    if rank is None and error is None:
        if method == "cat" or factors:
            return as_lora(base, changes, replaced, axes)
        rank, error = _usual_budget(found, method)
    return as_lora(base, reduced(changes, rank, error), replaced, axes)


def _usual_budget(found: Sequence[Parts], method: str) -> tuple[int | None, float | None]:
    """The rank, or else the error, of a result where the caller gives none."""
    if not method.endswith("svd"):
        return None, _EXACT
    return max(factors.rank for parts in found for factors in parts.updates.values()), None


def checked_weights(weights: Weights, count: int) -> list[float]:
    """The weights as numbers of Python.

    Raises:
      ValueError: unless there is a finite number for each adapter.
    """
    each = list(weights) if isinstance(weights, Sequence | np.ndarray | jax.Array) else []
    numbers = np.asarray(each, np.float64) if all(isinstance(w, int | float | np.number | jax.Array) for w in each) else np.zeros(0)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError(f"weights={shown(weights)} must be a number for each of the {count} adapters.")
    return numbers.tolist()


def _is_key(key: Any) -> bool:
    """Whether a value is one random key, of the new kind or of the old one."""
    if not isinstance(key, jax.Array):
        return False
    return key.ndim == 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key.dtype == jnp.uint32 and key.ndim == 1


def _check(pefts: Sequence[Peft], method: str, density: Any, majority_sign: str, factors: bool, key: Any) -> None:
    """Refuse options that are none or do not go together."""
    if not pefts:
        raise ValueError("combine() needs at least one adapter, in a list.")
    for peft in pefts:
        check_peft(peft, "combine")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is none of {', '.join(METHODS)}.")
    way = method.removesuffix("_svd")
    thins = way not in ("cat", "linear", "svd")
    if thins and (isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1):
        raise ValueError(f"density={shown(density)}: {method} needs the share of the numbers that it keeps, in (0, 1].")
    if not thins and density is not None:
        raise ValueError(f"density={shown(density)} has no effect on {method}, which keeps all numbers. Leave it out.")
    if key is not None and not _is_key(key):
        raise ValueError(f"key={shown(key)} is no random key, as jax.random.key(0) is one.")
    if majority_sign not in ("total", "frequency"):
        raise ValueError(f"majority_sign={majority_sign!r} is neither 'total' nor 'frequency'.")
    if factors and method not in WAYS:
        raise ValueError(f"factors=True goes with {', '.join(WAYS)}, which HF PEFT does by the factors; {method} is the same for both.")


def _keyed(options: Options, path: Path) -> Options:
    """The options with a random key of one path."""
    assert options.key is not None
    return options._replace(key=tree.key_for(options.key, path))


def _each_matrix(way: str, changes: np.ndarray, weights: Weights, options: Options) -> np.ndarray:
    """A way of combining changes [n, *stack, rows, columns], for each matrix of the stack by itself."""
    n, *stack, rows, columns = changes.shape
    assert options.key is not None
    each = changes.reshape(n, -1, rows, columns)
    keys = [jax.random.fold_in(options.key, i) for i in range(each.shape[1])]
    combined = [WAYS[way](each[:, i], weights, options._replace(key=key)) for i, key in enumerate(keys)]
    return np.stack(combined).reshape(*stack, rows, columns)


def _by_factors(path: Path, terms: Sequence[Factors], weights: Weights, pefts: Sequence[Peft], way: str, options: Options) -> Factors:
    """Factors that are combined by themselves, as HF PEFT does it.

    Raises:
      ValueError: for factors of several ranks, or a method without a scale of its own.
    """
    if len({term.rank for term in terms}) > 1 or not all(isinstance(peft.method, LoRA) for peft in pefts):
        ranks = ", ".join(str(term.rank) for term in terms)
        raise ValueError(f"factors=True needs adapters of LoRA of one rank, and those at '{path}' have the ranks {ranks}.")
    scales = [peft.method.scale(path) for peft in pefts if isinstance(peft.method, LoRA)]
    roots = [math.sqrt(abs(w) * s) for w, s in zip(weights, scales, strict=True)]
    a = np.stack([np.asarray(a, np.float32) / np.float32(s) for (a, _), s in zip(terms, scales, strict=True)])
    b = np.stack([np.asarray(b, np.float32) for _, b in terms])
    signed = [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)]
    both = (_each_matrix(way, side, shares, options) for side, shares in ((a, signed), (b, roots)))
    return Factors(*map(jnp.asarray, both))


def _replaced(base: Any, found: Sequence[Parts], weights: Weights, way: str, options: Options) -> dict[Path, Any]:
    """The leaves that adapters hold whole: the base's with the combined change."""
    leaves, layers, out = tree.flatten(base), layer_axes(base), {}
    for path in sorted({path for parts in found for path in parts.replaced}):
        shape, axis = tuple(leaves[path].shape), layers.get(path)
        form = whole_form(shape, axis)
        own = [(w, parts.replaced[path]) for w, parts in zip(weights, found, strict=True) if path in parts.replaced]
        matrix = lambda leaf, form=form: np.asarray(numbers_of(form, leaf), np.float32)[..., None]
        old = matrix(leaves[path])
        changes = np.stack([matrix(leaf) - old for _, leaf in own])
        new = old + _each_matrix(way, changes, [w for w, _ in own], _keyed(options, path))
        out[path] = form.from_matrix(jnp.asarray(new)).reshape(shape)
    return out


def _scales(found: Sequence[Parts], weights: Weights, method: str, factors: bool) -> dict[Path, dict[str, Any]]:
    """The vectors of (IA)³: ``1 + sum w_i (l_i - 1)``, the sum of the changes, or ``sum w_i l_i``, which is HF PEFT's.

    Raises:
      ValueError: for any other way, or for adapters of LoRA among them.
    """
    if any(parts.updates for parts in found):
        raise ValueError(
            "combine() takes adapters of LoRA or of (IA)³, and was given both. Turn the latter into LoRA: jpeft.to_lora(peft, ...)."
        )
    if method not in ("cat", "linear"):
        raise ValueError(f"method={method!r}: the vectors of (IA)³ can be combined by 'linear'. For another way turn them into LoRA first.")
    out: dict[Path, dict[str, Any]] = {}
    for path in sorted({path for parts in found for path in parts.scales}):
        own = [(w, parts.scales[path]) for w, parts in zip(weights, found, strict=True) if path in parts.scales]
        names = {name for _, vectors in own for name in vectors}
        if len(names) > 1:
            raise ValueError(
                f"'{path}': one adapter scales its inputs and another its outputs. Turn them into LoRA: jpeft.to_lora(peft, ...)."
            )
        name = names.pop()
        out[path] = {name: sum((w * (vectors[name] - 1) for w, vectors in own), jnp.ones_like(own[0][1][name]))}
        if factors:
            out[path] = {name: sum((w * vectors[name] for w, vectors in own), jnp.zeros_like(own[0][1][name]))}
    return out

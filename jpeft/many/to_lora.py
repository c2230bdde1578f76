"""Any change of weights as LoRA."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft import tree
from jpeft.core.method import Method
from jpeft.core.options import Count, PerPath, fits, shown
from jpeft.core.peft import Peft, check_peft
from jpeft.layouts import layer_axes
from jpeft.many import svd
from jpeft.many.as_lora import as_lora
from jpeft.many.numbers import check_numbers
from jpeft.many.parts import Factors, Parts, parts_of
from jpeft.reparameterized.matrix_form import MatrixForm
from jpeft.tree.head import head_leaves
from jpeft.tree.kernels import AxesRules, axes_of, axes_rules
from jpeft.tree.paths import Params, Path, first_few
from jpeft.tree.select import check_rules, first_match


def to_lora(peft: Peft, *, rank: Any = None, error: float | int | None = None) -> Peft:
    """An adapter of any method that changes weights as one of LoRA, by the singular values of its change of each kernel.

    The task head, biases and norms that the method changed stay whole, as leaves that LoRA's option `head` names. An adapter that has
    factors already, such as one of LoRA, is made smaller from its factors alone.

    Args:
      peft: Of a method that merges.
      rank: The rank of each kernel, a number or rules ``{regex or name: r}``; it is the best approximation of that rank. A kernel takes no
        more than it has inputs or outputs, or than its factors have already.
      error: Or how much of the change may be lost: the rank of each kernel is the lowest at which the rest has at most this share of the
        change's Frobenius norm. A stack of layers takes the rank of the layer that needs most.

    Returns:
      A `Peft` of `jpeft.lora` on the same base, with ``alpha = rank``. Kernels that are as in the base are none of its targets.

    Raises:
      ValueError: for a method that does not merge, with its reason; if no kernel is changed; unless one of `rank` and `error` is given; for
        a kernel whose geometry is not known.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jax.random.normal(jax.random.key(0), (32, 16))}}
    >>> peft = jpeft.apply(params, method="dora", rank=4)
    >>> peft = peft.replace(adapter=jax.tree.map(lambda leaf: leaf + 0.1, peft.adapter))
    >>> lora = jpeft.to_lora(peft, rank=16)
    >>> bool(jnp.allclose(jpeft.merge(lora)["query"]["kernel"], jpeft.merge(peft)["query"]["kernel"], atol=1e-5))
    True

    HF PEFT's `convert_to_lora` bounds the share of the sum of singular values instead of the error.
    """
    check_peft(peft, "to_lora")
    check_budget(rank, error)
    if (rank is None) == (error is None):
        raise ValueError("to_lora() takes one of rank=, such as rank=16, and error=, such as error=0.1.")
    if peft.method.why_no_merge is not None and not peft.method.parts:
        raise ValueError(f"{peft.method.name} cannot become LoRA: {peft.method.why_no_merge}.")
    check_numbers(peft, "to_lora()")
    parts = _low_rank_parts(peft) or _dense_parts(peft)
    if not parts.updates:
        kinds = first_few(sorted(parts.replaced)) or "nothing"
        raise ValueError(f"{peft.method.name} cannot become LoRA: it changes no kernel, but {kinds}.")
    return as_lora(peft.params, reduced(parts.updates, rank, error), parts.replaced, parts.axes)


def check_budget(rank: Any, error: Any) -> None:
    """Check `rank` and `error`, each where it is given.

    Raises:
      ValueError: for anything else than whole numbers above 0 and a number in [0, 1).
    """
    if rank is not None and not fits(rank, PerPath[Count]):
        raise ValueError(f"rank={shown(rank)} must be a whole number of at least 1, or rules {{regex or name: number}}.")
    if error is not None and (isinstance(error, bool) or not isinstance(error, int | float) or not 0 <= error < 1):
        raise ValueError(f"error={shown(error)} must be a share of the change's norm, from 0 to below 1.")


def reduced(updates: Mapping[Path, Factors | np.ndarray], rank: Any, error: float | int | None) -> dict[Path, Factors]:
    """Changes of kernels, as factors or whole, in factors of a rank, or of the lowest rank for an error."""
    check_rules(rank, list(updates), "rank")
    out = {}
    for path, change in updates.items():
        singular = svd.of_factors(change) if isinstance(change, Factors) else svd.of_matrix(change)
        wanted = first_match(path, rank, "rank") if error is None else svd.rank_for(error)(singular[1])
        out[path] = svd.truncated(singular, wanted)
    return out


def _low_rank_parts(peft: Peft) -> Parts | None:
    """The adapter's own factors, if all that it does to kernels has some."""
    try:
        parts = parts_of(peft, "to_lora")
    except ValueError:
        return None
    # What stands in a kernel's place, other than in the head's, is to be factorised.
    heads = _heads(peft)
    own = [path for path in parts.replaced if path not in heads and _is_matrix(peft.params, path, parts.axes)]
    return None if parts.scales or own else parts


def _dense_parts(peft: Peft) -> Parts:
    """The change of each kernel, from the merged weights in float32, and what else has changed, whole."""
    base = tree.flatten(peft.params)
    axes = tuple(dict.fromkeys(rule for method in _methods(peft.method) for rule in axes_rules(getattr(method, "axes", None))))
    changed = [path for path in peft.method.adapted_paths(peft.params, peft.adapter) if path in base]
    wide = {path: base[path].astype(tree.trained_dtype(base[path].dtype)) for path in changed}
    merged = tree.flatten(peft.method.merge(tree.replace(peft.params, wide), peft.adapter))
    heads, updates, replaced = _heads(peft), {}, {}
    for path in sorted(changed):
        if path not in heads and bool(jnp.array_equal(merged[path], wide[path])):
            continue
        form = None if path in heads else _is_matrix(peft.params, path, axes)
        if form is None:
            replaced[path] = merged[path]
        else:
            updates[path] = np.asarray(form.to_matrix(merged[path]), np.float32) - np.asarray(form.to_matrix(wide[path]), np.float32)
    return Parts(updates, {}, replaced, axes)


def _methods(method: Method) -> list[Method]:
    """The parts of a chain, or the method itself."""
    return [part for _, part in method.parts] or [method]


def _heads(peft: Peft) -> set[Path]:
    """The leaves of the task heads that the methods train whole."""
    return {path for method in _methods(peft.method) for path in head_leaves(peft.params, getattr(method, "head", None))}


def _is_matrix(params: Params, path: Path, rules: AxesRules) -> MatrixForm | None:
    """The matrix form of a leaf that is a kernel; None for a bias, a norm, or what else has no inputs and outputs.

    Raises:
      ValueError: for a kernel whose geometry is not known.
    """
    shape, layers = tuple(tree.flatten(params)[path].shape), layer_axes(params)
    name = path.rpartition("/")[2]
    if len(shape) - (layers.get(path) is not None) < 2 or name.endswith("bias"):
        return None
    try:
        return MatrixForm(shape, axes_of(path, shape, rules, layers=layers))
    except ValueError:
        if name in ("kernel", "embedding"):
            raise
        return None

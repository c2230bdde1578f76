"""Sparse differences: a few entries of a weight that are trained, and nothing of the size of the weight.

Beside a base leaf stand ``values`` [k], which are trained, and ``indices`` [digits, k], which are not. The bound leaf is the base with the
values *added* at the indices. Under ``kept`` may stand a second such pair, which is not trained: what was learnt before the entries were
chosen anew. Differences rather than new weights, because they add up with what another method of a chain has changed, are
decayed towards the pretrained weight and not towards zero, and stay float32 beside a bfloat16 base, whose own steps would round them away.

The indices are whole numbers in float32. JAX does not differentiate a tree with integer leaves, and an adapter is exactly what users, the
trainer and `optax` differentiate, add to and map over, so it holds floats only. Whole numbers below 2^24 are exact in float32: an index
into the flattened leaf is one digit to the base 2^24, or two where the leaf is larger. (The bits of an int32 seen as a float would always
need one, but those of small integers are subnormal numbers, which XLA flushes to zero in the first addition.) Their gradient is zero and
their label is "freeze", so an optimizer made by `jpeft.optimizer` keeps neither state nor updates for them.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jpeft import tree
from jpeft.method import FREEZE, TRAIN, InitFn, Method, Stage, not_head, with_head
from jpeft.tree.head import head_leaves

DIGIT = 2**24
VALUES, INDICES, KEPT = "values", "indices", "kept"


# --- choosing ------------------------------------------------------------------------------------------------------------------------


def budget(params: tree.Params, sparsity: float, head: str | None) -> int:
    """How many entries outside the head may change: ``int(total * sparsity) - |head|``; the dense head is part of the budget.

    Raises:
      ValueError: if the head alone takes all of it.
    """
    total, in_head = tree.size(params), tree.size(head_leaves(params, head))
    keep = int(total * sparsity) - in_head
    if keep < 1:
        raise ValueError(
            f"sparsity={sparsity} of {total:,} parameters are {int(total * sparsity):,}, which the head with {in_head:,} uses up. "
            f"Use a sparsity above {in_head / total:.2g}, or leave the head out with head=None."
        )
    return keep


def concrete(leaves: Mapping[str, Any], stats: Any, name: str, how: str) -> dict[str, np.ndarray]:
    """The scores of these leaves, from a tree like the parameters, as NumPy arrays.

    Raises:
      ValueError: without stats, for abstract ones, or if they lack a leaf or have one of another shape. `how` says how to make them.
    """
    if stats is None:
        raise ValueError(f"{name} chooses what to train by data, and was given none. {how}")
    scores = tree.flatten(stats)
    if any(isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)) for leaf in scores.values()):
        raise ValueError(
            f"{name}: how many entries of each weight are trained depends on the values of stats, and these are abstract. Parameters may "
            "be shapes only, stats must be arrays: make them outside of jit and eval_shape and close over them."
        )
    wrong = [path for path, leaf in leaves.items() if path not in scores or scores[path].shape != leaf.shape]
    if wrong:
        raise ValueError(
            f"{name}: stats must have a score for every parameter, in its shape; {len(wrong)} are missing or differ, such as '{wrong[0]}'. "
            f"{how}"
        )
    return {path: np.asarray(jax.device_get(scores[path])) for path in leaves}


def choose(scores: Mapping[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    """The k highest scores of all leaves together: ``{path: flat indices, ascending}``. Of equal scores the first in tree order are taken.

    Raises:
      ValueError: if there are fewer than k, or one is not finite.
    """
    everything = np.concatenate([score.reshape(-1) for score in scores.values()])
    if k > everything.size:
        raise ValueError(f"{k:,} entries are to be trained, but there are only {everything.size:,}.")
    if not np.all(np.isfinite(everything)):
        bad = next(path for path, score in scores.items() if not np.all(np.isfinite(score)))
        raise ValueError(f"The scores of '{bad}' are not finite.")
    threshold = np.partition(everything, everything.size - k)[everything.size - k]
    ties = k - int(np.count_nonzero(everything > threshold))
    out: dict[str, np.ndarray] = {}
    for path, score in scores.items():
        flat = score.reshape(-1)
        equal = np.flatnonzero(flat == threshold)[:ties]
        ties -= equal.size
        index = np.sort(np.concatenate([np.flatnonzero(flat > threshold), equal]))
        if index.size:
            out[path] = index
    return out


def choose_from(params: tree.Params, stats: Any, sparsity: float, head: str | None, name: str, how: str) -> dict[str, np.ndarray]:
    """The entries outside the head that statistics choose, as many as the `budget` has: ``{path: flat indices, ascending}``.

    Raises:
      ValueError: as `concrete`, `budget` and `choose`, for the method `name`; and for statistics that are all zero, which choose nothing.
    """
    scores = concrete(not_head(params, head), stats, name, how)
    if not any(score.any() for score in scores.values()):
        raise ValueError(
            f"{name}: the statistics are zero everywhere outside the head, so they say nothing about what to train. A head that begins at "
            f"zero passes no gradient on: give it small random values before taking them. {how}"
        )
    return choose(scores, budget(params, sparsity, head))


def leaves(base: Mapping[str, Any], chosen: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
    """The adapter's leaves by path: zero differences at the chosen places, or those of `values`, dense arrays by path.

    Raises:
      ValueError: for a leaf of 2^31 entries or more.
    """
    out: dict[str, Any] = {}
    for path, index in chosen.items():
        if base[path].size >= 2**31:
            raise ValueError(f"'{path}' has {base[path].size:,} entries; sparse differences index fewer than 2^31.")
        dtype = jnp.promote_types(base[path].dtype, jnp.float32)
        start = np.zeros(index.size) if values is None else values[path].reshape(-1)[index]
        out[f"{path}/{VALUES}"] = jnp.asarray(start, dtype)
        out[f"{path}/{INDICES}"] = encode(index, base[path].size)
    return out


def chosen_anew(
    base: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]], chosen: Mapping[str, np.ndarray], name: str
) -> dict[str, Any]:
    """The adapter's leaves by path after another choice of entries: the bound parameters stay as they are.

    An entry that was chosen before, whether trained last or kept, goes on from its difference; differences of entries that are not chosen
    again are kept.

    Args:
      base: The base's leaves by path.
      beside: What stands beside them now.
      chosen: The new choice, as from `choose`.
      name: The method, for the message.

    Raises:
      ValueError: if the adapter is abstract.
    """
    old: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for path, part in beside.items():
        pairs = list(_pairs(part))
        if any(isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)) for pair in pairs for leaf in pair):
            raise ValueError(f"{name}: the entries are chosen anew by their values: call jpeft.advance outside of jit and eval_shape.")
        old[path] = np.concatenate([np.asarray(decode(i)) for i, _ in pairs]), np.concatenate([np.asarray(v) for _, v in pairs])
    out: dict[str, Any] = {}
    for path in base:
        index, values = old.get(path, (np.zeros(0, np.int32), np.zeros(0, np.float32)))
        new = chosen.get(path, np.zeros(0, np.int64))
        if new.size:
            dense = np.zeros(base[path].size, values.dtype)
            dense[index] = values
            out |= leaves({path: base[path]}, {path: new}, {path: dense})
        stays = ~np.isin(index, new)
        if stays.any():
            order = np.argsort(index[stays])
            out[f"{path}/{KEPT}/{VALUES}"] = jnp.asarray(values[stays][order])
            out[f"{path}/{KEPT}/{INDICES}"] = encode(index[stays][order], base[path].size)
    return out


def _pairs(part: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """``(indices, values)``: of what is kept, and of what is trained."""
    for pair in (part.get(KEPT, {}), part):
        if VALUES in pair:
            yield pair[INDICES], pair[VALUES]


# --- indices -------------------------------------------------------------------------------------------------------------------------


def _digits(size: int) -> int:
    return 1 if size <= DIGIT else 2


def encode(index: np.ndarray, size: int) -> jax.Array:
    """Flat indices into `size` entries as float32 [digits, k], the lowest digit first."""
    return jnp.asarray(np.stack([index // DIGIT**i % DIGIT for i in range(_digits(size))]), jnp.float32)


def decode(indices: jax.Array) -> jax.Array:
    """The inverse of `encode`, int32 [k]."""
    digits = jnp.rint(jax.lax.stop_gradient(indices)).astype(jnp.int32)
    return sum((digits[i] * DIGIT**i for i in range(1, len(digits))), digits[0])


# --- the functions of a method -------------------------------------------------------------------------------------------------------


def bind(params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
    """Add the values at their indices."""
    del rng

    def add(path: str, leaf: Any, beside: dict[str, Any]) -> Any:
        del path
        for indices, values in _pairs(beside):
            # One coordinate for each axis, not a reshape to a vector, which would gather a sharded leaf.
            at = jnp.unravel_index(decode(indices), leaf.shape)
            new = leaf[at].astype(values.dtype) + values
            leaf = leaf.at[at].set(new.astype(leaf.dtype), indices_are_sorted=True, unique_indices=True)
        return leaf

    return tree.merge_leaves(params, adapter, add)


def labels(adapter: tree.Adapter) -> Any:
    """All is trained but the indices, and what is kept."""
    flat = tree.flatten(adapter)

    def fixed(path: str) -> bool:
        owner, _, name = path.rpartition("/")
        paired = name in (VALUES, INDICES) and {f"{owner}/{VALUES}", f"{owner}/{INDICES}"} <= flat.keys()
        return paired and (name == INDICES or owner.endswith(f"/{KEPT}"))

    return tree.unflatten({path: FREEZE if fixed(path) else TRAIN for path in flat})


def changed(params: tree.Params, adapter: tree.Adapter) -> int:
    """The values, those that are kept included, and the dense head."""
    replaced, beside, _ = tree.split(params, adapter)
    return tree.size(replaced) + sum(values.size for part in beside.values() for _, values in _pairs(part))


def method(init: InitFn, sparsity: float, head: str | None, *, needs: str, stages: tuple[Stage, ...] = ()) -> Method:
    """The method whose adapter is sparse differences, which `init` chooses by the statistics that it `needs`, and the head."""
    return Method(
        init=with_head(init, head),
        bind=bind,
        merge=bind,
        labels=labels,
        changed=changed,
        shapes=functools.partial(shapes, sparsity=sparsity, head=head),
        needs=needs,
        stages=stages,
        reduces=True,
    )


def shapes(params: tree.Params, adapter: tree.Adapter, *, sparsity: float, head: str | None) -> tree.Adapter:
    """What an adapter must look like on this base, whichever entries it holds.

    Raises:
      ValueError: if it has another number of values than the budget, or an index that is out of range.
    """
    flat = tree.flatten(params)
    _, beside, _ = tree.split(params, adapter)
    out: dict[str, Any] = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in head_leaves(params, head).items()}
    held = 0
    for path, part in beside.items():
        size, pairs = flat[path].size, {path: part}
        if KEPT in part:
            pairs = {f"{path}/{KEPT}": part[KEPT]} | ({path: part} if VALUES in part else {})
        for owner, pair in pairs.items():
            k = pair[VALUES].size if VALUES in pair else 0
            held += k if owner == path else 0
            out[f"{owner}/{VALUES}"] = jax.ShapeDtypeStruct((k,), jnp.promote_types(flat[path].dtype, jnp.float32))
            out[f"{owner}/{INDICES}"] = jax.ShapeDtypeStruct((_digits(size), k), jnp.float32)
            if INDICES in pair and pair[INDICES].ndim == 2 and k and int(decode(pair[INDICES]).max()) >= size:
                raise ValueError(f"it changes entry {int(decode(pair[INDICES]).max()):,} of '{path}', which has {size:,}.")
    keep = budget(params, sparsity, head)
    if held != keep:
        raise ValueError(f"it changes {held:,} entries, where sparsity={sparsity} of this base is {keep:,}.")
    return tree.unflatten(out)

"""Pools: several adapters over one base, one of them for each example of a batch."""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp

from jpeft import tree
from jpeft.core.peft import Peft, check_peft
from jpeft.hosts.registry import unwrap
from jpeft.many.as_lora import one_of, rules_of
from jpeft.many.mixed import LEAF_AXES, VALUE, Mixed, numbers_of
from jpeft.many.parts import Factors, Parts, forms_of, parts_of
from jpeft.many.same_base import check_same_base
from jpeft.reparameterized.matrix_form import MatrixForm
from jpeft.tree.paths import Params, Path, first_few
from jpeft.tree.select import first_match


def mix(params: Params, adapters: Sequence[Peft], *, slots: SupportsIndex | None = None, rank: Any = None) -> Peft:
    """A pool: several adapters over one base, of which each example of a batch takes one, in one compiled program.

    What can stand in the pool is decided here and stays: the number of slots, the kernels, the highest rank of each, which leaves are
    held whole. Within that, adapters are exchanged without a new compilation::

        pool = jpeft.mix(params, [french, german], slots=16, rank=16)
        forward = jax.jit(jpeft.wrap(model.apply))
        logits = forward(jpeft.assign(pool, [0, 1, -1, 0]), ids)    # -1 is the base
        pool = jpeft.swap(pool, 2, spanish)
        logits = forward(jpeft.assign(pool, [2, 2, 0, 1]), ids)

    Args:
      params: The base, the very params that the adapters were made or loaded on.
      adapters: `Peft`s of LoRA, with any options, or of (IA)³, or chains of LoRA with methods that replace leaves. Their trained heads
        come along. Others are turned into LoRA first: `jpeft.to_lora`. They take the slots from 0 on.
      slots: Number of slots; as many as there are adapters if not given.
      rank: The highest rank of the kernels, a number or rules ``{regex or name: r}``; by default the highest among the adapters, kernel
        by kernel. Adapters of a lower rank are padded with zeros, so the cost is that of this rank.

    Returns:
      A `Peft` to be given an index for each example, `jpeft.assign`, before it is called. Its method does not merge. It may be trained:
      the gradient of a slot is that of the examples which chose it. Dropout is off.

    Raises:
      ValueError: for no adapters, one for another base, of a method that is neither, or with a rank above the pool's.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((8, 4))}}
    >>> low, high = (jpeft.apply(params, method="lora", rank=rank) for rank in (2, 4))
    >>> pool = jpeft.mix(params, [low, high], slots=16)
    >>> jax.tree.map(jnp.shape, pool.adapter)
    {'dense': {'kernel': {'a': (16, 8, 4), 'b': (16, 4, 4)}}}

    HF PEFT mixes LoRA adapters at inference only, by a loop over the adapters in each layer.
    """
    adapters = [adapters] if isinstance(adapters, Peft) else list(adapters)
    if not adapters:
        raise ValueError("mix() needs at least one adapter, in a list: its kernels and ranks decide what the pool can hold.")
    count = len(adapters) if slots is None else slots
    if not _whole(count) or int(count) < len(adapters):
        raise ValueError(f"slots={slots!r} must be a whole number of at least {len(adapters)}, the number of adapters.")
    params = unwrap(params)
    found = [_parts(params, peft, f"Adapter {i} of mix()") for i, peft in enumerate(adapters)]
    replaced = {path for parts in found for path in parts.replaced}
    found = [_with_whole(params, parts, replaced, f"Adapter {i} of mix()") for i, parts in enumerate(found)]
    method = _method_for(found, int(count), rank)
    pool = Peft(params, method.init(jax.random.key(0), params), method)
    for slot, parts in enumerate(found):
        pool = _filled(pool, slot, parts, f"Adapter {slot} of mix()")
    return pool


def swap(peft: Peft, slot: SupportsIndex, adapter: Peft | None) -> Peft:
    """A pool with another adapter in one slot. Nothing is compiled anew by what runs the pool.

    Args:
      peft: What `jpeft.mix` made.
      slot: From 0 on.
      adapter: As for `mix`; None empties the slot, whose examples then get the base.

    Returns:
      The pool with new leaves; the old one stays as it is. The index that was assigned stays.

    Raises:
      ValueError: if there is no such slot, or the adapter does not fit the pool: another base, a method that cannot be mixed, a rank above
        the pool's, or a change of what the pool holds no leaves for.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((8, 4))}}
    >>> one, two = (jpeft.apply(params, method="lora", rank=rank) for rank in (2, 1))
    >>> pool = jpeft.swap(jpeft.mix(params, [one], slots=4), 1, two)
    >>> pool.adapter["dense"]["kernel"]["a"].shape
    (4, 8, 2)
    """
    check_peft(peft, "swap")
    if not isinstance(peft.method, Mixed):
        raise ValueError(f"swap() takes a pool, as jpeft.mix makes it, and was given a Peft of {peft.method.name}.")
    if not _whole(slot) or not 0 <= int(slot) < peft.method.slots:
        raise ValueError(f"slot={slot!r}: the pool has the slots 0 to {peft.method.slots - 1}.")
    what = "The adapter"
    parts = Parts({}, {}, {}, ()) if adapter is None else _parts(peft.params, adapter, what)
    whole = {path for path in peft.method.all_forms(peft.params) if VALUE in peft.method.leaves_at(path)}
    parts = _with_whole(peft.params, parts, whole, what)
    return _filled(peft, int(slot), parts, what)


def _whole(number: Any) -> bool:
    """Whether a value is a whole number."""
    return isinstance(number, SupportsIndex) and not isinstance(number, bool)


def _parts(params: Params, peft: Peft, what: str) -> Parts:
    """What an adapter does, once it is known to be one for this base."""
    if not isinstance(peft, Peft):
        raise ValueError(f"{what} is a {type(peft).__name__} and no Peft, as jpeft.apply and jpeft.load return it.")
    parts = parts_of(peft, "A mixed batch")
    check_same_base(params, peft.params, what, skip=parts.replaced)
    return parts


def _with_whole(params: Params, parts: Parts, whole: Collection[Path], what: str) -> Parts:
    """The same adapter, which holds a new value for those of these leaves that it changes by factors."""
    both = [path for path in parts.updates if path in whole]
    scaled = [path for path in parts.scales if path in whole]
    if scaled:
        raise ValueError(f"{what} scales {first_few(scaled)}, of which another adapter of the pool has a value of its own.")
    base, forms = tree.flatten(params), forms_of(params, both, parts.axes)
    wide = {path: base[path].astype(jnp.promote_types(base[path].dtype, jnp.float32)) for path in both}
    new = {path: wide[path] + forms[path].from_matrix(jnp.matmul(*parts.updates[path])) for path in both}
    updates = {path: factors for path, factors in parts.updates.items() if path not in both}
    return parts._replace(updates=updates, replaced=parts.replaced | new)


def _method_for(found: Sequence[Parts], slots: int, rank: Any) -> Mixed:
    """The method of a pool that holds all of these."""
    replaced = {path for parts in found for path in parts.replaced}
    ranks: dict[Path, int] = {}
    for parts in found:
        for path, factors in parts.updates.items():
            ranks[path] = max(ranks.get(path, 1), factors.rank)
    low_rank = ranks.keys()
    scaled = {name: {path for parts in found for path, own in parts.scales.items() if name in own} for name in ("l_out", "l_in")}
    axes = tuple(dict.fromkeys(rule for parts in found for rule in parts.axes))
    return Mixed(
        slots=slots,
        rank=rules_of(ranks) if rank is None else rank,
        low_rank=one_of(low_rank),
        outputs=one_of(scaled["l_out"]),
        inputs=one_of(scaled["l_in"]),
        replaced=one_of(replaced),
        axes=axes or None,
    )


def _filled(pool: Peft, slot: int, parts: Parts, what: str) -> Peft:
    """A pool with an adapter in a slot."""
    method, base = pool.method, tree.flatten(pool.params)
    assert isinstance(method, Mixed)
    forms = method.all_forms(pool.params)
    _check_fits(method, parts, forms, what)
    new: dict[Path, Any] = {}
    for path, form in forms.items():
        for name in method.leaves_at(path):
            new[f"{path}/{name}"] = _leaf(method, path, name, form, parts, base[path])
    own = tree.flatten(pool.adapter)
    placed = tuple((path, forms[path.rpartition("/")[0]]) for path in new)
    return pool.replace(adapter=tree.unflatten(own | _put({path: own[path] for path in new}, slot, new, placed)))


def _leaf(method: Mixed, path: Path, name: str, form: MatrixForm, parts: Parts, base: Any) -> Any:
    """One leaf of an adapter as a slot holds it, in matrix form, [*stack, ...]; neutral where the adapter has none."""
    if name == VALUE:
        value = parts.replaced.get(path, base).astype(jnp.promote_types(base.dtype, jnp.float32))
        return numbers_of(form, value)
    sizes = dict(zip(("in", "out"), form.sizes, strict=True)) | {"rank": 0}
    if name in ("l_in", "l_out"):
        return parts.scales.get(path, {}).get(name, jnp.ones((*form.stack, sizes[LEAF_AXES[name][1]])))
    rank = first_match(path, method.rank, "rank")
    factors = parts.updates.get(path)
    if factors is None:
        factors = Factors(jnp.zeros((*form.stack, sizes["in"], 0)), jnp.zeros((*form.stack, 0, sizes["out"])))
    leaf = factors.a if name == "a" else factors.b
    missing = [(0, 0)] * leaf.ndim
    missing[leaf.ndim - (1 if name == "a" else 2)] = (0, rank - factors.rank)
    return jnp.pad(leaf, missing)


@functools.partial(jax.jit, static_argnames="forms")
def _put(leaves: dict[Path, Any], slot: Any, new: dict[Path, Any], forms: tuple[tuple[Path, MatrixForm], ...]) -> dict[Path, Any]:
    """Write into one slot, as one program for all slots."""
    out = {}
    for path, form in forms:
        axes, leaf = LEAF_AXES[path.rpartition("/")[2]], leaves[path]
        matrices = form.leaf_to_matrix(leaf, axes)  # [*stack, slot, ...]
        put = jax.lax.dynamic_update_index_in_dim(matrices, new[path].astype(leaf.dtype), slot, len(form.stack))
        out[path] = form.leaf_from_matrix(put, axes)
    return out


def _check_fits(method: Mixed, parts: Parts, forms: Mapping[Path, MatrixForm], what: str) -> None:
    """Refuse what the pool has no leaves for."""
    names = {path: method.leaves_at(path) for path in forms}
    has = lambda path, name: name in names.get(path, ())
    absent = {path for path in parts.updates if not has(path, "a")}
    absent |= {path for path, own in parts.scales.items() for name in own if not has(path, name)}
    absent |= {path for path in parts.replaced if not has(path, VALUE)}
    if absent:
        raise ValueError(
            f"{what} changes {first_few(sorted(absent))}, for which the pool has no leaves of that kind: it holds what the adapters change "
            "that jpeft.mix was given. Make it with this adapter among them."
        )
    for path, factors in parts.updates.items():
        if factors.rank > (most := first_match(path, method.rank, "rank")):
            raise ValueError(
                f"{what} has rank {factors.rank} at '{path}', and the pool's highest is {most}. Make the pool with jpeft.mix(..., rank="
                f"{factors.rank}), or the adapter smaller: jpeft.to_lora(adapter, rank={most})."
            )

"""What is found of a call before it is made, in one abstract trace: whether all leaves are read, and whether the model is random."""

import dataclasses
import secrets
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
from flax import nnx

from jpeft.hosts.base import DROPOUT
from jpeft.hosts.nnx.graph import Grafts
from jpeft.hosts.nnx.patching import Around, Record, RecordedStream, recording
from jpeft.hosts.products import Read, reads
from jpeft.hosts.products.costly import CostlyKernels
from jpeft.tree.paths import Path

# Operations that run a function of their own, into which nothing is followed.
_OPAQUE = ("call", "map", "custom")

Run = Callable[..., Any]  # (grafts, others, args, kwargs, trace) -> outputs and state


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
      inner: The shapes of the leaves inside their modules, by the paths of the modules.
      drew: Whether the call draws random numbers.
    """

    inner: Mapping[Path, Mapping[Path, tuple[int, ...]]]
    drew: bool


def inspect_call(run: Run, grafts: Grafts, others: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inspection:
    """Trace a call abstractly and check it.

    Raises:
      ValueError: for leaves that no module reads.
    """
    # A name that was never used before: `nnx.jit` has no trace of it in its cache, so all modules are seen to run.
    trace = secrets.token_hex(8)
    arrays, rebuild = _arrays_of((others, args, dict(kwargs)))

    def call(adapted: Any, params: Any, leaves: Any, arrays: list[Any]) -> Any:
        # New objects, of this trace: also the random streams among the arguments, which stay as they are.
        others, args, kwargs = rebuild(arrays)
        record_streams((args, kwargs))
        return run(dataclasses.replace(grafts, params={**params, **adapted}, leaves=leaves), others, args, kwargs, trace)

    adapted = {path: grafts.params[path] for path in grafts.adapted()}
    others_of = {path: leaf for path, leaf in grafts.params.items() if path not in adapted}
    uses = None
    with recording() as record:
        try:
            uses = reads(call, adapted, others_of, dict(grafts.leaves), arrays)
        except jax.errors.ConcretizationTypeError:  # a model that looks at values cannot be traced, and runs all the same
            call(adapted, others_of, dict(grafts.leaves), arrays)
    _refuse_unread(grafts, record)
    CostlyKernels(grafts.method.name).warn(record.costly, stacklevel=6)
    if uses is not None:
        _refuse_reads_outside(grafts, uses)
    return Inspection(record.inner, record.drew)


def record_streams(node: Any) -> None:
    """Let all random streams in a model or in arguments record that they are used."""
    for path, each in nnx.iter_graph(node):
        # A linen module is given a key of each stream in any case, and may use that for dropout.
        if type(each) is nnx.RngStream and ("to_nnx__rngs" not in path or each.tag == DROPOUT):
            object.__setattr__(each, "__class__", RecordedStream)


def signature_of(grafts: Grafts, others: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """What of a call decides what runs: the structure of the arguments, the shapes of arrays, and all other values."""
    leaves, structure = jax.tree.flatten((dict(grafts.params), dict(grafts.leaves), others, args, dict(kwargs)))
    # Of arrays the values do not matter: no control flow in Python can depend on them under `jit`.
    value = lambda leaf: leaf if isinstance(leaf, Hashable) else None
    return structure, tuple((leaf.shape, str(leaf.dtype)) if hasattr(leaf, "dtype") else (type(leaf), value(leaf)) for leaf in leaves)


def _arrays_of(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays in any tree, and a function that puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    is_array = [hasattr(leaf, "dtype") and hasattr(leaf, "shape") for leaf in leaves]

    def rebuild(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        return jax.tree.unflatten(structure, [next(rest) if here else leaf for leaf, here in zip(leaves, is_array, strict=True)])

    return [leaf for leaf, here in zip(leaves, is_array, strict=True) if here], rebuild


def _refuse_reads_outside(grafts: Grafts, uses: list[Read]) -> None:
    """Refuse a parameter with leaves beside it that is also read elsewhere, or nowhere.

    A parent that reads the table of an embedding for its output would compute with the table as it was.
    """
    inside = {path: [] for path in grafts.adapted()}
    for use in uses:
        if Around(grafts.method, use.path.rpartition("/")[0]).scope in use.scopes:
            inside[use.path].append(use)
        elif not any(part in use.primitive for part in _OPAQUE):
            where = use.scopes or "the model's own code"
            raise ValueError(
                f"{grafts.method.name} adapts '{use.path}', which is also read outside of its module (`{use.primitive}` in {where}), where "
                "the change would be silently lost. Read it in a method of its module, as nnx.Embed.attend does; leave it out of the "
                "target; or merge the weights in every step, with host='dense' and a function of the parameters."
            )
    if lost := [path for path, found in inside.items() if not found]:
        raise ValueError(
            f"{grafts.method.name} adapts '{lost[0]}', which this call does not use, so the change would have no effect. Leave it out of "
            "the target."
        )


def _refuse_unread(grafts: Grafts, record: Record) -> None:
    """Refuse leaves on a module that did not run."""
    unread = [path for path in grafts.leaves if path not in record.ran]
    if unread:
        name = grafts.method.name
        what = f"the module '{unread[0]}'" if unread[0] else "the model as a whole"
        raise ValueError(
            f"{name} adds to {what}, which this call passes by: none of its public methods ran, so the change would be silently lost. "
            "Leave it out of the target, or read its parameters in a method of the module itself; where only weights change, "
            "host='dense' adapts them wherever they are read."
        )

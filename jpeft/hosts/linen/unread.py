"""Leaves that no linen module reads: refused, because the method's change would be lost without a word."""

import dataclasses
import functools
import secrets
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from jpeft.core.method import Method
from jpeft.hosts.linen.dependence import inputs_used
from jpeft.hosts.linen.elsewhere import refuse_reads_elsewhere
from jpeft.hosts.linen.named_methods import has_added
from jpeft.hosts.linen.ways_out import way_out
from jpeft.tree.adapters import ADDED, GRAFT, key_of, pop_grafts
from jpeft.tree.paths import Params, Path, first_few, flatten

# ``(bound, tags) -> (outputs, paths of the modules that read leaves)``, with the tag of each module by path.
Run = Callable[[Params, Mapping[Path, str]], tuple[Any, set[Path]]]

_NEEDS_CORE = (
    " Putting keys in front of a layer's own needs a model with parameterless modules there, called `core` and `positions`, as those of "
    "jpeft.models have: jpeft/models/common/contract.py."
)


class Known(NamedTuple):
    """The calls of one function that were found to be right.

    Attributes:
      read: By shapes. `nn.jit` traces one of several equal blocks, and none at all on later calls; so that modules which were not seen to
        run can be told from those that did not run, such a call is traced anew, once.
      nowhere_else: By structure: calls that use no adapted parameter past its module.
    """

    read: set[Hashable]
    nowhere_else: set[Hashable]

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> "Known":
        """What is known of a function: equal models share it, so a model is checked once, however often it is wrapped."""
        owner = getattr(fn, "__self__", None)
        if isinstance(owner, nn.Module):
            try:
                return _known(owner, fn.__func__)  # pyright: ignore[reportFunctionMemberAccess]  # a bound method
            except TypeError:  # a model that holds what cannot be hashed
                pass
        return cls(set(), set())


@functools.lru_cache(maxsize=32)
def _known(model: nn.Module, function: Callable[..., Any]) -> Known:
    del model, function
    return Known(set(), set())


@dataclasses.dataclass(frozen=True)
class UnreadLeaves:
    """Checks the calls of one wrapped function.

    Attributes:
      method: The method whose leaves are looked for.
      known: The calls that were found to be right.
    """

    method: Method
    known: Known

    def refuse(self, bound: Params, grafts: Mapping[Path, Any], ran: set[Path], call: Any, run: Run) -> None:
        """Refuse leaves whose change is lost, wholly or in part.

        Args:
          bound: The parameters with leaves.
          grafts: The leaves, by the path of their module.
          ran: Paths of the modules that were seen to read leaves in this call.
          call: The other collections, the arguments and the keyword arguments of the call.
          run: Runs the model anew.

        Raises:
          ValueError: if leaves stand on a module that does not exist, or that this call does not enter although it computes with its
            parameters; if it uses a parameter with leaves beside it in another way than by its module.
        """
        # Trace the model anew: no trace under a tag that was never used before can be in the cache of `nn.jit`, and each module has its
        # own tag, so it is recognised wherever it runs.
        fresh = secrets.token_hex(8)
        tags = {path: f"{fresh}-{i}" for i, path in enumerate(grafts)}
        # 1. Not all modules ran in this very call. They may be hidden by a trace in that cache, or have run under another path inside an
        # `apply` of the model's own.
        if not grafts.keys() <= ran and (signature := (self.method, _signature((bound, call)))) not in self.known.read:
            self._refuse_unread(bound, grafts, call, lambda params: run(params, tags))
            self.known.read.add(signature)
        # 2. A module that ran is not all that may use its parameters.
        clean = pop_grafts(bound)[0]
        adapted = frozenset(_beside(self.method, grafts) & flatten(clean).keys())
        key = (adapted, tuple(grafts), jax.tree.structure(clean), _signature(call, shapes=False))
        if grafts and key not in self.known.nowhere_else:
            refuse_reads_elsewhere(self.method, adapted, lambda params: run(params, tags)[0], bound)
            self.known.nowhere_else.add(key)

    def _refuse_unread(self, bound: Params, grafts: Mapping[Path, Any], call: Any, run: Callable[[Params], tuple[Any, set[Path]]]) -> None:
        found: set[Path] = set()

        def outputs(params: Params) -> Any:
            out, paths = run(params)
            found.update(paths)
            return out

        used = inputs_used(outputs, bound)[0]
        clean = pop_grafts(bound)[0]
        idle = [path for path in grafts if path not in found and not self._refuse_one(clean, path, grafts[path], found, used)]
        if idle and "method" not in call[-1]:
            warnings.warn(
                f"{self.method.name} adds to {first_few(idle)}, whose parameters this call of the model does not compute with: there, "
                "nothing will be trained. Choose other modules with target=, if no other call uses these.",
                stacklevel=6,
            )

    def _refuse_one(self, params: Params, path: Path, leaves: Mapping[str, Any], ran: set[Path], used: set[Path]) -> bool:
        """Refuse leaves on one module that did not read them; False if the call does not compute with the module."""
        what, name = (f"the module '{path}'" if path else "the model as a whole"), self.method.name
        # A module inside ran, so the call did pass through this one, by another way than one of its methods.
        inside = f"{path}/" if path else ""
        if entered := sorted(other for other in ran if other.startswith(inside)):
            raise ValueError(
                f"{name} adds to {what}, which this call passed by: '{entered[0]}' ran, but not the `__call__` around it, so the "
                "change would be silently lost. Enter by `__call__`, or let the method add to a module that is entered so; where a prompt "
                "is put in, body= says."
            )
        exists = _exists(params, path)
        # A path without parameters was made up by the method, from the usual names of such modules beside others that have some.
        around = path if exists else path.rpartition("/")[0]
        inside = f"{around}/" if around else ""
        read = sorted(leaf for leaf in used if leaf.startswith(inside) and GRAFT not in leaf.split("/"))
        if not read:
            return False
        if not exists:
            needs = _NEEDS_CORE if path.endswith(("core", "positions")) else ""
            raise ValueError(f"{name} adds to the module '{path}', but no such module ran.{needs}")
        beside = [leaf for leaf in read if leaf in _beside(self.method, {path: leaves})]
        if not beside and not has_added(self.method, leaves):
            return False
        raise ValueError(
            f"{name} adds to {repr(beside[0]) if beside else what}, and this call computes with '{(beside or read)[0]}', but by none of "
            f"the methods of a linen module '{path}' that a change could go around: it is read through `variables`, by a property, in a "
            "module of another framework, or by an `apply` inside the model, and the change would be silently lost. "
            f"{way_out(self.method)}."
        )


def _beside(method: Method, grafts: Mapping[Path, Any]) -> set[Path]:
    """The paths of the parameters that have leaves beside them, given the leaves of each module; others may be among them."""
    if method.parts:
        parts = (_beside(part, {path: leaves[name] for path, leaves in grafts.items() if name in leaves}) for name, part in method.parts)
        return set().union(*parts)
    return {f"{path}/{name}" if path else name for path, leaves in grafts.items() for name in leaves if name != ADDED}


def _exists(params: Params, path: str) -> bool:
    """Whether a module has parameters."""
    for name in path.split("/") if path else ():
        if not isinstance(params, Mapping) or key_of(params, name) not in params:
            return False
        params = params[key_of(params, name)]
    return bool(jax.tree.leaves(params))


def _signature(call: Any, *, shapes: bool = True) -> Hashable:
    """What of a call decides which modules run: the structure of the arguments, the shapes of arrays, and all other values."""
    leaves, structure = jax.tree.flatten(call)
    # Of arrays the values do not matter: no control flow in Python can depend on them under `jit`.
    value = lambda leaf: leaf if isinstance(leaf, Hashable) else None
    shape = lambda leaf: leaf.shape if shapes else len(leaf.shape)
    return structure, tuple((shape(leaf), str(leaf.dtype)) if hasattr(leaf, "dtype") else (type(leaf), value(leaf)) for leaf in leaves)

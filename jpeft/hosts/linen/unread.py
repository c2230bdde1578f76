"""Leaves that no linen module reads: refused, because the method's change would be lost without a word."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax

from jpeft.core.method import Method
from jpeft.tree.adapters import pop_grafts
from jpeft.tree.paths import Params


@dataclasses.dataclass(frozen=True)
class UnreadLeaves:
    """Checks the calls of one wrapped function.

    Attributes:
      method: The method whose leaves are looked for.
      known: The shapes of calls that were found to be right. `nn.jit` traces one of several equal blocks, and none at all on later calls;
        so that modules which were not seen to run can be told from modules that do not exist, such a call is traced anew, once.
    """

    method: Method
    known: set[Hashable] = dataclasses.field(default_factory=set)

    def refuse(self, bound: Params, ran: set[str], call: Any, trace: Callable[[], set[str]]) -> None:
        """Refuse leaves on a module that did not run.

        Args:
          bound: The parameters with leaves.
          ran: Paths of the modules that were seen to read leaves in this call.
          call: The arguments of the call.
          trace: Traces the call anew, without any trace of `nn.jit`, and returns the paths of the modules that read leaves.

        Raises:
          ValueError: if leaves stand on a module that does not exist, or on one that the call did not enter.
        """
        clean, grafts = pop_grafts(bound)
        # A module with parameters exists. A path without parameters was made up by the method from the usual names of such modules.
        guessed = [path for path in grafts if path and not _exists(clean, path)]
        if guessed:
            self._refuse_missing(guessed, ran, _signature((bound, call)), trace)
        _refuse_passed_by(self.method, grafts, ran)

    def _refuse_missing(self, guessed: list[str], ran: set[str], signature: Hashable, trace: Callable[[], set[str]]) -> None:
        # 1. Calls of this kind were right before.
        if signature in self.known:
            return
        # 2. The modules ran in this very call.
        missing = _missing(guessed, ran)
        # 3. They may be hidden by a trace in the cache of `nn.jit`: trace the model again, without that cache.
        if missing:
            missing = _missing(guessed, trace())
        if missing:
            raise ValueError(
                f"{self.method.name} adds to the module '{missing[0]}', but no such module ran. Putting keys in front of a layer's own "
                "needs a model with parameterless modules there, called `core` and `positions`, as those of jpeft.models have: "
                "jpeft/models/common/contract.py."
            )
        self.known.add(signature)


def _exists(params: Params, path: str) -> bool:
    """Whether a module has parameters."""
    for name in path.split("/"):
        if not isinstance(params, Mapping) or name not in params:
            return False
        params = params[name]
    return bool(jax.tree.leaves(params))


def _missing(guessed: list[str], ran: set[str]) -> list[str]:
    """The modules none of whose name ran. By name and not by path, for `nn.jit` traces only one of several equal blocks."""
    names = {path.rpartition("/")[2] for path in ran}
    return [path for path in guessed if path.rpartition("/")[2] not in names]


def _refuse_passed_by(method: Method, grafts: dict[str, Any], ran: set[str]) -> None:
    """Refuse leaves on a module around one that ran, if it did not run itself: the call began below it, or at another of its methods."""
    for path in grafts.keys() - ran:
        # A module inside ran, so the call did pass through this one, by another way than its `__call__`.
        inside = f"{path}/" if path else ""
        entered = sorted(other for other in ran if other.startswith(inside))
        if entered:
            what = f"the module '{path}'" if path else "the model as a whole"
            raise ValueError(
                f"{method.name} adds to {what}, which this call passed by: '{entered[0]}' ran, but not the `__call__` around it, so the "
                "change would be silently lost. Enter by `__call__`, or let the method add to a module that is entered so; where a prompt "
                "is put in, body= says."
            )


def _signature(call: Any) -> Hashable:
    """What of a call decides which modules run: the structure of the arguments, the shapes of arrays, and all other values."""
    leaves, structure = jax.tree.flatten(call)
    # Of arrays the values do not matter: no control flow in Python can depend on them under `jit`.
    value = lambda leaf: leaf if isinstance(leaf, Hashable) else None
    return structure, tuple((leaf.shape, str(leaf.dtype)) if hasattr(leaf, "dtype") else (type(leaf), value(leaf)) for leaf in leaves)

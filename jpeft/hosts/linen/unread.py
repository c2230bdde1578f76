"""Leaves that no linen module reads: refused, because the method's change would be lost without a word."""

import dataclasses
import secrets
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax

from jpeft.core.method import Method
from jpeft.hosts.linen.dependence import inputs_used
from jpeft.hosts.linen.named_methods import has_added
from jpeft.tree.adapters import GRAFT, pop_grafts
from jpeft.tree.paths import Params, Path, first_few

_NEEDS_CORE = (
    " Putting keys in front of a layer's own needs a model with parameterless modules there, called `core` and `positions`, as those of "
    "jpeft.models have: jpeft/models/common/contract.py."
)

# ``(bound, tags) -> (outputs, paths of the modules that read leaves)``, with the tag of each module by path.
Run = Callable[[Params, Mapping[Path, str]], tuple[Any, set[Path]]]


@dataclasses.dataclass(frozen=True)
class UnreadLeaves:
    """Checks the calls of one wrapped function.

    Attributes:
      method: The method whose leaves are looked for.
      known: The shapes of calls that were found to be right. `nn.jit` traces one of several equal blocks, and none at all on later calls;
        so that modules which were not seen to run can be told from those that did not run, such a call is traced anew, once.
    """

    method: Method
    known: set[Hashable] = dataclasses.field(default_factory=set)

    def refuse(self, bound: Params, grafts: Mapping[Path, Any], ran: set[Path], call: Any, run: Run) -> None:
        """Refuse leaves on a module that did not run, or by no method that a change could go around.

        Args:
          bound: The parameters with leaves.
          grafts: The leaves, by the path of their module.
          ran: Paths of the modules that were seen to read leaves in this call.
          call: The arguments of the call.
          run: Runs the model anew.

        Raises:
          ValueError: if leaves stand on a module that does not exist, or that this call does not enter although it computes with its
            parameters.
        """
        # 1. The modules ran in this very call.
        if grafts.keys() <= ran or (signature := _signature((bound, call))) in self.known:
            return
        # 2. They may be hidden by a trace in the cache of `nn.jit`, or have run under another path inside an `apply` of the model's own.
        # Trace the model anew: no trace under a tag that was never used before can be in that cache, and each module has its own tag.
        fresh = secrets.token_hex(8)
        tags = {path: f"{fresh}-{i}" for i, path in enumerate(grafts)}
        found: set[Path] = set()

        def outputs(params: Params) -> Any:
            out, paths = run(params, tags)
            found.update(paths)
            return out

        used = inputs_used(outputs, bound)[0]
        clean = pop_grafts(bound)[0]
        idle = [path for path in grafts if path not in found and not self._refuse(clean, path, grafts[path], found, used)]
        self.known.add(signature)
        if idle and "method" not in call[-1]:
            warnings.warn(
                f"{self.method.name} adds to {first_few(idle)}, whose parameters this call of the model does not compute with: there, "
                "nothing will be trained. Choose other modules with target=, if no other call uses these.",
                stacklevel=5,
            )

    def _refuse(self, params: Params, path: Path, leaves: Mapping[str, Any], ran: set[Path], used: set[Path]) -> bool:
        """Refuse leaves on one module that did not read them, unless the call does not compute with the module."""
        what, name = (f"the module '{path}'" if path else "the model as a whole"), self.method.name
        # A module inside ran, so the call did pass through this one, by another way than one of its methods.
        inside = f"{path}/" if path else ""
        if entered := sorted(other for other in ran if other.startswith(inside)):
            raise ValueError(
                f"{name} adds to {what}, which this call passed by: '{entered[0]}' ran, but not the `__call__` around it, so the "
                "change would be silently lost. Enter by `__call__`, or let the method add to a module that is entered so; where a prompt "
                "is put in, body= says."
            )
        exists = _under(params, path)
        # A path without parameters was made up by the method, from the usual names of such modules beside others that have some.
        around = path if exists else path.rpartition("/")[0]
        inside = f"{around}/" if around else ""
        read = sorted(leaf for leaf in used if leaf.startswith(inside) and GRAFT not in leaf.split("/"))
        if not read:
            return False
        if not exists:
            needs = _NEEDS_CORE if path.endswith(("core", "positions")) else ""
            raise ValueError(f"{name} adds to the module '{path}', but no such module ran.{needs}")
        beside = [leaf for leaf in read if leaf.removeprefix(inside) in _names(self.method, leaves)]
        if not beside and not has_added(self.method, leaves):
            return False
        raise ValueError(
            f"{name} adds to {repr(beside[0]) if beside else what}, and this call computes with '{(beside or read)[0]}', but by none of "
            f"the methods of a linen module '{path}' that a change could go around: it is read through `variables`, by a property, in a "
            "module of another framework, or by an `apply` inside the model, and the change would be silently lost. "
            f"{way_out(self.method)}."
        )


def way_out(method: Method) -> str:
    """What else than another target makes a method work on any function of parameters."""
    if method.why_no_merge is not None:
        return "Choose other parameters with target=, or another method"
    dense = "jpeft.wrap(lambda params, x: model.apply({'params': params}, x), host='dense')"
    return f"Choose other parameters with target=, or run the model on merged weights: {dense}"


def _names(method: Method, leaves: Mapping[str, Any]) -> set[str]:
    """The names of a module's own parameters that have leaves beside them."""
    return set().union(*(_names(part, leaves[name]) for name, part in method.parts if name in leaves)) if method.parts else set(leaves)


def _under(params: Params, path: Path) -> bool:
    """Whether a module has parameters."""
    for name in path.split("/") if path else ():
        if not isinstance(params, Mapping) or name not in params:
            return False
        params = params[name]
    return bool(jax.tree.leaves(params))


def _signature(call: Any) -> Hashable:
    """What of a call decides which modules run: the structure of the arguments, the shapes of arrays, and all other values."""
    leaves, structure = jax.tree.flatten(call)
    # Of arrays the values do not matter: no control flow in Python can depend on them under `jit`.
    value = lambda leaf: leaf if isinstance(leaf, Hashable) else None
    return structure, tuple((leaf.shape, str(leaf.dtype)) if hasattr(leaf, "dtype") else (type(leaf), value(leaf)) for leaf in leaves)

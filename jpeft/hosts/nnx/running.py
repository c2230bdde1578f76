"""A wrapped NNX model: one call on a copy with the method in it."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

from flax import nnx

from jpeft.core.method import Method
from jpeft.hosts.call_stack import with_room
from jpeft.hosts.nnx.graph import Grafts
from jpeft.hosts.nnx.inspection import Inspection, inspect_call, record_streams, signature_of
from jpeft.hosts.nnx.outputs import current_changes
from jpeft.hosts.nnx.patching import change_outputs
from jpeft.hosts.nnx.randomness import key_of, reseeded, stream_arguments
from jpeft.hosts.nnx.states import STATE
from jpeft.hosts.nnx.targets import Target
from jpeft.tree.paths import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Forward:
    """``forward(variables, *args, **kwargs)`` of a wrapped model.

    Attributes:
      target: What is called.
      method: The method.
      known: What was found of the calls so far, by their signature.
    """

    target: Target
    method: Method
    known: dict[Hashable, Inspection] = dataclasses.field(default_factory=dict)

    def __call__(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        adapter = self.method.from_collections(variables)
        own = self.method.to_collections(adapter)
        collections = {name: state for name, state in variables.items() if name not in own and name != "params"}
        others = self.target.model.with_others(collections)
        mutable = kwargs.get("mutable") if self.target.takes("mutable") else kwargs.pop("mutable", None)
        rngs = kwargs.get("rngs") if self.target.takes("rngs") else kwargs.pop("rngs", None)
        given = None if rngs is None or isinstance(rngs, nnx.Pytree) else rngs
        if given is not None:
            others = reseeded(others, given)
            if "rngs" in kwargs:
                kwargs["rngs"] = nnx.Rngs(**given) if isinstance(given, Mapping) else nnx.Rngs(given)
        base = flatten(variables["params"])
        self.target.model.with_params(base)
        # From here on paths are strings, as linen has them: '0' is the first of a list.
        bind = lambda rng: Grafts.of(self.method, base, self.method.bind(unflatten(base), adapter, rng=rng))

        call = (bind(None), others, args, kwargs)
        found = self._inspected(call)
        if given is not None or found.drew:
            key = key_of(given, others, stream_arguments(args, kwargs))
            call = (bind(key).with_keys(key, found.inner), others, args, kwargs)
        out, state = with_room(lambda: self.run(*call))
        if mutable is None or mutable is False:
            return out
        chosen = nnx.Not(nnx.Param) if mutable is True or self.target.takes("mutable") else nnx.All(nnx.Not(nnx.Param), mutable)
        return out, {STATE: nnx.filter_state(state, chosen)}

    def _inspected(self, call: tuple[Any, ...]) -> Inspection:
        """What is found of a call, once for all calls of its signature."""
        signature = signature_of(*call)
        if not _hashable(signature):
            return inspect_call(self.run, *call)
        if signature not in self.known:
            self.known[signature] = inspect_call(self.run, *call)
        return self.known[signature]

    def run(self, grafts: Grafts, others: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], trace: str = "") -> tuple[Any, Any]:
        """The outputs of a copy with leaves in it, and its other state afterwards."""
        model = self.target.model.merge(self.target.model.with_params(grafts.params), others)
        change_outputs(model, current_changes())
        grafts.put_on(model, trace)
        if trace:
            record_streams(model)
        out = self.target.call(model, *args, **kwargs)
        return out, nnx.state(model, nnx.Not(nnx.Param))


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:  # static arguments of a class of the user's that cannot be compared
        return False
    return True

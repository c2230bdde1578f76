"""The dense host: any function of parameters, run on merged weights.

The parameters may be any pytree: nested dicts, an NNX state, a registered dataclass. A method that only replaces leaves costs nothing here.
A method with leaves beside its kernels must merge, and then costs as much as full fine-tuning: the gradient of a merged kernel is formed
whole before it is contracted to the adapter.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from jpeft.core.method import Method
from jpeft.hosts.base import Host, dropout_key, has_argument
from jpeft.tree.paths import like


class DenseHost(Host):
    """Runs any function of parameters. It cannot see the function's layers, so it gives a method no layers to wrap."""

    name = "dense"
    takes_any = True

    def recognises(self, target: Any) -> bool:
        """True: any function can be run on merged weights."""
        del target
        return True

    def wrap(self, fn: Callable[..., Any], method: Method) -> Callable[..., Any]:
        """Return ``forward(variables, *args)`` that calls ``fn(params, *args)`` with the adapter bound or merged into the parameters.

        The method takes its random key from the ``rngs`` of the call. `fn` is given them only if it has an argument of that name.

        Raises:
          ValueError: from the first call, with the method's own reason, if the method cannot be merged.
        """
        if method.wraps_layers:
            warnings.warn(
                f"{method.name}: no host knows the layers of this model, so its weights are merged inside every step, which costs as much "
                "as full fine-tuning. None of them ran in it; if it calls a linen module all the same, say host='linen'.",
                stacklevel=5,
            )
        takes_rngs = has_argument(fn, "rngs")

        @functools.wraps(fn)
        def forward(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            adapter = method.from_collections(variables)
            rngs = kwargs.get("rngs") if takes_rngs else kwargs.pop("rngs", None)
            # `bind` draws random numbers where the method does; `merge` never does, and only it can write a change into a weight.
            if method.wraps_layers:
                params = method.merge(variables["params"], adapter)
            else:
                params = method.bind(variables["params"], adapter, rng=dropout_key(rngs))
            # Nobody knows in which dtype the function computes, so its parameters keep theirs.
            return fn(like(params, variables["params"]), *args, **kwargs)

        return forward

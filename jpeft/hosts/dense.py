"""The dense host: any function of parameters, run on merged weights.

Right for every mergeable method and every framework (equinox, haiku, NNX state, a closed model), at the cost of full fine-tuning: the
gradient of a merged kernel is formed whole before it is contracted to the adapter. Methods that only replace leaves pay nothing.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from jpeft.core.method import Method


def wrap(fn: Callable[..., Any], method: Method) -> Callable[..., Any]:
    """``forward(variables, *args)`` that calls ``fn(params, *args)`` with the adapter bound or merged into the parameters.

    A method that draws does so by the ``rngs`` of the call, as in the linen host; `fn` is given them only if it has such an argument.

    Raises:
      ValueError: from the first call, with the method's own reason, if it cannot be merged.
    """
    replaces = not method.wraps_layers
    if not replaces:
        warnings.warn(
            f"{method.name}: this model is not a linen module, so its weights are merged inside every step, which costs as much as full "
            "fine-tuning. Pass a linen model's own `apply`, or host='linen' for a function that calls one.",
            stacklevel=3,
        )
    takes_rngs = _takes(fn, "rngs")

    @functools.wraps(fn)
    def forward(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        adapter = method.from_collections(variables)
        rngs = kwargs.get("rngs") if takes_rngs else kwargs.pop("rngs", None)
        rng = rngs.get("dropout") if isinstance(rngs, Mapping) else rngs
        params = method.bind(variables["params"], adapter, rng=rng) if replaces else method.merge(variables["params"], adapter)
        return fn(params, *args, **kwargs)

    return forward


def _takes(fn: Callable[..., Any], name: str) -> bool:
    """Whether a function has a keyword argument of that name; one that does not say is taken to have it."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())

"""What people pass to `jpeft.wrap` for a linen model, as a function of variables that the linen host can run.

A model, one of its methods, an object around a model that takes parameters by keyword, as the Flax models of transformers do, and any
function that runs linen modules inside.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import errors
from flax import linen as nn

from jpeft.hosts.base import dropout_key, has_argument, innermost
from jpeft.hosts.linen import flax_internals
from jpeft.tree.paths import Params

PARAMS = "params"

# The methods of `nn.Module` that take variables themselves.
_TAKE_VARIABLES = frozenset({"apply", "init", "init_with_output", "lazy_init", "bind", "tabulate", "module_paths"})


def is_linen(target: Any) -> bool:
    """Whether a target is a linen module, an object around one, a method of one of them, or a partial application of these."""
    inner = innermost(target)
    return any(isinstance(each, nn.Module) or _module_in(each) is not None for each in (inner, getattr(inner, "__self__", None)))


def as_apply(fn: Any) -> Callable[..., Any]:
    """What `is_linen` recognises as ``(variables, *args, **kwargs) -> outputs``.

    Raises:
      ValueError: for a module that is bound to variables of its own.
    """
    if isinstance(fn, functools.partial):
        inner = as_apply(fn.func)
        return fn if inner is fn.func else _then(inner, fn.args, fn.keywords)
    owner = getattr(fn, "__self__", None)
    if isinstance(fn, nn.Module):
        return _unbound(fn).apply
    if isinstance(owner, nn.Module):
        name = getattr(fn, "__name__", "")
        return fn if name in _TAKE_VARIABLES else functools.partial(_unbound(owner).apply, method=name)
    return _with_params_keyword(fn) if any(_module_in(each) is not None for each in (fn, owner)) else fn


def module_of(target: Any) -> nn.Module:
    """The linen module itself, where a model is to be read and not run.

    Raises:
      ValueError: for anything else that `is_linen` recognises.
    """
    if isinstance(target, nn.Module):
        return target
    inside = "its linen module, such as model.module" if _module_in(target) is not None else "the model"
    raise ValueError(f"A {type(target).__name__} has no layers that can be read: give {inside}, and the inputs of that module.")


def form_inside(
    fn: Callable[..., Any], params: Params, collections: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[..., Any] | None:
    """A function that runs linen modules inside as ``(variables, *args, **kwargs) -> outputs``; None for one that runs none.

    It may take variables, as ``model.apply`` does, or parameters. Which of them, and whether modules run, is found by running it
    abstractly.
    """
    takes_rngs = has_argument(fn, "rngs")
    given = lambda kwargs: kwargs if takes_rngs else {name: value for name, value in kwargs.items() if name != "rngs"}
    of_variables = lambda variables, *args, **kwargs: fn(variables, *args, **given(kwargs))
    of_params = lambda variables, *args, **kwargs: fn(variables[PARAMS], *args, **given(kwargs))
    failing = []
    for form in (of_variables, of_params):
        ran: set[str] = set()

        def record(next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any, ran: set[str] = ran) -> Any:
            if context.module.scope is not None and flax_internals.collection(context.module, PARAMS):
                ran.add(context.method_name)
            return next_fun(*args, **kwargs)

        def run(params: Params, form: Callable[..., Any] = form) -> None:
            form({**collections, PARAMS: params}, *args, **kwargs)

        try:
            with nn.intercept_methods(record):
                jax.eval_shape(run, params)
        except errors.FlaxError:  # variables and parameters were mistaken for each other
            continue
        except Exception:
            failing += [form] if ran else []
            continue
        if ran:
            return form
    return failing[0] if failing else None


def _module_in(target: Any) -> nn.Module | None:
    """The linen module that an object runs which is called with ``params=``."""
    if isinstance(target, nn.Module) or target is None or isinstance(target, type):
        return None
    module = getattr(target, "module", None)
    return module if isinstance(module, nn.Module) and has_argument(target, PARAMS) else None


def _unbound(module: nn.Module) -> nn.Module:
    if module.scope is not None:
        raise ValueError(
            f"A {type(module).__name__} was given to wrap that is bound to variables, which no method can change: pass the model as it "
            "was before `bind`, or its `apply`."
        )
    return module


def _then(fn: Callable[..., Any], first: tuple[Any, ...], more: Mapping[str, Any]) -> Callable[..., Any]:
    """``fn(variables, *first, *args, **more, **kwargs)``."""
    return lambda variables, *args, **kwargs: fn(variables, *first, *args, **{**more, **kwargs})


def _with_params_keyword(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn(*args, params=...)`` as a function of variables. Its own name for the key of dropout is `dropout_rng`, as in transformers."""
    takes_rngs, takes_key = has_argument(fn, "rngs"), has_argument(fn, "dropout_rng")

    def forward(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        key = dropout_key(kwargs.get("rngs"))
        if not takes_rngs:
            kwargs.pop("rngs", None)
            if takes_key and key is not None:
                kwargs.setdefault("dropout_rng", key)
        # A model with running means takes all collections under the name of its parameters.
        return fn(*args, params=variables if variables.keys() - {PARAMS} else variables[PARAMS], **kwargs)

    return forward

"""One call of an NNX module: the module as a `Layer`, and the method around it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from jpeft.core.layer import Change, Layer, NoProductError
from jpeft.core.method import Method
from jpeft.hosts import products
from jpeft.hosts.arguments import argument_names, bind_by_position
from jpeft.hosts.linear import compute_dtype
from jpeft.hosts.linen.dependence import inputs_used
from jpeft.hosts.linen.named_methods import Traced, belonging
from jpeft.hosts.nnx.flax_internals import can_change
from jpeft.hosts.nnx.layers import is_known, linear_of, run_known, twin
from jpeft.hosts.nnx.patching import LAYER_METHODS, Around, current_record
from jpeft.hosts.taught import linear_of as linear_of_taught
from jpeft.tree.adapters import ADDED
from jpeft.tree.paths import flatten, replace, unflatten


def run_around(
    module: nnx.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], around: Around, leaves: dict[str, Any], key: Any
) -> Any:
    """Run a method of a module, whose leaves have been taken off, with the method around it."""
    args, kwargs = bind_by_position(module, name, args, kwargs)
    effects = [module]
    layer = as_layer(module, name, around, effects, args, kwargs)
    if name not in LAYER_METHODS:
        leaves = _leaves_for(layer, around, leaves, args)
        if not leaves:
            return layer(*args)
    record = current_record()
    if record is not None:
        ran = record.ran.setdefault(around.path, set())
        ran.add(name)
        if ADDED in held_names(around.method, leaves):
            _refuse_several(around, ran - {"attend"})
        record.inner[around.path] = {path: leaf.shape for path, leaf in flatten(leaves).items()}
    expected = _dtypes(layer, around, args)
    if leaves:
        with jax.named_scope(around.scope):
            out = around.method.call(layer, args, leaves, key)
    else:
        out = layer(*args)
    effects.clear()  # what runs later, in a backward pass, does not change the module
    return _narrowed(out, expected)


def _dtypes(layer: Layer, around: Around, args: tuple[Any, ...]) -> Any:
    """What a layer returns on the base's own dtypes, where a trained float32 leaf stands in place of one in half precision; else None."""
    if not around.narrow:
        return None
    base = {name: jax.ShapeDtypeStruct(layer.params[name].shape, dtype) for name, dtype in around.narrow}
    return jax.eval_shape(lambda params: layer.run({**layer.params, **params}, *args), base)


def _narrowed(out: Any, expected: Any) -> Any:
    """Outputs in the dtypes that are expected of them."""
    if expected is None:
        return out
    return jax.tree.map(
        lambda y, like: y.astype(like.dtype) if getattr(y, "dtype", None) != getattr(like, "dtype", None) else y, out, expected
    )


def as_layer(
    module: nnx.Module, name: str, around: Around, effects: list[nnx.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Layer:
    """A module that is about to run as a `Layer`, for middleware that may run it any number of times, on any parameters.

    The first run on the module's own parameters happens in place. Every other run is that of a copy, as the module was before the call, so
    that each of them draws the same random numbers. The module's state is that after the first run, whichever it was.

    Args:
      module: The module, without its leaves, which come back when the call ends. What may run later must hold a copy.
      name: The method that is called.
      around: What goes around the module.
      effects: Holds the module until its state is that after the call.
      args: The positional arguments of the call.
      kwargs: Its keyword arguments.
    """
    if is_known(module, name):
        own = {key: value.get_value() for key, value in vars(module).items() if isinstance(value, nnx.Param)}
        bare = twin(module, own)
        run = lambda params, *inputs, **keywords: run_known(bare, name, params, *inputs, **{**kwargs, **keywords})
        linear = linear_of(bare, name, own, args, kwargs)
        runs = _Runs(own, run, None)
    else:
        runs = _any_module(module, name, effects, kwargs, around.path)
        linear = linear_of_taught(module, runs.own, args, name)
    return Layer(
        run=runs.run,
        params=runs.own,
        path=around.path,
        linear=linear,
        dtype=compute_dtype(getattr(module, "dtype", None), runs.own, args),
        names=_names(module, name),
        keywords=kwargs,
        method=name,
        cached=bool(jax.tree.leaves(nnx.state(module, nnx.Cache))),
        run_changed=runs.run_changed if linear is None else None,
    )


class _Runs(NamedTuple):
    """The parameters of a module and its submodules, and the functions of a `Layer`."""

    own: dict[str, Any]
    run: Callable[..., Any]
    run_changed: Callable[..., Any] | None


def _any_module(module: nnx.Module, name: str, effects: list[nnx.Module], kwargs: Mapping[str, Any], path: str) -> _Runs:
    """What runs a module of any class."""
    graphdef, state, others = nnx.split(module, nnx.Param, ...)
    own = unflatten(flatten(state))

    def pure(keywords: Mapping[str, Any], params: Mapping[str, Any], *inputs: Any) -> tuple[Any, Any]:
        copy = nnx.merge(graphdef, replace(state, flatten(dict(params))), others, copy=True)
        out = getattr(copy, name)(*inputs, **{**kwargs, **keywords})
        return out, nnx.state(copy, nnx.Not(nnx.Param))

    def keep(state: Any) -> None:
        """Keep the effects of the first run on the module's state."""
        if effects and can_change(effects[0]):
            nnx.update(effects.pop(), state)

    def run(params: Mapping[str, Any], *inputs: Any, **keywords: Any) -> Any:
        # `is`: equal parameters that went through a transformation are other arrays, which the module does not hold.
        if params is own and effects and can_change(effects[0]):
            return getattr(effects.pop(), name)(*inputs, **{**kwargs, **keywords})
        out, state = pure(keywords, params, *inputs)
        keep(state)
        return out

    def run_changed(params: Mapping[str, Any], changes: Mapping[str, Change], *inputs: Any, **keywords: Any) -> Any:
        try:
            out, state = products.run_changed(functools.partial(pure, keywords), dict(params), changes, *inputs)
        except NoProductError as error:
            record = current_record()
            if record is not None:
                record.costly["/".join(filter(None, (path, error.name)))] = error.reason
            raise
        keep(state)
        return out

    return _Runs(own, run, run_changed)


def _refuse_several(around: Around, names: set[str]) -> None:
    """Refuse leaves that are added to a module of which a call runs several methods: nothing says to which of them they belong."""
    if len(names) > 1:
        raise ValueError(
            f"{around.method.name} adds to the module '{around.path}', of which this call runs several methods: "
            f"{', '.join(sorted(names))}. Nothing tells which of them it should change: choose a module inside or around it as the target."
        )


def _leaves_for(layer: Layer, around: Around, leaves: dict[str, Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """The leaves that a method which is not `__call__` is to be changed by, by what it reads and what it returns."""
    try:
        used, outputs = inputs_used(lambda params: layer.run({**layer.params, **params}, *args), dict(layer.params))
        call = Traced({path.partition("/")[0] for path in used}, outputs)
    except Exception:  # a method that looks at values cannot be traced
        call = Traced(set(layer.params), None)
    return belonging(around.method, leaves, layer.params, args, call)


def held_names(method: Method, leaves: Mapping[str, Any]) -> set[str]:
    """The names of the parameters that leaves stand beside, and `ADDED` for those that a module is given."""
    return {name for part in leaves.values() for name in part} if method.parts else set(leaves)


def _names(module: nnx.Module, name: str) -> tuple[str, ...]:
    try:
        return argument_names(type(module), name)
    except (TypeError, ValueError):
        return ()

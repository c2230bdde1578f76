"""Run a function with other products in the place of some of its own."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from jpeft.core.layer import Change, NoProductError
from jpeft.hosts.products.find import Use, axis_roles, calls, loop_counts, varying_axes, walk, whole_views
from jpeft.hosts.products.linear import NotLinear, layer_of
from jpeft.hosts.products.traced import trace
from jpeft.hosts.products.view import View, through
from jpeft.tree.paths import Path


def run_changed(fn: Callable[..., Any], params: Any, changes: Mapping[Path, Change], *args: Any) -> Any:
    """``fn(params, *args)`` with each product of some parameters run by a `Change`; all else is as it is.

    Args:
      fn: A function of parameters and of any other arguments. It is traced once more.
      params: A tree of arrays.
      changes: By the path of a parameter.
      *args: Trees of arrays and of values that are none.

    Returns:
      What `fn` returns.

    Raises:
      NoProductError: if a parameter is used in another way than in a product; it names the parameter and its use.

    >>> import jax.numpy as jnp
    >>> from jpeft.core.layer import Change
    >>> from jpeft.tree.kernels import KernelAxes
    >>> twice = Change(KernelAxes((), (0,), (1,)), lambda layer, x: 2 * layer(x))
    >>> run_changed(lambda params, x: x @ params["w"] + 1, {"w": jnp.eye(2)}, {"w": twice}, jnp.ones((1, 2)))
    Array([[3., 3.]], dtype=float32)
    """
    traced = trace(fn, params, *args)
    views = whole_views(traced, changes.keys())
    _check(traced.closed.jaxpr, views, changes)
    kernels = {path: array for path, array in zip(traced.paths, traced.arrays, strict=True) if path is not None}
    return traced.rebuild(_Run(changes, kernels).evaluate(traced.closed.jaxpr, traced.closed.consts, traced.arrays, views))


def _check(jaxpr: Any, views: Sequence[View | None], changes: Mapping[Path, Change]) -> None:
    """Refuse parameters that are used in another way than in a product, and parameters without a product."""
    met: set[Path] = set()

    def visit(use: Use, scopes: str) -> None:
        del scopes
        if axis_roles(use) is None or isinstance(use.eqn.invars[1 - use.position], core.Literal):
            raise NoProductError(use.view.path, f"it is also used by `{use.eqn.primitive.name}`")
        met.add(use.view.path)

    walk(jaxpr, views, visit)
    for path in changes:
        if path not in met:
            raise NoProductError(path, "no product with it is computed")


class _Run:
    """Evaluates jaxprs."""

    def __init__(self, changes: Mapping[Path, Change], kernels: Mapping[Path, jax.Array]):
        self.changes, self.kernels = changes, kernels

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], views: Sequence[View | None]) -> list[Any]:
        """The outputs of a jaxpr."""
        return self._evaluate(jaxpr, consts, args, views)[0]

    def _evaluate(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], views: Sequence[View | None]
    ) -> tuple[list[Any], list[View | None]]:
        values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        known = {var: view for var, view in zip(jaxpr.invars, views, strict=True) if view is not None}
        spread: dict[Any, tuple[int, ...]] = {}
        read = lambda var: var.val if isinstance(var, core.Literal) else values[var]
        view_of = lambda var: None if isinstance(var, core.Literal) else known.get(var)
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "broadcast_in_dim":
                spread[eqn.outvars[0]] = varying_axes(eqn)
            mine = [view_of(var) for var in eqn.invars]
            # What the model calls its parts stays readable in profiles.
            scopes = str(eqn.source_info.name_stack)
            with jax.named_scope(scopes) if scopes else contextlib.nullcontext():
                out, seen = self._one(eqn, [read(var) for var in eqn.invars], mine, spread, read)
            values |= dict(zip(eqn.outvars, out, strict=True))
            known |= {var: view for var, view in zip(eqn.outvars, seen, strict=True) if view is not None}
        return [read(var) for var in jaxpr.outvars], [view_of(var) for var in jaxpr.outvars]

    def _one(
        self, eqn: Any, operands: list[Any], mine: list[View | None], spread: Mapping[Any, tuple[int, ...]], read: Callable[[Any], Any]
    ) -> tuple[list[Any], list[View | None]]:
        """The results of one equation, and which of them are views."""
        none: list[View | None] = [None] * len(eqn.outvars)
        if not any(mine):
            return _bind(eqn, operands), none
        called = calls(eqn)
        if called is not None:
            return self._call(eqn, called, operands, mine)
        for position, view in enumerate(mine):
            if view is None:
                continue
            after = through(eqn, position, view, spread, read)
            if after is not None:
                return _bind(eqn, operands), [after]
        uses = [Use(eqn, position, view) for position, view in enumerate(mine) if view is not None]
        if len(uses) > 1:
            paths = " and ".join(sorted({view.path for view in mine if view is not None}))
            raise NoProductError(paths, "they are multiplied with each other")
        return [self._changed(uses[0], operands)], none

    def _changed(self, use: Use, operands: list[Any]) -> jax.Array:
        """A product, run by its change."""
        path = use.view.path
        change = self.changes[path]
        try:
            layer = layer_of(use, self.kernels[path], change.axes)
            y = change.run(layer, operands[1 - use.position])
        except NotLinear as error:
            raise NoProductError(path, str(error)) from error
        return y.astype(use.eqn.outvars[0].aval.dtype)

    def _call(self, eqn: Any, called: Sequence[Any], operands: list[Any], mine: list[View | None]) -> tuple[list[Any], list[View | None]]:
        """An equation that runs a jaxpr in which a parameter may meet activations."""
        name, params = eqn.primitive.name, eqn.params
        none: list[View | None] = [None] * len(eqn.outvars)
        body = called[0]
        consts = next((value.consts for value in params.values() if isinstance(value, core.ClosedJaxpr)), [])
        if name == "scan" and not any(mine[loop_counts(eqn)[0] :]):
            return self._scan(eqn, operands, mine), none
        if name == "cond":
            branches = [self._function(branch.jaxpr, branch.consts, mine[1:]) for branch in params["branches"]]
            return list(jax.lax.switch(operands[0], branches, *operands[1:])), none
        if name in ("checkpoint", "remat", "remat2"):
            run = self._function(body, consts, mine)
            return list(jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])(*operands)), none
        if name in ("scan", "while", "shard_map") or len(body.invars) != len(operands) or len(body.outvars) != len(none):
            path = next(view.path for view in mine if view is not None)
            raise NoProductError(path, f"it is used inside a `{name}` that goes over it")
        # A call: `jit`, or a function with a derivative of its own. Of the latter the parts are differentiated instead.
        return self._evaluate(body, consts, operands, mine)

    def _scan(self, eqn: Any, operands: list[Any], mine: list[View | None]) -> list[Any]:
        """A loop whose body uses a parameter as it is, such as the kernel of a recurrent cell."""
        params, closed = eqn.params, eqn.params["jaxpr"]
        consts, carries = loop_counts(eqn)
        views = mine[:consts] + [None] * (len(operands) - consts)

        def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            out = self.evaluate(closed.jaxpr, closed.consts, [*operands[:consts], *carry, *x], views)
            return out[:carries], out[carries:]

        carry, ys = jax.lax.scan(
            body,
            operands[consts : consts + carries],
            operands[consts + carries :],
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys]

    def _function(self, jaxpr: Any, consts: Sequence[Any], views: Sequence[View | None]) -> Callable[..., list[Any]]:
        return lambda *args: self.evaluate(jaxpr, consts, args, views)


def _bind(eqn: Any, operands: list[Any]) -> list[Any]:
    """The results of an equation as it is."""
    given = eqn.primitive.get_bind_params(eqn.params)
    functions, params = given if isinstance(given, tuple) else ((), given)  # jax 0.10 gives the functions apart
    out = eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]

"""The NNX host: a copy of the model, with patched classes.

NNX has no interceptors. So each call runs on a copy of the model, made from its graph: in the copy, a module that holds leaves of a method
gets a class of its own (`jpeft.hosts.nnx.patching`), and the leaves stand in it as variables, beside the kernel and of the kernel's type.
`nnx.scan`, `nnx.vmap`, `nnx.remat` and `nnx.jit` treat them like the kernel, whatever filters a model gives for its own variables. The
user's objects are never touched.

Why not a new module around each layer: it would change the paths, and with them every filter and checkpoint that goes by paths.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from jpeft.core.method import Method
from jpeft.hosts import base
from jpeft.hosts.nnx.outputs import changing
from jpeft.tree.kernels import KernelAxes
from jpeft.tree.paths import Params


class NNXHost(base.Host):
    """Models of `flax.nnx`: modules, graphdefs, and bound methods of modules."""

    name = "nnx"
    runs_jitted = True

    def recognises(self, target: Any) -> bool:
        """Whether the target is a module, a graphdef, a method of a module, or a function with its first argument, a module, filled in."""
        nnx = _nnx()
        while nnx is not None:
            if isinstance(target, nnx.Module | nnx.GraphDef) or isinstance(getattr(target, "__self__", None), nnx.Module):
                return True
            if not isinstance(target, functools.partial):
                return False
            if target.args and isinstance(target.args[0], nnx.Module):
                return True
            target = target.func
        return False

    def unwrap(self, params: Params) -> Params:
        """Return the parameters, those variables that are an `nnx.Param`, of a module or of a state that holds others too."""
        if _nnx() is None:
            return params
        from jpeft.hosts.nnx.states import params_of

        return params_of(params)

    def callable_of(self, target: Any) -> Callable[..., Any]:
        """Return the call of a copy of the model as it is now: later changes of the user's object do not reach the wrapped function."""
        from jpeft.hosts.nnx.targets import Target

        return Target.of(target)

    def wrap(self, fn: Any, method: Method) -> Callable[..., Any]:
        """Return ``forward(variables, *args, **kwargs)``: a copy of the model, with the method's `call` around all layers with leaves.

        `forward` takes two arguments more than the model does. ``mutable=`` is a filter of NNX, or True: the state that it selects is
        returned as it is after the call, ``(outputs, {"state": state})``, which is how running means and the counters of random streams
        go from one call to the next: ``collections={"state": state}``. ``rngs=`` is a dict of random keys, or one key: it seeds the random
        streams of the copy anew.
        """
        from jpeft.hosts.nnx.running import Forward
        from jpeft.hosts.nnx.targets import Target

        return Forward(fn if isinstance(fn, Target) else Target.of(fn), method)

    def kernel_axes(self, model: Any, params: Params, *args: Any, **kwargs: Any) -> tuple[tuple[str, KernelAxes], ...]:
        """Return the geometry of all kernels, by the operations that consume them."""
        from jpeft.hosts.nnx import reading

        return reading.kernel_axes(model, self.unwrap(params), *args, **kwargs)

    def inputs_of(self, model: Any, params: Params, name: str, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        """Return the inputs of the modules called `name`."""
        from jpeft.hosts.nnx import reading

        return reading.inputs_of(model, self.unwrap(params), name, *args, **kwargs)

    def map_outputs(self, fn: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
        """Return `fn` with `change` applied to what every module returns that runs in a model wrapped by this host."""

        @functools.wraps(base.innermost(fn))
        def run(*args: Any, **kwargs: Any) -> Any:
            with changing(change):
                return fn(*args, **kwargs)

        return run


def _nnx() -> ModuleType | None:
    """`flax.nnx`, if the program has imported it: nothing can belong to it otherwise."""
    return sys.modules.get("flax.nnx")

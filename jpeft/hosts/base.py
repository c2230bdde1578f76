"""The contract of a host.

A host connects methods to the models of one framework. Methods see parameter trees and layers only; a host knows how the framework keeps
its parameters, where a layer begins and ends, and which parameter acts as a layer's kernel.

A host is one file in this folder with one subclass of `Host`; `jpeft.hosts.registry` finds the class, and there is no list to edit. Only
`recognises` and `wrap` must be defined. `docs/guides/adding_a_host.md` goes through the file step by step.
"""

import abc
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax

from jpeft.core.method import Method
from jpeft.tree.kernels import KernelAxes
from jpeft.tree.paths import Params

DROPOUT = "dropout"  # name of the random stream that models use; a method draws numbers exactly where the model's dropout does


class Host(abc.ABC):
    """A framework as methods see it. A host has no state; all its functions are pure.

    Attributes:
      name: Name of the host, for ``jpeft.wrap(fn, host=name)``.
      takes_any: True for a host that can run any function of parameters. Hosts of one framework are asked first.
      runs_jitted: Whether what the framework itself has jitted runs with a method: its traces are found by the modules, with all in them.
    """

    name: ClassVar[str]
    takes_any: ClassVar[bool] = False
    runs_jitted: ClassVar[bool] = False

    @abc.abstractmethod
    def recognises(self, target: Any) -> bool:
        """Whether `target`, a model or a function that runs one, belongs to the framework.

        Another host may be asked next, so the answer must be quick, and False if in doubt. A host of an optional framework must not import
        it here: where ``sys.modules`` lacks the framework, the target cannot belong to it.
        """

    def callable_of(self, target: Any) -> Callable[..., Any]:
        """What `recognises` accepts as a function that `wrap` takes: a model becomes the function that runs it.

        Raises:
          ValueError: for a target that cannot be run with other parameters.
        """
        return target

    def form_inside(
        self, fn: Callable[..., Any], params: Params, collections: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[..., Any] | None:
        """A function that no host recognises in the form that `wrap` takes, if it runs models of the framework; else None.

        It is asked when the function is first called.

        Args:
          fn: The function, of parameters or of the framework's variables.
          params: The parameters of the call.
          collections: The model's other collections, such as running means.
          args: The other arguments.
          kwargs: The keyword arguments.
        """
        del fn, params, collections, args, kwargs
        return None

    @abc.abstractmethod
    def wrap(self, fn: Callable[..., Any], method: Method) -> Callable[..., Any]:
        """Return ``forward(variables, *args, **kwargs)``: the model with the method applied.

        `forward` takes the adapter out of ``variables`` (`Method.from_collections`), binds it to ``variables["params"]``
        (`Method.bind`), runs `fn`, and runs `Method.call` around every layer that has leaves of the method. It must

        * read a layer's leaves from the layer's own parameters, under the key `jpeft.tree.adapters.GRAFT`, so that they follow the kernel
          through the framework's loops, recomputation and traces;
        * run each layer as a function of its parameters (`Layer.run`);
        * give a method a random key exactly where the model itself may draw numbers, else None;
        * raise an error for leaves that no layer reads;
        * pass all other arguments through, and return what `fn` returns, without leaves of the method in it.
        """

    def unwrap(self, params: Params) -> Params:
        """Return the parameters without the framework's own wrappers, as a tree whose leaves are arrays.

        Every host is given all parameters, so one that finds no wrapper of its framework returns `params` itself.
        """
        return params

    def kernel_axes(self, model: Any, params: Params, *args: Any, **kwargs: Any) -> tuple[tuple[str, KernelAxes], ...]:
        """Return a rule ``(regex of its path, geometry)`` for each kernel of a model, read off the model's layers without running it.

        Args:
          model: A model that `recognises` accepts.
          params: Its parameters, or their shapes.
          *args: Example inputs, or their shapes.
          **kwargs: Further arguments of the model.

        Raises:
          ValueError: if the host cannot tell.
        """
        del params, args, kwargs
        raise ValueError(
            f"No host can read the geometry of kernels off a {type(model).__name__}. "
            "Give it by rules: axes=((regex, jpeft.KernelAxes(stack=(), inputs=(0,), outputs=(1, 2))),)."
        )

    def inputs_of(self, model: Any, params: Params, name: str, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        """Run a model once and return the arrays that each module called `name` is given, by the path of the module.

        What a module is given in several calls is that of its first call. Modules that the framework runs in a loop over stacked
        parameters share a path; their inputs are stacked like their parameters.

        Raises:
          ValueError: if the host cannot tell.
        """
        del params, name, args, kwargs
        raise ValueError(f"No host can record what the modules of a {type(model).__name__} are given.")

    def map_outputs(self, fn: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
        """Return `fn` with `change` applied to the outputs of every module of the framework that runs inside.

        `fn` may be any function. One that runs no modules of the framework does what it did before.
        """
        del change
        return fn


def innermost(fn: Any) -> Any:
    """The function inside any number of `functools.partial`."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def dropout_key(rngs: Any) -> jax.Array | None:
    """The key of dropout in the ``rngs`` of a call, which are a dict of streams or one key for all of them."""
    return rngs.get(DROPOUT) if isinstance(rngs, Mapping) else rngs


def has_argument(fn: Callable[..., Any], name: str) -> bool:
    """Whether a function takes a keyword argument of that name. A function without a signature is taken to have it."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())

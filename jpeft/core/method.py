"""The contract of a fine-tuning method.

A `Method` turns the parameters of a pretrained model into a *frozen base* and a *small trained pytree*, the adapter. It is made of pure
functions and nothing else; whatever framework the model is written in, methods see three things only:

1. **The parameter tree**, by path. `init` looks at it and builds the adapter. `bind` puts the adapter and the base together. `merge`
   writes the adapter into the base for good.
2. **One layer at a time.** `call` is middleware: it receives a `Layer`, the layer's inputs and the leaves that `bind` put beside the
   layer's own parameters, and returns the layer's outputs. LoRA is ``layer(x) + s * (x @ a) @ b``, a bottleneck adapter is
   ``y + up(act(down(y)))`` with ``y = layer(x)``, IA3 is ``layer(x) * l``. A method that merely replaces leaves needs no `call` at all and
   so works in any framework.
3. **The adapter**, a nested dict that mirrors the base tree (`jpeft.tree` says what may stand where).

Two methods are the same if they were made by the same factory from the same options; they hash alike, so a jitted function that takes a
`Peft` is compiled once. This is why a factory's options must be hashable (dicts and lists are frozen for you) and why the functions of a
hand-made `Method` should be defined once, not anew at every call.

Rules that every method keeps (``tests/test_conformance.py`` checks them):

* `init` works on abstract parameters (`jax.eval_shape`) and never looks at a value it does not need.
* `bind` and `call` never change the dtype of a base leaf or of an output.
* `merge` gives the same tree as the base and the same outputs as the bound model, or refuses with the reason.
* The base is never an argument of `grad`. Frozen things *inside* the adapter are named by `labels`.
* Randomness comes from the `rng` of `bind` and `call` alone. It is None at evaluation and in `merge`, which then agree.

Training may take *stages*: gates first and a fixed mask afterwards, a whole layer first and its best neurons afterwards. A method knows its
later stages (`Stage`), each with a pure function from what was trained to the next method and its adapter. Whoever runs the loop calls
`jpeft.advance` between them and builds optimizer and step anew; what happens there is the method's own affair.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ParamSpec, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jpeft.tree.adapters import ADDED, Adapter, graft, split
from jpeft.tree.head import head_leaves
from jpeft.tree.kernels import KernelAxes
from jpeft.tree.paths import Params, copy, flatten, unflatten

P = ParamSpec("P")

TRAIN, FREEZE = "train", "freeze"


@runtime_checkable
class InitFn(Protocol):
    """``(key, params, *, stats=None) -> adapter``. Pure; works on `jax.ShapeDtypeStruct` parameters under `jax.eval_shape`."""

    def __call__(self, key: jax.Array, params: Params, *, stats: Any = None) -> Adapter: ...


@runtime_checkable
class BindFn(Protocol):
    """``(params, adapter, *, rng=None) -> params`` with the adapter's leaves in place of, or beside, the base's."""

    def __call__(self, params: Params, adapter: Adapter, *, rng: jax.Array | None = None) -> Params: ...


@runtime_checkable
class CallFn(Protocol):
    """``(layer, inputs, leaves, rng) -> outputs``: middleware around one layer. `rng` is None where nothing may be random."""

    def __call__(self, layer: "Layer", inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any: ...


@runtime_checkable
class MergeFn(Protocol):
    """``(params, adapter) -> params``: the base's tree with the change written in, or a ValueError with the reason."""

    def __call__(self, params: Params, adapter: Adapter) -> Params: ...


@runtime_checkable
class LabelsFn(Protocol):
    """``adapter -> labels``: the same tree with ``"train"``, ``"freeze"`` or the name of a parameter group at each leaf."""

    def __call__(self, adapter: Adapter) -> Any: ...


@runtime_checkable
class PenaltyFn(Protocol):
    """``adapter -> scalar`` that is added to the loss."""

    def __call__(self, adapter: Adapter) -> jax.Array: ...


@runtime_checkable
class ChangedFn(Protocol):
    """``(params, adapter) -> int``: how many scalars of the base take another value once merged or bound."""

    def __call__(self, params: Params, adapter: Adapter) -> int: ...


@runtime_checkable
class ShapesFn(Protocol):
    """``(params, adapter) -> shapes``: what an adapter read from disk must look like on this base, or a ValueError with what is wrong.

    Only a method needs it whose `init` lets the *values* of its statistics decide how large the leaves are: FishMask knows the number of
    weights it trains, but only the data says how many of them lie in which tensor. For all others it is what `init` makes.
    """

    def __call__(self, params: Params, adapter: Adapter) -> Adapter: ...


@runtime_checkable
class FoldFn(Protocol):
    """``(params, adapter) -> (method, adapter)``: the same model, with what only training needs computed once and left out."""

    def __call__(self, params: Params, adapter: Adapter) -> "tuple[Method, Adapter]": ...


@runtime_checkable
class AdvanceFn(Protocol):
    """``(params, adapter, *, key, stats=None) -> (method, adapter)``: the method of the next stage, and the adapter it goes on from.

    Pure. It is given the base and what was trained, and may look at values: how many entries of a leaf go on can depend on them. The method
    that it returns is an ordinary one, made by a factory, so that a checkpoint of a later stage is loaded like any other adapter.
    """

    def __call__(self, params: Params, adapter: Adapter, *, key: jax.Array, stats: Any = None) -> "tuple[Method, Adapter]": ...


@dataclasses.dataclass(frozen=True)
class Stage:
    """A later stage of training, and how to get there from the one before it.

    Attributes:
      name: What it is called in logs.
      share: Its share of the training steps, counted from the beginning of the method's present stage, which takes what the others leave.
      advance: Makes the method and the adapter of this stage.
      needs: Statistics of the current model that `advance` must be given as ``stats``, as in `Method.needs`; None for none.
      restart: Whether the learning rate begins its course anew, as in a training of its own. Otherwise the run's schedule goes on.
    """

    name: str
    share: float
    advance: AdvanceFn
    needs: str | None = None
    restart: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    """How a parameter group, a label of its own in `labels`, is optimised where the user does not say otherwise.

    Attributes:
      rate: Its learning rate as a multiple of the others'.
      constant: A learning rate of its own, the same at every step, and then Adam without weight decay, whatever optimises the others.
      clip: With `constant`: largest global norm of the group's gradient; None for no clipping.
    """

    rate: float = 1.0
    constant: float | None = None
    clip: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class Linear:
    """What is linear about a layer: the parameter that acts as its kernel, its geometry, and how a low-rank kernel is applied.

    Attributes:
      name: Name of the parameter, ``"kernel"`` or ``"embedding"``.
      axes: Its geometry inside the layer (under `nn.scan` the stack axis is gone by then).
      branch: ``(x, a, b) -> y``, equal to the layer without its bias run on the kernel ``a b``, computed as ``(x a) b``.
      narrow: ``(x, kernel) -> y``, the layer without its bias on a kernel with another number of outputs, which are the last axis of y;
        None for a layer whose outputs have several axes, or are not computed so.
    """

    name: str
    axes: KernelAxes
    branch: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    narrow: Callable[[jax.Array, jax.Array], jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer as middleware sees it.

    Attributes:
      run: ``(params, *inputs) -> outputs``, a pure function: running the layer on other parameters is how the merged view of LoRA works.
        Keyword arguments exchange those of the call.
      params: The layer's own parameters by name, e.g. ``{"kernel": ..., "bias": ...}``.
      path: Path of the module, '/'-joined. Layers under one `nn.scan` share theirs.
      linear: The layer's geometry, or None where it is not known to be linear in one parameter.
      dtype: The dtype that the layer computes in, given its inputs.
      names: What the layer calls its inputs, in their order; empty where the host cannot tell.
      keywords: Arguments of this call that the layer takes by name only. ``layer(*inputs, name=value)`` runs it with another value.
      method: The module's method that is called: ``"__call__"``, or ``"attend"`` where an embedding gives scores of its rows.
      cached: Whether the module goes on from a cache of keys and values that an earlier call has made.
    """

    run: Callable[..., Any]
    params: Mapping[str, Any]
    path: str
    linear: Linear | None = None
    dtype: Any = jnp.float32
    names: tuple[str, ...] = ()
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    method: str = "__call__"
    cached: bool = False

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the layer as it is."""
        return self.run(self.params, *inputs, **keywords)

    @property
    def beneath(self) -> tuple[dict[str, Any], ...]:
        """The leaves of other middlewares between this one and the layer, the closest to the layer first."""
        return tuple(own["leaves"] for own in self.params.values() if isinstance(own, Mapping) and own.keys() == {"leaves", "rng"})

    def shape(self, *inputs: Any) -> Any:
        """Shapes and dtypes of the outputs for these inputs, of which the first is an array; nothing runs."""
        x, *rest = inputs
        return jax.eval_shape(lambda params, x: self.run(params, x, *rest), dict(self.params), x)

    def through(self, call: CallFn, name: str, leaves: dict[str, Any], rng: jax.Array | None) -> "Layer":
        """This layer with a middleware around it, as a layer again, so that another middleware can go around both.

        The leaves become part of the new layer's `params`, which keeps its `run` a function of all that may be differentiated.
        """
        inner = self

        def run(params: Mapping[str, Any], *inputs: Any, **keywords: Any) -> Any:
            own = {key: value for key, value in params.items() if key != name}
            mine = params[name]
            # `is`: unchanged parameters stay the very object that lets the host run the layer in place.
            below = dataclasses.replace(inner, params=inner.params if _same(own, inner.params) else own)
            if keywords:
                run = functools.partial(inner.run, **keywords)
                below = dataclasses.replace(below, run=run, keywords={**inner.keywords, **keywords})
            return call(below, inputs, mine["leaves"], mine["rng"])

        return dataclasses.replace(self, run=run, params={**self.params, name: {"leaves": leaves, "rng": rng}})


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[key] is b[key] for key in a)


def passthrough(layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
    """The default `call`: the layer, unchanged."""
    del leaves, rng
    return layer(*inputs)


def graft_adapter(params: Params, adapter: Adapter, *, rng: jax.Array | None = None) -> Params:
    """The default `bind`: `jpeft.tree.graft`."""
    del rng
    return graft(params, adapter)


def refuse(params: Params, adapter: Adapter) -> Params:
    """The default `merge`: it says that there is none.

    Raises:
      ValueError: always.
    """
    del params, adapter
    raise ValueError("This method defines no merge: keep using it through jpeft.wrap.")


def trainable(adapter: Adapter) -> Any:
    """The default `labels`: everything in the adapter is trained."""
    return jax.tree.map(lambda _: TRAIN, adapter)


def no_penalty(adapter: Adapter) -> jax.Array:
    """The default `penalty`: none."""
    del adapter
    return jnp.zeros(())


def touched(params: Params, adapter: Adapter) -> int:
    """The default `changed`: all scalars of every base leaf that is replaced or has leaves beside it."""
    replaced, beside, _ = split(params, adapter)
    base = flatten(params)
    return sum(base[path].size for path in replaced.keys() | beside.keys())


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A fine-tuning method: a name, options, and pure functions. Only `init` is required.

    Attributes:
      init: Builds the adapter from a key and the base.
      bind: Puts the base and the adapter together.
      call: Middleware around each layer that has leaves of this method.
      merge: Writes the adapter into the base.
      labels: Names what in the adapter is trained.
      penalty: Added to the loss.
      changed: Counts the base scalars that take another value.
      needs: What `init` must be given as ``stats``: "fisher" for `jpeft.stats.fisher` of the training data, "labels" for the token ids of
        each class label, "key_values" for `jpeft.stats.key_values` of the option `tokens`, or None. The trainer makes it.
      shapes: The shapes of an adapter on a base, for a method whose `init` alone does not tell; None where it does.
      fold: Reduces the adapter to what inference needs, for methods that train more than that (a reparametrised prefix); None for others.
      stages: The stages of training still to come; `jpeft.advance` moves on to the first of them. Empty for a method that has no more.
      groups: How the parameter groups named by `labels` are optimised, as pairs of label and `Group`.
      reduces: Whether the adapter's gradient is worked out of larger ones: a few entries of a weight's, say, or a sum over many places. On
        a mesh each part of the batch then does that before anything is summed over devices (`jpeft.sharding.by_example`).
      name: Name of the method, and of its collection in `Peft.variables`.
      options: The options it was made with, as sorted pairs; None for a method made by hand.
      parts: The methods of a `chain`, by name, in order; empty for a simple method.

    Example, a method that trains a scale for every output of the layers called ``out``:

    >>> import jax.numpy as jnp
    >>> from jpeft import Method, unflatten, flatten
    >>> def init(key, params, *, stats=None):
    ...     kernels = {path: leaf for path, leaf in flatten(params).items() if path.endswith("out/kernel")}
    ...     return unflatten({f"{path}/scale": jnp.ones(kernel.shape[-1:]) for path, kernel in kernels.items()})
    >>> def call(layer, inputs, leaves, rng):
    ...     return layer(*inputs) * leaves["kernel"]["scale"]
    >>> Method(name="output_scale", init=init, call=call).name
    'output_scale'
    """

    init: InitFn
    bind: BindFn = graft_adapter
    call: CallFn = passthrough
    merge: MergeFn = refuse
    labels: LabelsFn = trainable
    penalty: PenaltyFn = no_penalty
    changed: ChangedFn = touched
    needs: str | None = None
    shapes: ShapesFn | None = None
    fold: FoldFn | None = None
    stages: tuple[Stage, ...] = ()
    groups: tuple[tuple[str, Group], ...] = ()
    reduces: bool = False
    name: str = "custom"
    options: tuple[tuple[str, Hashable], ...] | None = None
    parts: tuple[tuple[str, "Method"], ...] = ()

    def _key(self) -> Hashable:
        if self.parts:
            return (self.name, self.parts)
        if self.options is not None:
            return (self.name, self.options)
        functions = (self.init, self.bind, self.call, self.merge, self.labels, self.penalty, self.changed, self.shapes, self.fold)
        return (self.name, functions, self.needs, self.stages, self.groups)

    def __eq__(self, other: object) -> bool:
        """Equal for the same factory and options; a hand-made method equals another one made of the same functions."""
        return isinstance(other, Method) and self._key() == other._key()

    def __hash__(self) -> int:
        """Consistent with equality."""
        return hash(self._key())

    def __repr__(self) -> str:
        """The call that makes it."""
        if self.parts:
            return f"jpeft.chain({', '.join(f'{name}={part!r}' for name, part in self.parts)})"
        if self.options is None:
            return f"jpeft.Method(name={self.name!r})"
        return f"jpeft.{self.name}({', '.join(f'{k}={v!r}' for k, v in self.options)})"

    def replace(self, **changes: Any) -> "Method":
        """A copy with some functions exchanged. It is a hand-made method then: equal to others with the same functions, not by options."""
        return dataclasses.replace(self, **({"options": None} | changes))

    def config(self) -> dict[str, Any]:
        """The method as plain data: ``{"method": name, **options}``; `jpeft.make` builds it again.

        Raises:
          ValueError: for a method made by hand, which only its own code can build.
        """
        if self.parts:
            return {"method": "chain", "parts": {name: part.config() for name, part in self.parts}}
        if self.options is None:
            raise ValueError(f"The method '{self.name}' was made by hand and has no configuration: pass the Method itself, method=...")
        return {"method": self.name, **{key: thaw(value) for key, value in self.options}}

    def expected(self, params: Params, adapter: Adapter) -> Adapter:
        """The shapes that an adapter must have on this base: those that `init` makes, unless the method says otherwise.

        Raises:
          ValueError: if the method does not fit the base, or, where it can tell so itself, the adapter does not.
        """
        return jax.eval_shape(self.init, jax.random.key(0), params) if self.shapes is None else self.shapes(params, adapter)

    # --- the adapter as collections -----------------------------------------------------------------------------------------------

    def collections(self, adapter: Adapter) -> dict[str, Any]:
        """The adapter as variable collections: one named after the method, or one for each part of a chain."""
        return {name: adapter[name] for name, _ in self.parts} if self.parts else {self.name: adapter}

    def adapter(self, variables: Mapping[str, Any]) -> Adapter:
        """The inverse of `collections`.

        Raises:
          ValueError: if a collection is missing.
        """
        names = [name for name, _ in self.parts] or [self.name]
        missing = [name for name in names if name not in variables]
        if missing:
            raise ValueError(
                f"The variables lack the collection {', '.join(map(repr, missing))} of {self!r}; they hold {sorted(variables)}. "
                "Call the wrapped function with peft.variables."
            )
        return {name: variables[name] for name in names} if self.parts else variables[self.name]


# --- making methods -----------------------------------------------------------------------------------------------------------------


def factory(fn: Callable[P, Method]) -> Callable[P, Method]:
    """Decorate a function of keyword options that returns a `Method`: gives the result its name and options, and checks the options.

    The options become hashable: a dict a tuple of pairs, a list a tuple. The decorated function receives them so.

    Raises:
      ValueError: from the factory, for an option that it does not have.
    """
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def make(*args: P.args, **options: P.kwargs) -> Method:
        unknown = [name for name in options if name not in signature.parameters]
        if unknown or args:
            given = f"option {unknown[0]!r}" if unknown else "positional arguments"
            defaults = ", ".join(str(p).split(": ")[0] + f"={p.default!r}" for p in signature.parameters.values())
            raise ValueError(f"{fn.__name__} has no {given}. Its options and defaults are: {defaults}.")
        bound = signature.bind(**options)
        bound.apply_defaults()
        frozen = {name: freeze(value) for name, value in bound.arguments.items()}
        method = fn(**frozen)  # pyright: ignore[reportCallIssue]
        return dataclasses.replace(method, name=fn.__name__, options=tuple(sorted(frozen.items(), key=lambda item: item[0])))

    return make


def with_head(init: InitFn, head: str | None) -> InitFn:
    """An `init` whose adapter also holds the task head: a head is made fresh for its task, so whatever else is trained, it is too.

    Args:
      init: The method's own init. A leaf that it replaces already is left to it.
      head: ``"auto"`` for a head under one of the usual names, a regex, or None.
    """

    def init_fn(key: jax.Array, params: Params, *, stats: Any = None) -> Adapter:
        adapter = init(key, params, stats=stats)
        taken = flatten(adapter)
        leaves = {path: copy(leaf) for path, leaf in head_leaves(params, head).items() if path not in taken}
        return unflatten(taken | leaves)

    return init_fn


def not_head(params: Params, head: str | None) -> dict[str, Any]:
    """The base's leaves by path, less those of the task head: what a method chooses its targets from."""
    skip = head_leaves(params, head)
    return {path: leaf for path, leaf in flatten(params).items() if path not in skip}


def freeze(value: Any) -> Hashable:
    """A hashable form of an option: dicts and lists become tuples.

    >>> freeze({"query": 4, ".*": [1, 2]})
    (('query', 4), ('.*', (1, 2)))
    """
    if isinstance(value, Mapping):
        return tuple((key, freeze(item)) for key, item in value.items())
    if isinstance(value, (list, set)) or type(value) is tuple:
        return tuple(freeze(item) for item in value)
    if isinstance(value, KernelAxes):
        return value
    hash(value)
    return value


def thaw(value: Any) -> Any:
    """The JSON form of a frozen option: tuples become lists."""
    return [thaw(item) for item in value] if isinstance(value, tuple) else value


__all__ = [
    "ADDED",
    "AdvanceFn",
    "BindFn",
    "CallFn",
    "ChangedFn",
    "FREEZE",
    "FoldFn",
    "Group",
    "InitFn",
    "LabelsFn",
    "Layer",
    "Linear",
    "MergeFn",
    "Method",
    "PenaltyFn",
    "ShapesFn",
    "Stage",
    "TRAIN",
    "factory",
    "freeze",
    "graft_adapter",
    "no_penalty",
    "not_head",
    "passthrough",
    "refuse",
    "thaw",
    "touched",
    "trainable",
    "with_head",
]

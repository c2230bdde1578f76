"""The public verbs: apply a method to parameters, wrap a model, advance, merge, fold, and the penalty."""

import dataclasses
import functools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.core import Tracer

from jpeft import registry
from jpeft.core.chain import chain
from jpeft.core.index import check_batch
from jpeft.core.method import FREEZE, Method
from jpeft.core.outputs import check_outputs
from jpeft.core.statistics import find
from jpeft.hosts import registry as registry_of_hosts
from jpeft.hosts.base import Host, innermost
from jpeft.tree.adapters import Adapter
from jpeft.tree.finite import not_finite
from jpeft.tree.head import unknown_heads
from jpeft.tree.kernels import KernelAxes
from jpeft.tree.paths import Params, copy, first_few, flatten, like, replace, trained_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Peft:
    """A frozen base and the adapter that a method trains on it. A pytree; the method is static.

    Attributes:
      params: The base, the very arrays that were given to `apply`.
      adapter: The trained pytree: all that is differentiated, optimised and saved.
      method: The `Method`; hashable, so a jitted function that takes a `Peft` is compiled once for equal options.
    """

    params: Params
    adapter: Adapter
    method: Method = dataclasses.field(metadata={"static": True})

    @property
    def variables(self) -> dict[str, Any]:
        """``{"params": base, <method>: adapter}``: what a wrapped function takes; each part of a chain is a collection of its own."""
        return {"params": self.params, **self.method.to_collections(self.adapter)}

    @property
    def labels(self) -> dict[str, Any]:
        """The tree of `variables` with ``"train"``, ``"freeze"`` or a group's name at every leaf."""
        frozen = jax.tree.map(lambda _: FREEZE, self.params)
        return {"params": frozen, **self.method.to_collections(self.method.labels(self.adapter))}

    def replace(self, **changes: Any) -> "Peft":
        """A copy with some fields exchanged: ``peft.replace(adapter=new)``."""
        if "params" in changes:
            changes["params"] = registry_of_hosts.unwrap(changes["params"])
        return dataclasses.replace(self, **changes)


def apply(
    params: Params,
    method: str | Mapping[str, Any] | Method | type[Method] = "lora",
    *,
    key: jax.Array | None = None,
    stats: Any = None,
    model: Any = None,
    inputs: Any = (),
    **options: Any,
) -> Peft:
    """Split pretrained parameters into a frozen base and a small adapter to train.

    Args:
      params: Parameters of any model as a pytree: a nested dict, a FrozenDict, an NNX state, a registered dataclass. Or their shapes,
        under `jax.eval_shape`. They are kept as they are, neither copied nor changed. Of the variables of a linen model,
        ``model.init(...)``, of an NNX module and of its state the parameters are taken; those of NNX are its `nnx.Param`.
      method: Name of a method (`jpeft.methods`), its class, its configuration, or a `Method`.
      key: For the adapter's random leaves; `jax.random.key(0)` if not given.
      stats: The statistics that a data-driven method requires, such as the Fisher information; a list of several for a chain. `jpeft.stats`
        makes them.
      model: The model, such as a linen module, to read the geometry of its kernels off it (`jpeft.kernel_axes`). Without it, names and
        shapes tell the geometry, or the option `axes`.
      inputs: Example inputs of the model, or their shapes: a tuple, or a dict of keyword arguments.
      **options: The method's options; see its class, e.g. `jpeft.lora`.

    Returns:
      A `Peft`. A warning names layers that may be a new head under a name that ``head="auto"`` does not know.

    Raises:
      ValueError: for an unknown method or option, a target that matches nothing, a head that does not exist.

    >>> import jax.numpy as jnp, jpeft
    >>> peft = jpeft.apply({"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}, method="lora", rank=2)
    >>> peft.variables["lora"]["dense"]["kernel"]["a"].shape
    (8, 2)
    """
    made = registry.make(method, **options)
    if key is not None and not hasattr(key, "dtype"):
        raise ValueError(f"key={key!r} is no random key: give one, such as jax.random.key(0).")
    params = registry_of_hosts.unwrap(params)
    if model is not None:
        made = with_geometry(made, registry_of_hosts.unknown_axes(model, params, inputs))
    made.check_base(params)
    try:
        peft = Peft(params, made.init(jax.random.key(0) if key is None else key, params, stats=stats), made)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"The adapter of {made!r} does not fit into the memory. Choose smaller sizes.") from error
    _warn_of_unknown_heads(peft)
    check_outputs(peft.method, peft.params, peft.method.to_collections(peft.adapter).values())
    return peft


def with_geometry(method: Method, axes: tuple[tuple[str, KernelAxes], ...]) -> Method:
    """The method, or each part of a chain, with rules for its option `axes`, where it has one that is not given."""
    if method.parts:
        return chain(**{name: with_geometry(part, axes) for name, part in method.parts})
    takes = any(field.name == "axes" for field in dataclasses.fields(method)) and not getattr(method, "axes", None)
    return dataclasses.replace(method, axes=axes) if takes and axes else method  # pyright: ignore[reportCallIssue]


def _warn_of_unknown_heads(peft: Peft) -> None:
    """Say that a classifier under an unknown name is not trained whole, where the method looks for one and the model seems to have one."""
    parts = [part for _, part in peft.method.parts] or [peft.method]
    if not any(getattr(part, "head", None) == "auto" for part in parts):
        return
    whole = {path for adapter in peft.method.to_collections(peft.adapter).values() for path in flatten(adapter)}
    heads = [path for path in unknown_heads(peft.params) if f"{path}/kernel" not in whole]
    if heads:
        regex = "|".join(map(re.escape, heads))
        warnings.warn(
            f"{peft.method.name} found no task head, so it trains none whole. {first_few(heads)} may be one, for it ends the model: if it "
            f"is new for your task, give head={regex!r}. If nothing is new, head=None says so.",
            stacklevel=3,
        )


def check_peft(peft: Any, verb: str) -> None:
    """Check that a verb was given a `Peft`.

    Raises:
      ValueError: if it was given anything else, such as the parameters or variables of a model.
    """
    if not isinstance(peft, Peft):
        raise ValueError(f"jpeft.{verb} takes a Peft, as jpeft.apply and jpeft.load return it, and was given a {type(peft).__name__}.")


def wrap(fn: Any, method: Method | None = None, *, host: str | Host = "auto") -> Callable[..., Any]:
    """The model with a method applied: a function with the signature of `fn`, called with a `Peft` in place of the parameters.

    There are two forms::

        forward = jpeft.wrap(model.apply)                   # any method: the one of the Peft that forward is given
        logits = forward(peft, x)

        forward = jpeft.wrap(model.apply, peft.method)      # one method; for a TrainState that holds variables
        logits = forward(peft.variables, x)                 # forward(peft, x) works too

    Both are pure: jit them, map them over stacked adapters, differentiate them by ``peft.adapter``::

        jax.grad(lambda adapter: loss(forward(peft.replace(adapter=adapter), x), y))(peft.adapter)

    Args:
      fn: ``model.apply`` of a linen module, the model itself, one of its methods, a Flax model of transformers, an NNX module or its
        graphdef, or any function of parameters or variables.
      method: As in `Peft.method`; None to take it from the `Peft` of each call.
      host: "linen" calls ``fn(variables, ...)`` and adapts the linen layers that run inside it; "nnx" runs a copy of the NNX module that
        is given: itself, its graphdef, a method of it, or ``functools.partial(function, module)``; "dense" calls ``fn(params, ...)`` with
        merged weights. "auto" is linen for a linen module, and for a function if linen modules run inside of it, which the first call
        tells; nnx for an NNX module; and dense for anything else. A `jpeft.hosts.base.Host` adapts the layers of another framework.

    Returns:
      ``forward(peft, *args, collections=None, **kwargs)``, or ``forward(variables, *args, **kwargs)`` if `method` is given. Other
      collections of the model, such as running means, are given as ``collections={"batch_stats": ...}`` beside a `Peft` and stand in the
      variables otherwise. ``rngs=`` and ``mutable=`` pass through. Of an NNX model, all state beside the parameters is that of the time
      when it was wrapped, unless ``collections={"state": state}`` gives another; with ``mutable=True``, or a filter of NNX,
      ``(outputs, {"state": state})`` is returned; and ``rngs={"dropout": key}`` seeds its random streams anew. The attributes ``method``
      and ``host`` say what `fn` was wrapped with.

    Raises:
      ValueError: if `fn` is jitted already: its trace was, or will be, made without the method. Jit the result instead.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> from flax import linen as nn
    >>> model, x = nn.Dense(4), jnp.ones((2, 8))
    >>> peft = jpeft.apply(model.init(jax.random.key(0), x)["params"], method="lora", rank=2)
    >>> jpeft.wrap(model.apply)(peft, x).shape, jpeft.wrap(model.apply, peft.method)(peft.variables, x).shape
    ((2, 4), (2, 4))
    """
    if not isinstance(method, Method | None):
        raise ValueError(f"wrap needs a jpeft.Method, such as peft.method, and was given {method!r}.")
    chosen = registry_of_hosts.host_for(fn, host)
    if hasattr(innermost(fn), "lower") and not chosen.runs_jitted:
        raise ValueError(
            "wrap was given a function that is jitted already: its compiled form does not know the method and would silently ignore it. "
            "Wrap first, jit the result instead: jax.jit(jpeft.wrap(model.apply))."
        )
    if not callable(fn) and chosen.takes_any:
        raise ValueError(f"wrap takes a model or a function that runs one, such as model.apply, and was given a {type(fn).__name__}.")
    fn = chosen.callable_of(fn)
    of_method = functools.cache(functools.partial(chosen.wrap, fn))
    # A function that no host recognises may run a model all the same. Its first call tells.
    decided = None if host == registry_of_hosts.AUTO and chosen.takes_any else chosen
    if method is not None and decided is not None:
        of_method(method)  # what the host says of the method, it says now

    @functools.wraps(innermost(fn))
    def forward(variables: Peft | Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if isinstance(variables, Peft):
            used, variables = variables.method, _with_collections(variables, kwargs.pop("collections", None))
        else:
            used = method
        if used is None:
            raise ValueError(
                "A model wrapped without a method is called with a Peft, forward(peft, x), and was given a "
                f"{type(variables).__name__}. To call it with variables, give the method: jpeft.wrap(model.apply, peft.method)."
            )
        if method not in (None, used):
            raise ValueError(f"The model was wrapped with {method!r} and is called with a Peft of {used!r}: wrap it without a method.")
        if used.takes_index:
            check_batch(used, used.from_collections(variables), args, kwargs)
        nonlocal decided, of_method
        if decided is None:
            own = {"params", used.name, *(name for name, _ in used.parts)}
            others = {name: tree for name, tree in variables.items() if name not in own}
            decided, form = registry_of_hosts.host_inside(fn, variables["params"], others, args, kwargs)
            of_method = functools.cache(functools.partial(decided.wrap, form))
        return of_method(used)(variables, *args, **kwargs)

    forward.method = method  # pyright: ignore[reportAttributeAccessIssue]
    forward.host = chosen  # pyright: ignore[reportAttributeAccessIssue]
    return forward


def _with_collections(peft: Peft, collections: Mapping[str, Any] | None) -> dict[str, Any]:
    """The variables of a `Peft` beside other collections of its model."""
    own, others = peft.variables, collections or {}
    if own.keys() & others.keys():
        raise ValueError(f"collections={sorted(others)} may not hold {sorted(own.keys() & others.keys())}, which the Peft holds.")
    return {**others, **own}


def advance(peft: Peft, *, key: jax.Array | None = None, stats: Any = None) -> Peft:
    """Move on to the method's next stage of training: from gates to a fixed mask, from whole layers to their best neurons.

    What is trained, its shapes and the method change, so build optimizer, state and step again. `Method.stages` holds the stages
    still to come, each with its share of the steps (`jpeft.core.stages.plan` turns shares into steps)::

        peft = jpeft.apply(params, method="diff_pruning")
        peft = train(peft)                                  # your loop: jpeft.wrap, jpeft.optimizer, a jitted step
        while peft.method.stages:
            peft = train(jpeft.advance(peft))

    Args:
      peft: With the adapter as it was trained.
      key: For what is random about the change; `jax.random.key(0)` if not given.
      stats: Statistics of the current model, where the stage's `requires_stats` names some.

    Returns:
      A `Peft` on the same base, with an adapter of its own. Its method is an ordinary one and is saved and loaded as such.

    Raises:
      ValueError: if there is no further stage, or the statistics that it needs are missing.

    >>> import jax.numpy as jnp, jpeft
    >>> peft = jpeft.apply({"dense": {"kernel": jnp.ones((8, 4))}}, method="diff_pruning", sparsity=0.25)
    >>> peft = peft.replace(adapter=jax.tree.map(lambda leaf: leaf + 0.1, peft.adapter))
    >>> jpeft.advance(peft).adapter["dense"]["kernel"]["values"].shape
    (8,)
    """
    check_peft(peft, "advance")
    if not peft.method.stages:
        raise ValueError(f"{peft.method!r} has no further stage.")
    stage = peft.method.stages[0]
    for kind in stage.requires_stats:
        if find(stats, kind) is None:
            raise ValueError(
                f"The stage {stage.name!r} of {peft.method.name} requires {kind.__name__} statistics of the current model: "
                f"jpeft.advance(peft, stats=...), made by {kind.made_by}."
            )
    method, adapter = stage.advance(peft.params, peft.adapter, key=jax.random.key(0) if key is None else key, stats=stats)
    return Peft(peft.params, jax.tree.map(copy, adapter), method)


def merge(peft: Peft) -> Params:
    """Plain parameters with the adapter written in: the base's own tree and dtypes, no trace of jpeft, no cost at inference.

    The sum of base and adapter is taken in float32 and rounded once, to the dtype of the base. Of an NNX model the result is a state, which
    goes into a copy of the model: ``copy = nnx.clone(model); nnx.update(copy, jpeft.merge(peft))``.

    Raises:
      ValueError: with the reason, if the method adds computation that no weight can take up; or with the leaf, if the adapter holds numbers
        that are not finite, which would spoil the base. Inside of `jax.jit` there are no numbers to look at.

    >>> import jax.numpy as jnp, jpeft
    >>> peft = jpeft.apply({"dense": {"kernel": jnp.ones((8, 4))}}, method="lora", rank=2)
    >>> jpeft.merge(peft)["dense"]["kernel"].shape
    (8, 4)
    """
    check_peft(peft, "merge")
    known = {path: leaf for path, leaf in flatten(peft.adapter).items() if not isinstance(leaf, Tracer | jax.ShapeDtypeStruct)}
    if bad := not_finite(known):
        raise ValueError(f"Cannot merge: the adapter holds numbers that are not finite, in {first_few(bad)}.")
    # What several parts of a chain change is handed from one to the next in float32.
    counts = Counter(path for name, part in peft.method.parts for path in part.adapted_paths(peft.params, peft.adapter[name]))
    base = flatten(peft.params) if counts else {}
    wide = {path: base[path].astype(trained_dtype(base[path].dtype)) for path, count in counts.items() if count > 1 and path in base}
    return like(peft.method.merge(replace(peft.params, wide) if wide else peft.params, peft.adapter), peft.params)


def fold(peft: Peft) -> Peft:
    """The same model with the adapter reduced to what inference needs, which is what to store and share.

    A reparametrised prefix or an encoded prompt trains a network that computes it. Folded, the network is left out and its result stays;
    the method is then the one that holds just that. Keep the original to go on training. Any other method is returned as it is.

    >>> import jpeft
    >>> from jpeft.models import BertConfig, BertModel, abstract_params
    >>> params = abstract_params(BertModel(BertConfig(num_hidden_layers=2)))
    >>> peft = jax.eval_shape(lambda p: jpeft.apply(p, method="prefix_tuning", length=5, mlp=64), params)
    >>> jpeft.summary(peft).stored, jpeft.summary(jax.eval_shape(jpeft.fold, peft)).stored
    (252736, 15360)
    """
    check_peft(peft, "fold")
    if not peft.method.folds:
        return peft
    method, adapter = peft.method.fold(peft.params, peft.adapter)
    return Peft(peft.params, jax.tree.map(copy, adapter), method)


def penalty(peft: Peft) -> jax.Array:
    """What the method adds to the loss, a scalar; zero for most.

    >>> import jax.numpy as jnp, jpeft
    >>> float(jpeft.penalty(jpeft.apply({"dense": {"kernel": jnp.ones((8, 4))}}, method="lora")))
    0.0
    """
    check_peft(peft, "penalty")
    return peft.method.penalty_on(peft.params, peft.adapter)

"""The contract of a fine-tuning method.

A `Method` turns the parameters of a pretrained model into a *frozen base* and a *small trained pytree*, the adapter. A method is a class
whose fields are its options and whose functions are pure. Whatever framework the model is written in, a method sees three things only:

1. **The parameter tree**, by path. `init` looks at it and builds the adapter. `bind` puts the adapter and the base together. `merge`
   writes the adapter into the base for good.
2. **One layer at a time.** `call` is middleware: it receives a `Layer`, the layer's inputs and the leaves that `bind` put beside the
   layer's own parameters, and returns the layer's outputs. LoRA is ``layer(x) + s * (x @ a) @ b``, a bottleneck adapter is
   ``y + up(act(down(y)))`` with ``y = layer(x)``. A method that merely replaces leaves needs no `call` and so works in any framework.
3. **The adapter**, a nested dict that mirrors the base tree (`jpeft.tree.adapters` says what may stand where).

Two methods are equal if they have the same class and equal options; they hash alike, so a jitted function that takes a `Peft` is compiled
once. Dicts and lists among the options become tuples, and every option is checked against its annotation (`jpeft.core.options`).

Rules that every method keeps (``tests/test_conformance.py`` checks them):

* `init` works on abstract parameters (`jax.eval_shape`) and never looks at a value that it does not need.
* What is trained is float32 or wider, whatever the dtype of the base; `bind` and `call` never change the dtype of an output. A leaf that
  replaces one of the base stays float32 in `bind`: it is rounded where a layer computes with it, and once by `jpeft.merge`.
* `merge` gives the same tree as the base and the same outputs as the bound model, or refuses with the reason.
* The base is never an argument of `grad`. Frozen leaves *inside* the adapter are named by `labels`.
* Randomness comes from the `rng` of `bind` and `call` alone. It is None at evaluation and in `merge`, which then agree.

Training may take *stages*: gates first and a fixed mask afterwards, a whole layer first and its best neurons afterwards. Each stage is a
method, and `stages` says how one leads to the next. The training loop calls `jpeft.advance` between them and builds optimizer and step
again.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core import options as opt
from jpeft.core.groups import Group
from jpeft.core.layer import Layer
from jpeft.core.method_type import MethodType as MethodType
from jpeft.core.rates import Rates
from jpeft.core.stages import Stage
from jpeft.core.statistics import Statistic
from jpeft.core.update_rule import UpdateRule
from jpeft.tree.adapters import Adapter, graft, split
from jpeft.tree.head import with_head as with_head
from jpeft.tree.paths import Params, flatten
from jpeft.tree.select import names_numbers

TRAIN, FREEZE = "train", "freeze"  # labels


class Method(metaclass=MethodType):
    """A fine-tuning method. A subclass declares its options as fields and must define `init`; all else has a default.

    Attributes:
      name: Name of the method, and of its collection in `Peft.variables`.
      family: ``"selective"``, ``"additive"`` or ``"reparameterized"``.
      summary: One line on what the method trains, for lists of methods.
      learning_rate: Peak AdamW learning rate that suits the method's defaults on a classification task.
      head_lr_scale: Learning rate of a newly made head, as a multiple of the method's: the head starts from nothing, so it has more to
        learn.
      begins_within: How far a new adapter may move the model's outputs, relative to them: 0.0 for a method that begins as the base, up to
        rounding; None if it promises nothing, as prompts do.
      stage: Name of the stage of training that the class stands for; empty for a method without stages.
      later_stages: The classes of the stages that may follow.
      why_no_merge: The reason why no weight can take up the change; None for a method that merges.
      adds_to_kernel: True if the change of a kernel is a term that does not depend on the kernel, as LoRA's: parts of a chain that change
        the kernel itself may then stand before or behind the method.
      reduce_grads_locally: True if the adapter's gradient is computed from a larger one, such as some entries of a full weight's gradient.
        On a mesh each device then reduces it before gradients are summed over devices (`jpeft.sharding.by_example`).
      takes_index: True if each example of a batch may be given a number of its own, by `assign`.

    Example, a method that trains a scale for every output of the layers called ``out``:

    >>> import jax.numpy as jnp
    >>> from jpeft import Method, flatten, unflatten
    >>> class OutputScale(Method):
    ...     name = "output_scale"
    ...     def init(self, key, params, *, stats=None):
    ...         kernels = {path: leaf for path, leaf in flatten(params).items() if path.endswith("out/kernel")}
    ...         return unflatten({f"{path}/scale": jnp.ones(kernel.shape[-1:]) for path, kernel in kernels.items()})
    ...     def call(self, layer, inputs, leaves, rng):
    ...         return layer(*inputs) * leaves["kernel"]["scale"]
    >>> OutputScale() == OutputScale()
    True
    """

    name: ClassVar[str] = "custom"
    family: ClassVar[str] = "custom"
    summary: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-3
    head_lr_scale: ClassVar[float] = 5.0
    begins_within: ClassVar[float | None] = None
    stage: ClassVar[str] = ""
    later_stages: ClassVar[tuple[type["Method"], ...]] = ()
    why_no_merge: ClassVar[str | None] = "this method defines no merge; keep using it through jpeft.wrap"
    adds_to_kernel: ClassVar[bool] = False
    reduce_grads_locally: ClassVar[bool] = False
    takes_index: ClassVar[bool] = False

    # --- a frozen dataclass -----------------------------------------------------------------------------------------------------------

    if not TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None:
            """Set all fields, which `MethodType` has checked."""
            self.__dict__.update(fields)

        def __setattr__(self, name: str, value: Any) -> None:
            """Refuse to change a method: jitted functions are compiled for its options."""
            raise dataclasses.FrozenInstanceError(f"Cannot set {name}: a method does not change. Make another one by replace({name}=...).")

        def __delattr__(self, name: str) -> None:
            """Refuse to delete a field."""
            raise dataclasses.FrozenInstanceError(f"Cannot delete {name}: a method does not change.")

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __eq__(self, other: object) -> bool:
        """Equal for the same class and equal options."""
        return type(self) is type(other) and self._values() == other._values()  # pyright: ignore[reportAttributeAccessIssue]

    def __hash__(self) -> int:
        """Consistent with equality."""
        return hash((type(self), self._values()))

    # --- what a method may define ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises:
          ValueError: with what was given and what is allowed.
        """

    def check_base(self, params: Params) -> None:
        """Refuse options that do not fit the base, when `jpeft.apply` makes an adapter; one on disk is read without this."""
        del params

    @abc.abstractmethod
    def init(self, key: jax.Array, params: Params, *, stats: Any = None) -> Adapter:
        """Build the adapter for a base. Pure; works on `jax.ShapeDtypeStruct` parameters under `jax.eval_shape`.

        Args:
          key: For random leaves; `jpeft.tree.key_for` gives each leaf its own.
          params: The base.
          stats: Statistics, from which `jpeft.core.statistics.find` takes those of `requires_stats`.
        """

    def bind(self, params: Params, adapter: Adapter, *, rng: jax.Array | None = None) -> Params:
        """Put the adapter's leaves in place of, or beside, the base's."""
        del rng
        return graft(params, adapter)

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """Run one layer that has leaves of this method. `rng` is None where nothing may be random."""
        del leaves, rng
        return layer(*inputs)

    def goes_around(self, inputs: tuple[Any, ...], outputs: Any, leaves: dict[str, Any]) -> bool:
        """Whether leaves under ``+`` go around a module's method that is not `__call__`: by default, if its outputs are activations."""
        del inputs, leaves
        return any(jnp.issubdtype(y.dtype, jnp.floating) and y.ndim for y in jax.tree.leaves(outputs) if hasattr(y, "dtype"))

    def merge(self, params: Params, adapter: Adapter) -> Params:
        """The base's tree with the change written in. The default does so for a method that only replaces leaves.

        Raises:
          ValueError: with `why_no_merge`, if there is a reason.
        """
        if self.why_no_merge is not None:
            raise ValueError(f"Cannot merge: {self.why_no_merge}.")
        return self.bind(params, adapter)

    def merge_layer(self, layer: Layer, leaves: dict[str, Any]) -> Mapping[str, Any] | None:
        """The parameters of one layer with the change written in; None if no parameter can hold it.

        It is what `merge` does to that layer. Other middleware around the same layer asks for it if it looks at the kernel's value.
        """
        del layer, leaves
        return None

    def labels(self, adapter: Adapter) -> Any:
        """The adapter's tree with ``"train"``, ``"freeze"`` or the name of a parameter group at each leaf."""
        return jax.tree.map(lambda _: TRAIN, adapter)

    @property
    def groups(self) -> tuple[tuple[str, Group], ...]:
        """How the parameter groups that `labels` names are optimised, as pairs of label and `Group`."""
        return ()

    def penalty(self, adapter: Adapter) -> jax.Array:
        """A scalar that is added to the loss."""
        del adapter
        return jnp.zeros(())

    def penalty_on(self, params: Params, adapter: Adapter) -> jax.Array:
        """`penalty`, which is the default, for a method whose penalty depends on the base, such as the geometry of its kernels."""
        del params
        return self.penalty(adapter)

    def update_rule(self, params: Params, adapter: Adapter) -> UpdateRule | None:
        """What the method does to an optimizer's updates, inside the compiled step; None for nothing. Shapes are enough to make it."""
        del params, adapter

    def for_steps(self, steps: int) -> "Method":
        """The method for a training of so many updates, where it was not told their number. The trainer asks for it."""
        del steps
        return self

    @property
    def requires_stats(self) -> tuple[type[Statistic], ...]:
        """The kinds of statistics that `init` must be given. The trainer makes them."""
        return ()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of training still to come; `jpeft.advance` moves to the first of them."""
        return ()

    @property
    def folds(self) -> bool:
        """Whether the adapter holds what only training needs, which `fold` leaves out."""
        return False

    def fold(self, params: Params, adapter: Adapter) -> "tuple[Method, Adapter]":
        """The same model with what only training needs computed once and left out."""
        del params
        return self, adapter

    def assign(self, adapter: Adapter, index: Any) -> Adapter:
        """The adapter with a number for each example of a batch, which `jpeft.core.index.as_leaf` turns into a leaf of it.

        Raises:
          ValueError: if the method takes none, or none of that value.
        """
        del adapter, index
        raise ValueError(f"{self.name} takes no index: it does the same to every example of a batch.")

    def assigned(self, adapter: Adapter) -> jax.Array | None:
        """The numbers that `assign` has written into the adapter, as that leaf; None before."""
        del adapter

    def adapted_paths(self, params: Params, adapter: Adapter) -> set[str]:
        """The base leaves that take another value, or whose layers compute with another value of them."""
        replaced, beside, _ = split(params, adapter)
        return replaced.keys() | beside.keys()

    def count_changed(self, params: Params, adapter: Adapter) -> int:
        """How many scalars of the base take another value once merged or bound."""
        base = flatten(params)
        return sum(base[path].size for path in self.adapted_paths(params, adapter))

    def expected(self, params: Params, adapter: Adapter) -> Adapter:
        """The shapes that an adapter read from disk must have on this base. By default they are those that `init` makes.

        A method whose `init` lets the *values* of statistics decide how large the leaves are defines this from the adapter; for an empty
        adapter, which asks what a new one may look like, it spreads them evenly.

        Raises:
          ValueError: if the method does not fit the base, or, where the method can tell, if the adapter does not.
        """
        del adapter
        return jax.eval_shape(lambda params: self.init(jax.random.key(0), params), params)

    # --- what follows from the options and the definitions --------------------------------------------------------------------------

    @property
    def wraps_layers(self) -> bool:
        """Whether the method has a `call`. A method without one only replaces leaves and works in any framework."""
        return type(self).call is not Method.call

    @property
    def parts(self) -> "tuple[tuple[str, Method], ...]":
        """The methods of a chain, by name, in order; empty for a simple method."""
        return ()

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """The options by the names that callers use, sorted; the stage is one of them."""
        stage = {"stage": self.stage} if self.stage else {}
        given = {spelled: getattr(self, field) for spelled, field in opt.spellings(type(self)).items()}
        return tuple(sorted({**given, **stage}.items(), key=lambda item: item[0]))

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"jpeft.{self.name}({', '.join(f'{name}={value!r}' for name, value in self.options)})"

    def replace(self, **options: Any) -> "Method":
        """A copy with some options exchanged.

        >>> import jpeft
        >>> jpeft.lora(rank=8).replace(rank=4) == jpeft.lora(rank=4)
        True
        """
        return type(self)(**{**dict(self.options), **options})

    def config(self) -> dict[str, Any]:
        """The method as plain data: ``{"method": name, **options}``; `jpeft.make` builds it again.

        Raises:
          ValueError: for a method that is not one of jpeft's, which only its own code can build.
        """
        return {"method": self.name, **{name: opt.plain(value) for name, value in self.options}}

    @classmethod
    def rates_for(cls, options: Mapping[str, Any]) -> Rates:
        """The learning rates that suit these options: those of the class, unless one of them asks for others."""
        return Rates(cls.learning_rate, cls.head_lr_scale)

    @classmethod
    def picks_blocks(cls, options: Mapping[str, Any]) -> bool:
        """Whether these options speak of single blocks of a model, which must then be numbered: stacked, they share their paths."""
        return names_numbers(dict(options))

    @classmethod
    def of_stage(cls, stage: Any) -> "type[Method]":
        """The class of one of the method's stages.

        Raises:
          ValueError: for a stage that the method does not have.
        """
        classes = {each.stage: each for each in (cls, *cls.later_stages)}
        if not isinstance(stage, str) or stage not in classes:
            raise ValueError(f"{cls.name}: stage={opt.shown(stage)} is not one of {', '.join(map(repr, classes))}.")
        return classes[stage]

    # --- the adapter as collections -------------------------------------------------------------------------------------------------

    def to_collections(self, adapter: Adapter) -> dict[str, Any]:
        """The adapter as variable collections: one named after the method, or one for each part of a chain."""
        return {name: adapter[name] for name, _ in self.parts} if self.parts else {self.name: adapter}

    def from_collections(self, variables: Mapping[str, Any]) -> Adapter:
        """The inverse of `to_collections`.

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

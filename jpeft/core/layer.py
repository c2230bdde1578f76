"""One layer as a method sees it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jpeft.tree.kernels import KernelAxes


@runtime_checkable
class Wrapper(Protocol):
    """The part of a method that goes around layers; see `jpeft.core.method.Method`."""

    def call(self, layer: "Layer", inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """Run the layer with the method's change."""
        ...

    def merge_layer(self, layer: "Layer", leaves: dict[str, Any]) -> Mapping[str, Any] | None:
        """The layer's parameters with the method's change written in, or None."""
        ...


class NoProductError(ValueError):
    """A layer that uses a parameter in another way than in products with its inputs."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"'{name}' does not act as a kernel: {reason}.")
        self.name, self.reason = name, reason


@dataclasses.dataclass(frozen=True)
class Linear:
    """What is linear about a layer: the parameter that acts as its kernel, its geometry, and cheap ways to change its product.

    A function that the host cannot give is None; a method then runs the layer on a changed kernel.

    Attributes:
      name: Name of the parameter, ``"kernel"`` or ``"embedding"``.
      axes: Its geometry inside the layer. Under `nn.scan` the axis of the layers is gone by then.
      apply_low_rank: ``(x, a, b) -> y``: the layer without its bias on the kernel ``a b``, computed as ``(x a) b``.
      apply_columns: ``(x, kernel) -> y``: the layer without its bias on a kernel with another number of outputs, which are the last axis
        of y; None for a layer whose outputs have several axes.
      apply_joined: ``(params, x, h, b) -> y``: the layer on inputs ``[x, h]`` and the kernel ``[W; b]``: ``x W + h b`` in one product. None
        for a layer whose inputs are not the last axis of x.
      scale_outputs: ``(y, g) -> y``: the layer's outputs times g, which has the kernel's output axes.
      scale_inputs: ``(x, g) -> x``: the layer's inputs times g, which has the kernel's input axes.
      add_bias: ``(y, bias) -> y``: the layer's outputs with its bias added.
      map_inputs: ``(x, fn) -> x``: the layer's inputs changed by `fn`, which takes them as vectors [*stack, rows, inputs], in the order of
        the kernel's matrix, and returns as many.
      apply_vectors: ``(x, fn) -> y``: the layer without its bias, with `fn` in the place of its product: from vectors
        [*stack, rows, inputs] to [*stack, rows, *outputs], with the kernel's own output axes.
      reads_once: Whether each number of x is an input at one position only, as in a dense layer and not in a convolution.
      views: In which forms an update of low rank can be computed: "factored", ``layer(x) + (x a) b``, or "merged", the layer on the new
        kernel with the gradient of the factors taken from the factored form.
    """

    name: str
    axes: KernelAxes
    apply_low_rank: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    apply_columns: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    apply_joined: Callable[[Mapping[str, Any], jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    scale_outputs: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    scale_inputs: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    add_bias: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    map_inputs: Callable[[jax.Array, Callable[[jax.Array], jax.Array]], jax.Array] | None = None
    apply_vectors: Callable[[jax.Array, Callable[[jax.Array], jax.Array]], jax.Array] | None = None
    reads_once: bool = False
    views: tuple[str, ...] = ("factored", "merged")


class Change(NamedTuple):
    """What runs in the place of a parameter's products; see `Layer.run_changed`.

    Attributes:
      axes: The geometry of the parameter, as the adapter has it.
      run: ``(layer, x) -> y``: `layer` is a product as a layer of its own, whose kernel is the parameter.
    """

    axes: KernelAxes
    run: Callable[["Layer", jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MiddlewareState:
    """What one middleware reads, as an entry of `Layer.params`, where it can be differentiated like any parameter."""

    leaves: dict[str, Any]
    rng: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer as middleware sees it.

    Attributes:
      run: ``(params, *inputs) -> outputs``, a pure function: running the layer on other parameters is how the merged view of LoRA works.
        Keyword arguments replace those of the call.
      params: The layer's own parameters by name, e.g. ``{"kernel": ..., "bias": ...}``.
      path: Path of the module, '/'-joined. Layers under one `nn.scan` share their path.
      linear: The layer's geometry, or None where the layer is not known to be linear in one parameter.
      dtype: The dtype that the layer computes in, given its inputs.
      names: What the layer calls its inputs, in their order; empty where the host cannot tell.
      keywords: Arguments of this call that the layer takes by name only. ``layer(*inputs, name=value)`` runs the layer with another value.
      method: The module's method that is called: ``"__call__"``, or ``"attend"`` where an embedding gives scores of its rows.
      cached: Whether the module continues from a cache of keys and values that an earlier call has made.
      merged: ``params -> params``: the layer's own parameters with the changes of all inner middleware written in, as `Method.merge` would
        write them; None where a change is none of a parameter. A method that looks at the kernel's value takes it from here.
      bare: The layer without any middleware; None where there is none around it.
      run_changed: ``(params, changes, *inputs) -> outputs``: the layer with a `Change` in the place of the products of some parameters, by
        their names, for layers of unknown classes; None where the host gives none. Raises `NoProductError`.
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
    merged: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] = lambda params: params
    bare: "Layer | None" = None
    run_changed: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the layer as it is."""
        return self.run(self.params, *inputs, **keywords)

    def with_params(self, params: Mapping[str, Any]) -> "Layer":
        """This layer with some of its parameters exchanged."""
        return dataclasses.replace(self, params={**self.params, **params})

    def with_keywords(self, keywords: Mapping[str, Any]) -> "Layer":
        """This layer with some of its keyword arguments exchanged, also where it is run without middleware."""
        run, run_changed = (None if fn is None else functools.partial(fn, **keywords) for fn in (self.run, self.run_changed))
        assert run is not None
        bare = None if self.bare is None else self.bare.with_keywords(keywords)
        return dataclasses.replace(self, run=run, run_changed=run_changed, keywords={**self.keywords, **keywords}, bare=bare)

    def without_bias(self) -> "Layer":
        """This layer with zeros for its bias, if it has one."""
        return self.with_params({"bias": jnp.zeros_like(self.params["bias"])}) if "bias" in self.params else self

    @property
    def innermost(self) -> "Layer":
        """The layer without any middleware."""
        return self.bare or self

    @property
    def inner_middleware(self) -> tuple[dict[str, Any], ...]:
        """The leaves of other middleware between this one and the layer, the closest to the layer first."""
        return tuple(own.leaves for own in self.params.values() if isinstance(own, MiddlewareState))

    @property
    def is_wrapped(self) -> bool:
        """Whether another middleware stands between this one and the layer: the outputs may then not be linear in the kernel."""
        return any(isinstance(own, MiddlewareState) for own in self.params.values())

    def shape(self, *inputs: Any) -> Any:
        """Shapes and dtypes of the outputs for these inputs, of which the first is an array; nothing runs."""
        x, *rest = inputs
        return jax.eval_shape(lambda params, x: self.run(params, x, *rest), dict(self.params), x)

    def with_middleware(self, method: "Wrapper", name: str, leaves: dict[str, Any], rng: jax.Array | None) -> "Layer":
        """This layer with a method's middleware around it, as a layer again, so that another middleware can go around both.

        The leaves become part of the new layer's `params`, which keeps its `run` a function of everything that may be differentiated.

        Args:
          method: The method whose `call` goes around the layer.
          name: A name for its entry in `params`.
          leaves: The leaves of the method at this layer.
          rng: The method's random key, or None.
        """
        inner = self

        def below(params: Mapping[str, Any]) -> Layer:
            own = {key: value for key, value in params.items() if key != name}
            # `is`: unchanged parameters stay the very object that lets the host run the layer in place.
            return dataclasses.replace(inner, params=inner.params if _same(own, inner.params) else own)

        def run(params: Mapping[str, Any], *inputs: Any, **keywords: Any) -> Any:
            layer = below(params)
            if keywords:
                layer = layer.with_keywords(keywords)
            return method.call(layer, inputs, params[name].leaves, params[name].rng)

        def merged(params: Mapping[str, Any]) -> Mapping[str, Any] | None:
            return method.merge_layer(below(params), params[name].leaves)

        return dataclasses.replace(
            self, run=run, run_changed=None, merged=merged, bare=inner.innermost, params={**self.params, name: MiddlewareState(leaves, rng)}
        )


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[key] is b[key] for key in a)

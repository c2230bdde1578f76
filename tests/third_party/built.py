"""A model as the suite takes it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx as flax_nnx

RANDOM = np.random.default_rng(0)
KEY = jax.random.key(0)
IDS = jnp.asarray(RANDOM.integers(3, 30, (2, 6)), jnp.int32)
VECTORS = jnp.asarray(RANDOM.standard_normal((2, 6, 16)), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Built:
    """A model, its parameters, and a call of it.

    Attributes:
      model: What `jpeft.wrap` takes.
      params: What `jpeft.apply` takes.
      inputs: Of a call.
      keywords: Of a call.
      target: Kernels of methods that change weights, where they are not called kernel.
      asks: Whether `jpeft.apply` reads the geometry of kernels off the model, as for layers of the model's own.
    """

    model: Any
    params: Any
    inputs: tuple[Any, ...]
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    target: str | None = None
    asks: bool = False


Maker = Callable[[], Built]


def linen(model: Any, *inputs: Any, **keywords: Any) -> Built:
    """A linen model with random parameters."""
    variables = dict(model.init(KEY, *inputs, **keywords))
    params = random(variables.pop("params"))
    return Built(model, params, inputs, {**keywords, **({"collections": variables} if variables else {})})


def nnx(model: Any, *inputs: Any, **keywords: Any) -> Built:
    """An NNX model with random parameters."""
    flax_nnx.update(model, random(flax_nnx.state(model, flax_nnx.Param)))
    return Built(model, model, inputs, keywords)


def random(params: Any) -> Any:
    """Parameters with noise: some models begin with zeros, and wait for a checkpoint."""
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1 * RANDOM.standard_normal(leaf.shape), leaf.dtype), params)

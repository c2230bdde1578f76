"""Random streams of NNX models: a key for the method, and new seeds for the model."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jpeft.hosts.base import DROPOUT, dropout_key
from jpeft.tree.paths import key_for, path_str

_OWN = "jpeft"  # what the method draws from a stream of the model differs from what the model draws


def is_variable(node: Any) -> bool:
    """Whether a node of a tree is a variable."""
    return isinstance(node, nnx.Variable)


def key_of(given: Any, others: Any, streams: list[nnx.RngStream]) -> jax.Array | None:
    """A random key for the method. It moves no stream on, so the model draws what it would draw without the method.

    Args:
      given: The keys of the call, a dict of streams or one key for all of them; or None.
      others: The model's other state.
      streams: The random streams among the arguments of the call.
    """
    if given is not None:
        return dropout_key(given)
    for stream in sorted(streams, key=lambda stream: stream.tag != DROPOUT):
        return _next(stream.key.get_value(), stream.count.get_value())
    variables = [leaf for leaf in jax.tree.leaves(others, is_leaf=is_variable) if isinstance(leaf, nnx.RngState)]
    keys = [leaf for leaf in variables if isinstance(leaf, nnx.RngKey)]
    counts = [leaf for leaf in variables if isinstance(leaf, nnx.RngCount)]
    pairs = list(zip(keys, counts, strict=True))
    for key, count in sorted(pairs, key=lambda pair: pair[0].get_metadata("tag", None) != DROPOUT):
        return _next(key.get_value(), count.get_value())
    return None


def _next(key: jax.Array, count: jax.Array) -> jax.Array:
    """A key that no stream gives; that of the first entry for a stream that a stack of modules has."""
    return key_for(jax.random.fold_in(key.ravel()[0], count.ravel()[0]), _OWN)


def stream_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[nnx.RngStream]:
    """The random streams among the arguments of a call."""
    nodes = jax.tree.leaves((args, dict(kwargs)), is_leaf=lambda node: isinstance(node, nnx.Rngs | nnx.RngStream))
    found = []
    for node in nodes:
        if isinstance(node, nnx.RngStream):
            found.append(node)
        elif isinstance(node, nnx.Rngs):
            found += [stream for _, stream in node.items()]
    return found


def reseeded(others: Any, given: Any) -> Any:
    """A model's other state with its random streams begun anew, each from a key of its own.

    Args:
      others: The state.
      given: A dict of keys by the names of streams, or one key for all streams.
    """

    def reseed(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, nnx.RngState):
            return leaf
        tag = leaf.get_metadata("tag", "")
        key = given.get(tag) if isinstance(given, Mapping) else given
        if key is None:
            return leaf
        value = leaf.get_value()
        if isinstance(leaf, nnx.RngCount):
            return leaf.replace(jax.numpy.zeros_like(value))
        new = key_for(key if jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key), path_str(path))
        return leaf.replace(jax.random.split(new, value.shape) if value.shape else new)

    return jax.tree_util.tree_map_with_path(reseed, others, is_leaf=is_variable)

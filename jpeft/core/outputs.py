"""Output layers through which no gradient can pass."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jpeft import tree
from jpeft.core.method import Method
from jpeft.tree.head import named_as_outputs, output_kernels


def check_outputs(method: Method, params: tree.Params, adapters: Iterable[tree.Adapter]) -> None:
    """Refuse a model whose output layers stay as they are with kernels of zeros: the gradient of everything before them is zero.

    A new head is often initialised with zeros, and must then be trained. Nothing is said of parameters without values.

    Args:
      method: Of the adapter, for the message.
      params: The base.
      adapters: What is trained, by path: that of each part of a chain.

    Raises:
      ValueError: with the kernels, and how to train them.
    """
    flat = tree.flatten(params)
    trained = [path for adapter in adapters for path in tree.flatten(adapter)]
    stays = lambda path: not any(other == path or other.startswith(f"{path}/") for other in trained)
    outputs = output_kernels(params)
    of_layers = [[path for path in paths if stays(path) and _is_zero(flat[path])] for paths in outputs.values()]
    dead = [path for paths in of_layers for path in paths]
    if not all(of_layers):  # a gradient passes another output
        return
    dead += [path for path in named_as_outputs(params) if path not in dead and stays(path) and _is_zero(flat[path])]
    if not dead:
        return
    # Where every kernel is zero, the values are no model's.
    if all(_is_zero(leaf) for path, leaf in flat.items() if path.endswith("kernel") and path not in dead):
        return
    regex = "|".join(re.escape(path.rpartition("/")[0]) for path in dead)
    raise ValueError(
        f"{method.name}: the output layer {tree.first_few(dead)} is all zeros and would stay so. No gradient passes it, so nothing before "
        f"it could learn. Train it along, as a new head: head={regex!r}."
    )


def _is_zero(leaf: Any) -> bool:
    """Whether a leaf has values, and all are zero."""
    if isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return False
    return not bool(jnp.any(leaf != 0))

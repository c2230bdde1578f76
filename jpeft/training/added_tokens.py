"""How a run trains the rows of added tokens: beside its method, as two parts of a chain."""

import warnings
from typing import Any

import jax
import numpy as np

import jpeft
from jpeft import models
from jpeft.core.method import Method
from jpeft.registry import classes
from jpeft.selective.trainable_tokens import TrainableTokens
from jpeft.tasks.task import Arrays
from jpeft.tree.adapters import split


def with_added_tokens(name: str, options: dict[str, Any], loaded: models.Loaded) -> Method:
    """Make a method, together with what trains the rows of the model's added tokens.

    Args:
      name: Name of the method.
      options: Its options.
      loaded: The model.
    """
    tokens = tuple(loaded.added.values())
    if tokens and classes().get(name) is TrainableTokens:
        return jpeft.make(name, **options | {"tokens": tuple(dict.fromkeys((*(options.get("tokens") or ()), *tokens)))})
    method = jpeft.make(name, **options)
    if not tokens:
        return method
    rows = TrainableTokens(tokens=tokens, head=None)
    return method if _trains_everything(method, rows, loaded) else jpeft.chain(**{name: method, "tokens": rows})


def warn_of_absent(loaded: models.Loaded, arrays: Arrays) -> None:
    """Say which added tokens no training text has, so that nothing teaches the model what they mean."""
    present = set(np.unique(arrays["input_ids"]).tolist()) if loaded.added else set()
    if absent := [token for token, token_id in loaded.added.items() if token_id not in present]:
        listed = ", ".join(map(repr, absent))
        warnings.warn(f"The training texts, as they are cut to max_length, never have the added tokens {listed}.", stacklevel=2)


def _trains_everything(method: Method, rows: Method, loaded: models.Loaded) -> bool:
    """Whether the method replaces the tables of the rows whole, as full fine-tuning does, and so trains the rows anyway."""
    if method.requires_stats:
        return False  # such a method chooses entries and replaces no table
    replaced, tables = (
        split(loaded.params, jax.eval_shape(lambda params, each=each: each.init(jax.random.key(0), params), loaded.params))[i]
        for each, i in ((method, 0), (rows, 1))
    )
    return tables.keys() <= replaced.keys()

"""How a finished run generates text, from what its caller asks for."""

import numbers
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jpeft import models
from jpeft.tasks.task import Decoding, Task

_WHOLE, _REAL = (numbers.Integral, "a whole number"), (numbers.Real, "a number")

# What a caller may ask for: its type, and that in words.
OPTIONS: dict[str, tuple[type, str]] = {
    "max_new_tokens": _WHOLE,
    "seed": _WHOLE,
    "temperature": _REAL,
    "top_k": _WHOLE,
    "top_p": _REAL,
}


def make_decoding(task: Task, loaded: models.Loaded, **options: Any) -> Decoding:
    """Return how text is generated.

    Args:
      task: The task of the run.
      loaded: The model, whose configuration and tokenizer know the tokens that end a text.
      **options: Any of `OPTIONS`; None counts as not given.

    Raises:
      ValueError: if options are given for a task that generates no text, an option of random draws without a seed, or a value of another
        type.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        kind, word = OPTIONS[name]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{name} must be {word}, not {value!r}.")
    if given and not task.generates:
        raise ValueError(f"{_list(given)}: only for a model that generates text, and this one does {task.name}.")
    if given and "seed" not in given and set(given) != {"max_new_tokens"}:
        raise ValueError(f"{_list(sorted(given.keys() - {'max_new_tokens'}))}: only for tokens drawn at random, with `seed`.")
    if task.generates:
        # Some models have several end tokens: the tokenizer names one, the configuration all of them.
        end = loaded.tokenizer.eos_token_id
        others = getattr(loaded.config, "eos_token_id", None)
        given |= {"stop": tuple({end, *np.atleast_1d(end if others is None else others).tolist()}), "pad": end}
    if "seed" in given:
        given["key"] = jax.random.key(given.pop("seed"))
    return Decoding(**given)


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)

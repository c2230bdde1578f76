"""Checks of single values of a configuration, by the annotation of their field."""

import math
import typing
from typing import Any

from jpeft.core.limits import LARGEST
from jpeft.core.options import shown

# Whole numbers that are no sizes.
_MAY_BE_ZERO = ("type_vocab_size",)
_ANY_NUMBER = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def check_value(name: str, field: str, annotation: Any, value: Any) -> None:
    """Check one value of a configuration.

    Args:
      name: What the message calls the value.
      field: The field of the configuration.
      annotation: The field's type. Fields of other types than numbers, booleans and text are not checked.
      value: The value.

    Raises:
      ValueError: if the value is not of the type, or no such number makes a model.

    >>> check_value("n_layer", "num_hidden_layers", int, 0)
    Traceback (most recent call last):
    ValueError: n_layer must be a whole number from 1 to 2147483647, not 0.
    """
    kinds = set(typing.get_args(annotation) or (annotation,))
    if value is None and type(None) in kinds:
        return
    if kinds - {type(None)} == {int}:
        low = -LARGEST if field in _ANY_NUMBER else 0 if field in _MAY_BE_ZERO else 1
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= LARGEST:
            raise ValueError(f"{name} must be a whole number from {low} to {LARGEST}, not {shown(value)}.")
    elif kinds - {type(None)} == {float}:
        high = 1.0 if "drop" in field else math.inf
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value <= high and math.isfinite(value)):
            range_ = "from 0 to 1" if high == 1 else "of at least 0"
            raise ValueError(f"{name} must be a number {range_}, not {shown(value)}.")
    elif kinds == {bool} and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {shown(value)}.")
    elif kinds == {str} and not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {shown(value)}.")

"""One rule of types: what a value of a file means as a text or as a label, whatever the format of the file.

CSV files hold strings alone; JSON and Parquet files have numbers, truth values and missing values. So a string that is spelled like a
number or a truth value is the same label as that number or truth value.
"""

import decimal
import json
import numbers
import re
from typing import Any

# Spellings of numbers. A number with a leading zero, "007", is a code.
_WHOLE = re.compile(r"([+-]?)(0|[1-9][0-9]*)")
_REAL = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def is_missing(value: Any) -> bool:
    """Return whether a value is missing: null, NaN, or a string of spaces.

    >>> [is_missing(value) for value in (None, float("nan"), " ", "NA", 0)]
    [True, True, True, False, False]
    """
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, numbers.Real) and value != value)


def as_text(value: Any) -> str | None:
    """Return a value as a text, "" for a missing one, None for one that cannot be a text. Numbers are spelled as in JSON.

    >>> [as_text(value) for value in ("007 ", 7, 1.0, True, None, ["a"])]
    ['007 ', '7', '1.0', 'true', '', None]
    """
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, decimal.Decimal):
        return str(value)
    return json.dumps(float(value)) if isinstance(value, numbers.Real) and abs(value) != float("inf") else None


def as_label(value: Any) -> str | None:
    """Return a value as a label, "" for a missing one, None for one that cannot be a label, such as a real number.

    Spaces around a label are dropped, whole numbers are written without fraction, truth values in lower case.

    >>> [as_label(value) for value in (1, 1.0, "1.0", "+1", "1e0")]
    ['1', '1', '1', '1', '1']
    >>> [as_label(value) for value in (True, "True", "pos ", "007", "NA", None, 0.5, "0.5", ["a"])]
    ['true', 'true', 'pos', '007', 'NA', '', None, None, None]
    """
    if is_missing(value):
        return ""
    if isinstance(value, str):
        return _label_of_string(value.strip())
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, numbers.Integral):
        return _label_of_string(str(value))
    if isinstance(value, decimal.Decimal):
        return str(int(value)) if value.is_finite() and value == value.to_integral_value() else None
    return _label_of_float(float(value)) if isinstance(value, numbers.Real) else None


def _label_of_string(text: str) -> str | None:
    if text.lower() in ("true", "false"):
        return text.lower()
    if whole := _WHOLE.fullmatch(text):
        return whole[2] if whole[1] != "-" or whole[2] == "0" else text
    return _label_of_float(float(text)) if _REAL.fullmatch(text) else text


def _label_of_float(value: float) -> str | None:
    return str(int(value)) if value.is_integer() else None


def fault_of(text: str) -> str | None:
    r"""Return what makes a string no text: half of a surrogate pair or a NUL character; None for a good one.

    >>> fault_of("a\ud83d")
    "half of a surrogate pair ('\\ud83d')"
    """
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair ({text[error.start]!a})"
    return None

"""Options of methods: declared by type and range, checked when they are given, hashable."""

import json
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core import options as opt

# A value that fits, and some that do not.
KINDS = {
    "count": (opt.Count, [1, 8], [0, -1, 1.5, True, "3", None, math.nan, (1,)]),
    "count or zero": (opt.CountOrZero, [0, 3], [-1, 0.5, False]),
    "positive": (opt.Positive, [0.5, 2, 1e-9], [0, -1.0, math.inf, math.nan, "1", True]),
    "probability": (opt.Probability, [0, 0.0, 0.99], [1, 1.0, -0.1, math.nan]),
    "share": (opt.Share, [1, 0.25], [0, 1.1, None]),
    "share below one": (opt.ShareBelowOne, [0.5], [0, 1, 1.0]),
    "flag": (bool, [True, False], [1, 0, "True", None]),
    "literal": (Literal["a", "b"], ["a"], ["c", 1, None]),
    "literal number": (Literal[False, "dots"], [False, "dots"], [0, True]),
    "names": (opt.Names, ["x", ("x", "y")], [1, (1,), None, ()]),
    "rules": (opt.PerPath[opt.Count], [2, (("q", 2), (".*", 1))], [(), (("q", 0),), (("q",),), ((1, 2),), 0]),
    "optional": (opt.Count | None, [None, 2], [0, "none"]),
}


@pytest.mark.parametrize(("hint", "good", "bad"), KINDS.values(), ids=KINDS)
def test_values_are_checked_against_the_declaration(hint, good, bad):
    for value in good:
        assert opt.checked("m", "o", value, hint) == value
    for value in bad:
        with pytest.raises(ValueError, match=r"^m: o=.* must be \S"):
            opt.checked("m", "o", value, hint)


def test_declarations_in_words():
    assert opt.describe(opt.Probability) == "a number of at least 0 and below 1"
    assert opt.describe(opt.Count | None) == "a whole number of at least 1, or None"
    assert opt.describe(Literal["a", "b"]) == "one of 'a', 'b'"
    assert opt.describe(opt.Names) == "a text, or a list, each a text (not empty)"


def test_arrays_lists_and_dicts_become_hashable():
    assert opt.hashable({"a": [1, 2]}) == (("a", (1, 2)),)
    assert opt.hashable(np.arange(3)) == opt.hashable(jnp.arange(3)) == (0, 1, 2)
    assert opt.hashable(np.float32(0.5)) == 0.5
    axes = opt.hashable([["q", [[], [0], [1, 2]]]])
    assert axes == opt.hashable(((r"q", jpeft.KernelAxes((), (0,), (1, 2))),))


@pytest.mark.parametrize("name", list(jpeft.methods()))
def test_every_option_of_every_method_refuses_what_it_cannot_be(name):
    """No option takes an object of a foreign type, and each error names the method, the option, the value and what is allowed."""
    for option, parameter in jpeft.methods()[name].factory.__signature__.parameters.items():
        if option == "stage":
            continue
        value = object()
        with pytest.raises(ValueError, match=rf"^{name}: {option}=<object object at .*> must be \S") as error:
            jpeft.make(name, **{option: value})
        assert "\n" not in str(error.value)
        assert parameter.default is not parameter.empty  # every option has a default


@pytest.mark.parametrize("name", list(jpeft.methods()))
def test_methods_are_their_options(name):
    method = jpeft.make(name)
    again = jpeft.make(json.loads(json.dumps(method.config())))
    assert again == method
    assert hash(again) == hash(method)
    assert eval(repr(method)) == method
    assert method.replace() == method
    with pytest.raises(AttributeError):
        method.head = None  # frozen


def test_real_options_take_whole_numbers():
    assert jpeft.lora(alpha=16) == jpeft.lora(alpha=16.0)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match=r"lora has no option 'rnak'. Did you mean 'rank'\? Its options and defaults are: .*rank=8"):
        jpeft.lora(rnak=3)
    with pytest.raises(ValueError, match="lora has no positional arguments"):
        jpeft.lora(8)

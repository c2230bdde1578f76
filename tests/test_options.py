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
    "names": (opt.Names, ["x", ("x", "y"), "@ffn_in|@ffn_out"], [1, (1,), None, ()]),
    "rules": (opt.PerPath[opt.Count], [2, (("q", 2), (".*", 1))], [(), (("q", 0),), (("q",),), ((1, 2),), 0]),
    "axes": (opt.Axes, [(), ((".*q", ((), (0,), (1, 2))),)], [(("q", ((), (0,), "x")),), "q", (("q", 1),)]),
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
    assert opt.describe(opt.Names) == "a regex, or a list, each a name (not empty)"


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


# What no option may be, whatever its type; and what an option may be only if its default, or its other values, are of that type.
NEVER = [
    math.nan,
    math.inf,
    -math.inf,
    10**30,
    10**400,
    10**5000,
    1e300,
    1e-300,
    "\n",
    b"x",
    1j,
    bytearray(b"x"),
    [[[]]],
    [math.nan],
    [object()],
]
NEVER += [{"": 4}, {"(": 4}, {"query": math.nan}, {"query": True}, {1: 2}, np.array([math.nan]), np.float32("nan"), lambda: 1]
ONLY = {
    bool: [True, False],
    int: [-1, 10**9, 2**40],
    float: [-0.1, 1.5, 1.0],
    str: ["abc", "", " ", "(", "@nope"],
    list: [[1], [-1], [True], [""], []],
}


@pytest.mark.parametrize("name", list(jpeft.methods()))
def test_every_option_of_every_method_refuses_bad_values_by_its_name(name):
    parameters = jpeft.methods()[name].factory.__signature__.parameters
    for option, parameter in parameters.items():
        allowed = opt.describe(parameter.annotation)
        taken = {
            bool: "True or False" in allowed,
            int: "number" in allowed or "activation" in option,
            float: "a number" in allowed,
            str: any(word in allowed for word in ("a regex", "a text")),
            list: "list" in allowed,
        }
        bad = [*NEVER, *(value for kind, values in ONLY.items() if not taken[kind] for value in values)]
        fine = (10**30,) if "a number" in allowed else ("\n",) if "a text" in allowed else ()
        bad = [value for value in bad if not any(type(value) is type(one) and value == one for one in fine)]
        for value in bad:
            with pytest.raises(ValueError, match=option) as error:
                jpeft.make(name, **{option: value})
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"rank": True}, "rank=True must be a whole number"),
        ("lora", {"rank": 1.5}, "rank=1.5 must be a whole number"),
        ("lora", {"rank": [1]}, r"rank=\[1\] must be a whole number of at least 1, or rules"),
        ("lora", {"rank": 10**30}, "rank=10+ is too large: it must be at most 1,048,576"),
        ("lora", {"alpha": "abc"}, "alpha='abc' must be a number above 0"),
        ("lora", {"dropout": 1.0}, "dropout=1.0 must be a number of at least 0 and below 1"),
        ("lora", {"dropout": -0.1}, "dropout=-0.1 must be"),
        ("lora", {"rslora": 7}, "rslora=7 must be True or False"),
        ("lora", {"target": []}, r"target=\[\] must be a regex, or a list, each a name \(not empty\)"),
        ("lora", {"target": ""}, "target='' is empty"),
        ("lora", {"target": ["query", ""]}, "holds '', which holds an empty name|holds an empty name"),
        ("lora", {"target": "(query"}, r"target='\(query' is not a regular expression: missing \)"),
        ("lora", {"target": "@qurey"}, "target='@qurey' .* Did you mean '@query'"),
        ("lora", {"rank": {"(": 3}}, r"rank={'\(': 3} holds '\(', which is not a regular expression"),
        ("lora", {"rank": {"@query": 3}}, "holds '@query', which is a role"),
        ("lora", {"axes": [["q", [[], [0]]]]}, "axes=.* holds .*, which must be rules"),
        ("lora", {"head": "("}, r"head='\(' is not a regular expression"),
        ("freeze", {"top": "x"}, "top='x' must be a whole number of at least 0"),
        ("freeze", {"layers": "layer"}, "layers='layer' needs exactly one group"),
        ("prompt_tuning", {"length": "x"}, "length='x' must be"),
        ("prompt_tuning", {"length": 10**6}, "length=1000000 is too large: it must be at most 100,000"),
        ("prompt_tuning", {"init": "tokens", "tokens": [True]}, r"tokens=\[True\] must be"),
        ("p_tuning", {"template": [("start", True)]}, "template: at 'start' a number of pseudo tokens"),
        ("p_tuning", {"template": [("start", 10**9)]}, "template: at 'start' a number of pseudo tokens"),
        ("hard_prompt", {"template": []}, r"template=\[\] must be"),
        ("fish_mask", {"refresh": 10**6}, "refresh=1000000 must be a whole number of at least 0 and at most 1000"),
        ("far", {"stage": ["learners"]}, r"stage=\['learners'\] is not one of 'priming', 'learners'"),
    ],
)
def test_what_an_error_says(method, options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.make(method, **options)


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("lora", "r", "Here 'r' is called 'rank'"),
        ("lora", "lora_alpha", "Here 'lora_alpha' is called 'alpha'"),
        ("lora", "lora_dropout", "is called 'dropout'"),
        ("lora", "target_modules", "is called 'target'"),
        ("dora", "use_rslora", "is called 'rslora'"),
        ("lora", "use_dora", "method='dora'"),
        ("lora", "modules_to_save", "is called 'head'"),
        ("lora", "bias", "jpeft.chain"),
        ("ia3", "feedforward_modules", "is called 'feedforward'"),
        ("prompt_tuning", "num_virtual_tokens", "is called 'length'"),
        ("p_tuning", "encoder_hidden_size", "is called 'hidden'"),
        ("prefix_tuning", "encoder_hidden_size", "is called 'mlp'"),
        ("pfeiffer", "reduction_factor", "is called 'reduction'"),
        ("lora", "learning_rate", "is the optimizer's"),
    ],
)
def test_options_of_other_libraries_are_explained(method, option, message):
    with pytest.raises(ValueError, match=f"^{method} has no option '{option}'. .*{message}"):
        jpeft.make(method, **{option: 3})


def test_sets_have_one_order():
    assert opt.hashable({"value", "query", "key"}) == opt.hashable(frozenset(["key", "value", "query"])) == ("key", "query", "value")


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

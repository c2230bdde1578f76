"""Arguments of the public functions that are no options: each bad one is a ValueError that says what to give."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import jpeft
from jpeft.comparison.rows import parse_row, parse_rows

PARAMS = {"dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}}
unchecked: Any = lambda function: getattr(function, "__wrapped__", function)


def peft():
    return jpeft.apply(PARAMS, method="bitfit")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jpeft.make("chain"), r"There is no method 'chain'. Chain methods with jpeft.chain"),
        (lambda: jpeft.make({"method": "chain"}), "The configuration of a chain holds .*, and has parts=None"),
        (lambda: jpeft.make({"method": "chain", "parts": {}, "rank": 3}), r"and has \['rank'\] besides"),
        (lambda: jpeft.make({"rank": 3}), "There is no method None"),
        (lambda: jpeft.make({"method": ["lora"]}), r"There is no method \['lora'\]"),
        (lambda: jpeft.chain(**{"a/b": jpeft.lora()}), "'a/b' is no name for a part"),
        (lambda: jpeft.chain(**{"+": jpeft.lora()}), r"'\+' is no name for a part"),
        (lambda: jpeft.chain(**{"": jpeft.lora()}), "'' is no name for a part"),
        (lambda: jpeft.chain(lora=jpeft.lora(rank=True)), "lora: rank=True must be"),
        (lambda: jpeft.stack([]), "needs at least one Peft, in a list"),
        (lambda: jpeft.optimizer({"train": optax.adam(1e-3), "x": None}, peft()), "optimizer: x=None is no optax optimizer"),
        (lambda: jpeft.optimizer(optax.adam(1e-3), peft(), over="both"), "over='both' is not one of"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_key_is_a_key():
    for key in (jax.random.key(1), jax.random.PRNGKey(1)):
        jpeft.apply(PARAMS, method="lora", rank=1, key=key)


@pytest.mark.parametrize("rate", ["nan", "inf", "0", "-1", "True", "abc", "[1]", "1e-300", "9" * 400])
def test_the_rate_of_a_row(rate):
    with pytest.raises(ValueError, match=r"Row 'lora learning_rate=.*': learning_rate=.* is not a positive number"):
        parse_row(f"lora learning_rate={rate}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("", "There is no method ''"),
        ("lora rank=True", "lora: rank=True must be"),
        ("lora rank=nan", "lora: rank='nan' must be"),
        ("lora r=3", "Here 'r' is called 'rank'"),
        ("lora rank=3 rank=4", "given twice"),
        ("full target=x", "given twice"),
        ("lora target=", "target='' is empty"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(ValueError, match=message):
        parse_rows([row])

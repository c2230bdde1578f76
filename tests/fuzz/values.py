"""Options: a value of every type for every option of every method. It is refused by name, or is of the option's kind and has an effect."""

import json
import math
import numbers
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jpeft
from fuzz.verdict import Verdict, judge
from fuzz.watch import Seen, command, watch

# Values by kind and name. Those of the wrong type for one option are of the right type for another.
VALUES: dict[str, dict[str, Any]] = {
    "a whole number": {"0": 0, "1": 1, "2": 2, "-1": -1, "10^30": 10**30, "-10^30": -(10**30), "of NumPy": np.int64(2)},
    "a real number": {
        "1.0": 1.0,
        "0.5": 0.5,
        "-0.5": -0.5,
        "2.5": 2.5,
        "1e308": 1e308,
        "1e-320": 1e-320,
        "nan": math.nan,
        "inf": math.inf,
        "nan of NumPy": np.float32("nan"),
    },
    "a text": {
        "empty": "",
        "a word": "abc",
        "a number": "2",
        "nan": "nan",
        "not a regex": "(query",
        "a role": "@query",
        "no role": "@nowhere",
        "two lines": "a\nb",
    },
    "a list": {
        "empty": [],
        "a name": ["query"],
        "no name": ["qurey"],
        "an empty name": [""],
        "numbers": [1, 2],
        "negative numbers": [-1],
        "large numbers": [10**6],
        "nested": [[1], ["x", None]],
        "of NumPy": np.array([1, 2]),
    },
    "rules": {
        "empty": {},
        "a name": {"query": 2, ".*": 1},
        "for nothing": {".*qurey": 2, ".*": 1},
        "of text": {".*": "x"},
        "that are no regex": {"(": 1},
        "by number": {1: 2},
    },
    "something else": {"None": None, "True": True, "False": False, "complex": 1j, "bytes": b"query", "a type": int, "an object": Ellipsis},
}

# What each kind of option may be; more exact ranges are the methods' business.
_COUNT = ["rank", "size", "reduction", "division", "length", "mlp", "hidden", "width", "sample", "top", "refresh"]
_COUNT += ["target_rank", "total_steps", "interval", "seed", "heads", "tasks", "block_size", "block_num", "mini_rank", "terms"]
_NUMBER = ["alpha", "dropout", "std", "sparsity", "l0", "gate_rate", "weight_rate", "mask_share", "retention", "priming_share", "scale"]
_NUMBER += ["block_dropout", "rank_dropout", "module_dropout", "eps", "d_initial"]
_NUMBER += ["t_init", "t_final", "beta1", "beta2", "orthogonal", "rho", "b_lr_scale"]
_FLAG = ["structured", "draw", "train_norms", "plus_plus", "own_norm", "shift", "rslora", "causal"]
_FLAG += ["freeze_a", "project", "apply_gs", "effective_conv", "decompose_both", "rank_dropout_scale", "lora_bias", "block_share", "coft"]
_CHOICE = ["activation", "init", "view", "encoder", "stage", "tied", "variant"]
_SELECTION = ["value", "output", "hidden_state", "target", "feedforward", "also", "layers", "head", "embedding", "body", "subset"]
_LIST = ["tokens", "labels", "template", "edges", "axes"]


# Options without which a method is not made.
NEEDED: dict[str, dict[str, Any]] = {"trainable_tokens": {"tokens": [3, 4]}}


def fits(option: str, value: Any, default: Any) -> bool:
    """Whether a value is of the kind that an option's name promises."""
    if value is None:
        return default is None or option in ("head", "target", "also", "feedforward", "mlp", "terms")
    number = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_)) and math.isfinite(value)
    if option in ("rank", "alpha") and isinstance(value, dict):
        return bool(value) and all(isinstance(path, str) and fits(option, one, default) for path, one in value.items())
    if option in ("n_butterfly_factor", "decompose_factor"):  # -1 for decompose_factor is as near the root as can be
        return number and isinstance(value, numbers.Integral)
    if option in _COUNT:
        return number and isinstance(value, numbers.Integral) and value >= 0
    if option in _NUMBER:
        return number
    if option in _FLAG:
        return isinstance(value, bool)
    if option in _CHOICE:
        return isinstance(value, str)
    if option in _SELECTION:
        names = [value] if isinstance(value, str) else value
        return isinstance(names, list) and bool(names) and all(isinstance(name, str) and name for name in names)
    if option in _LIST:  # an empty mapping is an empty list of pairs
        return isinstance(value, (list, np.ndarray)) or value == {}
    raise KeyError(f"{option} is a new option: say in values.py what kind of value it takes.")


def cases() -> list[tuple[str, str, str, str]]:
    """Every method, option, kind of value and name of a value."""
    named = ((name, option) for name, info in jpeft.methods().items() for option in info.factory.__signature__.parameters)
    return [(name, option, kind, value) for name, option in named for kind in VALUES for value in VALUES[kind]]


def judge_option(method: str, option: str, value: Any, params: Any, apply: Callable[..., Any], world: Path) -> Verdict:
    """Make a method with an option and give it to a model."""
    default = jpeft.methods()[method].factory.__signature__.parameters[option].default
    needed = NEEDED.get(method, {})

    def operation() -> str:
        made = jpeft.make(method, **needed | {option: value})
        if made != jpeft.make(json.loads(json.dumps(made.config()))):
            return "its configuration does not give it back"
        wrong = "" if made.requires_stats or made == jpeft.make(method, **needed) else _use(made, params, apply)
        return wrong or ("" if fits(option, value, default) else f"{value!r} was taken, as {made!r}")

    return judge(watch(operation, world), "", _names(option, value))


def _names(option: str, value: Any) -> list[str]:
    """What an error has to name: the option, or the value that was given, or part of it."""
    parts = value if isinstance(value, (list, dict)) else [value]
    return [rf"\b{option}\b", *(re.escape(repr(part)) for part in parts)]


def _use(method: jpeft.Method, params: Any, apply: Callable[..., Any]) -> str:
    """Apply a method and trace the model with it; what is wrong, if anything."""
    peft = jpeft.apply(params, method=method)
    bad = [path for path, leaf in jpeft.flatten(peft.adapter).items() if not np.all(np.isfinite(np.asarray(leaf)))]
    if bad:
        return f"{bad[0]} of a new adapter is not finite"
    jax.eval_shape(jpeft.wrap(apply, method), peft.variables, np.ones((2, 6), np.int32))
    return ""


def judge_on_the_command_line(method: str, option: str, value: Any, model: Path, world: Path) -> Verdict:
    """The same, as a user types it: NAME=VALUE."""
    default = jpeft.methods()[method].factory.__signature__.parameters[option].default
    written = value if isinstance(value, str) else repr(value)
    more = [f"{name}={needed}" for name, needed in NEEDED.get(method, {}).items() if name != option]
    seen = watch(command("summary", "--model", model, "--method", method, f"{option}={written}", *more), world)
    if not seen.kind and fits(option, value, default):
        return Verdict("same")
    if not seen.kind and isinstance(value, str):
        return Verdict("same")  # "2" and 2 are the same there
    return judge(seen, Seen(), [*_names(option, value), "requires the statistics"])

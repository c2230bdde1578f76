"""Options of a method: declared by type and range, made hashable, and checked when they are given.

A method declares an option as a dataclass field. The annotation is the declaration: its type, and its range in an `Annotated` type::

    rank: PerPath[Count] = 8               # a whole number of at least 1, or rules {regex: number}
    dropout: Probability = 0.0             # a number in [0, 1)
    view: Literal["auto", "factored"] = "auto"

`checked` then refuses every value of another type or outside the range, and names the option, the value and what is allowed.
"""

import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union

from jpeft.core import other_names
from jpeft.core.limits import LARGEST, LONGEST, WIDEST, Geometry, Limit, Name, NotEmpty, Number, Range, Regex, is_finite
from jpeft.tree.kernels import KernelAxes

T = TypeVar("T")


Count = Annotated[int, Range(1, WIDEST)]  # 1, 2, 3, ...
Length = Annotated[int, Range(1, LONGEST)]  # rows of a prompt or prefix
CountOrZero = Annotated[int, Range(0, LARGEST)]  # 0, 1, 2, ...
Positive = Annotated[Number, Range(0, open="low")]  # (0, inf)
NotNegative = Annotated[Number, Range(0)]  # [0, inf)
Probability = Annotated[Number, Range(0, 1, open="high")]  # [0, 1)
Share = Annotated[Number, Range(0, 1, open="low")]  # (0, 1]
ShareBelowOne = Annotated[Number, Range(0, 1, open="both")]  # (0, 1)

Pattern = Annotated[str, Regex()]  # a regex for whole paths, or roles
PathPattern = Annotated[str, Regex(roles=False)]  # a regex or a name, for one path at a time
Names = Pattern | Annotated[Sequence[Annotated[str, Name()]], NotEmpty()]  # a regex, a name, or a list of names
Axes = Sequence[tuple[PathPattern, Annotated[tuple[Sequence[CountOrZero], ...], Geometry()]]]  # as of `jpeft.kernel_axes`
PerPath = T | Mapping[PathPattern, T] | tuple[tuple[PathPattern, T], ...]  # one value for all paths, or rules {regex or name: value}


def option(*, default: Any, alias: str) -> Any:
    """A dataclass field that callers spell `alias`, because a function of the contract has the option's name already.

    >>> import jpeft
    >>> jpeft.lora(init="gaussian").initializer
    'gaussian'
    """
    return dataclasses.field(default=default, metadata={"alias": alias})


def spelling(field: dataclasses.Field[Any]) -> str:
    """The name by which callers give a field."""
    return field.metadata.get("alias", field.name)


def spellings(cls: Any) -> dict[str, str]:
    """The fields of a method's class by the names that callers give them."""
    return {spelling(field): field.name for field in dataclasses.fields(cls)}


def signature(cls: Any) -> inspect.Signature:
    """The options of a method's class as a signature of keyword arguments, with their defaults and types."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    empty = inspect.Parameter.empty
    kind = inspect.Parameter.KEYWORD_ONLY
    default = lambda field: empty if field.default is dataclasses.MISSING else field.default
    return inspect.Signature([inspect.Parameter(spelling(f), kind, default=default(f), annotation=f.type) for f in fields])


def per_path(cls: Any) -> dict[str, str]:
    """The fields of a method's class that may be rules, `PerPath`, by the names that callers give them."""
    hints = annotations(cls)
    is_rules = lambda hint: any(
        isinstance(made := typing.get_origin(part), type) and issubclass(made, Mapping) for part in typing.get_args(hint)
    )
    return {name: field for name, field in spellings(cls).items() if is_rules(hints.get(field))}


@functools.cache
def annotations(cls: Any) -> dict[str, Any]:
    """The annotations of a method's fields, evaluated; none for a class whose annotations name what only its own function knows."""
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except NameError:
        return {}


def refuse_unknown(name: str, parameters: Mapping[str, inspect.Parameter], args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Refuse positional arguments and options that a method does not have.

    Raises:
      ValueError: with the options that exist, and the one that was probably meant.
    """
    unknown = [given for given in options if given not in parameters]
    if not unknown and not args:
        return
    given = f"option {unknown[0]!r}" if unknown else "positional arguments"
    elsewhere = other_names.hint(unknown[0], parameters) if unknown else ""
    close = difflib.get_close_matches(unknown[0], parameters, n=1) if unknown and not elsewhere else []
    hint = f" Did you mean {close[0]!r}?" if close else f" {elsewhere}" if elsewhere else ""
    defaults = ", ".join(f"{parameter.name}={parameter.default!r}" for parameter in parameters.values())
    raise ValueError(f"{name} has no {given}.{hint} Its options and defaults are: {defaults}.")


# --- values -----------------------------------------------------------------------------------------------------------------------------


def hashable(value: Any) -> Hashable:
    """The form in which an option is kept: dicts, lists, sets and arrays become tuples, so that methods can be compared and hashed.

    >>> hashable({"query": 4, ".*": [1, 2]})
    (('query', 4), ('.*', (1, 2)))
    """
    if isinstance(value, Mapping):
        return tuple((key, hashable(item)) for key, item in value.items())
    if isinstance(value, KernelAxes):
        return KernelAxes(*map(tuple, value))
    if hasattr(value, "tolist"):  # a NumPy or JAX array, or a scalar of one
        return hashable(value.tolist())
    if isinstance(value, (set, frozenset)):  # in one order in every process
        return tuple(sorted(map(hashable, value), key=repr))
    if isinstance(value, (list, tuple)):
        return tuple(hashable(item) for item in value)
    hash(value)
    return value


def plain(value: Any) -> Any:
    """The form in which an option is written to JSON: tuples become lists."""
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def checked(owner: str, name: str, value: Hashable, hint: Any, *, given: Any = None) -> Hashable:
    """The value of an option, if it has the declared type and lies in the declared range.

    Args:
      owner: Name of the method.
      name: Name of the option.
      value: In the form of `hashable`.
      hint: Annotation of the field.
      given: The value in the form in which it was given, for the message.

    Raises:
      ValueError: otherwise.

    >>> checked("lora", "rank", 8, PerPath[Count])
    8
    """
    if not _fits(value, hint):
        spelled = shown(value if given is None else given)
        raise ValueError(f"{owner}: {name}={spelled} {_problem(value, hint) or f'must be {describe(hint)}'}.")
    return _real(value, hint)


def checked_fields(cls: Any, owner: str, options: Mapping[str, Any]) -> dict[str, Hashable]:
    """The values of a method's fields, made hashable and checked: those of the given options, and the defaults of the others.

    Raises:
      ValueError: for an option that is missing, of another type than its field, or outside its range.
    """
    hints, values = annotations(cls), {}
    for field in dataclasses.fields(cls):
        name = spelling(field)
        if name not in options and field.default is dataclasses.MISSING:
            raise ValueError(f"{owner} needs the option {name!r}.")
        given, hint = options.get(name, field.default), hints.get(field.name, Any)
        try:
            value = hashable(given)
        except (TypeError, RecursionError):  # what cannot be hashed, nests without end, or is known inside `jax.jit` only
            raise ValueError(f"{owner}: {name}={shown(given)} must be {describe(hint)}.") from None
        values[field.name] = checked(owner, name, value, hint, given=given)
    return values


def shown(value: Any) -> str:
    """A value for an error message, in one line of bearable length.

    >>> shown("a" * 300)[-6:], shown(10**5000)
    ('aaa...', '<int>')
    """
    try:
        text = " ".join(repr(value).splitlines())
    except (ValueError, RecursionError):  # Python refuses to write very long numbers
        return f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:197]}..."


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has a declared type and lies in its range.

    >>> fits(8, Count), fits([8], Sequence[Count]), fits(True, int)
    (True, True, False)
    """
    try:
        return _fits(hashable(value), hint)
    except (TypeError, RecursionError):
        return False


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return _fits(value, args[0]) and all(value in limit for limit in _limits(hint))
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in args)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if hint is float or hint == Number:
        return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None or hint is type(None):
        return value is None
    if origin is tuple:
        return isinstance(value, tuple) and _fits_tuple(value, args)
    # `hashable` has made tuples of sequences and mappings.
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, tuple) and bool(value) and all(_fits(pair, tuple[args]) for pair in value)
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    return isinstance(value, hint if isinstance(hint, type) else object)


def _real(value: Any, hint: Any) -> Any:
    """A value that fits, with real numbers where they are declared: JAX would take 10 ** 10 for a number of 32 bits and refuse it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is float or hint == Number:
        return float(value)
    if origin is Annotated:
        return _real(value, args[0])
    if origin in (Union, types.UnionType):
        return _real(value, next(part for part in args if _fits(value, part)))
    if not isinstance(value, tuple) or not args:
        return value
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return tuple((key, _real(item, args[1])) for key, item in value)
    hints = args if origin is tuple and args[1:] != (Ellipsis,) else args[:1] * len(value)
    return tuple(map(_real, value, hints))


def _fits_tuple(value: tuple[Any, ...], args: tuple[Any, ...]) -> bool:
    if args[1:] == (Ellipsis,):
        rules = typing.get_origin(args[0]) is tuple
        return (bool(value) or not rules) and all(_fits(item, args[0]) for item in value)
    return len(value) == len(args) and all(map(_fits, value, args))


def _limits(hint: Any) -> list[Limit]:
    return [limit for limit in typing.get_args(hint)[1:] if isinstance(limit, Limit)]


def _problem(value: Any, hint: Any) -> str:
    """What is wrong with a value that does not fit, where a limit knows more than the type's description says; else nothing."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        if not _fits(value, args[0]):
            return _problem(value, args[0])
        return next(filter(None, (limit.problem(value) for limit in _limits(hint))), "")
    if origin in (Union, types.UnionType):
        return next(filter(None, (_problem(value, part) for part in args)), "")
    if origin is Literal or not args or not isinstance(value, tuple):
        return ""
    if isinstance(origin, type) and issubclass(origin, Mapping):
        items = [(item, hint) for pair in value if isinstance(pair, tuple) and len(pair) == len(args) for item, hint in zip(pair, args)]
    elif origin is tuple and args[1:] != (Ellipsis,):
        items = list(zip(value, args)) if len(value) == len(args) else []
    else:
        items = [(item, args[0]) for item in value]
    found = ((item, _problem(item, hint)) for item, hint in items)
    item, problem = next(((item, problem) for item, problem in found if problem), (None, ""))
    return problem if not problem or problem.startswith("holds ") else f"holds {shown(item)}, which {problem}"


def describe(hint: Any) -> str:
    """What a declared type allows, in words.

    >>> describe(PerPath[Count])
    'a whole number of at least 1, or rules {regex or name: a whole number of at least 1}'
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    words = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", type(None): "None", Any: "any value"}
    if hint == Number:
        return "a number"
    if origin is Annotated:
        limits = _limits(hint)
        kind = next((limit.words for limit in limits if limit.words is not None), None)
        return " ".join([kind or describe(args[0]), *(str(limit) for limit in limits if limit.words is None)])
    if origin in (Union, types.UnionType):
        return ", or ".join(dict.fromkeys(map(describe, _without_pairs(args))))
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}" if args[1:] else repr(*args)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"rules {{regex or name: {describe(args[1])}}}"
    if origin is tuple and args and args[1:] != (Ellipsis,):
        return f"({', '.join(map(describe, args))})"
    if args and isinstance(origin, type) and issubclass(origin, Iterable):
        return f"a list, each {describe(args[0])}"
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _without_pairs(args: tuple[Any, ...]) -> list[Any]:
    """The parts of a union without the tuple form of rules, where the mapping stands beside it."""
    rules = any(isinstance(typing.get_origin(part), type) and issubclass(typing.get_origin(part), Mapping) for part in args)
    pairs = lambda part: typing.get_origin(part) is tuple and typing.get_origin(typing.get_args(part)[0]) is tuple
    return [part for part in args if not (rules and pairs(part))]

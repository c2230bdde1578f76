"""Choosing parameters by path.

One idiom everywhere: ordered ``(regex or name, value)`` rules over '/'-joined paths, `re.fullmatch`, first match wins. A selection that
matches nothing is an error that names what was asked for and what there is.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jpeft import layouts
from jpeft.tree.paths import Params, Path, flatten

_NUMBER = re.compile(r"(^|[/(|])(\d|\\d|\[\d|\(\d|\(\\d)")
Rules = Mapping[str, Any] | Sequence[Any]  # {regex or name: value} or ((regex or name, value), ...)


def first_match(path: Path, rules: Any, what: str) -> Any:
    """The value of the first ``(regex or name, value)`` rule that matches; a plain value stands for every path.

    Raises:
      ValueError: if rules were given and none matches.

    >>> first_match("encoder/query/kernel", {"query": 16, ".*": 4}, "rank")
    16
    """
    if not isinstance(rules, (tuple, Mapping)):
        return rules
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    for pattern, value in pairs:
        if applies(pattern, path):
            return value
    raise ValueError(f"No {what} rule matches '{path}'. Rules: {[p for p, _ in pairs]}. End them with ('.*', {what}) for all the others.")


def check_rules(rules: Any, paths: Sequence[Path], what: str) -> None:
    """Refuse rules that leave a path out, or that change nothing: each must be the first to match one of the paths.

    A last rule for all others, such as ``".*"``, may be left with nothing.

    Args:
      rules: As for `first_match`.
      paths: The paths of all that the rules are for.
      what: Name of the option.

    Raises:
      ValueError: for a path without a rule, a rule that matches no path, or none that is left by the rules before it.
    """
    if not isinstance(rules, (tuple, Mapping)):
        return
    patterns = list(rules) if isinstance(rules, Mapping) else [pattern for pattern, _ in rules]
    first = {next((i for i, pattern in enumerate(patterns) if applies(pattern, path)), None) for path in paths}
    for i, pattern in enumerate(patterns):
        # Whatever matches a path that no model has is a rule for all others.
        if i in first or re.fullmatch(pattern, "?/?") is not None:
            continue
        own = [path for path in paths if applies(pattern, path)]
        if not own:
            raise ValueError(
                f"{what}: the rule {pattern!r} matches none of the {len(paths)} layers that are adapted.{_close(pattern, paths)}"
            )
        before = next(other for other in patterns if applies(other, own[0]))
        advice = "leave one out" if before == pattern else "the first match wins, so swap them"
        raise ValueError(f"{what}: the rule {pattern!r} never applies, because {before!r} stands before it: {advice}.")
    for path in paths:
        first_match(path, rules, what)


def applies(pattern: str, path: Path) -> bool:
    """Whether a rule is for a path: a regex for the whole of it, or a name in it, as in a list of targets."""
    return matches(pattern, path) or named(pattern, path)


def matches(pattern: str, path: Path) -> bool:
    """Whether a regex matches the whole path of a leaf, or of the module that owns it.

    Raises:
      ValueError: for a role, which a single path cannot show, or a regex that is none.
    """
    if layouts.is_role(pattern):
        raise ValueError(
            f"'{pattern}' is a role, which only a whole model shows: a target may be one, but a rule for single paths may not."
        )
    try:
        return re.fullmatch(pattern, path) is not None or re.fullmatch(pattern, path.rpartition("/")[0]) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error


def named(name: str, path: Path) -> bool:
    """Whether `name` is the leaf, its module, or a '/'-suffix of either: ``query`` and ``self/query`` name ``.../self/query/kernel``."""
    module = path.rpartition("/")[0]
    return f"/{path}".endswith(f"/{name}") or f"/{module}".endswith(f"/{name}")


def chooses(target: str | Sequence[str], path: Path) -> bool:
    """Whether a target, a regex or a list of names, names a path."""
    if isinstance(target, str):
        return matches(target, path)
    return any(matches(name, path) if layouts.is_role(name) else named(name, path) for name in target)


def select(paths: Iterable[Path], target: str | Sequence[str], *, option: str = "target", params: Params | None = None) -> list[Path]:
    """The paths that a target names.

    Args:
      paths: Candidates.
      target: A string is a regex that must match a whole path, of the leaf or of its module; if it matches none, it is taken for one name.
        A sequence is a list of names, each a module or leaf name or a '/'-suffix of a path, as HF PEFT's ``target_modules``; every one of
        them must be found. A string or a name that begins with ``@`` is a role, ``"@ffn_in|@ffn_out"`` (`jpeft.layouts`).
      option: Name of the option, for the message.
      params: The tree the candidates come from, to name what exists when they themselves say too little.

    Raises:
      ValueError: if the regex is not one, or something matches nothing.
    """
    candidates: Any = paths if isinstance(paths, Mapping) else list(paths)
    paths = list(candidates)
    # Roles are looked for in the whole tree, since a part of it may not show which layout the model follows.
    whole = candidates if params is None else params
    if layouts.is_role(target):
        with_role = set(layouts.find(whole, str(target), option=option))
        found = [path for path in paths if path in with_role]
        if not found:
            raise ValueError(_nothing(option, str(target), paths, params))
        return found
    if isinstance(target, str):
        try:
            re.compile(target)
        except re.error as error:
            raise ValueError(f"{option}={target!r} is not a regular expression: {error}.") from error
        found = [path for path in paths if matches(target, path)]
        found = found or [path for path in paths if named(target, path)]
        if not found:
            raise ValueError(_nothing(option, target, paths, params))
        return found
    chosen: set[Path] = set()
    for name in target:
        new = select(candidates, name, option=option, params=params) if layouts.is_role(name) else [p for p in paths if named(name, p)]
        if not new:
            raise ValueError(_nothing(option, name, paths, params))
        chosen.update(new)
    return [path for path in paths if path in chosen]


def names_numbers(value: Any) -> bool:
    """Whether a text in the options of a method, a regex or a name, has a component of a path that is, or begins with, a number.

    >>> names_numbers({"target": r".*layer/(10|11)/.*query/kernel"}), names_numbers({"rank": {".*c_fc1/kernel": 4}})
    (True, False)
    """
    return any(_NUMBER.search(text) for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    """All texts in the options of a method, the keys of rules included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(key)
            yield from _texts(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)


def _nothing(option: str, target: str, paths: list[Path], params: Params | None) -> str:
    everything = paths or (list(flatten(params)) if params is not None else [])
    names = [name for name in re.split(r"[\s,|]+", target.strip("()[]")) if name]
    if len(names) > 1 and all(any(named(name, path) for path in everything) for name in names):
        return f"{option}={target!r} is one regular expression, and matches no parameter. For a list of names give {option}={names!r}."
    return (
        f"{option}={target!r} matches none of the {len(everything)} parameters it could.{_close(target, everything)} "
        "A string must match a whole path as a regular expression (begin it with '.*/') or be a name; a list holds names."
    )


def _close(target: str, paths: Sequence[Path]) -> str:
    """What a target that matches nothing may have meant, and what there is."""
    modules = sorted({re.sub(r"(^|/)\d+(?=/|$)", r"\1*", path) for path in paths})
    parts = {part for path in paths for part in path.split("/")}
    # Within a regex, the words that do not occur are the mistyped ones.
    words = [word for word in re.findall(r"[A-Za-z_]\w*", target) if word not in parts]
    close = [
        name for word in dict.fromkeys([target, *words]) for name in difflib.get_close_matches(word, parts | set(modules), n=3, cutoff=0.6)
    ]
    hint = f" Did you mean {' or '.join(map(repr, dict.fromkeys(close[:3])))}?" if close else ""
    shown = ", ".join(f"'{name}'" for name in modules[:12]) + (f", ... ({len(modules)} kinds)" if len(modules) > 12 else "")
    return f"{hint} They are: {shown or '(none)'}."

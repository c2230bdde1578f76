"""Choosing parameters by path.

One idiom everywhere: ordered ``(regex, value)`` rules over '/'-joined paths, `re.fullmatch`, first match wins. A selection that matches
nothing is an error that names what was asked for and what there is.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jpeft import layouts
from jpeft.tree.paths import Params, Path, flatten

Rules = Mapping[str, Any] | Sequence[Any]  # {regex: value} or ((regex, value), ...)


def first_match(path: Path, rules: Any, what: str) -> Any:
    """The value of the first ``(regex, value)`` rule that matches; a plain value stands for every path.

    Raises:
      ValueError: if rules were given and none matches.
    """
    if not isinstance(rules, (tuple, Mapping)):
        return rules
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    for pattern, value in pairs:
        if matches(pattern, path):
            return value
    raise ValueError(f"No {what} rule matches '{path}'. Rules: {[p for p, _ in pairs]}. End them with ('.*', {what}) for all the others.")


def matches(pattern: str, path: Path) -> bool:
    """Whether a regex matches the whole path of a leaf, or of the module that owns it.

    Raises:
      ValueError: for a role, which a single path cannot show.
    """
    if layouts.is_role(pattern):
        raise ValueError(
            f"'{pattern}' is a role, which only a whole model shows: a target may be one, but a rule for single paths may not."
        )
    return re.fullmatch(pattern, path) is not None or re.fullmatch(pattern, path.rpartition("/")[0]) is not None


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
      target: A string is a regex that must match a whole path, of the leaf or of its module. A sequence is a list of names, each a module
        or leaf name or a '/'-suffix of a path, as HF PEFT's ``target_modules``; every one of them must be found. A string or a name that
        begins with ``@`` is a role, ``"@ffn_in|@ffn_out"`` (`jpeft.layouts`).
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
            found = [path for path in paths if matches(target, path)]
        except re.error as e:
            raise ValueError(f"{option}={target!r} is not a regular expression: {e}.") from e
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


def _nothing(option: str, target: str, paths: list[Path], params: Params | None) -> str:
    everything = paths or (list(flatten(params)) if params is not None else [])
    modules = sorted({re.sub(r"(^|/)\d+(?=/|$)", r"\1*", p) for p in everything})
    close = difflib.get_close_matches(target, {part for p in everything for part in p.split("/")} | set(modules), n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    shown = ", ".join(f"'{m}'" for m in modules[:12]) + (f", ... ({len(modules)} kinds)" if len(modules) > 12 else "")
    return (
        f"{option}={target!r} matches none of the {len(everything)} parameters it could.{hint} They are: {shown or '(none)'}. "
        "A string must match a whole path as a regular expression (begin it with '.*/'); a list holds names."
    )

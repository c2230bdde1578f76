"""What each outcome is worth.

Right: `same` (equal to the bit to what undamaged input gives), `refused` (one line that names what was damaged), `said` (different, and a
warning names what was damaged), `as it says` (different, as it has to be: the file itself is the only source, and an independent reader
reads it likewise). Everything else is a failure.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from fuzz.watch import Seen

RIGHT = ("same", "refused", "said", "as it says")
LONGEST = 1200  # characters of an error that is one line


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a mutation.

    Attributes:
      outcome: One of `RIGHT`, or the kind of failure: "silent", "traceback", "many lines", "unnamed", "hang", "left over", "blocked".
      why: The evidence.
    """

    outcome: str
    why: str = ""

    @property
    def right(self) -> bool:
        return self.outcome in RIGHT


def judge(
    seen: Seen,
    expected: Any,
    names: Sequence[str],
    *,
    usual: str = "",
    writes: str = r"(?!)",
    repairs: str = r"(?!)",
    needless: bool = False,
    explain: Callable[[Any], str | None] = lambda value: None,
) -> Verdict:
    """Judge what was seen of an operation on damaged input.

    Args:
      seen: What was seen.
      expected: What undamaged input gives.
      names: What an error or warning has to name: it matches one of these patterns.
      usual: What the operation prints on undamaged input, which says nothing of the damage.
      writes: Regex of paths that a success may change.
      repairs: Regex of paths that a failure may change.
      needless: Whether the operation does not need what was damaged, so that a refusal is a failure.
      explain: Says why a value other than the expected one is right; None if it is not.
    """
    if seen.kind == "TooLong":
        return Verdict("hang", seen.error or "")
    if "Traceback (most recent call last)" in seen.output:
        return Verdict("traceback", f"printed: {seen.output[-1500:]}")
    changed = [path for path in seen.changed if not re.fullmatch(repairs if seen.kind else writes, path)]
    hidden = [path for path in seen.appeared if re.search(r"(^|/)\.|partial|\.tmp|\.old", path)]
    if seen.kind:
        verdict = _judge_error(seen, names, needless)
        if verdict.right and (changed or hidden):
            return Verdict("left over", f"{(changed or hidden)[:5]} after: {seen.error}")
        return verdict
    if changed or hidden:
        return Verdict("left over", f"{(changed or hidden)[:5]}")
    if seen.value == expected:
        return Verdict("same")
    new = [line for line in seen.output.splitlines() if line not in usual]
    if any(_mentions(line, names) for line in new if re.match(r"(warning|note)\b", line, re.IGNORECASE)):
        return Verdict("said", seen.output[:300])
    reason = explain(seen.value)
    return Verdict("as it says", reason) if reason else Verdict("silent", _difference(seen.value, expected))


def _judge_error(seen: Seen, names: Sequence[str], needless: bool) -> Verdict:
    text = seen.error or ""
    if seen.kind == "CommandFailed":
        lines = [line for line in text.splitlines() if not re.match(r"(warning|note)\b", line, re.IGNORECASE)]
        if len(lines) != 1 or not lines[0].startswith("error: "):
            return Verdict("many lines", text[:1500])
        text = lines[0]
    elif seen.kind not in ("ValueError", "FileNotFoundError", "PermissionError", "IsADirectoryError", "NotADirectoryError", "OSError"):
        return Verdict("traceback", seen.trace[-2500:])
    if "\n" in text or len(text) > LONGEST:
        return Verdict("many lines", text[:1500])
    if not _mentions(text, names):
        return Verdict("unnamed", text)
    return Verdict("blocked" if needless else "refused", text)


def _mentions(text: str, names: Sequence[str]) -> bool:
    return any(re.search(name, text) for name in names)


def _difference(value: Any, expected: Any) -> str:
    if isinstance(value, tuple) and isinstance(expected, tuple):
        return "; ".join(_difference(a, b) for a, b in zip(value, expected) if a != b)
    if isinstance(value, dict) and isinstance(expected, dict):
        keys = [key for key in expected.keys() | value.keys() if value.get(key) != expected.get(key)]
        return ", ".join(f"{key}: {value.get(key)!r:.150} for {expected.get(key)!r:.150}" for key in sorted(keys)[:3])
    return f"{value!r:.400} for {expected!r:.400}"

"""Spans of words that a row of tags marks, in the schemes IOB1, IOB2, IOBES and BILOU."""

import re
from collections.abc import Iterable, Sequence

Span = tuple[int, int, str]  # first word, word after the last, kind
# The part of its span that a word is, "B" begin, "I" inside, "E" end or "S" a single word, and the kind of the span.
Mark = tuple[str, str]

OUTSIDE = "O"
# Letters of a scheme, each with the part that it means. BILOU says "last" and "unit", BMES "middle", BMEWO "middle" and "whole".
SCHEMES = (
    {"B": "B", "I": "I", "E": "E", "S": "S"},
    {"B": "B", "I": "I", "L": "E", "U": "S"},
    {"B": "B", "M": "I", "E": "E", "S": "S"},
    {"B": "B", "M": "I", "E": "E", "W": "S"},
)


def find_marks(tags: Iterable[str]) -> dict[str, Mark | None]:
    """Return what each tag of a tag set marks; None for the tag of words outside of spans.

    A tag is a letter and a kind, ``B-PER`` or ``B_PER``, or a letter alone where all tags are. The letters that occur decide on the
    scheme. A tag of any other form, such as a part of speech, is a span of one word.

    >>> find_marks(["O", "B-PER", "L-PER", "NOUN"])
    {'O': None, 'B-PER': ('B', 'PER'), 'L-PER': ('E', 'PER'), 'NOUN': ('S', 'NOUN')}
    """
    names = list(dict.fromkeys(tags))
    split = {name: re.fullmatch(r"([A-Z])[-_](.+)", name) for name in names}
    if OUTSIDE in names and {"B", "I"} & set(names) and all(re.fullmatch(r"[OBIESLUMW]", name) for name in names):
        split = {name: re.fullmatch(r"([A-Z])()", name) if name != OUTSIDE else None for name in names}
    letters = {match[1] for match in split.values() if match} & set("BIESLUMW")
    scheme = next((scheme for scheme in SCHEMES if letters <= scheme.keys()), {"B": "B", "I": "I"})
    outside = outside_of(names)
    marks: dict[str, Mark | None] = {}
    for name, match in split.items():
        known = match and match[1] in scheme
        marks[name] = None if name == outside else (scheme[match[1]], match[2]) if match and known else ("S", name)
    return marks


def outside_of(tags: Sequence[str]) -> str:
    """Return the tag of words outside of spans: "O", or "0" where all tags are numbers.

    >>> outside_of(["0", "1"]), outside_of(["B-PER", "O"])
    ('0', 'O')
    """
    return "0" if OUTSIDE not in tags and tags and all(tag.isdecimal() for tag in tags) else OUTSIDE


def spans(tags: Sequence[str | None], names: Iterable[str] | None = None) -> list[Span]:
    """Return the spans that a row of tags marks.

    ``B-X`` begins a span of kind X. ``I-X`` and ``E-X`` continue a span of kind X, or begin one after any other tag; behind ``E-X`` and
    ``S-X`` the span is closed. This is how CoNLL's own script and the package seqeval read IOB1, IOB2 and IOBES, also in rows that break
    the rules of the scheme; BILOU is the same with other letters. A word without a tag (None) is outside of spans.

    Args:
      tags: The tags of a row.
      names: All tags that there are, by which the scheme is known; those of the row by default.

    >>> spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "NOUN"])
    [(0, 2, 'PER'), (3, 4, 'LOC'), (4, 5, 'LOC'), (5, 6, 'NOUN')]
    >>> spans(["B-PER", "E-PER", "S-PER", "E-LOC"])
    [(0, 2, 'PER'), (2, 3, 'PER'), (3, 4, 'LOC')]
    """
    return mark_spans(tags, find_marks([tag for tag in tags if tag is not None] if names is None else names))


def mark_spans(tags: Sequence[str | None], marks: dict[str, Mark | None]) -> list[Span]:
    """Return the spans of a row of tags whose marks are known; see `spans`."""
    found: list[Span] = []
    open_kind = None
    for word, tag in enumerate(tags):
        mark = None if tag is None else marks[tag]
        if mark is None:
            open_kind = None
            continue
        part, kind = mark
        if part in "IE" and kind == open_kind:
            found[-1] = (found[-1][0], word + 1, kind)
        else:
            found.append((word, word + 1, kind))
        open_kind = kind if part in "BI" else None
    return found

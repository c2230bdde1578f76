"""Templates: which tokens a prompt puts into each text, and where they stand.

Users give a template as pairs of a place and tokens. `parse_template` checks the pairs and turns them into `TokenBlock`s.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeGuard

from jpeft.core.limits import LARGEST, LONGEST
from jpeft.core.options import shown

PSEUDO = -1  # stands for a pseudo token: its embedding is a row of the prompt, not one of the vocabulary
DEFAULT_LENGTH = 20  # pseudo tokens of a soft prompt without a template

TextPlace = str | tuple[str, int]  # "start", "end", ("before", token id) or ("after", token id)


class TokenBlock(NamedTuple):
    """Neighbouring tokens that are inserted at one place.

    Attributes:
      place: Where they are inserted.
      tokens: Ids of the vocabulary, or `PSEUDO`.
    """

    place: TextPlace
    tokens: tuple[int, ...]


def parse_template(template: Iterable[Any]) -> tuple[TokenBlock, ...]:
    """The blocks of a template.

    Args:
      template: Pairs of a place and tokens. The tokens are a number of pseudo tokens, or a tuple of token ids and `PSEUDO`.

    Raises:
      ValueError: if an item is not such a pair.

    >>> parse_template((("start", 2), (("before", 103), (PSEUDO, 7))))
    (TokenBlock(place='start', tokens=(-1, -1)), TokenBlock(place=('before', 103), tokens=(-1, 7)))
    """
    blocks = []
    for item in template:
        place, tokens = item if isinstance(item, tuple) and len(item) == 2 else (None, None)
        if not _is_place(place):
            raise ValueError(
                f"template: {shown(item)} is not a pair of a place ('start', 'end', ('before', id) or ('after', id)) and tokens: "
                "a number of pseudo tokens, or a tuple of token ids with -1 for a pseudo token."
            )
        tokens = (PSEUDO,) * tokens if _is_whole(tokens, at_most=LONGEST) else tokens
        if not isinstance(tokens, tuple) or not tokens or not all(_is_whole(token) and token >= PSEUDO for token in tokens):
            most = f" (at most {LONGEST:,})" if isinstance(tokens, int) and tokens > LONGEST else ""
            raise ValueError(
                f"template: at {place!r} a number of pseudo tokens or a tuple of token ids must stand, not {shown(item[1])}{most}."
            )
        blocks.append(TokenBlock(place, tokens))
    return tuple(blocks)


def _is_whole(value: Any, *, at_most: int = LARGEST) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value <= at_most


def _is_place(place: Any) -> TypeGuard[TextPlace]:
    anchored = isinstance(place, tuple) and len(place) == 2 and place[0] in ("before", "after") and _is_whole(place[1]) and place[1] >= 0
    return anchored or place in ("start", "end")


def trained_blocks(length: int | None, template: Iterable[Any] | None) -> tuple[TokenBlock, ...]:
    """The blocks of a soft prompt: those of its template, or `length` pseudo tokens at the start of the text.

    Raises:
      ValueError: for a template without pseudo tokens, or with another number of them than `length`.
    """
    if template is None:
        return parse_template((("start", DEFAULT_LENGTH if length is None else length),))
    blocks = parse_template(template)
    rows = count_pseudo_tokens(blocks)
    if not rows:
        raise ValueError("The template has no pseudo tokens, so there is nothing to train: jpeft.hard_prompt puts in plain tokens.")
    if length not in (None, rows):
        raise ValueError(f"length={length}, but the template has {rows} pseudo tokens; leave length out.")
    return blocks


def count_pseudo_tokens(blocks: tuple[TokenBlock, ...]) -> int:
    """How many of the blocks' tokens are pseudo tokens, which is the number of rows of the prompt."""
    return sum(token == PSEUDO for block in blocks for token in block.tokens)

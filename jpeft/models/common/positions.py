"""The positions of tokens, as the module `positions` of every family returns them."""

from typing import NamedTuple

from jaxtyping import Array


class PositionsError(ValueError):
    """A call takes more positions than the model's position table has."""


def check_positions(length: int, rows: int | None) -> None:
    """Check that the position table is long enough: a lookup beyond its end would return NaN without an error.

    Args:
      length: Positions that the call takes, those of a prefix, a prompt and the cache included.
      rows: Rows of the table; None for a model without one.

    Raises:
      PositionsError: if it is too short.
    """
    if rows is not None and length > rows:
        raise PositionsError(f"{length} positions, but the position table holds {rows}. Truncate the input.")


class TokenPositions(NamedTuple):
    """Where each token of a call stands, and whether it is a token.

    A prefix wraps the module `positions` and changes `position_ids` and `offset` with `_replace`.
    """

    position_ids: Array  # int [batch or 1, length]
    mask: Array | None  # bool [batch, 1, 1, length], over the keys of this call: False is padding; None if all are tokens
    offset: int = 0  # number of positions that stay free in front of the first token
    token_type_ids: Array | None = None  # int [batch, length]; None in families without token types

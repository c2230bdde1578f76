"""The positions of tokens, as the module `positions` of every family returns them."""

from typing import NamedTuple

from jaxtyping import Array


class TokenPositions(NamedTuple):
    """Where each token of a call stands, and whether it is a token.

    A prefix wraps the module `positions` and changes `position_ids` and `offset` with `_replace`.
    """

    position_ids: Array  # int [batch or 1, length]
    mask: Array  # bool [batch, 1, 1, length], over the keys of this call: False is padding
    offset: int = 0  # number of positions that stay free in front of the first token
    token_type_ids: Array | None = None  # int [batch, length]; None in families without token types

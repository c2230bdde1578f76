"""How a text is continued: the options of `jpeft.models.generate` together, checked in one place."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft.core.limits import WIDEST
from jpeft.core.options import Count, CountOrZero, fits, shown
from jpeft.models.generation.sampling import check_sampling


class Decoding(NamedTuple):
    """How text is generated; `jpeft.models.generate` explains the options.

    Attributes:
      max_new_tokens: Length of the longest continuation.
      stop: Token ids that end a text; an id, several, or None.
      pad: Token id that fills a row behind its end.
      key: Random key to draw tokens with; None for the most likely token each time.
      temperature: Divides the logits before a draw.
      top_k: Draw among this many most likely tokens.
      top_p: Draw among the most likely tokens that have this probability together.
      beams: Open texts of a beam search; 1 for none.
      length_penalty: Exponent of the length, in a beam search.
      early_stopping: When a beam search stops.
    """

    max_new_tokens: int = 64
    stop: int | Sequence[int] | None = None
    pad: int = 0
    key: jax.Array | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return () if self.stop is None else tuple(np.atleast_1d(np.asarray(self.stop)).tolist())

    def check(self) -> None:
        """Check all options.

        Raises:
          ValueError: for an option outside its range, an option of sampling without a key, or one of beam search without beams.

        >>> Decoding(top_k=3).check()
        Traceback (most recent call last):
        ValueError: top_k=3 without a key= has no effect: greedy text takes the most likely word each time. Pass key=.
        """
        if not fits(self.max_new_tokens, Count):
            raise ValueError(f"max_new_tokens={shown(self.max_new_tokens)} must be a whole number of at least 1 and at most {WIDEST:,}.")
        for name, ids, given in (("stop", self.stop_ids, self.stop), ("pad", (self.pad,), self.pad)):
            if not fits(ids, Sequence[CountOrZero]):
                raise ValueError(f"{name}={shown(given)} is no token id: ids are whole numbers from 0 on.")
        self._check_search()
        check_sampling(self.key, self.temperature, self.top_k, self.top_p)

    def _check_search(self) -> None:
        """Refuse options of a beam search that are out of range or have no effect."""
        beams: Any = self.beams
        if not fits(self.length_penalty, float):
            raise ValueError(f"length_penalty={shown(self.length_penalty)} must be a finite number.")
        if not fits(beams, Count) or (beams == 1 and (self.length_penalty != 1.0 or self.early_stopping is not False)):
            raise ValueError(
                f"beams={shown(beams)}, length_penalty={self.length_penalty}, early_stopping={self.early_stopping!r}: beams must be a "
                "whole number of at least 1, and the others have no effect unless it is more."
            )
        if beams > 1 and self.key is not None:
            raise ValueError(f"beams={beams} searches for the most likely text and key= asks for random ones; give one of them.")
        if self.early_stopping not in (True, False, "never") or not isinstance(self.early_stopping, bool | str):
            raise ValueError(f"early_stopping={self.early_stopping!r} is not one of True, False, 'never'.")

"""Learning rates of a method."""

from typing import NamedTuple


class Rates(NamedTuple):
    """Learning rates that suit a method.

    Attributes:
      learning_rate: Peak rate of AdamW.
      head_lr_scale: The rate of a newly made head, as a multiple of it.
    """

    learning_rate: float
    head_lr_scale: float

"""Parameter groups: leaves of an adapter that are optimised differently from the rest."""

import dataclasses

from jpeft.deprecation import renamed_fields


@renamed_fields(rate="lr_scale", constant="fixed_lr")
@dataclasses.dataclass(frozen=True)
class Group:
    """How a parameter group, a label of its own in `Method.labels`, is optimised where the user does not say otherwise.

    Attributes:
      lr_scale: Its learning rate as a multiple of the others'.
      fixed_lr: A learning rate of its own, the same at every step, with Adam without weight decay, whatever optimises the others.
      clip: With `fixed_lr`: largest global norm of the group's gradient; None for no clipping.
    """

    lr_scale: float = 1.0
    fixed_lr: float | None = None
    clip: float | None = 1.0

"""What is said of kernels that have no product to change: they cost as much as full fine-tuning."""

import dataclasses
import warnings
from collections.abc import Mapping

from jpeft.tree.paths import Path, first_few


@dataclasses.dataclass(frozen=True)
class CostlyKernels:
    """Says once for each wrapped function which of its kernels a method must exchange whole.

    Attributes:
      method: Name of the method.
      said: The kernels that were named.
    """

    method: str
    said: set[Path] = dataclasses.field(default_factory=set)

    def warn(self, found: Mapping[Path, str], stacklevel: int = 2) -> None:
        """Warn of kernels that were not named before.

        Args:
          found: The reason of each.
          stacklevel: Of the caller to whom it is said, as for `warnings.warn`.
        """
        new = {path: reason for path, reason in found.items() if path not in self.said}
        if not new:
            return
        self.said.update(new)
        path, reason = next(iter(new.items()))
        count = f"{len(new)} kernels do not act" if len(new) > 1 else "one kernel does not act"
        warnings.warn(
            f"{self.method}: {count} in products with inputs alone: {first_few(list(new))} (of '{path}': {reason}). They are exchanged "
            "whole: exact, but it costs as much as full fine-tuning of these layers. jpeft.register_layer teaches a layer's product; "
            "target= leaves layers out.",
            stacklevel=stacklevel + 1,
        )

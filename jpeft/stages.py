"""Deprecated: the name of `jpeft.core.stages` in earlier versions."""

from jpeft.core.stages import Segment as Segment
from jpeft.core.stages import plan as plan
from jpeft.deprecation import warn_renamed

warn_renamed("jpeft.stages", "jpeft.core.stages", stacklevel=2)

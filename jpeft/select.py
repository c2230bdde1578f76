"""Deprecated: the names of `jpeft.tree.select` and `jpeft.tree.kernels` in earlier versions."""

from jpeft.deprecation import warn_renamed
from jpeft.tree.head import head_leaves as head_leaves
from jpeft.tree.kernels import KernelAxes as KernelAxes
from jpeft.tree.kernels import axes_of
from jpeft.tree.select import first_match as first_match
from jpeft.tree.select import select as select

warn_renamed("jpeft.select", "jpeft.tree.select", stacklevel=2)

kernel_axes = axes_of

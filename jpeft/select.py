"""Deprecated: the names of `jpeft.tree.select` and `jpeft.tree.kernels` as earlier versions spelled them."""

from jpeft.tree.head import head_leaves as head_leaves
from jpeft.tree.kernels import KernelAxes as KernelAxes
from jpeft.tree.kernels import axes_of as kernel_axes  # noqa: F401
from jpeft.tree.select import first_match as first_match
from jpeft.tree.select import select as select

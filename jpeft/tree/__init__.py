"""Parameter trees: paths, adapters that mirror them, selections by path, geometry of kernels, task heads."""

from typing import Any

from jpeft.deprecation import warn_renamed
from jpeft.tree.adapters import ADDED as ADDED
from jpeft.tree.adapters import GRAFT as GRAFT
from jpeft.tree.adapters import Adapter as Adapter
from jpeft.tree.adapters import graft as graft
from jpeft.tree.adapters import merge_leaves as merge_leaves
from jpeft.tree.adapters import pop_grafts as pop_grafts
from jpeft.tree.adapters import put_grafts as put_grafts
from jpeft.tree.adapters import split as split
from jpeft.tree.paths import Params as Params
from jpeft.tree.paths import Path as Path
from jpeft.tree.paths import copy as copy
from jpeft.tree.paths import first_few as first_few
from jpeft.tree.paths import flatten as flatten
from jpeft.tree.paths import key_for as key_for
from jpeft.tree.paths import nbytes as nbytes
from jpeft.tree.paths import path_str as path_str
from jpeft.tree.paths import paths as paths
from jpeft.tree.paths import replace as replace
from jpeft.tree.paths import size as size
from jpeft.tree.paths import trained_copy as trained_copy
from jpeft.tree.paths import trained_dtype as trained_dtype
from jpeft.tree.paths import unflatten as unflatten


def __getattr__(name: str) -> Any:
    """The functions that had other names in earlier versions."""
    renamed = {"fold": ("merge_leaves", merge_leaves), "fold_in": ("key_for", key_for)}
    if name not in renamed:
        raise AttributeError(f"module 'jpeft.tree' has no attribute {name!r}")
    new, function = renamed[name]
    warn_renamed(f"jpeft.tree.{name}", f"jpeft.tree.{new}")
    return function

"""Deprecated: the names that methods of earlier versions were written with. See `jpeft.core.method` and docs/guides."""

from jpeft.core.function_method import factory as factory
from jpeft.core.function_method import init_with_head
from jpeft.core.groups import Group as Group
from jpeft.core.layer import Layer as Layer
from jpeft.core.layer import Linear as Linear
from jpeft.core.method import FREEZE as FREEZE
from jpeft.core.method import TRAIN as TRAIN
from jpeft.core.method import Method as Method
from jpeft.core.stages import Stage as Stage
from jpeft.deprecation import warn_renamed
from jpeft.tree.adapters import ADDED as ADDED
from jpeft.tree.head import not_head as not_head

warn_renamed("jpeft.method", "jpeft.core.method", stacklevel=2)

with_head = init_with_head
passthrough = None  # `call=passthrough` meant a method without middleware, which is the default

"""Layouts: how model families name their parameters, as one table of roles.

A *role* is what a module does in a transformer: project queries, leave the feed-forward layer, normalise. A *layout* is a naming scheme
that one or more families share: one regex for each role. Methods ask for roles and never for names:

>>> from jax import ShapeDtypeStruct
>>> block = {"attn/c_attn": (8, 24), "attn/c_proj": (8, 8), "mlp/c_fc": (8, 32), "mlp/c_proj": (32, 8)}
>>> shapes = {f"h/{i}/{name}/kernel": ShapeDtypeStruct(shape, "float32") for i in range(2) for name, shape in block.items()}
>>> find(shapes, "@ffn_out")
['h/0/mlp/c_proj/kernel', 'h/1/mlp/c_proj/kernel']
>>> detect(shapes).name
'gpt2'

A role begins with ``@``, which no Python identifier can hold, so a role is never the name of a module. ``"@attention_out|@ffn_out"`` is one
or the other, and ``"@query/bias"`` the leaf ``bias`` of the modules with a role instead of their weight. The table is in
`jpeft.layouts.table`; docs/layouts.md shows what it finds in each family.

This package imports nothing of jpeft but `jpeft.tree.paths`, and needs names and shapes, never values.
"""

from jpeft.layouts.geometry import KERNEL_AXES as KERNEL_AXES
from jpeft.layouts.layout import Layout as Layout
from jpeft.layouts.parts import Parts as Parts
from jpeft.layouts.parts import parts as parts
from jpeft.layouts.roles import Role as Role
from jpeft.layouts.roles import is_role as is_role
from jpeft.layouts.search import RoleModule as RoleModule
from jpeft.layouts.search import blocks as blocks
from jpeft.layouts.search import detect as detect
from jpeft.layouts.search import find as find
from jpeft.layouts.search import modules as modules
from jpeft.layouts.stacks import STACKED as STACKED
from jpeft.layouts.stacks import Stack as Stack
from jpeft.layouts.stacks import layer_axes as layer_axes
from jpeft.layouts.stacks import rows as rows
from jpeft.layouts.stacks import stacks as stacks
from jpeft.layouts.table import LAYOUTS as LAYOUTS
from jpeft.layouts.table import PLAIN as PLAIN

"""All uses of what NNX keeps private; see `jpeft.hosts.linen.flax_internals`."""

from flax import nnx


def can_change(module: nnx.Module) -> bool:
    """Whether a module belongs to the trace that is being made. What runs in a trace inside must leave nothing of it in the module.

    NNX itself asks this before it lets an attribute be set, and raises an error if not.
    """
    return module._pytree__state.trace_state.is_valid()  # pyright: ignore[reportAttributeAccessIssue]

"""The blocks of a model: one after another, or one traced block scanned over stacked parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.models.model_config import ModelConfig

Hidden = Float[Array, "batch length hidden"]
Pick = Callable[[Any, Any], Any]  # (what all blocks are told, kind of one) -> what that one is told


class Blocks(nn.Module):
    """The blocks one after another, named "0", "1", ..."""

    config: ModelConfig
    block: type[nn.Module]

    @nn.compact
    def __call__(self, hidden: Hidden, context: Any, deterministic: bool, kinds: Sequence[bool], pick: Pick) -> list[Hidden]:
        """Output of every block."""
        outputs = []
        for index, kind in enumerate(kinds):
            hidden = self.block(self.config, name=str(index))(hidden, pick(context, kind), deterministic)
            outputs.append(hidden)
        return outputs


def stack(config: ModelConfig, block: type[nn.Module], name: str | None = None) -> nn.Module:
    """What holds the parameters of all blocks: `Blocks`, or one block to be scanned. ``block(config)(hidden, context, deterministic)``."""
    if config.remat:
        # Argument 3 is `deterministic` (0 is self). Inside a scan nothing can be merged, so no barrier is needed.
        policy = jax.checkpoint_policies.dots_saveable if config.remat == "dots" else None
        block = nn.remat(block, static_argnums=(3,), prevent_cse=not config.scan, policy=policy)
    return block(config, name=name) if config.scan else Blocks(config, block, name=name)


def run_stack(
    blocks: Any,
    config: ModelConfig,
    hidden: Hidden,
    context: Any,
    deterministic: bool,
    *,
    output_hidden_states: bool,
    kinds: Sequence[bool] | None = None,
    pick: Pick = lambda context, kind: context,
) -> tuple[Hidden, tuple[Hidden, ...]]:
    """Run what `stack` made.

    Args:
      blocks: from `stack`.
      config: the same as there.
      hidden: input of the first block.
      context: what all blocks are told, a pytree.
      deterministic: without dropout.
      output_hidden_states: return the inputs of the blocks too.
      kinds: one bit for each block, where blocks are told different things.
      pick: what a block of a kind is told, of the context; the kind is traced in a scan.

    Returns:
      The output of the last block, and the inputs of all if asked for.
    """
    kinds = (False,) * config.num_hidden_layers if kinds is None else tuple(kinds)
    if config.scan:

        def body(block: nn.Module, hidden: Array, context: Any, kind: Array) -> tuple[Array, Array | None]:
            return block(hidden, pick(context, kind), deterministic), hidden if output_hidden_states else None

        scan = nn.scan(
            body,
            variable_axes={"params": 0, "cache": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            length=config.num_hidden_layers,
        )
        hidden, inputs = scan(blocks, hidden, context, jnp.array(kinds))
        return hidden, () if inputs is None else tuple(inputs)
    outputs = blocks(hidden, context, deterministic, kinds, pick)
    return outputs[-1], (hidden, *outputs[:-1]) if output_hidden_states else ()

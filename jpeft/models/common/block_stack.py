"""A stack of blocks: one block after another, or one traced block scanned over stacked parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.core.residuals import save_products
from jpeft.models.common.config import ModelConfig

Hidden = Float[Array, "batch length hidden"]
SelectContext = Callable[[Any, Any], Any]  # (context shared by all blocks, flag of this block) -> context of this block


class Blocks(nn.Module):
    """The blocks one after another, named "0", "1", ..."""

    config: ModelConfig
    block: type[nn.Module]

    @nn.compact
    def __call__(
        self, hidden: Hidden, context: Any, deterministic: bool, flags: Sequence[bool], select_context: SelectContext
    ) -> list[Hidden]:
        """Return the output of every block."""
        outputs = []
        for index, flag in enumerate(flags):
            hidden = self.block(self.config, name=str(index))(hidden, select_context(context, flag), deterministic)
            outputs.append(hidden)
        return outputs


def make_blocks(config: ModelConfig, block: type[nn.Module], name: str | None = None) -> nn.Module:
    """Return the module that holds the parameters of all blocks, for `run_blocks`.

    Args:
      config: its `remat` and `scan` choose how the blocks are run.
      block: called as ``block(config)(hidden, context, deterministic)``.
      name: of the module; None in `setup`.

    Returns:
      `Blocks`, or with ``config.scan`` a single block whose parameters `run_blocks` stacks.
    """
    if config.remat:
        # Argument 3 is `deterministic` (0 is self). XLA does not merge the recomputation with the forward pass inside a scan, so the
        # barrier that prevents merging is not needed there.
        policy = save_products() if config.remat == "dots" else None
        block = nn.remat(block, static_argnums=(3,), prevent_cse=not config.scan, policy=policy)
    return block(config, name=name) if config.scan else Blocks(config, block, name=name)


def run_blocks(
    blocks: Any,
    config: ModelConfig,
    hidden: Hidden,
    context: Any,
    deterministic: bool,
    *,
    output_hidden_states: bool = False,
    num_layers: int | None = None,
    flags: Sequence[bool] | None = None,
    select_context: SelectContext = lambda context, flag: context,
) -> tuple[Hidden, tuple[Hidden, ...]]:
    """Run the blocks that `make_blocks` returned.

    Args:
      blocks: from `make_blocks`.
      config: the configuration that `make_blocks` was given.
      hidden: input of the first block.
      context: a pytree that every block is given, such as a mask.
      deterministic: True runs without dropout.
      output_hidden_states: also return the input of every block.
      num_layers: number of blocks; ``config.num_hidden_layers`` if None. An encoder-decoder has two stacks, with a number each.
      flags: one bit for each block, for models whose blocks differ, such as those with sliding windows in some layers.
      select_context: gives each block its context, from the common context and the block's flag. A scan traces the flag.

    Returns:
      The output of the last block, and the inputs of all blocks, or () if not asked for.
    """
    flags = (False,) * (config.num_hidden_layers if num_layers is None else num_layers) if flags is None else tuple(flags)
    if config.scan:
        # Blocks that do not differ are not told apart by a traced flag.
        alike = len(set(flags)) == 1

        def body(block: nn.Module, hidden: Array, context: Any, flag: Array) -> tuple[Array, Array | None]:
            chosen = select_context(context, flags[0] if alike else flag)
            return block(hidden, chosen, deterministic), hidden if output_hidden_states else None

        scan = nn.scan(
            body,
            variable_axes={"params": 0, "cache": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            length=len(flags),
        )
        hidden, inputs = scan(blocks, hidden, context, jnp.array(flags))  # inputs: [layers, batch, length, hidden]
        return hidden, () if inputs is None else tuple(inputs)
    outputs = blocks(hidden, context, deterministic, flags, select_context)
    return outputs[-1], (hidden, *outputs[:-1]) if output_hidden_states else ()

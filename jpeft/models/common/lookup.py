"""Looking up token ids in a table of embeddings, with one rule for ids that have no row.

**The rule.** An id below 0, or one that no row answers, gives a row of NaN: never the row of another id. Inside `jit` that is all that can
be done, and the outputs for that text are NaN. Where the ids are known, the call raises a ValueError instead. Prompts keep the rule:
an id beyond the vocabulary never becomes a row of a prompt.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

# Stands for every id below 0: `jnp.take` counts such ids from the end of the table, and gives NaN for ids beyond it.
NO_ROW = int(np.iinfo(np.int32).max)


def look_up(table: nn.Embed, ids: Int[Array | np.ndarray, "..."], what: str = "input_ids") -> Float[Array, "... width"]:
    """Return the rows of a table, NaN for ids that have none.

    Args:
      table: The table; middleware around it may answer ids beyond its rows.
      ids: Which rows.
      what: What the ids are called, for the error message.

    Raises:
      ValueError: if an id has no row, and the ids are not traced by `jit`.
    """
    given, ids = ids, jnp.asarray(ids)
    rows = table(jnp.where(ids < 0, NO_ROW, ids))
    if table.num_embeddings == 1:  # which flax broadcasts, whatever the ids
        rows = jnp.where((ids == 0)[..., None], rows, jnp.nan)
    _refuse(given, rows, table.num_embeddings, what)
    return rows


def _refuse(ids: Int[Array | np.ndarray, "..."], rows: Float[Array, "... width"], size: int, what: str) -> None:
    """Raise the error, as far as the ids and the rows are known."""
    if isinstance(ids, Tracer):
        return
    outside = (np.asarray(ids) < 0) | (np.asarray(ids) >= size)
    if not outside.any():
        return
    known = jax.lax.stop_gradient(rows)  # inside of `grad` alone, the values are known too
    if isinstance(known, Tracer):
        return
    # A prompt answers ids beyond the table, with rows of numbers.
    unanswered = outside & np.isnan(np.asarray(known, np.float32)).all(-1)
    if unanswered.any():
        raise ValueError(
            f"{what} holds {np.asarray(ids)[unanswered][0]}, and the model's embedding has {size} rows, for the ids 0 to {size - 1}. Does "
            "the tokenizer belong to the model? Tokens that were added to it need rows: jpeft.models.load(..., add_tokens=[...])."
        )

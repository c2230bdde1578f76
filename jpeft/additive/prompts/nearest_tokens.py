"""A soft prompt read back in words."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jpeft import tree
from jpeft.core.peft import Peft, fold


class Nearest(NamedTuple):
    """The words nearest to each row of a prompt, the nearest first."""

    ids: Int[Array, "l count"]
    similarity: Float[Array, "l count"]  # cosine


def nearest_tokens(peft: Peft, count: int = 1) -> Nearest:
    """The `count` tokens of the vocabulary whose embeddings point most nearly the same way as each row of a prompt.

    Args:
      peft: A prompt's, folded or not; in a chain, one prompt among other methods.
      count: How many for each row.

    Raises:
      ValueError: if there is no prompt in it, or more than one.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"wte": {"embedding": jax.random.normal(jax.random.key(0), (50, 8))}}
    >>> peft = jpeft.apply(params, method="prompt_tuning", init="tokens", tokens=[7, 30, 2])
    >>> jpeft.nearest_tokens(peft).ids[:, 0]
    Array([ 7, 30,  2], dtype=int32)

    A trained prompt is longer than words by far and lies between many, so a low similarity says that no word says it; the paper
    (https://arxiv.org/abs/2104.08691, section 7) found nearest words to be alike, and labels among them.
    """
    folded = fold(peft)
    parts = [folded.adapter[name] for name, _ in folded.method.parts] or [folded.adapter]
    end = f"/{tree.ADDED}/prompt"
    found = [(path.removesuffix(end), leaf) for part in parts for path, leaf in tree.flatten(part).items() if path.endswith(end)]
    if len(found) != 1:
        raise ValueError(f"{peft.method!r} has {len(found)} prompts to read back; give a Peft with one, such as a part of the chain.")
    module, prompt = found[0]
    (table,) = [leaf for path, leaf in tree.flatten(peft.params).items() if path.rpartition("/")[0] == module]
    unit = lambda rows: rows / jnp.maximum(jnp.linalg.norm(rows.astype(jnp.float32), axis=-1, keepdims=True), 1e-12)
    similarity, ids = jax.lax.top_k(unit(prompt) @ unit(table).T, count)
    return Nearest(ids, similarity)

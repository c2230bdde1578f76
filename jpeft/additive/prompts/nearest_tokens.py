"""Reading a soft prompt as words: the tokens of the vocabulary whose embeddings are most similar to its rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jpeft import tree
from jpeft.core.peft import Peft, fold


class Nearest(NamedTuple):
    """The tokens most similar to each row of a prompt, the most similar first.

    Attributes:
      ids: Token ids.
      similarity: Cosine similarity of their embeddings to the row.
    """

    ids: Int[Array, "rows count"]
    similarity: Float[Array, "rows count"]


def nearest_tokens(peft: Peft, count: int = 1) -> Nearest:
    """Find the `count` tokens whose embeddings have the highest cosine similarity to each row of a prompt.

    Args:
      peft: A soft prompt, folded or not, alone or in a chain.
      count: Number of tokens for each row.

    Raises:
      ValueError: if there is no prompt, or more than one.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"wte": {"embedding": jax.random.normal(jax.random.key(0), (50, 8))}}
    >>> peft = jpeft.apply(params, method="prompt_tuning", init="tokens", tokens=[7, 30, 2])
    >>> jpeft.nearest_tokens(peft).ids[:, 0]
    Array([ 7, 30,  2], dtype=int32)

    A row of a trained prompt has a much larger norm than word embeddings and is often close to none of them; a low similarity means that
    no single word describes it. The paper (https://arxiv.org/abs/2104.08691, section 7) found that the nearest words of a row are similar
    to each other, and that class labels are among them.
    """
    folded = fold(peft)
    parts = [folded.adapter[name] for name, _ in folded.method.parts] or [folded.adapter]
    end = f"/{tree.ADDED}/prompt"
    prompts = [(path.removesuffix(end), leaf) for part in parts for path, leaf in tree.flatten(part).items() if path.endswith(end)]
    if len(prompts) != 1:
        raise ValueError(f"{peft.method!r} has {len(prompts)} prompts to read back; give a Peft with one, such as a part of the chain.")
    module, prompt = prompts[0]
    # The embedding module has one parameter, the table.
    (table,) = [leaf for path, leaf in tree.flatten(peft.params).items() if path.rpartition("/")[0] == module]
    cosines = _unit(prompt) @ _unit(table).T  # [rows, vocabulary]
    similarity, ids = jax.lax.top_k(cosines, count)
    return Nearest(ids, similarity)


def _unit(rows: Float[Array, "rows width"]) -> Float[Array, "rows width"]:
    """The rows scaled to length 1; zeros stay zeros."""
    rows = rows.astype(jnp.float32)
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)

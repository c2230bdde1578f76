"""Tokens that are added to a pretrained model: to its tokenizer, and as rows to its embedding and its head.

A row begins as the mean of all rows that the checkpoint has, so that the model reads a new token as an average word and gives it an average
score. The mean is a function of the checkpoint alone: whoever adds the same tokens again has the same model.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jpeft.distributed import gather_to_host, place
from jpeft.models import families
from jpeft.sharding import Rules
from jpeft.sharding import place as placement
from jpeft.tree.paths import flatten, unflatten

if TYPE_CHECKING:
    from jpeft.models.checkpoints.loading import Loaded


def check_added_tokens(tokens: Sequence[str]) -> tuple[str, ...]:
    """Return the tokens to add as a tuple.

    Raises:
      ValueError: unless they are different texts, none of them empty.

    >>> check_added_tokens(["<ENT>", "<REL>"])
    ('<ENT>', '<REL>')
    """
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"add_tokens must be a list of texts, such as ['<ENT>'], not {tokens!r}.")
    for token in tokens:
        if not token.strip():
            raise ValueError(f"add_tokens has {token!r}: a token needs at least one character that is no space.")
        if tokens.count(token) > 1:
            raise ValueError(f"add_tokens has {token!r} more than once.")
        try:
            token.encode()
        except UnicodeEncodeError:
            raise ValueError(f"add_tokens has {token!r}, which is no text: half of a surrogate pair.") from None
    return tuple(tokens)


def add_tokens(loaded: "Loaded", tokens: Sequence[str], mesh: Mesh | None, rules: Rules) -> "Loaded":
    """Return a model with rows for some tokens, and a tokenizer that knows them.

    A token that the tokenizer has and the embedding has no row for is given one. A token that has both is named in a warning and left as it
    is. All other rows keep their values.

    Args:
      loaded: The model as its folder has it.
      tokens: The tokens.
      mesh: Where the parameters are; None for one device.
      rules: How they are split over it.

    Raises:
      ValueError: for tokens that `check_added_tokens` refuses, or that the tokenizer would never find in a text.
    """
    tokens = check_added_tokens(tokens)
    tokenizer, old_rows = loaded.tokenizer, loaded.config.vocab_size
    before = tokenizer.get_vocab()
    there = [token for token in tokens if before.get(token, old_rows) < old_rows]
    if there:
        listed = ", ".join(f"{token!r} (id {before[token]})" for token in there)
        warnings.warn(f"add_tokens: the model has {listed} already. Such tokens stay as they are.", stacklevel=3)
    new = [token for token in tokens if token not in there]
    if not new:
        return loaded
    tokenizer.add_tokens([token for token in new if token not in before])
    after = tokenizer.get_vocab()
    for token in new:
        if after.get(token) not in tokenizer(token, add_special_tokens=False)["input_ids"]:
            raise ValueError(
                f"add_tokens: the tokenizer does not find {token!r} in a text: it changes or splits that text before it looks."
            )
    # Rows between are needed too: they belong to tokens of the tokenizer that the checkpoint has no rows for either.
    rows = max(old_rows, max(after[token] for token in new) + 1)
    names = {i: token for token, i in after.items() if i >= old_rows}
    added = {after[token]: token for token in new} | {i: names.get(i, f"id {i}") for i in range(old_rows, rows)}
    model = loaded.model.clone(config=dataclasses.replace(loaded.config, vocab_size=rows))
    params = _with_rows(loaded, model, sorted(added), mesh, rules)
    out = dataclasses.replace(loaded, model=model, params=params, added={added[i]: i for i in sorted(added)})
    out.__dict__["tokenizer"] = tokenizer  # in the place where the property keeps what it has read
    return out


def _with_rows(loaded: "Loaded", model: Any, ids: Sequence[int], mesh: Mesh | None, rules: Rules) -> dict[str, Any]:
    """Return the parameters with the mean in the rows of these tokens, in every leaf that has an axis for the vocabulary."""
    smaller, larger = (flatten(families.abstract_params(each)) for each in _probes(model))
    leaves = flatten(loaded.params)
    for path, shape in {path: leaf.shape for path, leaf in larger.items()}.items():
        axes = [axis for axis, size in enumerate(shape) if size != smaller[path].shape[axis]]
        if not axes:
            continue
        whole = np.moveaxis(np.asarray(gather_to_host(leaves[path])), axes[0], 0)
        old = len(whole)
        mean = whole.astype(np.float64).mean(0).astype(whole.dtype)
        grown = np.concatenate([whole, np.broadcast_to(mean, (model.config.vocab_size - old, *mean.shape))])
        grown[np.asarray(ids)] = mean
        leaf = np.moveaxis(grown, 0, axes[0])
        sharding = None if mesh is None else NamedSharding(mesh, placement(path, leaf.shape, mesh, rules).spec)
        leaves[path] = jnp.asarray(leaf) if sharding is None else place(leaf, sharding)
    return unflatten(leaves)


def _probes(model: Any) -> Sequence[Any]:
    """Return the model with two sizes of the vocabulary, which show what grows with it."""
    size = model.config.vocab_size
    return [model.clone(config=dataclasses.replace(model.config, vocab_size=n)) for n in (size, size + 1)]

"""After encoding: a model must have an embedding for every token, and a position for every place in a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.core.options import shown
from jpeft.models import Loaded
from jpeft.tasks.cross_entropy import IGNORE


def check_token_ids(arrays: Mapping[str, np.ndarray], loaded: Loaded, columns: Sequence[str] = ("input_ids",)) -> None:
    """Raise an error unless the model has a row of its embedding for every token id, and positions for the length of the rows.

    Padding counts: the model reads it too, and a row of NaN there makes the outputs of the whole text NaN.

    Args:
      arrays: Encoded rows; every column [rows, length].
      loaded: The model, with its tokenizer.
      columns: The columns that hold token ids; those that are absent are left out.

    Raises:
      ValueError: naming the token, the row where it is, and the way out.
    """
    config = loaded.config
    for name in columns:
        if name in arrays:
            _check_column(name, arrays[name], loaded)
    kinds = getattr(config, "type_vocab_size", 0)  # 0: the model does not read them
    types = arrays.get("token_type_ids")
    if kinds and types is not None and types.size and not 0 <= types.min() <= types.max() < kinds:
        bad = int(types.max()) if types.max() >= kinds else int(types.min())
        raise ValueError(
            f"The tokenizer in {loaded.folder} gives the token type {bad}, and the model has {kinds} of them, from 0 to {kinds - 1}. "
            "Use the tokenizer that belongs to the model."
        )
    length = arrays["input_ids"].shape[-1] if "input_ids" in arrays else 0
    if length > config.max_length:
        raise ValueError(f"The texts are encoded as rows of {length} tokens, and the model has {config.max_length} positions.")


def _check_column(name: str, ids: np.ndarray, loaded: Loaded) -> None:
    rows, tokenizer = loaded.config.vocab_size, loaded.tokenizer
    outside = ((ids < 0) | (ids >= rows)) & ~((name != "input_ids") & (ids == IGNORE))
    if not outside.any():
        return
    first = int(np.argwhere(outside)[0][0])
    found = dict.fromkeys(ids[outside].tolist())
    token = [shown(_name(tokenizer, int(i))) for i in found]
    has = f"the model's embedding has {rows} rows, for the ids 0 to {rows - 1}"
    if len(found) > 20:
        raise ValueError(
            f"{len(found)} tokens of these texts, such as {', '.join(token[:3])}, have ids up to {max(found)}, and {has}. The tokenizer "
            f"in {loaded.folder} has {len(tokenizer)} tokens and is not that of this model."
        )
    more = f" (and {len(found) - 1} more: {', '.join(token[1:6])})" if len(found) > 1 else ""
    raise ValueError(
        f"Row {first + 1}: the token {token[0]}{more} has the id {next(iter(found))}, and {has}. Train with --add-tokens "
        f"{' '.join(token)}, which makes such rows (add_tokens=[...] in Python), or put the tokenizer that belongs to the model into "
        f"{loaded.folder}."
    )


def _name(tokenizer: Any, token_id: int) -> str | None:
    """Return a token as it was added; `convert_ids_to_tokens` gives added tokens in lower case where the tokenizer changes texts so."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return str(added[token_id]) if token_id in added else tokenizer.convert_ids_to_tokens(token_id)

"""Tables of texts as arrays of token ids."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jpeft.data.tables import Table
from jpeft.data.values import as_label


def encode(table: Table, tokenizer: Any, *, labels: Sequence[str] | None, max_length: int) -> dict[str, np.ndarray]:
    """Return texts as token ids, all rows of one length.

    Warns how many texts were cut.

    Args:
      table: N rows.
      tokenizer: A tokenizer of `transformers`; its own template (`[CLS] text [SEP] pair [SEP]`, ...) and padding apply.
      labels: The classes in the order of the model's outputs; None to leave labels out.
      max_length: Length of every row, special tokens included: longer texts are cut, shorter ones padded.

    Returns:
      `input_ids` and `attention_mask` [N, max_length], `token_type_ids` [N, max_length] if the tokenizer makes them,
      `label` [N], the number of the class, if `labels` is given; all int32.

    Raises:
      ValueError: for a label that is not among `labels`, a length the tokenizer cannot make, or no padding token.

    Example: `encode(table, AutoTokenizer.from_pretrained(folder), labels=("neg", "pos"), max_length=128)`.
    """
    if tokenizer.pad_token_id is None:
        folder = getattr(tokenizer, "name_or_path", "")
        of = f" of {folder}" if folder else ""
        raise ValueError(
            f"The tokenizer{of} has no padding token: name one in tokenizer_config.json, or set one, e.g. tokenizer.pad_token = "
            "tokenizer.eos_token."
        )
    check_max_length(tokenizer, max_length, pair=table.pair is not None)
    cut = 0
    arrays: dict[str, list[np.ndarray]] = defaultdict(list)
    chunk = 4096  # rows at a time, because the tokenizer's Python lists take ten times the memory of the arrays
    for start in range(0, max(len(table), 1), chunk):
        stop = start + chunk
        pairs = None if table.pair is None else table.pair[start:stop]
        encoded = (
            tokenizer(table.text[start:stop], pairs, truncation=True, padding="max_length", max_length=max_length)
            if len(table)
            else {"input_ids": [], "attention_mask": []}
        )
        # Only fast tokenizers, those of the package tokenizers, say what they cut.
        cut += sum(bool(encoding.overflowing) for encoding in getattr(encoded, "encodings", None) or ())
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            if name in encoded:
                arrays[name].append(np.asarray(encoded[name], np.int32).reshape(-1, max_length))
    if cut:
        warn_of_cut(table, cut, max_length)
    result = {name: np.concatenate(parts) for name, parts in arrays.items()}
    if labels is not None:
        result["label"] = _label_numbers(table, tuple(labels))
    return result


def check_max_length(tokenizer: Any, max_length: int, *, pair: bool = False) -> None:
    """Raise a ValueError for a length of rows that a tokenizer cannot make."""
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if not special < max_length <= tokenizer.model_max_length:
        folder = getattr(tokenizer, "name_or_path", "")
        where = f" (model_max_length in {folder}/tokenizer_config.json)" if folder else ""
        raise ValueError(
            f"max_length={max_length} must be more than the {special} special tokens and at most "
            f"{tokenizer.model_max_length}, the tokenizer's own limit{where}."
        )


def warn_of_cut(table: Table, cut: int, max_length: int) -> None:
    """Warn that so many texts of a table were cut."""
    warnings.warn(f"{table.title}{cut} of {len(table)} texts are longer than max_length={max_length} tokens and were cut.", stacklevel=3)


def check_known(kind: str, table: Table, used: Sequence[Iterable[str]], labels: Sequence[str]) -> dict[str, int]:
    """Return the number of each label, after checking that a table has no others.

    Args:
      kind: "label" or "tag".
      table: The rows.
      used: The labels in each row.
      labels: The labels of the model. One of them in another spelling, "True" for "true", is the same label.

    Raises:
      ValueError: naming the unknown labels and their rows.
    """
    number = {name: i for i, name in enumerate(labels)}
    number = {as_label(name) or name: i for name, i in number.items()} | number
    unknown = sorted({name for row in used for name in row} - number.keys())
    if unknown:
        rows = [i for i, row in enumerate(used) if not number.keys() >= set(row)]
        raise ValueError(
            f"Unknown {kind}{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown[:10]))}: the model knows "
            f"{', '.join(map(repr, labels))}. See {table.where(rows)}. Remove those rows, or train with them."
        )
    return number


def _label_numbers(table: Table, labels: tuple[str, ...]) -> np.ndarray:
    if table.label is None:
        raise ValueError("The table has no labels: give labels=None to encode rows for prediction.")
    number = check_known("label", table, [(name,) for name in table.label], labels)
    return np.asarray([number[name] for name in table.label], np.int32)

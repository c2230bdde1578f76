"""A tag for each word: names in a sentence, parts of speech.

A word may be several tokens; the first of them stands for it, in the loss, in the metrics and in predictions, as in BERT's and P-Tuning
v2's experiments. Words that do not fit into a row are not tagged.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jpeft.data import Table
from jpeft.tasks.token_loss import IGNORE, counts, losses

Span = tuple[int, int, str]  # first word, word after the last, kind


def tag_names(table: Table) -> tuple[str, ...]:
    """The tags of a training table in the order of the model's outputs: "O" first, then by name.

    Raises:
      ValueError: for a table without tags or with fewer than two.

    >>> from jpeft.data import Table
    >>> tag_names(Table(text=["Ada sings"], words=[["Ada", "sings"]], tags=[["B-PER", "O"]]))
    ('O', 'B-PER')
    """
    if table.tags is None:
        raise ValueError("the table has no tags to train on; read it with `tags` naming their column")
    names = sorted({tag for row in table.tags for tag in row}, key=lambda name: (name != "O", name))
    if len(names) < 2:
        raise ValueError(f"training needs at least two tags, got {names} in {len(table)} rows; check the column of tags")
    return tuple(names)


def encode(table: Table, tokenizer: Any, *, labels: Sequence[str] | None, max_length: int) -> dict[str, np.ndarray]:
    """Turn words into token numbers, all rows of one length.

    Args:
      table: N rows of words; of a table without `words`, what stands between the spaces of the text.
      tokenizer: A fast tokenizer of `transformers`; its template and padding apply.
      labels: The tags in the order of the model's outputs; None to leave them out.
      max_length: Length L of every row.

    Returns:
      int32 arrays [N, L]: `input_ids`, `attention_mask`, `token_type_ids` if the tokenizer makes them, `first`, 1 at the first token of
      each word, and, with `labels`, `label`, the tag's number there and `IGNORE` elsewhere.

    Raises:
      ValueError: for a tag that is not among `labels`, a table without tags, a slow tokenizer or one without padding.
    """
    if tokenizer.pad_token_id is None or not tokenizer.is_fast:
        raise ValueError("tagging needs a fast tokenizer (tokenizer.json), with a padding token")
    rows = _words(table)
    encoded = tokenizer(rows, is_split_into_words=True, truncation=True, padding="max_length", max_length=max_length) if rows else {}
    names = ("input_ids", "attention_mask", "token_type_ids")
    arrays = {name: np.asarray(encoded[name], np.int32) for name in names if name in encoded} or dict.fromkeys(
        names[:2], np.zeros((0, max_length), np.int32)
    )
    word = np.full(arrays["input_ids"].shape, -1, np.int32)
    for i in range(len(rows)):
        ids = encoded.word_ids(i)  # pyright: ignore[reportAttributeAccessIssue]
        word[i] = [-1 if w is None or (t and ids[t - 1] == w) else w for t, w in enumerate(ids)]
    arrays["first"] = (word >= 0).astype(np.int32)
    if labels is not None:
        number = _numbers(table, tuple(labels))
        arrays["label"] = np.asarray(
            [[number[tags[w]] if w >= 0 else IGNORE for w in at] for tags, at in zip(table.tags or (), word)], np.int32
        )
        arrays["label"] = arrays["label"].reshape(word.shape)
    return arrays


def _words(table: Table) -> list[list[str]]:
    return [text.split() for text in table.text] if table.words is None else table.words


def _numbers(table: Table, labels: tuple[str, ...]) -> dict[str, int]:
    if table.tags is None:
        raise ValueError("the table has no tags; give labels=None to encode rows for prediction")
    unknown = sorted({tag for row in table.tags for tag in row} - set(labels))
    if unknown:
        raise ValueError(
            f"unknown tag{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown[:10]))}: the model knows "
            f"{', '.join(map(repr, labels))}; remove those rows or train with them"
        )
    return {name: i for i, name in enumerate(labels)}


def scores(logits: Float[Array, "batch length tags"], batch: Mapping[str, Any]) -> dict[str, Array]:
    """For each row: its loss, the words tagged in it, and the most likely tag at every token."""
    return {"loss": losses(logits, batch), "count": counts(batch), "predicted": logits.argmax(-1)}


def metrics(scores: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], labels: Sequence[str]) -> dict[str, float]:
    """Loss and accuracy over all words, each counting once, and F1 over spans.

    A predicted span counts if first word, last word and kind are right: precision over all predicted spans, recall over all true ones,
    F1 = 2 · precision · recall / (precision + recall), over all kinds together as in CoNLL-2003.
    """
    words = arrays["label"] != IGNORE
    right = (scores["predicted"] == arrays["label"]) & words
    hits = predicted = expected = 0
    for guess, truth, here in zip(scores["predicted"], arrays["label"], words):
        found, true = (set(spans([labels[int(i)] for i in row[here]])) for row in (guess, truth))
        hits, predicted, expected = hits + len(found & true), predicted + len(found), expected + len(true)
    return {
        "loss": float(scores["loss"].sum(dtype=np.float64) / scores["count"].sum(dtype=np.float64)),
        "accuracy": float(right.sum() / words.sum()),
        "f1": 2 * hits / (predicted + expected) if predicted + expected else 1.0,
    }


def spans(tags: Sequence[str]) -> list[Span]:
    """What a row of tags marks.

    ``B-X`` begins a span of kind X, ``I-X`` goes on with it, or begins one where none of its kind is open (as in CoNLL's own script). A tag
    of another form than these and ``O`` is a span of one word.

    >>> spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "NOUN"])
    [(0, 2, 'PER'), (3, 4, 'LOC'), (4, 5, 'LOC'), (5, 6, 'NOUN')]
    """
    found: list[Span] = []
    open_kind = None
    for at, tag in enumerate(tags):
        match = re.fullmatch(r"([BI])-(.+)", tag)
        kind = match[2] if match else None
        if match and match[1] == "I" and kind == open_kind:
            found[-1] = (found[-1][0], at + 1, match[2])
        elif tag != "O":
            found.append((at, at + 1, kind or tag))
        open_kind = kind
    return found


def tags_of(predicted: np.ndarray, first: np.ndarray, labels: Sequence[str]) -> list[list[str]]:
    """The tags of each row's words, in order."""
    return [[labels[int(i)] for i in row[at > 0]] for row, at in zip(predicted, first)]

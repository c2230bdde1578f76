"""Token classification: a tag for each word, such as names in a sentence or parts of speech.

A word may be several tokens. Its first token carries the tag in the loss, the metrics and the predictions, as in the experiments of BERT
and P-Tuning v2. Words that do not fit into a row are not tagged.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jpeft.data import Table
from jpeft.tasks.cross_entropy import IGNORE, token_counts, token_losses
from jpeft.tasks.sequence_classification import classify
from jpeft.tasks.task import Arrays, Batch, Decoding, Task
from jpeft.training.config import Settings

Span = tuple[int, int, str]  # first word, word after the last, kind


def tag_names(table: Table) -> tuple[str, ...]:
    """Return the tags of a training table in the order of the model's outputs: "O" first, then by name.

    Raises:
      ValueError: for a table without tags or with fewer than two.

    >>> from jpeft.data import Table
    >>> tag_names(Table(text=["Ada sings"], words=[["Ada", "sings"]], tags=[["B-PER", "O"]]))
    ('O', 'B-PER')
    """
    if table.tags is None:
        raise ValueError("The table has no tags to train on: name their column with `tags`.")
    names = sorted({tag for row in table.tags for tag in row}, key=lambda name: (name != "O", name))
    if len(names) < 2:
        raise ValueError(f"Training needs at least two tags, got {names} in {len(table)} rows: check the column of tags.")
    return tuple(names)


def encode(table: Table, tokenizer: Any, *, labels: Sequence[str] | None, max_length: int) -> dict[str, np.ndarray]:
    """Turn words into token numbers, all rows of one length.

    Args:
      table: N rows of words; a table without `words` has its texts split at spaces.
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
        raise ValueError("Token classification needs a fast tokenizer (tokenizer.json) with a padding token.")
    rows = _words(table)
    encoded = tokenizer(rows, is_split_into_words=True, truncation=True, padding="max_length", max_length=max_length) if rows else {}
    names = ("input_ids", "attention_mask", "token_type_ids")
    arrays = {name: np.asarray(encoded[name], np.int32) for name in names if name in encoded} or dict.fromkeys(
        names[:2], np.zeros((0, max_length), np.int32)
    )
    # [N, L]: number of the word at its first token, -1 at all other tokens
    word = np.full(arrays["input_ids"].shape, -1, np.int32)
    for i in range(len(rows)):
        ids = encoded.word_ids(i)  # pyright: ignore[reportAttributeAccessIssue]
        word[i] = [-1 if w is None or (t and ids[t - 1] == w) else w for t, w in enumerate(ids)]
    arrays["first"] = (word >= 0).astype(np.int32)
    if labels is not None:
        number = _numbers(table, tuple(labels))
        arrays["label"] = np.asarray(
            [[number[tags[w]] if w >= 0 else IGNORE for w in row] for tags, row in zip(table.tags or (), word)], np.int32
        )
        arrays["label"] = arrays["label"].reshape(word.shape)
    return arrays


def _words(table: Table) -> list[list[str]]:
    return [text.split() for text in table.text] if table.words is None else table.words


def _numbers(table: Table, labels: tuple[str, ...]) -> dict[str, int]:
    if table.tags is None:
        raise ValueError("The table has no tags: give labels=None to encode rows for prediction.")
    unknown = sorted({tag for row in table.tags for tag in row} - set(labels))
    if unknown:
        raise ValueError(
            f"Unknown tag{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown[:10]))}: the model knows "
            f"{', '.join(map(repr, labels))}. Remove those rows, or train with them."
        )
    return {name: i for i, name in enumerate(labels)}


def scores(logits: Float[Array, "batch length tags"], batch: Mapping[str, Any]) -> dict[str, Array]:
    """Return for each row the loss, the number of tagged words, and the most likely tag of every token."""
    return {"loss": token_losses(logits, batch), "count": token_counts(batch), "predicted": logits.argmax(-1)}


def metrics(scores: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], labels: Sequence[str]) -> dict[str, float]:
    """Return loss and accuracy over all words, each with equal weight, and F1 over spans.

    A predicted span is correct if its first word, last word and kind are. Precision is the share of correct ones among the predicted spans,
    recall their share of the true spans, and F1 = 2 · precision · recall / (precision + recall), over all kinds together as in CoNLL-2003.
    """
    words = arrays["label"] != IGNORE
    right = (scores["predicted"] == arrays["label"]) & words
    hits = predicted = expected = 0
    for guessed, true, is_word in zip(scores["predicted"], arrays["label"], words):
        guessed_spans, true_spans = (set(spans([labels[int(i)] for i in row[is_word]])) for row in (guessed, true))
        hits, predicted, expected = hits + len(guessed_spans & true_spans), predicted + len(guessed_spans), expected + len(true_spans)
    return {
        "loss": float(scores["loss"].sum(dtype=np.float64) / scores["count"].sum(dtype=np.float64)),
        "accuracy": float(right.sum() / words.sum()),
        "f1": 2 * hits / (predicted + expected) if predicted + expected else 1.0,
    }


def spans(tags: Sequence[str]) -> list[Span]:
    """Return the spans that a row of tags marks.

    ``B-X`` begins a span of kind X. ``I-X`` continues a span of kind X, or begins one after any other tag (as in CoNLL's own script). ``O``
    is outside of spans; a tag of any other form is a span of one word.

    >>> spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "NOUN"])
    [(0, 2, 'PER'), (3, 4, 'LOC'), (4, 5, 'LOC'), (5, 6, 'NOUN')]
    """
    found: list[Span] = []
    open_kind = None
    for word, tag in enumerate(tags):
        match = re.fullmatch(r"([BI])-(.+)", tag)
        kind = match[2] if match else None
        if match and match[1] == "I" and kind == open_kind:
            found[-1] = (found[-1][0], word + 1, match[2])
        elif tag != "O":
            found.append((word, word + 1, kind or tag))
        open_kind = kind
    return found


def tags_of(predicted: np.ndarray, first: np.ndarray, labels: Sequence[str]) -> list[list[str]]:
    """Return the tags of each row's words, in order; `first` is 1 at the first token of a word."""
    return [[labels[int(i)] for i in row[starts > 0]] for row, starts in zip(predicted, first)]


class TokenClassification(Task):
    """A tag for each word."""

    name = "token-classification"
    model = "token-classification"
    columns = ("tags",)
    metric = "f1"
    targets = ("label", "first")

    def label_names(self, table: Table) -> tuple[str, ...]:
        """Return the tags of a training table; see `tag_names`."""
        return tag_names(table)

    def encode(self, table: Table, tokenizer: Any, *, labels: Sequence[str] | None, max_length: int) -> Arrays:
        """Return token ids, the first token of each word, and tag numbers; see `encode`."""
        return encode(table, tokenizer, labels=labels, max_length=max_length)

    def losses(self, logits: Array, batch: Batch, settings: Settings | None = None) -> Float[Array, " batch"]:
        """Return the cross entropy summed over the words of each row."""
        return token_losses(logits, batch, 0.0 if settings is None else settings.label_smoothing)

    def counts(self, batch: Batch) -> Float[Array, " batch"]:
        """Return the number of words in each row."""
        return token_counts(batch)

    def scores(self, logits: Array, batch: Batch) -> dict[str, Array]:
        """Return loss, number of words and most likely tags of each row; see `scores`."""
        return scores(logits, batch)

    def metrics(self, scores: Mapping[str, np.ndarray], arrays: Arrays, labels: Sequence[str]) -> dict[str, float]:
        """Return loss, accuracy and F1; see `metrics`."""
        return metrics(scores, arrays, labels)

    def answer(self, forward: Callable[..., Any], variables: Mapping[str, Any], batch: Batch, decoding: Decoding) -> dict[str, Array]:
        """Return the most likely tag of each token with its logit, and which tokens begin a word."""
        del decoding
        logits = classify(forward, variables, self.model_inputs(batch))
        return {"predicted": logits.argmax(-1), "logit": logits.max(-1), "first": batch["first"]}

    def predictions(self, answers: Mapping[str, np.ndarray], labels: Sequence[str], tokenizer: Any) -> list[dict[str, Any]]:
        """Return the tags of each row's words."""
        del tokenizer
        return [{"tags": tags} for tags in tags_of(answers["predicted"], answers["first"], labels)]

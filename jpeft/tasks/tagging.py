"""Token classification: a tag for each word, such as names in a sentence or parts of speech.

A word may be several tokens. Its first token carries the tag in the loss, the metrics and the predictions, as in the experiments of BERT
and P-Tuning v2. A word without a token, because it does not fit into the row or the tokenizer drops it, has no part in the loss and no
predicted tag (None). Metrics count it: it is never right, and it is outside of spans.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jpeft.data import Table
from jpeft.data.encoding import check_known, check_max_length
from jpeft.tasks.cross_entropy import IGNORE, token_counts, token_losses
from jpeft.tasks.sequence_classification import classify
from jpeft.tasks.spans import OUTSIDE, find_marks, mark_spans
from jpeft.tasks.spans import spans as spans
from jpeft.tasks.task import Arrays, Batch, Decoding, Task
from jpeft.training.config import Settings

NO_TOKEN = -1  # in the column `first`: the word has no token
NO_WORD = -2  # in the column `first`: the row has no such word


def tag_names(table: Table) -> tuple[str, ...]:
    """Return the tags of a training table in the order of the model's outputs: "O" first, then by name.

    Raises:
      ValueError: for a table without tags or with fewer than two, and for tags among which the one outside of spans cannot be told: numbers
        without "O", or tags of spans beside others without "O".

    >>> from jpeft.data import Table
    >>> tag_names(Table(text=["Ada sings"], words=[["Ada", "sings"]], tags=[["B-PER", "O"]]))
    ('O', 'B-PER')
    """
    if table.tags is None:
        raise ValueError("The table has no tags to train on: name their column with `tags`.")
    names = sorted({tag for row in table.tags for tag in row}, key=lambda name: (name != "O", name))
    if len(names) < 2:
        raise ValueError(f"Training needs at least two tags, got {names} in {len(table)} rows: check the column of tags.")
    if OUTSIDE not in names:
        _check_outside(names)
    return tuple(names)


def _check_outside(names: Sequence[str]) -> None:
    numbers = [name for name in names if name.isdecimal()]
    if numbers:
        raise ValueError(
            f"The tags {', '.join(numbers[:10])} are numbers and none is 'O', so spans of words cannot be told. Name the tags 0, 1, ... in "
            "their order with `tag_names`, such as O B-PER I-PER."
        )
    # A span of one word has no mark but its whole name where the tag belongs to no scheme.
    others = [name for name, mark in find_marks(names).items() if mark == ("S", name)]
    if others and len(others) < len(names):
        spanning = next(name for name in names if name not in others)
        raise ValueError(
            f"Tags such as {spanning!r} mark spans of words, others such as {others[0]!r} do not, and none is 'O': call the tag of words "
            "outside of spans 'O' in the data."
        )


def encode(table: Table, tokenizer: Any, *, labels: Sequence[str] | None, max_length: int) -> dict[str, np.ndarray]:
    """Turn words into token numbers, all rows of one length.

    Warns how many words have no token.

    Args:
      table: N rows of words; a table without `words` has its texts split at spaces.
      tokenizer: A fast tokenizer of `transformers`; its template and padding apply.
      labels: The tags in the order of the model's outputs; None to leave them out.
      max_length: Length L of every row.

    Returns:
      int32 arrays: `input_ids`, `attention_mask` and, if the tokenizer makes them, `token_type_ids` [N, L]; `first` [N, W], the position of
      the first token of each word, `NO_TOKEN` for a word that has none, `NO_WORD` behind the last word; and, with `labels`, `label` [N, L],
      the tag's number at the first token of each word and `IGNORE` elsewhere, and `tags` [N, W], the tag's number of each word. W is the
      number of words in the longest row, or more.

    Raises:
      ValueError: for a tag that is not among `labels`, a table without tags, a slow tokenizer or one without padding.
    """
    if tokenizer.pad_token_id is None or not tokenizer.is_fast:
        raise ValueError("Token classification needs a fast tokenizer (tokenizer.json) with a padding token.")
    check_max_length(tokenizer, max_length)
    rows = _words(table)
    encoded = tokenizer(rows, is_split_into_words=True, truncation=True, padding="max_length", max_length=max_length) if rows else {}
    names = ("input_ids", "attention_mask", "token_type_ids")
    arrays = {name: np.asarray(encoded[name], np.int32) for name in names if name in encoded} or dict.fromkeys(
        names[:2], np.zeros((0, max_length), np.int32)
    )
    arrays["first"] = _first_tokens(encoded, [len(row) for row in rows], max_length)
    cut = [bool(row.overflowing) for row in getattr(encoded, "encodings", ())]
    _warn_of_missed(table, arrays["first"], cut, max_length, ", which count as wrong in metrics" if labels is not None else "")
    if labels is not None:
        arrays |= _tag_numbers(table, tuple(labels), arrays["first"], max_length)
    return arrays


def _words(table: Table) -> list[list[str]]:
    return [text.split() for text in table.text] if table.words is None else table.words


def _first_tokens(encoded: Any, counts: Sequence[int], max_length: int) -> np.ndarray:
    """Return the column `first`. Its width is a multiple of `max_length`, so that splits with rows of like lengths share compiled code."""
    width = max_length * max(-(-max(counts, default=0) // max_length), 1)
    first = np.full((len(counts), width), NO_WORD, np.int32)
    for i, count in enumerate(counts):
        first[i, :count] = NO_TOKEN
        words = encoded.word_ids(i)
        for position in reversed(range(len(words))):
            if words[position] is not None:
                first[i, words[position]] = position
    return first


def _warn_of_missed(table: Table, first: np.ndarray, cut: Sequence[bool], max_length: int, effect: str) -> None:
    behind, dropped = 0, []
    for i, (row, was_cut) in enumerate(zip(first, cut)):
        missed = np.flatnonzero(row == NO_TOKEN)
        seen = np.flatnonzero(row >= 0).max(initial=-1)
        # A word behind the last one with a token was cut, if anything was.
        lost = int((missed > seen).sum()) if was_cut else 0
        behind += lost
        dropped += [i] * (len(missed) - lost)
    if behind:
        warnings.warn(
            f"{table.title}{sum(cut)} of {len(table)} texts are longer than max_length={max_length} tokens and were cut; words without a "
            f"tag{effect}: {behind}.",
            stacklevel=3,
        )
    if dropped:
        where = table.where(sorted(set(dropped)))
        warnings.warn(f"{table.title}words that give no token and get no tag{effect}: {len(dropped)}, in {where}.", stacklevel=3)


def _tag_numbers(table: Table, labels: tuple[str, ...], first: np.ndarray, max_length: int) -> dict[str, np.ndarray]:
    """Return the columns `label` and `tags`."""
    if table.tags is None:
        raise ValueError("The table has no tags: give labels=None to encode rows for prediction.")
    number = check_known("tag", table, table.tags, labels)
    tags = np.full(first.shape, IGNORE, np.int32)
    label = np.full((len(table), max_length), IGNORE, np.int32)
    for i, row in enumerate(table.tags):
        tags[i, : len(row)] = [number[tag] for tag in row]
        has_token = first[i] >= 0
        label[i, first[i, has_token]] = tags[i, has_token]
    return {"label": label, "tags": tags}


def scores(logits: Float[Array, "batch length tags"], batch: Mapping[str, Any]) -> dict[str, Array]:
    """Return for each row the loss, the number of tagged words, and the most likely tag of every token."""
    return {"loss": token_losses(logits, batch), "count": token_counts(batch), "predicted": logits.argmax(-1)}


def metrics(scores: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], labels: Sequence[str]) -> dict[str, float]:
    """Return loss and accuracy over all words, each with equal weight, and F1 over spans.

    A predicted span is correct if its first word, last word and kind are. Precision is the share of correct ones among the predicted spans,
    recall their share of the true spans, and F1 = 2 · precision · recall / (precision + recall), over all kinds together as in CoNLL-2003.
    The loss is over the words that have a token. A word that has none counts as wrong, and as outside of spans.
    """
    marks = find_marks(labels)
    right = words = hits = predicted = expected = 0
    for guessed, true in _rows_of_words(scores["predicted"], arrays):
        right, words = right + int((guessed == true).sum()), words + len(true)
        guessed_spans, true_spans = (
            set(mark_spans([None if tag < 0 else labels[int(tag)] for tag in row], marks)) for row in (guessed, true)
        )
        hits, predicted, expected = hits + len(guessed_spans & true_spans), predicted + len(guessed_spans), expected + len(true_spans)
    return {
        "loss": float(scores["loss"].sum(dtype=np.float64) / max(scores["count"].sum(dtype=np.float64), 1.0)),
        "accuracy": right / max(words, 1),
        "f1": 2 * hits / (predicted + expected) if predicted + expected else 1.0,
    }


def _rows_of_words(predicted: np.ndarray, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterate over the predicted and the true tags of each row's words; `NO_TOKEN` for a word without prediction."""
    if "tags" not in arrays:  # labels by token alone, as of a table in which each word has a token
        for row, label in zip(predicted, arrays["label"]):
            yield row[label != IGNORE], label[label != IGNORE]
        return
    for row, first, tags in zip(predicted, arrays["first"], arrays["tags"]):
        places = first[first != NO_WORD]
        yield np.where(places >= 0, row[places], NO_TOKEN), tags[: len(places)]


def tags_of(predicted: np.ndarray, first: np.ndarray, labels: Sequence[str]) -> list[list[str | None]]:
    """Return a tag for each word of each row, in order; None for a word without a token. `first` is that of `encode`."""
    rows = zip(predicted, first)
    return [[labels[int(row[place])] if place >= 0 else None for place in places if place != NO_WORD] for row, places in rows]


class TokenClassification(Task):
    """A tag for each word."""

    name = "token-classification"
    model = "token-classification"
    columns = ("tags",)
    metric = "f1"
    targets = ("label", "first", "tags")

    def label_names(self, table: Table) -> tuple[str, ...]:
        """Return the tags of a training table; see `tag_names`."""
        return tag_names(table)

    def row_shapes(self, max_length: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a row with at most as many words as tokens."""
        return dict.fromkeys(("input_ids", "attention_mask", "label", *self.targets[1:]), (max_length,))

    def encode(self, table: Table, tokenizer: Any, *, labels: Sequence[str] | None, max_length: int) -> Arrays:
        """Return token ids, the first token of each word, and tag numbers; see `encode`."""
        return encode(table, tokenizer, labels=labels, max_length=max_length)

    def identity(self, arrays: Arrays) -> Arrays:
        """Return the columns as earlier versions made them, with 1 at the first token of each word, so that their runs are recognised."""
        starts = np.zeros_like(arrays["input_ids"])
        row, word = np.nonzero(arrays["first"] >= 0)
        starts[row, arrays["first"][row, word]] = 1
        return {**{name: column for name, column in arrays.items() if name != "tags"}, "first": starts}

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
        """Return the most likely tag of each token with its logit, and where each word begins."""
        del decoding
        logits = classify(forward, variables, self.model_inputs(batch))
        return {"predicted": logits.argmax(-1), "logit": logits.max(-1), "first": batch["first"]}

    def predictions(self, answers: Mapping[str, np.ndarray], labels: Sequence[str], tokenizer: Any) -> list[dict[str, Any]]:
        """Return a tag for each of a row's words, None for a word without a token."""
        del tokenizer
        return [{"tags": tags} for tags in tags_of(answers["predicted"], answers["first"], labels)]

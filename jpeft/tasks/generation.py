"""Text generation by a causal language model: rows of token ids, the loss of each predicted token, and metrics.

There are two kinds of tables:

* *Pairs*, which have targets. A row is text, target, end: ``[BOS] text target EOS``, padded on the right. Only the tokens of the target
  and EOS are predicted. Text and target are tokenized apart, as a prompt is when the model is used. Nothing is put between them: end the
  texts with the separator you want.
* *Plain text*, without targets. The documents are joined to one stream, ``EOS document EOS document EOS ...``, which is cut into rows of
  one length ("packing"). So only the last row is padded, nothing is cut off, and every token but the first is predicted exactly once.
  Attention and positions run through a row, so a document sees the ends of the documents before it in its row, as in the training of GPT-2
  and GPT-3.

A pair that is longer than a row may be is refused, cut or dropped (`overlong`). A cut pair loses tokens at the beginning of its text,
behind BOS, down to half of a row, and then at the end of its target. So neither is lost whole.

BOS is at the beginning if the tokenizer's own template puts it there. It is never predicted.

``label[t]`` is the token that position t predicts, which is the token at t + 1. The loss needs no shift.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jpeft.data import Table
from jpeft.models.common.token_loss import TokenLoss
from jpeft.models.generation.generate import continue_prompts
from jpeft.tasks.cross_entropy import IGNORE, token_counts, token_losses
from jpeft.tasks.task import Arrays, Batch, Decoding, Task
from jpeft.training.config import Settings

# What becomes of rows that are too long.
Overlong = Literal["error", "cut", "drop"]


def encode(
    table: Table, tokenizer: Any, *, labels: Sequence[str] | None, max_length: int, overlong: Overlong = "error"
) -> dict[str, np.ndarray]:
    """Return a table as rows of token ids.

    Warns how many rows were cut or dropped.

    Args:
      table: N texts; a table with targets holds pairs.
      tokenizer: A tokenizer of `transformers`.
      labels: None for prompts, which need no target; anything else for rows to train on or to score.
      max_length: Length L of a row. For prompts: length of the longest one allowed.
      overlong: What becomes of pairs and prompts that are longer: "error" refuses them; "cut" shortens them; "drop" leaves pairs out, and
        keeps the place of a prompt, which has no answer then.

    Returns:
      int32 arrays `input_ids` and `attention_mask` [N, L], and `label` [N, L], `IGNORE` where nothing is predicted. Pairs also have
      `complete` [N], 0 where the end of a target was cut off. Plain text has as many rows as its tokens fill. Prompts have no labels and
      are padded to the longest of them; if some are dropped, `complete` is 0 there.

    Raises:
      ValueError: for a tokenizer without an end-of-text token, and for rows that are too long, as `overlong` has it.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-text token: set one, e.g. tokenizer.eos_token = '</s>'.")
    if labels is None:
        return _prompts(table, tokenizer, max_length, overlong)
    if table.target is None:
        return _packed(table, tokenizer, max_length)
    return _pairs(table, table.target, tokenizer, max_length, overlong)


def _prompts(table: Table, tokenizer: Any, max_length: int, overlong: Overlong) -> dict[str, np.ndarray]:
    begin = _template(tokenizer)
    rows = _starts(table, tokenizer)
    long = [i for i, row in enumerate(rows) if len(row) > max_length]
    if long and overlong == "error":
        raise ValueError(_too_long(table, [len(row) for row in rows], long, "texts are", max_length))
    if long:
        what = "lost their beginning" if overlong == "cut" else "get no answer"
        warnings.warn(
            f"{table.title}{len(long)} of {len(table)} texts are longer than max_length={max_length} tokens and {what}.", stacklevel=3
        )
    if overlong == "cut":
        return _padded({"input_ids": [_tail(row, begin, max_length) for row in rows]}, tokenizer, min(max_length, _longest(rows)))
    # A dropped prompt keeps its place, so that answers stay beside their texts.
    complete = np.asarray([len(row) <= max_length for row in rows], np.int32)
    rows = [row if fits else [tokenizer.eos_token_id] for row, fits in zip(rows, complete)]
    arrays = _padded({"input_ids": rows}, tokenizer, _longest(rows))
    return arrays | ({"complete": complete} if long else {})


def _pairs(table: Table, targets: list[str], tokenizer: Any, max_length: int, overlong: Overlong) -> dict[str, np.ndarray]:
    begin = _template(tokenizer)
    prompts = _starts(table, tokenizer)
    ends = [[*ids, tokenizer.eos_token_id] for ids in _tokens(tokenizer, targets)]
    # The last token is predicted and not an input.
    lengths = [len(prompt) + len(end) - 1 for prompt, end in zip(prompts, ends)]
    long = [i for i, length in enumerate(lengths) if length > max_length]
    if long and (overlong == "error" or (overlong == "drop" and len(long) == len(table))):
        raise ValueError(_too_long(table, lengths, long, "texts with their targets are", max_length))
    if overlong == "drop":
        prompts, ends = ([column[i] for i, length in enumerate(lengths) if length <= max_length] for column in (prompts, ends))
    keep = [max(max_length + 1 - len(end), min(len(prompt), max(max_length // 2, 1))) for prompt, end in zip(prompts, ends)]
    starts = [_tail(prompt, begin, count) for prompt, count in zip(prompts, keep)]
    whole = [(start + end)[: max_length + 1] for start, end in zip(starts, ends)]
    complete = [len(start) + len(end) <= max_length + 1 for start, end in zip(starts, ends)]
    if long:
        lost = sum(len(start) < len(prompt) for start, prompt in zip(starts, prompts))
        what = f"were cut: {lost} lost the beginning of the text, {complete.count(False)} the end of the target"
        warnings.warn(
            f"{table.title}{len(long)} of {len(table)} texts with their targets are longer than max_length={max_length} tokens and "
            f"{'were dropped' if overlong == 'drop' else what}.",
            stacklevel=3,
        )
    labels = [[IGNORE] * (len(start) - 1) + row[len(start) :] for start, row in zip(starts, whole)]
    arrays = _padded({"input_ids": [row[:-1] for row in whole], "label": labels}, tokenizer, max_length)
    return arrays | {"complete": np.asarray(complete, np.int32)}


def _tail(row: list[int], begin: list[int], count: int) -> list[int]:
    """Return so many tokens of a text: those that the tokenizer begins with, and the last ones."""
    if len(row) <= count:
        return row
    kept = count - len(begin)
    return [*begin, *row[-kept:]] if kept > 0 else row[-count:]


def _longest(rows: list[list[int]]) -> int:
    return max(map(len, rows), default=1)


def _packed(table: Table, tokenizer: Any, max_length: int) -> dict[str, np.ndarray]:
    begin, eos = _template(tokenizer), tokenizer.eos_token_id
    # Without BOS, the EOS of the document before marks the beginning of a document, so the first document needs one as well.
    stream: list[int] = [] if begin else [eos]
    predicted: list[int] = [] if begin else [IGNORE]
    for ids in _tokens(tokenizer, table.text):
        stream += [*begin, *ids, eos]
        predicted += [*([IGNORE] * len(begin)), *ids, eos]
    ids, label = stream[:-1], predicted[1:]
    cuts = [slice(start, start + max_length) for start in range(0, len(ids), max_length)]
    return _padded({"input_ids": [ids[cut] for cut in cuts], "label": [label[cut] for cut in cuts]}, tokenizer, max_length)


def _starts(table: Table, tokenizer: Any) -> list[list[int]]:
    """Return the tokens of each text behind BOS; at least one token, because the first prediction needs an input."""
    begin = _template(tokenizer)
    return [[*begin, *ids] or [tokenizer.eos_token_id] for ids in _tokens(tokenizer, table.text)]


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # verbose=False: no warning about documents that are longer than the model's longest row.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _template(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts in front of a text: BOS, or nothing."""
    plain, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = [i for i in range(len(framed)) if framed[i : i + len(plain)] == plain]
    return list(framed[: starts[0]]) if plain and starts else []


def _too_long(table: Table, lengths: list[int], long: list[int], what: str, max_length: int) -> str:
    worst = max(long, key=lambda i: lengths[i])
    return (
        f"{len(long)} of {len(table)} {what} longer than max_length={max_length} tokens: {table.where(long)}. The "
        f"longest, {table.text[worst][:40]!r}..., has {lengths[worst]}. Raise max_length, or give overlong=cut or overlong=drop."
    )


def _padded(columns: dict[str, list[list[int]]], tokenizer: Any, width: int) -> dict[str, np.ndarray]:
    """Return columns of rows of token ids as arrays [N, width], with a mask that is 0 at the padding."""
    # The model never attends to padding, so a tokenizer without a padding token (GPT-2's) may use any id.
    fill = {"input_ids": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id, "label": IGNORE}
    arrays = {name: np.full((len(rows), width), fill[name], np.int32) for name, rows in columns.items()}
    mask = np.zeros(arrays["input_ids"].shape, np.int32)
    for name, rows in columns.items():
        for i, row in enumerate(rows):
            arrays[name][i, : len(row)] = row
    for i, row in enumerate(columns["input_ids"]):
        mask[i, : len(row)] = 1
    return arrays | {"attention_mask": mask}


# --- metrics --------------------------------------------------------------------------------------------------------


def scores(outputs: TokenLoss | Float[Array, "batch length vocab"], batch: Mapping[str, Any]) -> dict[str, Array]:
    """Return for each row the loss, the number of predicted tokens, and how many of them had the highest probability."""
    if isinstance(outputs, TokenLoss):
        loss, correct = outputs.loss.sum(-1), outputs.correct
    else:
        loss, correct = token_losses(outputs, batch), outputs.argmax(-1) == jnp.asarray(batch["label"])
    return {"loss": loss, "count": token_counts(batch), "correct": correct.sum(-1)}


def metrics(scores: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return loss, perplexity and accuracy over the tokens of all rows, each token with equal weight; for pairs also exact match.

    Exact match is the share of targets that greedy generation reproduces token for token, EOS included. It needs no generation: greedy
    generation reproduces a target exactly if at each of its positions the most likely token, given the true tokens before, is the true one.
    A target that was cut does not match.
    """
    tokens = float(scores["count"].sum(dtype=np.float64))
    loss = float(scores["loss"].sum(dtype=np.float64)) / tokens
    # e^700 is close to the largest float64; a trained model is far below.
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": float(scores["correct"].sum()) / tokens}
    if "complete" in arrays:
        found["exact_match"] = float(np.mean((scores["correct"] == scores["count"]) & (arrays["complete"] == 1)))
    return found


def texts(tokens: Int[np.ndarray, "rows new"], lengths: Int[np.ndarray, " rows"], tokenizer: Any) -> list[str]:
    """Return generated token ids as texts, without EOS."""
    return [tokenizer.decode(row[:length], skip_special_tokens=True) for row, length in zip(tokens, lengths)]


class Generation(Task):
    """Continue texts.

    Args:
      overlong: What becomes of rows that are too long; see `encode`.
    """

    name = "generation"
    model = "causal-lm"
    columns = ("target",)
    metric = "perplexity"
    higher_is_better = False
    targets = ("label", "complete")
    token_columns = ("input_ids", "label")
    generates = True

    def __init__(self, overlong: Overlong = "error"):
        self.overlong: Overlong = overlong

    def configured(self, settings: Settings) -> "Generation":
        """Return the task with the configured treatment of long rows."""
        return Generation(settings.overlong)

    def label_names(self, table: Table) -> tuple[str, ...]:
        """Return nothing: a language model has no classes."""
        del table
        return ()

    def row_shapes(self, max_length: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a row of token ids, each of which predicts the next one."""
        return dict.fromkeys(("input_ids", "attention_mask", "label"), (max_length,))

    def encode(self, table: Table, tokenizer: Any, *, labels: Sequence[str] | None, max_length: int) -> Arrays:
        """Return rows of token ids and the tokens to predict; see `encode`."""
        return encode(table, tokenizer, labels=labels, max_length=max_length, overlong=self.overlong)

    def loss_inputs(self, batch: Batch, settings: Settings | None = None) -> dict[str, Any]:
        """Return the token ids and the labels: the model computes the loss of each token, without the logits of all of them."""
        smoothing = {} if settings is None or not settings.label_smoothing else {"label_smoothing": settings.label_smoothing}
        return {**self.model_inputs(batch), "labels": batch["label"], **smoothing}

    def losses(self, outputs: TokenLoss | Array, batch: Batch, settings: Settings | None = None) -> Float[Array, " batch"]:
        """Return the cross entropy summed over the predicted tokens of each row; of logits too, for a model that takes no labels."""
        if isinstance(outputs, TokenLoss):
            return outputs.loss.sum(-1)
        return token_losses(outputs, batch, 0.0 if settings is None else settings.label_smoothing)

    def counts(self, batch: Batch) -> Float[Array, " batch"]:
        """Return the number of predicted tokens in each row."""
        return token_counts(batch)

    def scores(self, outputs: TokenLoss | Array, batch: Batch) -> dict[str, Array]:
        """Return loss and numbers of predicted and of correct tokens of each row; see `scores`."""
        return scores(outputs, batch)

    def metrics(self, scores: Mapping[str, np.ndarray], arrays: Arrays, labels: Sequence[str]) -> dict[str, float]:
        """Return loss, perplexity, accuracy and exact match; see `metrics`."""
        del labels
        return metrics(scores, arrays)

    def answer(self, forward: Callable[..., Any], variables: Mapping[str, Any], batch: Batch, decoding: Decoding) -> dict[str, Array]:
        """Return the generated tokens of each row, their number, and their log-likelihood."""
        generated = continue_prompts(forward, variables, batch["input_ids"], batch["attention_mask"], decoding)
        dropped = {"complete": batch["complete"]} if "complete" in batch else {}
        return {**generated._asdict(), **dropped}

    def predictions(self, answers: Mapping[str, np.ndarray], labels: Sequence[str], tokenizer: Any) -> list[dict[str, Any]]:
        """Return the generated text of each row, None for a prompt that was dropped."""
        del labels
        made = texts(answers["tokens"], answers["lengths"], tokenizer)
        complete = answers.get("complete", np.ones(len(made)))
        return [{"generated": text if fits else None} for text, fits in zip(made, complete)]

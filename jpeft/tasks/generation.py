"""Text for a causal language model: rows of token numbers, the loss of each token to be predicted, and what follows from it.

Two kinds of table, told apart by whether they have targets:

* *Pairs.* A row is text, target, end: ``[BOS] text target EOS``, padded on the right. Only the tokens of the target and its
  end are predicted. Text and target are tokenized apart, as a prompt is when the model is used, and nothing is put between them: end the
  texts with whatever shall separate them.
* *Plain text.* The documents are joined to one stream, ``EOS document EOS document EOS ...``, and that is cut into rows of one length
  ("packing"): no padding but in the last row, nothing cut off, and every token but the very first is predicted exactly once. Attention and
  positions run through a row, so a document sees the ends of those before it in its row, as in the training of GPT-2 and GPT-3.

BOS stands where the tokenizer's own template puts one, and is never predicted.

``label[t]`` is the token that position t predicts, so the row after its own token: the shift is done here, once, and not by the loss.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jpeft.data import Table
from jpeft.tasks.token_loss import IGNORE, counts, losses


def encode(table: Table, tokenizer: Any, *, labels: Sequence[str] | None, max_length: int) -> dict[str, np.ndarray]:
    """A table as rows of token numbers.

    Args:
      table: N texts; with targets, pairs.
      tokenizer: A tokenizer of `transformers`.
      labels: None for texts to be continued, which need no target; anything else for rows to learn from or to score.
      max_length: Length L of every row to learn from. Longest prompt, for texts to be continued.

    Returns:
      int32 arrays. `input_ids` and `attention_mask` [N, L], and `label` [N, L], `IGNORE` where nothing is predicted. Pairs also have
      `complete` [N], 0 where the end of a target was cut off; plain text has as many rows as its tokens fill. Texts to be continued
      have no labels and are as wide as the longest of them.

    Raises:
      ValueError: for a tokenizer without an end-of-text token, or texts that leave no room for anything to predict.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token; set one, e.g. tokenizer.eos_token = '</s>'")
    if labels is None:
        return _prompts(table, tokenizer, max_length)
    return _packed(table, tokenizer, max_length) if table.target is None else _pairs(table, table.target, tokenizer, max_length)


def _prompts(table: Table, tokenizer: Any, max_length: int) -> dict[str, np.ndarray]:
    rows = _starts(table, tokenizer)
    _check_room(rows, table, max_length, "to continue")
    return _padded({"input_ids": rows}, tokenizer, max(map(len, rows), default=1))


def _pairs(table: Table, targets: list[str], tokenizer: Any, max_length: int) -> dict[str, np.ndarray]:
    prompts = _starts(table, tokenizer)
    _check_room(prompts, table, max_length, "of the target")
    ends = [[*ids, tokenizer.eos_token_id] for ids in _tokens(tokenizer, targets)]
    # One token more than fits, because the last is only predicted.
    whole = [(prompt + end)[: max_length + 1] for prompt, end in zip(prompts, ends)]
    labels = [[IGNORE] * (len(prompt) - 1) + row[len(prompt) :] for prompt, row in zip(prompts, whole)]
    arrays = _padded({"input_ids": [row[:-1] for row in whole], "label": labels}, tokenizer, max_length)
    complete = [len(prompt) + len(end) <= max_length + 1 for prompt, end in zip(prompts, ends)]
    return arrays | {"complete": np.asarray(complete, np.int32)}


def _packed(table: Table, tokenizer: Any, max_length: int) -> dict[str, np.ndarray]:
    begin, eos = _template(tokenizer), tokenizer.eos_token_id
    # Where documents have no beginning of their own, the end of the one before serves as such, so the first needs one too.
    stream: list[int] = [] if begin else [eos]
    predicted: list[int] = [] if begin else [IGNORE]
    for ids in _tokens(tokenizer, table.text):
        stream += [*begin, *ids, eos]
        predicted += [*([IGNORE] * len(begin)), *ids, eos]
    ids, label = stream[:-1], predicted[1:]
    cuts = [slice(at, at + max_length) for at in range(0, len(ids), max_length)]
    return _padded({"input_ids": [ids[cut] for cut in cuts], "label": [label[cut] for cut in cuts]}, tokenizer, max_length)


def _starts(table: Table, tokenizer: Any) -> list[list[int]]:
    """The tokens of each text, behind what the tokenizer begins with; at least one, because a prediction has to start from something."""
    begin = _template(tokenizer)
    return [[*begin, *ids] or [tokenizer.eos_token_id] for ids in _tokens(tokenizer, table.text)]


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # verbose: a document may well be longer than the model's longest row.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _template(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text: BOS for some, nothing for others."""
    plain, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = [at for at in range(len(framed)) if framed[at : at + len(plain)] == plain]
    return list(framed[: starts[0]]) if plain and starts else []


def _check_room(rows: list[list[int]], table: Table, max_length: int, what: str) -> None:
    full = [i for i, row in enumerate(rows) if len(row) > max_length]
    if full:
        worst = max(full, key=lambda i: len(rows[i]))
        raise ValueError(
            f"{len(full)} of {len(rows)} texts are longer than max_length={max_length} tokens, which leaves nothing {what}: the longest, "
            f"{table.text[worst][:40]!r}..., has {len(rows[worst])}; raise max_length, or shorten or remove them"
        )


def _padded(columns: dict[str, list[list[int]]], tokenizer: Any, width: int) -> dict[str, np.ndarray]:
    """Columns of rows of token numbers as arrays [N, width], with a mask of what is no padding."""
    # What stands in the padding is never seen, so a tokenizer without a padding token (GPT-2's) will do.
    fill = {"input_ids": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id, "label": IGNORE}
    arrays = {name: np.full((len(rows), width), fill[name], np.int32) for name, rows in columns.items()}
    mask = np.zeros(arrays["input_ids"].shape, np.int32)
    for name, rows in columns.items():
        for i, row in enumerate(rows):
            arrays[name][i, : len(row)] = row
    for i, row in enumerate(columns["input_ids"]):
        mask[i, : len(row)] = 1
    return arrays | {"attention_mask": mask}


# --- what is learned and measured -----------------------------------------------------------------------------------


def scores(logits: Float[Array, "batch length vocab"], batch: Mapping[str, Any]) -> dict[str, Array]:
    """For each row: its loss, the tokens predicted, and those of them that were the most likely ones."""
    label = jnp.asarray(batch["label"])
    return {"loss": losses(logits, batch), "count": counts(batch), "correct": (logits.argmax(-1) == label).sum(-1)}


def metrics(scores: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Loss, perplexity and accuracy over the tokens of all rows, each token counting once; for pairs also exact match.

    Exact match is the share of targets that greedy generation gives token for token, their end included. It needs no generation: the
    most likely token is the right one at each place of the target, given all before it, exactly if greedy generation goes that way.
    A target that was cut to fit does not match.
    """
    tokens = float(scores["count"].sum(dtype=np.float64))
    loss = float(scores["loss"].sum(dtype=np.float64)) / tokens
    # Nothing that has learned anything comes near e^700, the end of float64.
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": float(scores["correct"].sum()) / tokens}
    if "complete" in arrays:
        found["exact_match"] = float(np.mean((scores["correct"] == scores["count"]) & (arrays["complete"] == 1)))
    return found


def texts(tokens: Int[np.ndarray, "rows new"], lengths: Int[np.ndarray, " rows"], tokenizer: Any) -> list[str]:
    """Generated token numbers as texts, without what marks their end."""
    return [tokenizer.decode(row[:length], skip_special_tokens=True) for row, length in zip(tokens, lengths)]

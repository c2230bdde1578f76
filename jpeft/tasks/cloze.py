"""Classification by a language model without training: a text with a gap, and words for each label that may fill it.

cloze = Cloze("{text} It was {mask}.", {"positive": ("great", "good"), "negative": ("terrible", "bad")})
arrays = cloze.encode(tokenizer, texts, max_length=128)
scores = cloze.classify(model.apply, {"params": params}, tokenizer, arrays)     # [texts, labels]
"""

import dataclasses
import functools
import string
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jpeft.data import eval_batches

Words = tuple[tuple[int, ...], ...]  # for each label, the token ids of its words


@dataclasses.dataclass(frozen=True)
class Cloze:
    """A pattern and a verbaliser: ``score(label | x) = mean over w in words(label) of log p([MASK] = w | pattern(x))``.

    For a masked language model the gap may be anywhere. A causal language model has no mask token, so the gap must be at the end of the
    pattern, and the words are scored as the next token.

    Attributes:
      pattern: The text around the gap, with ``{text}``, ``{mask}`` and, for pairs, ``{pair}``, each once.
      words: The words of each label, as a mapping or pairs. Each word is a single token of the model. Scores are in the order of the
        labels.

    Raises:
      ValueError: for a pattern without text or gap, or a label without words.

    >>> Cloze("{text} It was {mask}.", {"positive": ["great"], "negative": ["bad"]}).labels
    ('positive', 'negative')

    Reference: Schick and Schütze, Exploiting Cloze Questions for Few Shot Text Classification and Natural Language Inference, 2021,
    https://arxiv.org/abs/2001.07676.
    """

    pattern: str
    words: Any  # kept as pairs, so that a Cloze can be hashed

    def __post_init__(self) -> None:
        fields = [name for _, name, _, _ in string.Formatter().parse(self.pattern) if name is not None]
        if sorted(fields) not in (["mask", "text"], ["mask", "pair", "text"]):
            raise ValueError(f"The pattern {self.pattern!r} must have {{text}} and {{mask}} once each, and at most {{pair}} besides.")
        pairs = self.words.items() if isinstance(self.words, Mapping) else self.words
        words = tuple((label, (of_label,) if isinstance(of_label, str) else tuple(of_label)) for label, of_label in pairs)
        if not words or not all(of_label for _, of_label in words):
            raise ValueError(f"Each label needs at least one word, got {dict(words)}.")
        object.__setattr__(self, "words", words)

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the labels in the order of the scores."""
        return tuple(label for label, _ in self.words)

    def tokens(self, tokenizer: Any) -> tuple[int, ...]:
        """Return the tokens of the pattern without text and gap, to initialise ``prompt_tuning(init="tokens", tokens=...)``."""
        return tuple(_ids(tokenizer, " ".join(self.pattern.format(text="", pair="", mask="").split())))

    def word_ids(self, tokenizer: Any) -> Words:
        """Return the token of each word in the gap, tokenized behind the text that precedes the gap.

        Raises:
          ValueError: for a word that is several tokens, unknown, or shared by two labels.
        """
        # Some tokenizers give a word another token behind a space than at the beginning.
        before = next(literal for literal, name, _, _ in string.Formatter().parse(self.pattern) if name == "mask")
        start, seen, out = len(_ids(tokenizer, before.rstrip())), {}, []
        for label, words in self.words:
            ids = [_ids(tokenizer, before + word)[start:] for word in words]
            for word, tokens in zip(words, ids):
                if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
                    what = f"{len(tokens)} tokens" if len(tokens) != 1 else "unknown"
                    raise ValueError(
                        f"The word {word!r} of label {label!r} is {what} to this tokenizer: choose one that is a single token."
                    )
                if seen.setdefault(tokens[0], label) != label:
                    raise ValueError(f"The word {word!r} stands for two labels, {seen[tokens[0]]!r} and {label!r}.")
            out.append(tuple(tokens[0] for tokens in ids))
        return tuple(out)

    def encode(self, tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int) -> dict[str, np.ndarray]:
        """Return texts in the pattern as token ids. Texts are cut to fit, with a warning; the pattern is not.

        Args:
          tokenizer: A fast tokenizer of `transformers`, or any object with the same call.
          texts: N texts.
          pairs: Their second texts, if the pattern has ``{pair}``.
          max_length: Length of every row; shorter ones are padded on the right.

        Returns:
          `input_ids`, `attention_mask` and, if the tokenizer makes them, `token_type_ids` [N, max_length], and `gap` [N], the position
          whose logits predict the word in the gap; all int32.

        Raises:
          ValueError: if the pattern alone is too long, a causal model's gap is not at the pattern's end, only one of data and pattern has
            pairs, or a text contains the mask token.
        """
        if (pairs is not None) != ("{pair}" in self.pattern):
            raise ValueError(f"The pattern {self.pattern!r} and the data must both have pairs, or neither.")
        if tokenizer.mask_token is None and not self.pattern.rstrip().endswith("{mask}"):
            raise ValueError(f"A model without a mask token only continues texts: the pattern {self.pattern!r} must end with {{mask}}.")
        rows = [self._row(tokenizer, text, pair, max_length) for text, pair in zip(texts, pairs or [""] * len(texts), strict=True)]
        if cut := sum(was_cut for _, _, was_cut in rows):
            warnings.warn(
                f"{cut} of {len(rows)} texts are longer than max_length={max_length} tokens with the template and were cut.", stacklevel=2
            )
        out: dict[str, np.ndarray] = {}
        for name in rows[0][0] if rows else ():
            fill = (tokenizer.pad_token_id or 0) if name == "input_ids" else 0  # any id will do where the mask is 0
            out[name] = np.array([row[name] + [fill] * (max_length - len(row[name])) for row, _, _ in rows], np.int32)
        return {**out, "gap": np.array([gap for _, gap, _ in rows], np.int32)}

    def _row(self, tokenizer: Any, text: str, pair: str, max_length: int) -> tuple[dict[str, list[int]], int, bool]:
        """Return the columns of a row, the position of its gap, and whether a text was cut."""
        whole = text, pair
        mask = tokenizer.mask_token
        if mask is not None and mask in text + pair:
            raise ValueError(f"A text contains {mask!r}, so there would be two gaps: {text!r}.")
        while True:
            row = tokenizer(self.pattern.format(text=text, pair=pair, mask=mask or "").rstrip(), return_attention_mask=True)
            row = {name: list(row[name]) for name in ("input_ids", "attention_mask", "token_type_ids") if name in row}
            ids = row["input_ids"]
            if mask is None and ids and ids[-1] == tokenizer.eos_token_id:  # the gap continues the text
                row = {name: column[:-1] for name, column in row.items()}
            excess = len(row["input_ids"]) - max_length
            if excess <= 0:
                gap = len(row["input_ids"]) - 1 if mask is None else row["input_ids"].index(tokenizer.mask_token_id)
                return row, gap, (text, pair) != whole
            if not text + pair:
                raise ValueError(f"max_length={max_length} is less than the {excess + max_length} tokens of the pattern alone.")
            text, pair = _cut(tokenizer, text, pair, excess)

    def classify(
        self, forward: Callable[..., Any], variables: Any, tokenizer: Any, arrays: Mapping[str, np.ndarray], *, batch_size: int = 32
    ) -> np.ndarray:
        """Return a score of each label for every text, [texts, labels]; the label with the highest score is the answer.

        Args:
          forward: ``model.apply`` of a masked or causal language model, or ``jpeft.wrap(model.apply, ...)``.
          variables: First argument of `forward`.
          tokenizer: The model's tokenizer.
          arrays: From `encode`.
          batch_size: Texts per compiled call.

        Raises:
          ValueError: if the score of a text is not finite, or if the model scores no such word.
        """
        words = self.word_ids(tokenizer)
        out = []
        for batch in eval_batches(dict(arrays), batch_size):
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
            out.append(np.asarray(_scores(forward, words, variables, inputs, batch["gap"]))[batch["weight"] > 0])
        scores = np.concatenate(out)
        bad = np.flatnonzero(~np.isfinite(scores).all(-1))
        if bad.size:
            raise ValueError(
                f"The model's scores for text {bad[0] + 1} are not finite numbers: its checkpoint is damaged, or the text holds a token "
                "that it has no embedding for."
            )
        return scores


@functools.partial(jax.jit, static_argnames=("forward", "words"))
def _scores(forward: Callable[..., Any], words: Words, variables: Any, inputs: dict[str, Array], gap: Array) -> Array:
    return label_scores(forward(variables, **inputs), gap, words)


def label_scores(
    logits: Float[Array, "batch length vocab"], gap: Int[Array | np.ndarray, " batch"], words: Words
) -> Float[Array, "batch labels"]:
    """Return the mean log-probability of each label's words at the gap.

    Raises:
      ValueError: for a word that the model does not score.

    >>> logits = jnp.log(jnp.array([[[0.5, 0.2, 0.2, 0.1]]]))
    >>> jnp.exp(label_scores(logits, jnp.array([0]), ((0,), (1, 2)))).round(3)
    Array([[0.5, 0.2]], dtype=float32)
    """
    if (last := max(token for ids in words for token in ids)) >= logits.shape[-1]:
        raise ValueError(f"A word has the token {last}, and the model scores {logits.shape[-1]}: the tokenizer is not that of this model.")
    at_gap = jnp.take_along_axis(logits, jnp.asarray(gap)[:, None, None], axis=1)[:, 0]  # [batch, vocab]
    log_p = jax.nn.log_softmax(at_gap.astype(jnp.float32), axis=-1)
    return jnp.stack([log_p[:, jnp.array(ids)].mean(-1) for ids in words], axis=-1)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _cut(tokenizer: Any, text: str, pair: str, count: int) -> tuple[str, str]:
    """Return two texts with `count` tokens less. Each token is taken from the end of the text that has more tokens left."""
    # Character spans of the tokens of both texts.
    spans = [tokenizer(each, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"] for each in (text, pair)]
    keep = [len(tokens) for tokens in spans]
    for _ in range(min(count, sum(keep))):
        keep[keep[1] > keep[0]] -= 1
    text, pair = (each[: tokens[n - 1][1]] if n else "" for each, tokens, n in zip((text, pair), spans, keep))
    return text, pair

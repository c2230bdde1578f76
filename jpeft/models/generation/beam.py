"""Beam search over a cache of keys and values.

At each step the K open texts of a prompt are continued by every word of the vocabulary. The K best continuations that have not ended stay
open. A continuation that ends is a candidate for the result if it is among the K best of its step; the K candidates with the highest
``log p(text) / length^length_penalty`` are kept. The length counts new tokens, the stop token included.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Log-likelihood of texts that must not be chosen: lower than that of any text, and finite, so that sums and comparisons stay exact.
NEVER = -1e9

Step = Callable[[Any, Int[Array, " rows"]], tuple[Float[Array, "rows vocab"], Any]]  # cache and tokens to logits and cache


class Texts(NamedTuple):
    """K texts for each prompt, the best one first."""

    tokens: Int[Array, "batch k new"]
    scores: Float[Array, "batch k"]
    ended: Bool[Array, "batch k"]
    lengths: Int[Array, "batch k"]

    def take(self, index: Int[Array, "batch _"]) -> "Texts":
        """Return the texts at these indices."""
        return jax.tree.map(lambda leaf: _gather(leaf, index), self)

    def take_best(self, k: int) -> tuple["Texts", Int[Array, "batch _"]]:
        """Return the k texts with the highest scores, and their indices."""
        index = jax.lax.top_k(self.scores, k)[1]
        return self.take(index), index


class _State(NamedTuple):
    """The state of the loop over tokens."""

    step: Array  # int32 []: number of tokens so far
    open: Texts  # scores are log p(text)
    ended: Texts  # scores are log p(text) / length^length_penalty
    can_improve: Array  # bool [batch]: whether an open text may still score higher than an ended one
    finite: Array  # bool [batch]: whether all logits so far were numbers
    last: Array  # int32 [batch * k]: the newest token of the open texts
    cache: Any
    running: Array  # bool []


class _Options(NamedTuple):
    """The options of `search` that stay the same in every step."""

    beams: int
    new: int
    stop: tuple[int, ...]
    length_penalty: float
    early_stopping: bool | str


def search(
    logits: Float[Array, "batch vocab"],
    cache: Any,
    step: Step,
    axes: Any,
    *,
    beams: int,
    new: int,
    stop: tuple[int, ...],
    pad: int,
    length_penalty: float,
    early_stopping: bool | str,
) -> Texts:
    """Return the K best texts after each prompt.

    Where logits were not numbers, the scores of that prompt's texts are NaN.

    Args:
      logits: After the prompts.
      cache: After the prompts, with one row for each.
      step: Runs one token for each of batch * k rows.
      axes: For each leaf of the cache the axis of its rows, or -1 if it has none.
      beams: K.
      new: Largest number of new tokens.
      stop: Tokens that end a text.
      pad: The token that fills a row behind the end of its text.
      length_penalty: The exponent; above 0 favours long texts.
      early_stopping: When to stop before all texts are `new` tokens long. True: once K texts have ended. False: once the best open text, at
        its present length, does not score higher than the worst of K ended texts. "never": the same with the length at which the open text
        would score highest, so that the search stops only when no result can change.
    """
    batch = len(logits)
    options = _Options(beams, new, stop, length_penalty, early_stopping)
    none = Texts(
        jnp.full((batch, beams, new), pad, jnp.int32),
        jnp.full((batch, beams), NEVER, jnp.float32),
        jnp.zeros((batch, beams), bool),
        jnp.zeros((batch, beams), jnp.int32),
    )
    # All K open texts are equal at first, so only the first one may be continued in the first step.
    first = none._replace(scores=jnp.where(jnp.arange(beams) == 0, 0.0, NEVER)[None] + jnp.zeros((batch, 1)))
    yes, last = jnp.ones(batch, bool), jnp.zeros(batch * beams, jnp.int32)
    start = _State(jnp.zeros((), jnp.int32), first, none, yes, yes, last, None, jnp.array(True))
    repeat = lambda leaf, axis: leaf if axis < 0 else jnp.repeat(leaf, beams, axis=axis)
    state = _extend(start, jnp.repeat(logits, beams, 0), jax.tree.map(repeat, cache, axes), axes, options)
    body = lambda state: _extend(state, *step(state.cache, state.last), axes, options)
    end = jax.lax.while_loop(lambda state: state.running, body, state)
    return end.ended._replace(scores=jnp.where(end.finite[:, None], end.ended.scores, jnp.nan))


def _extend(state: _State, logits: Float[Array, "rows vocab"], cache: Any, axes: Any, options: _Options) -> _State:
    """Return the state after one more token: K open texts, and the K best ended texts."""
    beams, new = options.beams, options.new
    batch, vocab = len(state.open.scores), logits.shape[-1]
    # At least K of so many candidates have not ended: a text can end with each of the stop tokens.
    count = min(max(2, 1 + len(options.stop)) * beams, beams * vocab)
    log_p = jax.nn.log_softmax(logits).reshape(batch, beams, vocab) + state.open.scores[:, :, None]
    # What a text that takes no more part is continued by does not matter.
    finite = state.finite & (~jnp.isnan(log_p).any((1, 2)) | ~state.can_improve)
    scores, index = jax.lax.top_k(log_p.reshape(batch, -1), count)  # [batch, count]
    parents, words = index // vocab, (index % vocab).astype(jnp.int32)
    tokens = _gather(state.open.tokens, parents).at[:, :, state.step].set(words)
    length = state.step + 1
    ends = jnp.isin(words, jnp.array(options.stop, jnp.int32)) | (length == new)
    candidates = Texts(tokens, scores, ends, jnp.full(ends.shape, length))

    still_open, chosen = candidates._replace(scores=scores + NEVER * ends).take_best(beams)
    rows = (_gather(parents, chosen) + beams * jnp.arange(batch)[:, None]).reshape(-1)  # the row of the cache that each text continues
    cache = jax.tree.map(lambda leaf, axis: leaf if axis < 0 else jnp.take(leaf, rows, axis=axis), cache, axes)

    ended = _add_ended(state, candidates, length, options)
    best_length = new if options.early_stopping == "never" and options.length_penalty > 0 else length
    best_score = still_open.scores[:, 0] / jnp.asarray(best_length, jnp.float32) ** options.length_penalty
    can_improve = state.can_improve & (best_score > jnp.where(ended.ended, ended.scores.min(1, keepdims=True), NEVER).min(1))
    complete = ended.ended.all() & (options.early_stopping is True)
    last = _gather(words, chosen).reshape(-1)
    return _State(length, still_open, ended, can_improve, finite, last, cache, can_improve.any() & ~complete & (length < new))


def _add_ended(state: _State, candidates: Texts, length: Array, options: _Options) -> Texts:
    """Return the K best ended texts: those so far, and the candidates that end and are among the K best of this step."""
    ends = candidates.ended & (jnp.arange(candidates.ended.shape[1]) < options.beams)[None]
    # A prompt whose search is over takes no more texts, though other prompts of the batch continue.
    closed = state.ended.ended.all(1) & (options.early_stopping is True) | ~state.can_improve
    scores = candidates.scores / length.astype(jnp.float32) ** options.length_penalty
    scores = scores + NEVER * (~ends + closed[:, None].astype(jnp.float32))
    pool = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), state.ended, candidates._replace(scores=scores, ended=ends))
    return pool.take_best(options.beams)[0]


def _gather(leaf: Array, index: Int[Array, "batch _"]) -> Array:
    """Return the entries at `index` of axis 1, row by row of the batch."""
    return jnp.take_along_axis(leaf, index.reshape(*index.shape, *[1] * (leaf.ndim - 2)), axis=1)

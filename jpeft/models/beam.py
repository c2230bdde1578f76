"""Beam search over a cache of keys and values.

At each step the K open texts of a prompt grow by every word of the vocabulary, and the K best of the results that have not ended stay
open. Of those that have ended, the K with the highest ``log p(text) / length^length_penalty`` are kept, if they were among the K best of
their step; the length counts new tokens, the stop token among them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Log-likelihood of what must not be chosen: beyond any text's, and finite, so that sums and comparisons stay as they are.
NEVER = -1e9

Step = Callable[[Any, Int[Array, " rows"]], tuple[Float[Array, "rows vocab"], Any]]  # cache and tokens to logits and cache


class Texts(NamedTuple):
    """K texts for each prompt, the best one first."""

    tokens: Int[Array, "batch k new"]
    scores: Float[Array, "batch k"]
    ended: Bool[Array, "batch k"]
    lengths: Int[Array, "batch k"]

    def take(self, index: Int[Array, "batch _"]) -> "Texts":
        """Those at these places."""
        return jax.tree.map(lambda leaf: _gather(leaf, index), self)

    def best(self, k: int) -> tuple["Texts", Int[Array, "batch _"]]:
        """The k of the highest score, and where they were."""
        index = jax.lax.top_k(self.scores, k)[1]
        return self.take(index), index


class _State(NamedTuple):
    step: Array  # int32 []: tokens so far
    open: Texts  # scores are log p(text)
    ended: Texts  # scores are those of the length penalty
    hopeful: Array  # bool [batch]: whether an open text may still become better than one that has ended
    last: Array  # int32 [batch * k]: the newest token of the open texts
    cache: Any
    going: Array  # bool []


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
    """The K best texts after each prompt.

    Args:
      logits: After the prompts.
      cache: After the prompts, one row each.
      step: Runs one token for each of batch * k rows.
      axes: For each leaf of the cache the axis of its rows, or -1 if it has none.
      beams: K.
      new: Longest text.
      stop: Tokens that end one.
      pad: What follows the end.
      length_penalty: The exponent; above 0 favours long texts.
      early_stopping: When to stop before all texts are `new` tokens long. True: once K have ended. False: once the best open text, at its
        present length, does not score higher than the worst of K that have ended. "never": likewise with the length at which it would
        score highest, which stops only when nothing can change any more.
    """
    batch, vocab = logits.shape
    candidates = min(max(2, 1 + len(stop)) * beams, beams * vocab)  # so many that K of them have not ended

    def grow(state: _State, logits: Float[Array, "rows vocab"], cache: Any) -> _State:
        log_p = jax.nn.log_softmax(logits).reshape(batch, beams, vocab) + state.open.scores[:, :, None]
        scores, place = jax.lax.top_k(log_p.reshape(batch, -1), candidates)
        parents, words = place // vocab, (place % vocab).astype(jnp.int32)
        tokens = _gather(state.open.tokens, parents).at[:, :, state.step].set(words)
        length = state.step + 1
        ends = jnp.isin(words, jnp.array(stop, jnp.int32)) | (length == new)
        grown = Texts(tokens, scores, ends, jnp.full(ends.shape, length))

        still_open, chosen = grown._replace(scores=scores + NEVER * ends).best(beams)
        rows = (_gather(parents, chosen) + beams * jnp.arange(batch)[:, None]).reshape(-1)
        cache = jax.tree.map(lambda leaf, axis: leaf if axis < 0 else jnp.take(leaf, rows, axis=axis), cache, axes)

        ends &= (jnp.arange(candidates) < beams)[None]
        closed = state.ended.ended.all(1) & (early_stopping is True) | ~state.hopeful
        value = scores / length.astype(jnp.float32) ** length_penalty + NEVER * (~ends + closed[:, None].astype(jnp.float32))
        pool = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), state.ended, grown._replace(scores=value, ended=ends))
        ended, _ = pool.best(beams)

        reach = new if early_stopping == "never" and length_penalty > 0 else length
        hope = still_open.scores[:, 0] / jnp.asarray(reach, jnp.float32) ** length_penalty
        hopeful = state.hopeful & (hope > jnp.where(ended.ended, ended.scores.min(1, keepdims=True), NEVER).min(1))
        full = ended.ended.all() & (early_stopping is True)
        last = _gather(words, chosen).reshape(-1)
        return _State(length, still_open, ended, hopeful, last, cache, hopeful.any() & ~full & (length < new))

    none = Texts(
        jnp.full((batch, beams, new), pad, jnp.int32),
        jnp.full((batch, beams), NEVER, jnp.float32),
        jnp.zeros((batch, beams), bool),
        jnp.zeros((batch, beams), jnp.int32),
    )
    # All K begin alike, so only the first may grow at the first step.
    begun = none._replace(scores=jnp.where(jnp.arange(beams) == 0, 0.0, NEVER)[None] + jnp.zeros((batch, 1)))
    start = _State(jnp.zeros((), jnp.int32), begun, none, jnp.ones(batch, bool), jnp.zeros(batch * beams, jnp.int32), None, jnp.array(True))
    repeat = lambda leaf, axis: leaf if axis < 0 else jnp.repeat(leaf, beams, axis=axis)
    state = grow(start, jnp.repeat(logits, beams, 0), jax.tree.map(repeat, cache, axes))
    state = jax.lax.while_loop(lambda state: state.going, lambda state: grow(state, *step(state.cache, state.last)), state)
    return state.ended


def _gather(leaf: Array, index: Int[Array, "batch _"]) -> Array:
    return jnp.take_along_axis(leaf, index.reshape(*index.shape, *[1] * (leaf.ndim - 2)), axis=1)

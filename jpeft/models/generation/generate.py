"""Text from a decoder with a cache of keys and values: greedy, sampled or by beam search, as one compiled program.

The program runs the prompts once, which makes the cache (the prefill), and then one token at a time in a `lax.while_loop` until every row
has met a stop token. `generate` is given the forward function, plain or wrapped, and the variables. It does not depend on models or
methods.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jpeft.core.index import repeated
from jpeft.models.common.attention import Ids, Mask
from jpeft.models.generation import beam
from jpeft.models.generation.decoding import Decoding
from jpeft.models.generation.sampling import filter_logits


class Generated(NamedTuple):
    """What `generate` returns."""

    tokens: Array  # int32 [batch, max_new_tokens]: the new tokens, with the stop token if there is one, then padding
    lengths: Array  # int32 [batch]: number of new tokens without padding
    scores: Array  # float32 [batch]: sum of log p(token) before temperature; for a beam search divided by the length penalty


def generate(
    forward: Callable[..., Any],
    variables: Mapping[str, Any],
    input_ids: Ids,
    attention_mask: Mask | None = None,
    *,
    max_new_tokens: int,
    stop: int | Sequence[int] | None = None,
    pad: int = 0,
    key: jax.Array | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
) -> Generated:
    r"""Continue a batch of prompts: with the most likely token each time, with random tokens (`key`), or with the likeliest text (`beams`).

    A random token is drawn from ``softmax(z / temperature)``. `top_k` keeps the k most likely words; `top_p` then keeps the fewest words
    whose probabilities sum to at least p. Hugging Face has the same order. A beam search keeps `beams` open texts for each prompt, and
    returns the ended text with the highest ``log p(text) / length^length_penalty``.

    Args:
      forward: ``model.apply`` of a language model of `jpeft.models`, or ``jpeft.wrap(model.apply, peft.method)``. It is called as
        ``forward(variables, ids, mask, cache_length=..., logits_at=..., mutable=["cache"])``, then with the cache among the variables as
        ``forward(variables, ids, mutable=["cache"])``. Reuse one such function: each new function is compiled anew.
      variables: ``{"params": params}`` or ``peft.variables``.
      input_ids: The prompts [batch, length], each with at least one token.
      attention_mask: 1 for tokens, 0 for padding, which may be on either side; None if all are tokens.
      max_new_tokens: Largest number of new tokens. It is part of the program's shape, as is the length of the prompts: a new value
        compiles anew.
      stop: The ids that end a text, such as ``config.eos_token_id``; None for none.
      pad: The id that fills a row behind the end of its text.
      key: Draw tokens at random, with this key.
      temperature: Above 1 the distribution is flatter, below 1 sharper; None for 1. It may change without a new
        compilation, as may `top_p`.
      top_k: Draw among that many words.
      top_p: Draw among the most likely words that together have this probability.
      beams: Number of open texts of a beam search; 1 for none. Time and cache grow with the number, as for that many prompts.
      length_penalty: Exponent of the length; above 0 favours long texts, 0 ranks by log-likelihood.
      early_stopping: When a beam search stops before max_new_tokens. True: once as many texts as `beams` have ended. False: once the best
        open text, at its present length, scores no higher than the worst of those. "never": once no open text can score higher at any
        length.

    Returns:
      A `Generated`: ``tokens``, ``lengths``, ``scores``.

    Raises:
      ValueError: for an option outside its range, an option of sampling without a `key`, or an option of beam search without `beams`. The
        model raises one if prompt and continuation do not fit into its position table. Also for logits that are not finite; inside of
        your own `jit` the score of such a row is NaN instead.

    The cache takes ``2 · layers · rows · (length + max_new_tokens - 1 + virtual tokens) · kv_heads · head_dim`` numbers of the
    computation's dtype, with ``batch · beams`` rows. A beam search copies the cache at each step.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> from jpeft.models import GPT2Config, GPT2LMHeadModel, generate
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    >>> ids = jnp.array([[3, 5, 2, 7]])
    >>> peft = jpeft.apply(model.init(jax.random.key(0), ids)["params"], method="lora", rank=1)
    >>> forward = jpeft.wrap(model.apply, peft.method)
    >>> generate(forward, peft.variables, ids, max_new_tokens=5).tokens.shape
    (1, 5)

    Differs from Hugging Face: only new tokens are returned, prompts may also be padded on the right, and the defaults are greedy whatever
    a checkpoint's generation_config.json says.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "beams": beams, "length_penalty": length_penalty}
    decoding = Decoding(max_new_tokens, stop, pad, key, early_stopping=early_stopping, **options)
    generated = continue_prompts(forward, variables, input_ids, attention_mask, decoding)
    if not isinstance(generated.scores, Tracer) and (bad := np.flatnonzero(~np.isfinite(np.asarray(generated.scores)))).size:
        raise ValueError(
            f"The model's outputs for prompt {bad[0] + 1} are not finite numbers: the prompt holds a token that the model has no embedding "
            "for, or the weights are not finite, or the computation overflows."
        )
    return generated


def continue_prompts(
    forward: Callable[..., Any], variables: Mapping[str, Any], input_ids: Ids, attention_mask: Mask | None, decoding: Decoding
) -> Generated:
    """Do what `generate` does without waiting for the result: where the logits were not finite, the score of the row is NaN."""
    decoding.check()
    input_ids = jnp.asarray(input_ids, jnp.int32)
    # Without padding the first pass is left to the device's kernel as it stands (`jpeft.models.common.attention_kernels`).
    mask = None if attention_mask is None else jnp.asarray(attention_mask) != 0
    static: dict[str, Any] = {"new": decoding.max_new_tokens, "stop": decoding.stop_ids, "pad": int(decoding.pad)}
    if decoding.beams > 1:
        length_penalty = float(decoding.length_penalty)
        search = {"beams": decoding.beams, "length_penalty": length_penalty, "early_stopping": decoding.early_stopping}
        return _search(forward, dict(variables), input_ids, mask, **static, **search)
    drawn = (decoding.key, decoding.temperature, decoding.top_p)
    return _sample(forward, dict(variables), input_ids, mask, *drawn, **static, top_k=decoding.top_k)


# --- the program ---


def _prefill(forward: Any, variables: Any, ids: Ids, mask: Mask | None, new: int) -> tuple[Float[Array, "batch vocab"], Any]:
    """Return the logits after each prompt, and a cache with room for all new tokens but the last, which no token attends to."""
    length = ids.shape[1]
    # [batch]: index of the last token of each prompt
    last = jnp.full(len(ids), length - 1) if mask is None else length - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    logits, cache = forward(variables, ids, mask, cache_length=length + new - 1, logits_at=last, mutable=["cache"])
    return logits[:, 0], cache


def _step(forward: Any, variables: Any, cache: Any, tokens: Int[Array, " batch"]) -> tuple[Float[Array, "batch vocab"], Any]:
    """Return the logits after one more token of each row, and the longer cache."""
    logits, cache = forward({**variables, **cache}, tokens[:, None], mutable=["cache"])
    return logits[:, -1], cache


def _for_rows(forward: Any, variables: Any, count: int) -> dict[str, Any]:
    """Return the variables for `count` rows of each prompt, if a method keeps an index of them."""
    return repeated(variables, getattr(forward, "method", None), count)


class _State(NamedTuple):
    """The state of the loop over tokens."""

    step: Array  # int32 []: number of tokens so far
    tokens: Array  # int32 [batch, new]
    last: Array  # int32 [batch]: the newest token of each row
    ended: Array  # bool [batch]
    lengths: Array  # int32 [batch]
    scores: Array  # float32 [batch]
    cache: Any


@functools.partial(jax.jit, static_argnames=("forward", "new", "stop", "pad", "top_k"))
def _sample(
    forward: Any,
    variables: Any,
    ids: Ids,
    mask: Mask | None,
    key: Any,
    temperature: Any,
    top_p: Any,
    *,
    new: int,
    stop: tuple[int, ...],
    pad: int,
    top_k: int | None,
) -> Generated:
    """Run the prefill and the loop over tokens."""

    def draw(logits: Float[Array, "batch vocab"], step: Any) -> Int[Array, " batch"]:
        if key is None:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        filtered = filter_logits(logits, temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, step), filtered).astype(jnp.int32)

    def add(state: _State, logits: Float[Array, "batch vocab"], cache: Any) -> _State:
        token = jnp.where(state.ended, pad, draw(logits, state.step))
        score = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], -1)[:, 0]
        return _State(
            step=state.step + 1,
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, 1),
            last=token,
            ended=state.ended | jnp.isin(token, jnp.array(stop, jnp.int32)),
            lengths=state.lengths + ~state.ended,
            scores=state.scores + jnp.where(state.ended, 0, score),
            cache=cache,
        )

    def body(state: _State) -> _State:
        return add(state, *_step(forward, variables, state.cache, state.last))

    rows = len(ids)
    empty = _State(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((rows, new), pad, jnp.int32),
        last=jnp.zeros(rows, jnp.int32),
        ended=jnp.zeros(rows, bool),
        lengths=jnp.zeros(rows, jnp.int32),
        scores=jnp.zeros(rows),
        cache=None,
    )
    state = add(empty, *_prefill(forward, variables, ids, mask, new))
    state = jax.lax.while_loop(lambda state: (state.step < new) & ~state.ended.all(), body, state)
    return Generated(state.tokens, state.lengths, state.scores)


@functools.partial(jax.jit, static_argnames=("forward", "new", "stop", "pad", "beams", "length_penalty", "early_stopping"))
def _search(forward: Any, variables: Any, ids: Ids, mask: Mask | None, *, new: int, **options: Any) -> Generated:
    """Run the prefill and a beam search over its cache."""
    # The axis of the rows differs among the leaves of the cache and under `nn.scan`: it is the one that grows with the batch.
    shapes = [
        jax.eval_shape(
            lambda ids, mask, n=n: _prefill(forward, _for_rows(forward, variables, n), ids, mask, new)[1],
            *(None if x is None else jnp.repeat(x, n, 0) for x in (ids, mask)),
        )
        for n in (1, 2)
    ]
    axes = jax.tree.map(lambda one, two: next((i for i, size in enumerate(one.shape) if size != two.shape[i]), -1), *shapes)
    step = functools.partial(_step, forward, _for_rows(forward, variables, options["beams"]))
    texts = beam.search(*_prefill(forward, variables, ids, mask, new), step, axes, new=new, **options)
    return Generated(texts.tokens[:, 0], texts.lengths[:, 0], texts.scores[:, 0])

"""Text from a decoder: greedy, sampled or by beam search, with a cache of keys and values, as one compiled program.

The program is one prefill, which runs the prompts and makes the cache, and one `lax.while_loop`, which runs a token at a time until every
row has met a stop token. It knows nothing of methods: it is given the forward function, plain or wrapped, and the variables.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jpeft.models import beam
from jpeft.models.decoder import Ids, Mask


class Generated(NamedTuple):
    """What `generate` returns."""

    tokens: Array  # int32 [batch, max_new_tokens]: the new tokens alone, with the stop token where there was one, then padding
    lengths: Array  # int32 [batch]: how many of them are no padding
    scores: Array  # float32 [batch]: sum of log p(token) under the model, whatever the temperature; of beam search divided by its penalty


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
    r"""Continue a batch of prompts: the most likely token each time, with a `key` a random one, with `beams` the most likely text.

    A random token is drawn from ``softmax(z / temperature)``, of which `top_k` keeps the k most likely words and `top_p` then the fewest
    whose probabilities reach p together, renormalised: Hugging Face's order. Beam search keeps `beams` open texts for each prompt, and
    returns that of the highest ``log p(text) / length^length_penalty`` among those that have ended.

    Args:
      forward: ``model.apply`` of a language model of `jpeft.models`, or ``jpeft.wrap(model.apply, peft.method)``. It is called as
        ``forward(variables, ids, mask, cache_length=..., logits_at=..., mutable=["cache"])``, then with the cache among the variables as
        ``forward(variables, ids, mutable=["cache"])``. Keep one such function: another is another program to compile.
      variables: ``{"params": params}`` or ``peft.variables``.
      input_ids: The prompts [batch, length], each with at least one token.
      attention_mask: 1 for tokens, 0 for padding, which may be on either side; all tokens if None.
      max_new_tokens: How many tokens to add at most. Part of the program's shape, like the prompts': another length compiles anew.
      stop: The ids that end a text, such as ``config.eos_token_id``; None for none.
      pad: The id that follows the end.
      key: Draw tokens at random, with this key.
      temperature: Above 1 flatter, below 1 sharper; 1 if None. May change without a new compilation, like `top_p`.
      top_k: Draw among that many.
      top_p: Draw among the most likely that make up this probability.
      beams: Number of open texts of beam search; 1 for none. It costs as much time and cache as that many prompts each.
      length_penalty: Its exponent; above 0 favours long texts, 0 is plain log-likelihood.
      early_stopping: When it stops before max_new_tokens. True: once as many texts as `beams` have ended. False: once the best open text,
        at its present length, scores no higher than the worst of these. "never": once no open text can, whatever its length becomes.

    Returns:
      A `Generated`: ``tokens``, ``lengths``, ``scores``.

    Raises:
      ValueError: for an option outside its range, one of sampling without a `key`, or one of beam search without `beams`; from the
        model, if prompt and continuation do not fit into its position table.

    The cache takes ``2 · layers · rows · (length + max_new_tokens - 1 + virtual tokens) · kv_heads · head_dim`` numbers of the
    computation's dtype, with ``batch · beams`` rows; a beam search copies it once more at each step.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> from jpeft.models import GPT2Config, GPT2LMHeadModel, generate
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    >>> ids = jnp.array([[3, 5, 2, 7]])
    >>> peft = jpeft.apply(model.init(jax.random.key(0), ids)["params"], method="lora", rank=1)
    >>> forward = jpeft.wrap(model.apply, peft.method)
    >>> generate(forward, peft.variables, ids, max_new_tokens=5).tokens.shape
    (1, 5)

    Differs from Hugging Face: only new tokens are returned, the prompt may be padded on the right as well, and the defaults are greedy
    whatever a checkpoint's generation_config.json says.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if beams < 1 or (beams == 1 and (length_penalty != 1.0 or early_stopping is not False)):
        raise ValueError(
            f"beams={beams}, length_penalty={length_penalty}, early_stopping={early_stopping!r}: beams must be at least 1, and the others "
            "are without effect unless it is more."
        )
    if beams > 1 and key is not None:
        raise ValueError(f"beams={beams} looks for the most likely text and key= asks for random ones; give one of them.")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping={early_stopping!r} is not one of True, False, 'never'.")
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    if key is None and any(value is not None for value in given.values()):
        names = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise ValueError(f"{names} without a key= is without effect: greedy text is the most likely word each time. Pass key=.")
    _check_sampling(temperature, top_k, top_p)
    input_ids = jnp.asarray(input_ids, jnp.int32)
    mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
    ends = () if stop is None else tuple(int(token) for token in np.atleast_1d(stop))
    static: dict[str, Any] = {"new": max_new_tokens, "stop": ends, "pad": pad}
    if beams > 1:
        penalty = float(length_penalty)
        search = {"beams": beams, "length_penalty": penalty, "early_stopping": early_stopping}
        return _search(forward, dict(variables), input_ids, mask, **static, **search)
    return _sample(forward, dict(variables), input_ids, mask, key, temperature, top_p, **static, top_k=top_k)


def _check_sampling(temperature: Any, top_k: int | None, top_p: Any) -> None:
    """Those of the options that are numbers, not traced, are in their range."""
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; for the most likely word each time leave key= out.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1.")
    if isinstance(top_p, (int, float)) and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is not in (0, 1].")


def warp(
    logits: Float[Array, "batch vocab"],
    temperature: float | Array | None = None,
    top_k: int | None = None,
    top_p: float | Array | None = None,
) -> Float[Array, "batch vocab"]:
    """Logits to sample from: divided by the temperature, -inf at the words that `top_k` and then `top_p` leave out.

    Words as likely as the last one kept are kept too.

    >>> warp(jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]])), top_p=0.6)[0, 1:] > -jnp.inf
    Array([ True, False, False], dtype=bool)
    """
    if temperature is not None:
        logits = logits / temperature
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = -jnp.sort(-logits, axis=-1)
        shares = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares  # of the words above each one
        least = jnp.where((before < top_p).at[:, 0].set(True), ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


# --- the program ---


def _prefill(forward: Any, variables: Any, ids: Ids, mask: Mask, new: int) -> tuple[Float[Array, "batch vocab"], Any]:
    """Logits after each prompt, and the cache, with room for all new tokens but the last."""
    last = ids.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    logits, cache = forward(variables, ids, mask, cache_length=ids.shape[1] + new - 1, logits_at=last, mutable=["cache"])
    return logits[:, 0], cache


def _step(forward: Any, variables: Any, cache: Any, tokens: Int[Array, " batch"]) -> tuple[Float[Array, "batch vocab"], Any]:
    """Logits after one more token of each row."""
    logits, cache = forward({**variables, **cache}, tokens[:, None], mutable=["cache"])
    return logits[:, -1], cache


class _State(NamedTuple):
    step: Array  # int32 []: tokens so far
    tokens: Array  # int32 [batch, new]
    last: Array  # int32 [batch]: the newest of each row
    ended: Array  # bool [batch]
    lengths: Array
    scores: Array
    cache: Any


@functools.partial(jax.jit, static_argnames=("forward", "new", "stop", "pad", "top_k"))
def _sample(
    forward: Any,
    variables: Any,
    ids: Ids,
    mask: Mask,
    key: Any,
    temperature: Any,
    top_p: Any,
    *,
    new: int,
    stop: tuple[int, ...],
    pad: int,
    top_k: int | None,
) -> Generated:
    def draw(logits: Float[Array, "batch vocab"], step: Any) -> Int[Array, " batch"]:
        if key is None:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        warped = warp(logits, temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, step), warped).astype(jnp.int32)

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
def _search(forward: Any, variables: Any, ids: Ids, mask: Mask, *, new: int, **options: Any) -> Generated:
    # The axis of the rows in each leaf of the cache, which differs under `nn.scan`, is the one that grows with the batch.
    shapes = [
        jax.eval_shape(lambda ids, mask: _prefill(forward, variables, ids, mask, new)[1], *(jnp.repeat(x, n, 0) for x in (ids, mask)))
        for n in (1, 2)
    ]
    axes = jax.tree.map(lambda one, two: next((i for i, n in enumerate(one.shape) if n != two.shape[i]), -1), *shapes)
    step = functools.partial(_step, forward, variables)
    texts = beam.search(*_prefill(forward, variables, ids, mask, new), step, axes, new=new, **options)
    return Generated(texts.tokens[:, 0], texts.lengths[:, 0], texts.scores[:, 0])

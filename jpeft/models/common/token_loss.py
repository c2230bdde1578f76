"""The loss of each token of a language model, without the logits of all tokens at once.

The last layer, which scores every word of the vocabulary, is run on a chunk of tokens at a time. The gradient goes one of two ways:

* Where nothing that the last layer reads is trained, each chunk makes the gradient of its hidden states in the forward pass, where its
  logits are at hand: (softmax - one-hot) times the frozen layer. It is kept in place of logits, so the whole costs twice the layer's
  forward pass.
* Where something is trained (a head, a tied embedding, an adapter around it), the backward pass runs each chunk again.

Chunks are cut along the length, so a batch that is split over a mesh stays as it is, and the label's logit is a sum over the vocabulary, so
a vocabulary that is split stays so too.

The rule for labels is that of `jpeft.models.common.lookup`: one that is no word and not `IGNORE` gives NaN, and an error where it is known.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from jpeft.models.common.traced_method import TracedMethod, trace_method

IGNORE = -100  # label of a token that is not predicted
CHUNK = 1024  # tokens of a chunk, at most
SMALL = 2**20  # logits of a chunk, at least, so that a small batch makes a small program
# Chunks of a batch, if they are not too large. So many are written out one by one, because XLA counts the cost of a loop's body once.
PIECES = 16


class TokenLoss(NamedTuple):
    """What a language model returns when it is given labels.

    Attributes:
      loss: Cross entropy of each label, float32; 0 where the label is `IGNORE`.
      correct: Whether the label has the highest score; False where the label is `IGNORE`.
    """

    loss: Float[Array, "batch length"]
    correct: Bool[Array, "batch length"]


class _Kept(NamedTuple):
    """Residuals where nothing in the head is trained: the gradient of each token's loss."""

    grad: Float[Array, "batch length width"]


class _Again(NamedTuple):
    """Residuals where something is: all that the head is run again on. What is trained is apart, by its index among `reads`."""

    trained: dict[int, Array]
    fixed: dict[int, Array]
    hidden: Float[Array, "batch length width"]
    labels: Int[Array, "batch length"]
    key: Array | None


def token_loss(
    model: nn.Module,
    method: str,
    hidden: Float[Array, "batch length width"],
    labels: Shaped[Array | np.ndarray, "..."],
    vocabulary: int,
    smoothing: float = 0.0,
) -> TokenLoss:
    """Return the loss of each token, and whether it is predicted rightly.

    Args:
      model: A bound module.
      method: Name of its method that returns the float32 logits of hidden states, each token by itself.
      hidden: Last hidden states.
      labels: The token that each position predicts; `IGNORE` where nothing is.
      vocabulary: Number of logits of a token.
      smoothing: Label smoothing, as in `jpeft.tasks.cross_entropy`.

    Raises:
      ValueError: for labels of another shape, and for a label that is no word, if the labels are not traced by `jit`.
    """
    _check(labels, hidden.shape[:2], vocabulary)
    if model.is_initializing():
        getattr(model, method)(hidden[:, :0])  # makes the parameters
    batch, length, width = hidden.shape
    size = _chunk_size(batch, length, vocabulary)
    head = trace_method(model, method, jax.ShapeDtypeStruct((batch, size, width), hidden.dtype))
    return _custom(head, size, smoothing)(head.reads, hidden, jnp.asarray(labels), head.key)


def _check(labels: Any, shape: tuple[int, ...], vocabulary: int) -> None:
    if jnp.shape(labels) != shape:
        raise ValueError(
            f"The labels have the shape {jnp.shape(labels)}, but the ids {shape}: labels[:, t] is the token that position t predicts, and "
            f"{IGNORE} where nothing is predicted."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"The labels are {labels.dtype}, but must be whole numbers: token ids, and {IGNORE} where nothing is predicted.")
    if isinstance(labels, Tracer):
        return
    known = np.asarray(labels)
    wrong = known[(known != IGNORE) & ((known < 0) | (known >= vocabulary))]
    if wrong.size:
        raise ValueError(
            f"labels holds {wrong[0]}, and the model scores {vocabulary} words, 0 to {vocabulary - 1}. A token that is not predicted has "
            f"the label {IGNORE}."
        )


def _chunk_size(batch: int, length: int, vocabulary: int) -> int:
    """Return the positions of a chunk; a row has at least two chunks.

    >>> _chunk_size(8, 1024, 128256), _chunk_size(4, 512, 65536), _chunk_size(1, 32768, 128256), _chunk_size(4, 16, 100)
    (64, 32, 1024, 8)
    """
    pieces = min(max(batch * length * vocabulary // SMALL, 2), PIECES)
    return max(1, min(CHUNK // max(batch, 1), -(-length // pieces)))


def _custom(head: TracedMethod, size: int, smoothing: float) -> Callable[..., TokenLoss]:
    """Return ``(reads, hidden, labels, key) -> TokenLoss`` with the derivative of this file."""
    run, count = head.run, len(head.reads)

    @jax.custom_vjp
    def losses(reads: tuple[Array, ...], hidden: Array, labels: Array, key: Array | None) -> TokenLoss:
        each = lambda carry, key, hidden, labels: (carry, _score(run(reads, hidden, key), labels, smoothing)[0])
        return _over_chunks(each, (), size, key, hidden, labels)[1]

    def forward(*arguments: Any) -> tuple[TokenLoss, _Kept | _Again]:
        # Each leaf comes with its value and whether something is differentiated by it.
        reads, hidden, labels, key = jax.tree.map(lambda leaf: leaf.value, arguments, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
        trained = [bool(leaf.perturbed) for leaf in arguments[0]]
        if any(trained):
            apart = {wanted: {i: leaf for i, leaf in enumerate(reads) if trained[i] is wanted} for wanted in (True, False)}
            return losses(reads, hidden, labels, key), _Again(apart[True], apart[False], hidden, labels, key)

        def each(carry: tuple[()], key: Array | None, hidden: Array, labels: Array) -> tuple[tuple[()], tuple[TokenLoss, Array]]:
            logits, pull = jax.vjp(lambda hidden: run(reads, hidden, key), hidden)
            out, slope = _score(logits, labels, smoothing)
            (grad,) = pull(slope())
            return carry, (out, jnp.where((labels != IGNORE)[..., None], grad, 0))

        _, (out, grad) = _over_chunks(each, (), size, key, hidden, labels)
        return out, _Kept(grad)

    def backward(kept: _Kept | _Again, cotangent: TokenLoss) -> tuple[Any, ...]:
        given, grads = cotangent.loss, {}
        if isinstance(given, jax.custom_derivatives.SymbolicZero):
            grad = None
        elif isinstance(kept, _Kept):
            grad = (kept.grad.astype(jnp.float32) * given[..., None]).astype(kept.grad.dtype)
        else:
            grads, grad = _run_again(run, kept, given, size, smoothing)
        return tuple(grads.get(i) for i in range(count)), grad, None, None

    losses.defvjp(forward, backward, symbolic_zeros=True)
    return losses


def _run_again(
    run: Callable[..., Array], kept: _Again, cotangent: Float[Array, "batch length"], size: int, smoothing: float
) -> tuple[dict[int, Array], Float[Array, "batch length width"]]:
    """Return the gradients of what is trained, by its index, and of the hidden states."""

    def each(total: dict[int, Array], key: Array | None, hidden: Array, labels: Array, cotangent: Array) -> tuple[dict[int, Array], Array]:
        def logits_of(trained: dict[int, Array], hidden: Array) -> Array:
            both = kept.fixed | trained
            return run(tuple(both[i] for i in range(len(both))), hidden, key)

        logits, pull = jax.vjp(logits_of, kept.trained, hidden)
        slope = _score(logits, labels, smoothing)[1]()
        grads, grad = pull(jnp.where((labels != IGNORE)[..., None], slope * cotangent[..., None], 0))
        return jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), total, grads), grad

    # Summed over chunks in float32, whatever is trained.
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), kept.trained)
    total, grad = _over_chunks(each, zero, size, kept.key, kept.hidden, kept.labels, cotangent)
    return jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), total, kept.trained), grad


def _score(
    logits: Float[Array, "batch chunk vocab"], labels: Int[Array, "batch chunk"], smoothing: float
) -> tuple[TokenLoss, Callable[[], Float[Array, "batch chunk vocab"]]]:
    """Return loss and hits of a chunk, and a function that gives the derivative of each token's loss by its logits, seen or not."""
    seen, size = labels != IGNORE, logits.shape[-1]
    hot = jnp.arange(size)[None, None] == labels[..., None]
    total = jax.nn.logsumexp(logits, -1)
    # A label that is no word has no logit. Its loss must not look like one.
    at_label = jnp.where((labels >= 0) & (labels < size), jnp.sum(jnp.where(hot, logits, 0), -1), jnp.nan)
    loss = total - at_label
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (total - logits.mean(-1))

    def slope() -> Array:
        # softmax - expected: 1 - smoothing at the label, and smoothing / size everywhere. `expm1` is exact where the model is sure.
        others = jnp.exp(logits - total[..., None])
        if not smoothing:
            return jnp.where(hot, jnp.expm1(at_label - total)[..., None], others)
        return others - jnp.where(hot, 1 - smoothing, 0) - smoothing / size

    return TokenLoss(jnp.where(seen, loss, 0), seen & (jnp.argmax(logits, -1) == labels)), slope


def _over_chunks(
    each: Callable[..., tuple[PyTree, PyTree]], carry: PyTree, size: int, key: Array | None, *arrays: Array
) -> tuple[PyTree, PyTree]:
    """Run ``each(carry, key, *chunks) -> (carry, outputs)`` over chunks of arrays [batch, length, ...], and join the outputs.

    Each chunk has a dropout key of its own.

    Args:
      each: Takes chunks of the same arrays.
      carry: What is carried from chunk to chunk.
      size: Positions of a chunk.
      key: For dropout.
      *arrays: The hidden states, the labels, and others.
    """
    length = arrays[0].shape[1]
    count = -(-length // size)
    # The last chunk is filled up, with tokens that predict nothing.
    fill = lambda x, value: jnp.pad(x, [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)], constant_values=value)
    if count * size > length:
        arrays = tuple(fill(x, IGNORE if index == 1 else 0) for index, x in enumerate(arrays))
    chunk_key = lambda index: None if key is None else jax.random.fold_in(key, index)
    if count <= PIECES:
        parts: list[PyTree] = []
        for index in range(count):
            hidden, *others = [x[:, index * size : (index + 1) * size] for x in arrays]
            hidden = _after(hidden, carry, parts[-1]) if parts else hidden
            carry, outputs = each(carry, chunk_key(index), hidden, *others)
            parts.append(outputs)
        return carry, jax.tree.map(lambda *x: jnp.concatenate(x, 1)[:, :length], *parts)
    split = lambda x: jnp.moveaxis(x.reshape(len(x), count, size, *x.shape[2:]), 1, 0)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count * size, *x.shape[3:])[:, :length]
    step = lambda carry, part: each(carry, chunk_key(part[0]), *part[1:])
    carry, outputs = jax.lax.scan(step, carry, (jnp.arange(count), *map(split, arrays)))
    return carry, jax.tree.map(join, outputs)


def _after(hidden: Float[Array, "batch chunk width"], carry: PyTree, outputs: PyTree) -> Float[Array, "batch chunk width"]:
    """Return a chunk's hidden states as they are, but so that XLA cannot compute with them before the chunk in front is done.

    Without it XLA for CPU starts all chunks at once, and holds the logits of all of them. It drops `jax.lax.optimization_barrier` before it
    decides on the order, so this is a condition that always holds, of numbers that only the chunk in front can give.
    """
    # Each number is NaN or not: 0 or 1, and never less than 0.
    flags = [jnp.isnan(x if x.ndim == 2 else x[..., 0]) for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
    flags += [jnp.isnan(x.sum())[None, None] for x in jax.tree.leaves(carry)]
    for flag in flags:
        hidden = jnp.where((flag.astype(jnp.int32) >= 0)[..., None], hidden, 0)
    return hidden

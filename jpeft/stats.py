"""What a model makes of data, which decides where some methods train or start: Fisher information, movement of weights, keys and values."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.hosts import registry as hosts
from jpeft.tree.adapters import ADDED, Adapter
from jpeft.tree.paths import Params, unflatten

Batch = Any  # a pytree of arrays with a leading axis of examples


def fisher(
    fn: Callable[[Params, Any], jax.Array],
    params: Params,
    batches: Iterable[Batch],
    *,
    mode: str = "empirical",
    num_samples: int | None = 1024,
    chunk: int = 1,
) -> Params:
    r"""The diagonal of the Fisher information of every parameter: ``F_i = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta_i)^2``.

    The gradient of each example is squared by itself. Squaring the gradient of a batch's mean loss estimates something else.

    Args:
      fn: ``(params, batch) -> losses`` for "empirical": the negative log-likelihood of each example. ``(params, batch) -> logits`` of shape
        [examples, classes] for "expected". Without dropout. It is called with one example at a time, as a batch of one.
      params: Parameters of the model, its head included. The head must not be all zero: the gradient of everything below it would be, too.
      batches: Pytrees of arrays, examples along the first axis; any sizes.
      mode: "empirical" takes the true label for y, as the experiments of the FishMask paper do; "expected" is the exact sum over all
        classes, ``sum_c p_c g_c^2``, and needs no labels.
      num_samples: How many examples to use; all of them with None, or where there are fewer. The paper's 1024.
      chunk: Examples whose gradients are formed at once. Memory grows with it: ``chunk`` gradients in the mode "empirical" and twice as
        many in "expected", besides the sum, which is float32.

    Returns:
      A tree like `params`, float32: the mean over the examples.

    Raises:
      ValueError: for an unknown mode, without examples, or if `fn` returns something of another shape.

    >>> import jax, jax.numpy as jnp
    >>> from jpeft.stats import fisher
    >>> logits = lambda params, batch: batch["x"] @ params["kernel"]
    >>> params = {"kernel": jnp.zeros((1, 2))}
    >>> fisher(logits, params, [{"x": jnp.ones((4, 1))}], mode="expected")["kernel"]
    Array([[0.25, 0.25]], dtype=float32)

    Reference: Sung, Nair and Raffel, Training Neural Networks with Fixed Sparse Masks, 2021, https://arxiv.org/abs/2111.09839.
    """
    if mode not in ("empirical", "expected"):
        raise ValueError(f"mode={mode!r} is not one of 'empirical', 'expected'.")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1.")
    squares = {"empirical": _empirical, "expected": _expected}[mode](fn)

    def accumulate(total: Params, params: Params, batch: Batch, weights: jax.Array) -> Params:
        def add(total: Params, part: tuple[Batch, jax.Array]) -> tuple[Params, None]:
            examples, weight = part
            scores = jax.vmap(squares, (None, 0))(params, examples)
            return jax.tree.map(lambda t, s: t + jnp.tensordot(weight, s, 1), total, scores), None

        split = lambda x: x.reshape(-1, chunk, *x.shape[1:])
        return jax.lax.scan(add, total, jax.tree.map(split, (batch, weights)))[0]

    step = jax.jit(accumulate, donate_argnums=0)
    total, seen = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params), 0
    for batch in batches:
        size = len(jax.tree.leaves(batch)[0])
        used = size if num_samples is None else min(size, num_samples - seen)
        if used <= 0:
            break
        rows = np.arange(used + -used % chunk)  # whole chunks: what is there twice has no weight
        total = step(total, params, _take(batch, rows % used), jnp.asarray(rows < used, jnp.float32))
        seen += used
    if not seen:
        raise ValueError(f"fisher: no examples: batches is empty, or num_samples={num_samples} is not positive.")
    return jax.tree.map(lambda t: t / seen, total)


def movement(before: Params, after: Params) -> Params:
    """``|after - before|`` of every weight, float32: what a few steps of training have moved.

    >>> import jax.numpy as jnp
    >>> from jpeft.stats import movement
    >>> movement({"bias": jnp.array([1.0, 2.0])}, {"bias": jnp.array([0.5, 2.0])})["bias"]
    Array([0.5, 0. ], dtype=float32)
    """
    return jax.tree.map(lambda b, a: jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)), before, after)


def key_values(model: Any, params: Params, input_ids: Any) -> Adapter:
    """The keys and values of a text in every layer, from which `jpeft.prefix_tuning` and `jpeft.p_tuning_v2` can start.

    Args:
      model: A linen model whose attention cores are modules called ``core``, as those of `jpeft.models`.
      params: Its parameters.
      input_ids: The l tokens of one text, [1, l].

    Returns:
      A prefix of length l: pass it as ``jpeft.apply(params, method="prefix_tuning", length=l, stats=...)``. Rotary models are told rotated
      keys, as the text has them.

    Raises:
      ValueError: for another shape, or a model without cores.

    >>> import jax, jax.numpy as jnp
    >>> from jpeft.models import GPT2Config, GPT2Model
    >>> from jpeft.stats import key_values
    >>> model = GPT2Model(GPT2Config(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    >>> words = jnp.array([[3, 5, 2]])
    >>> jax.tree.map(jnp.shape, key_values(model, model.init(jax.random.key(0), words)["params"], words))
    {'h': {'0': {'attn': {'core': {'+': {'key': (3, 4), 'value': (3, 4)}}}}}}
    """
    input_ids = jnp.asarray(input_ids)
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"key_values: a prefix starts from one text, [1, length], and was given {input_ids.shape}.")
    cores = hosts.inputs_of(model, params, "core", input_ids)
    if not cores:
        raise ValueError("key_values: no module called 'core' ran. A prefix needs a model with attention cores, as those of jpeft.models.")
    # [*stack, 1, l, heads, head_dim] -> [*stack, l, heads * head_dim]
    flat = lambda leaf: leaf.reshape(*leaf.shape[:-4], leaf.shape[-3], -1)
    return unflatten(
        {f"{path}/{ADDED}/{name}": flat(inputs[i]) for path, inputs in cores.items() for i, name in ((1, "key"), (2, "value"))}
    )


def _empirical(fn: Callable[[Params, Any], jax.Array]) -> Callable[[Params, Any], Params]:
    def loss(params: Params, example: Any) -> jax.Array:
        out = fn(params, _one(example))
        if out.size != 1:
            raise ValueError(f"fisher: fn must return one loss for each example, and gave shape {out.shape} for a batch of one.")
        return out.reshape(())

    def squares(params: Params, example: Any) -> Params:
        return jax.tree.map(_square, jax.grad(loss)(params, example))

    return squares


def _expected(fn: Callable[[Params, Any], jax.Array]) -> Callable[[Params, Any], Params]:
    def log_probs(params: Params, example: Any) -> jax.Array:
        logits = fn(params, _one(example))
        if logits.ndim != 2 or logits.shape[0] != 1:
            raise ValueError(f"fisher: with mode='expected' fn must return logits [examples, classes], and gave {logits.shape} for one.")
        return jax.nn.log_softmax(logits[0].astype(jnp.float32))

    def squares(params: Params, example: Any) -> Params:
        logp, pull = jax.vjp(lambda p: log_probs(p, example), params)

        def add(total: Params, c: jax.Array) -> tuple[Params, None]:
            (grads,) = pull(jax.nn.one_hot(c, logp.size))
            return jax.tree.map(lambda t, g: t + jnp.exp(logp[c]) * _square(g), total, grads), None

        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        return jax.lax.scan(add, zero, jnp.arange(logp.size))[0]

    return squares


def _take(batch: Batch, rows: np.ndarray) -> Batch:
    return jax.tree.map(lambda x: jnp.asarray(x)[rows], batch)


def _one(example: Any) -> Any:
    return jax.tree.map(lambda x: x[None], example)


def _square(g: jax.Array) -> jax.Array:
    return jnp.square(g.astype(jnp.float32))

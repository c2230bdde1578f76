"""Statistics of a model or of data, which some methods require: ``jpeft.apply(params, method, stats=...)``.

`fisher` measures which parameters matter for a loss, `movement` how far training has moved them, `input_moments` what the inputs of
kernels are like, and `key_values` records the keys and values of a text in every layer. Each returns one of the types below. `jpeft.apply`
and `jpeft.advance` take one statistic, or several in a list, from which each part of a chain reads the kinds that it requires
(`Method.requires_stats`).
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jpeft.core.statistics import Fisher as Fisher
from jpeft.core.statistics import InputMoments as InputMoments
from jpeft.core.statistics import KeyValues as KeyValues
from jpeft.core.statistics import LabelTokens as LabelTokens
from jpeft.core.statistics import Movement as Movement
from jpeft.core.statistics import Prompt as Prompt
from jpeft.core.statistics import SourcePrompt as SourcePrompt
from jpeft.hosts import registry as hosts
from jpeft.input_moments import input_moments as input_moments
from jpeft.tree.adapters import ADDED
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
) -> Fisher:
    r"""Return the diagonal of the Fisher information: ``F_i = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta_i)^2`` of every parameter.

    The gradient of each example is squared. The square of a batch's mean gradient would estimate something else.

    Args:
      fn: ``(params, batch) -> losses`` for "empirical": the negative log-likelihood of each example. ``(params, batch) -> logits`` of shape
        [examples, classes] for "expected". Without dropout. `fn` is called with one example at a time, as a batch of one.
      params: Parameters of the model, its head included. A head that is all zero passes no gradient on, so the Fisher information of all
        layers below would be zero.
      batches: Pytrees of arrays with the examples along the first axis; batches may differ in size.
      mode: "empirical" takes the true label for y, as the experiments of the FishMask paper do; "expected" is the exact sum over all
        classes, ``sum_c p_c g_c^2``, and needs no labels.
      num_samples: How many examples to use, at most; None for all. The paper uses 1024.
      chunk: Examples whose gradients are computed at once. Memory grows with it: besides the sum in float32, there are ``chunk`` gradients
        in the mode "empirical" and twice as many in "expected".

    Returns:
      `Fisher`, whose ``values`` are a tree like `params` in float32: the mean over the examples.

    Raises:
      ValueError: for an unknown mode, without examples, or if `fn` returns an array of another shape.

    >>> import jax, jax.numpy as jnp
    >>> from jpeft.stats import fisher
    >>> logits = lambda params, batch: batch["x"] @ params["kernel"]
    >>> params = {"kernel": jnp.zeros((1, 2))}
    >>> fisher(logits, params, [{"x": jnp.ones((4, 1))}], mode="expected").values["kernel"]
    Array([[0.25, 0.25]], dtype=float32)

    Reference: Sung, Nair and Raffel, Training Neural Networks with Fixed Sparse Masks, 2021, https://arxiv.org/abs/2111.09839.
    """
    if mode not in ("empirical", "expected"):
        raise ValueError(f"fisher: mode={mode!r} is not one of 'empirical', 'expected'.")
    if chunk < 1:
        raise ValueError(f"fisher: chunk={chunk} must be at least 1.")
    step = jax.jit(_accumulator({"empirical": _empirical, "expected": _expected}[mode](fn), chunk), donate_argnums=0)
    total, seen = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params), 0
    for batch in batches:
        size = len(jax.tree.leaves(batch)[0])
        used = size if num_samples is None else min(size, num_samples - seen)
        if used <= 0:
            break
        rows = np.arange(used + -used % chunk)  # fills the last chunk with repeated examples, which get the weight 0
        total = step(total, params, _take(batch, rows % used), jnp.asarray(rows < used, jnp.float32))
        seen += used
    if not seen:
        raise ValueError(f"fisher: there are no examples: batches is empty, or num_samples={num_samples} is not positive.")
    return Fisher(hosts.unwrap(jax.tree.map(lambda t: t / seen, total)))


def movement(before: Params, after: Params) -> Movement:
    """Return how far training has moved every parameter: ``|after - before|`` in float32.

    >>> import jax.numpy as jnp
    >>> from jpeft.stats import movement
    >>> movement({"bias": jnp.array([1.0, 2.0])}, {"bias": jnp.array([0.5, 2.0])}).values["bias"]
    Array([0.5, 0. ], dtype=float32)
    """
    moved = jax.tree.map(lambda b, a: jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)), hosts.unwrap(before), hosts.unwrap(after))
    return Movement(moved)


def key_values(model: Any, params: Params, input_ids: Any) -> KeyValues:
    """Record the keys and values of a text in every layer, from which `jpeft.prefix_tuning` and `jpeft.p_tuning_v2` can start.

    Args:
      model: A linen model whose attention cores are modules called ``core``, as those of `jpeft.models`.
      params: Its parameters.
      input_ids: The l tokens of one text, [1, l].

    Returns:
      `KeyValues` of a prefix of length l: pass it as ``jpeft.apply(params, method="prefix_tuning", length=l, stats=...)``. The keys of a
      model with rotary positions are rotated as in the text.

    Raises:
      ValueError: for `input_ids` of another shape, or a model without cores.

    >>> import jax, jax.numpy as jnp
    >>> from jpeft.models import GPT2Config, GPT2Model
    >>> from jpeft.stats import key_values
    >>> model = GPT2Model(GPT2Config(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    >>> words = jnp.array([[3, 5, 2]])
    >>> jax.tree.map(jnp.shape, key_values(model, model.init(jax.random.key(0), words)["params"], words).values)
    {'h': {'0': {'attn': {'core': {'+': {'key': (3, 4), 'value': (3, 4)}}}}}}
    """
    input_ids = jnp.asarray(input_ids)
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"key_values: a prefix starts from one text, [1, length], and was given {input_ids.shape}.")
    cores = hosts.inputs_of(model, params, "core", input_ids)
    if not cores:
        raise ValueError("key_values: no module called 'core' ran. A prefix needs a model with attention cores, as those of jpeft.models.")
    # A core is called with (query, key, value, ...).
    named = {f"{path}/{ADDED}/{name}": inputs[i] for path, inputs in cores.items() for i, name in ((1, "key"), (2, "value"))}
    return KeyValues(unflatten({path: _without_heads(leaf) for path, leaf in named.items()}))


def source_prompt(peft: Any, task: int | None = None) -> SourcePrompt:
    """Take a prompt that several tasks were trained on, from which `jpeft.multitask_prompt_tuning` can start for another task.

    Args:
      peft: A `Peft` of `jpeft.multitask_prompt_tuning`.
      task: The task whose factors to take; None for the mean of all tasks' factors, as the paper does.

    Raises:
      ValueError: if there is no such prompt, or no such task.

    >>> import jax.numpy as jnp, jpeft
    >>> from jpeft.stats import source_prompt
    >>> params = {"wte": {"embedding": jnp.ones((50, 8))}}
    >>> source = jpeft.apply(params, method="multitask_prompt_tuning", length=3, tasks=5)
    >>> peft = jpeft.apply(params, method="multitask_prompt_tuning", length=3, stats=source_prompt(source))
    >>> peft.adapter["wte"]["+"]["cols"].shape
    (1, 3, 1)
    """
    tasks = dict(peft.method.options).get("tasks")
    if tasks is not None and task is not None and not 0 <= task < tasks:
        raise ValueError(f"source_prompt: there is no task {task}: the prompt has the tasks 0 to {tasks - 1}.")
    found = SourcePrompt.of(peft.adapter, task)
    if found is None:
        raise ValueError(f"source_prompt: {peft.method!r} has no prompt that tasks share; give a Peft of multitask_prompt_tuning.")
    return found


def _without_heads(leaf: Float[Array, "*stack 1 length heads head_dim"]) -> Float[Array, "*stack length width"]:
    """The keys or values of one text with the heads side by side in one axis."""
    return leaf.reshape(*leaf.shape[:-4], leaf.shape[-3], -1)


# --- squared gradients ------------------------------------------------------------------------------------------------------------------


def _accumulator(squares: Callable[[Params, Any], Params], chunk: int) -> Callable[[Params, Params, Batch, Float[Array, " rows"]], Params]:
    """A function that adds the weighted squares of a batch's examples to a total, chunk by chunk."""

    def accumulate(total: Params, params: Params, batch: Batch, weights: Float[Array, " rows"]) -> Params:
        def add(total: Params, part: tuple[Batch, Float[Array, " chunk"]]) -> tuple[Params, None]:
            examples, weight = part
            scores = jax.vmap(squares, (None, 0))(params, examples)  # leaves [chunk, *shape]
            return jax.tree.map(lambda t, s: t + jnp.tensordot(weight, s, 1), total, scores), None

        split = lambda x: x.reshape(-1, chunk, *x.shape[1:])  # [rows, ...] -> [chunks, chunk, ...]
        return jax.lax.scan(add, total, jax.tree.map(split, (batch, weights)))[0]

    return accumulate


def _empirical(fn: Callable[[Params, Any], jax.Array]) -> Callable[[Params, Any], Params]:
    """``(params, example) -> g^2``, with g the gradient of the example's loss."""

    def loss(params: Params, example: Any) -> Float[Array, ""]:
        out = fn(params, _batch_of_one(example))
        if out.size != 1:
            raise ValueError(f"fisher: fn must return one loss for each example, and gave shape {out.shape} for a batch of one.")
        return out.reshape(())

    def squares(params: Params, example: Any) -> Params:
        return jax.tree.map(_square, jax.grad(loss)(params, example))

    return squares


def _expected(fn: Callable[[Params, Any], jax.Array]) -> Callable[[Params, Any], Params]:
    """``(params, example) -> sum_c p_c g_c^2``, with g_c the gradient of the log-probability of class c."""

    def log_probs(params: Params, example: Any) -> Float[Array, " classes"]:
        logits = fn(params, _batch_of_one(example))
        if logits.ndim != 2 or logits.shape[0] != 1:
            raise ValueError(f"fisher: with mode='expected' fn must return logits [examples, classes], and gave {logits.shape} for one.")
        return jax.nn.log_softmax(logits[0].astype(jnp.float32))

    def squares(params: Params, example: Any) -> Params:
        # One forward pass serves all classes: `pull` is linear, and a scan over classes keeps one gradient at a time.
        logp, pull = jax.vjp(lambda p: log_probs(p, example), params)

        def add(total: Params, c: jax.Array) -> tuple[Params, None]:
            (grads,) = pull(jax.nn.one_hot(c, logp.size))
            return jax.tree.map(lambda t, g: t + jnp.exp(logp[c]) * _square(g), total, grads), None

        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        return jax.lax.scan(add, zero, jnp.arange(logp.size))[0]

    return squares


def _take(batch: Batch, rows: np.ndarray) -> Batch:
    return jax.tree.map(lambda x: jnp.asarray(x)[rows], batch)


def _batch_of_one(example: Any) -> Batch:
    return jax.tree.map(lambda x: x[None], example)


def _square(g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.square(g.astype(jnp.float32))

"""Attention by a kernel of the device, which makes no array of queries × keys: cuDNN's on a GPU, splash attention on a TPU.

A kernel knows few structures, so a `Visible` is brought into one that it knows, exactly:

* **Padding** becomes lengths: the tokens of each row are moved to its front, in their order, and the contexts are moved back. Causal order
  and windows, which count tokens, do not change. Splash attention takes padding as a segment of its own.
* **A prefix under a causal kernel**: as many queries of zeros are put in front, so that the diagonal is where it belongs, and their
  contexts are dropped.

Grouped heads are not repeated.

References: Dao et al., FlashAttention, 2022, https://arxiv.org/abs/2205.14135; Ainslie et al., GQA, 2023, https://arxiv.org/abs/2305.13245.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jpeft.models.common.visible import Visible

KERNELS = ("auto", "xla", "cudnn", "splash")

Queries = Float[Array, "batch queries heads head"]
Keys = Float[Array, "batch keys groups head"]

_LANES = 128  # of a TPU: lengths and head sizes of its kernel are multiples of it
_SHORT = 128  # below so many queries there is nothing to gain


def choose(wanted: str, query: Queries, key: Keys, mask: Any, *, drops: bool) -> str:
    """Return the kernel that computes an attention: "xla", "cudnn" or "splash".

    Calls that continue a cache are XLA's, whatever is wanted.

    Args:
      wanted: One of `KERNELS`.
      query: The queries, and on which device they will be computed.
      key: The keys.
      mask: What each query may see.
      drops: Whether weights are dropped.

    Raises:
      ValueError: if a kernel is wanted that cannot compute this, with the reason.
    """
    # One query or a few that continue a cache: there is no square to save, and no kernel for it.
    if wanted == "xla" or (isinstance(mask, Visible) and mask.slot is not None):
        return "xla"
    if wanted != "auto":
        if reason := why_not(wanted, query, key, mask, drops=drops):
            raise ValueError(f"attention={wanted!r} cannot compute this attention: {reason}. attention='auto' takes what can.")
        return wanted
    kernel = kernel_of(_device())
    if kernel is None or query.shape[1] < _SHORT or why_not(kernel, query, key, mask, drops=drops):
        return "xla"
    # Mosaic kernels are not partitioned: on several devices splash attention runs where a shard_map gives each its own part.
    if kernel == "splash" and jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes:
        return "xla"
    return kernel


def kernel_of(device: Any) -> str | None:
    """Return the kernel that a device has; None for a CPU, a GPU without CUDA, and one from before cuDNN's flash attention (Ampere)."""
    if device.platform == "tpu":
        return "splash"
    has_cuda = device.platform in ("gpu", "cuda") and "cuda" in device.client.platform_version.lower()
    return "cudnn" if has_cuda and float(device.compute_capability) >= 8.0 else None


def _device() -> Any:
    """Return the device that computes where arrays say nothing else; the default may be one of another platform."""
    default: Any = getattr(jax.config, "jax_default_device", None)
    return default if hasattr(default, "platform") else jax.devices(default)[0]


def why_not(kernel: str, query: Queries, key: Keys, mask: Any, *, drops: bool) -> str | None:
    """Return the reason why a kernel cannot compute an attention; None if it can."""
    if not isinstance(mask, Visible):
        return "what each query may see is a boolean mask of the model's own"
    if drops:
        return "attention weights are dropped in training (attention_dropout), which is done on the weights"
    if query.shape[1] + mask.prefix != key.shape[1]:
        return f"it takes as many keys as queries, and there are {key.shape[1]} for {query.shape[1]}"
    if mask.window is not None and not mask.causal:
        return "it has windows only where attention is causal"
    if mask.window is not None and mask.prefix:
        return "no window of it lets the keys of a prefix through"
    if mask.query_segments is not None and mask.prefix:
        return "the keys of a prefix belong to every segment"
    return {"cudnn": _why_not_cudnn, "splash": _why_not_splash}[kernel](query, mask)


def _why_not_cudnn(query: Queries, mask: Visible) -> str | None:
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, and the model in {query.dtype}"
    if query.shape[-1] % 8 or query.shape[-1] > 128:
        return f"a head is {query.shape[-1]} wide, and must be a multiple of 8, 128 at most"
    if mask.query_segments is not None:
        return "it knows no segments of packed rows"
    return None


def _why_not_splash(query: Queries, mask: Visible) -> str | None:
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it computes in bfloat16 or float32, and the model in {query.dtype}"
    return None


def run_kernel(kernel: str, query: Queries, key: Keys, value: Keys, mask: Visible, *, interpret: bool = False) -> Queries:
    """Return the context of each query, computed by a kernel.

    Args:
      kernel: "cudnn" or "splash", which `choose` found able.
      query: The queries.
      key: The keys.
      value: The values.
      mask: What each query may see.
      interpret: Run a Pallas kernel by its operations, on any device.
    """
    one = {"cudnn": _cudnn, "splash": functools.partial(_splash, interpret=interpret)}[kernel]
    if mask.uses_window is None:
        return one(query, key, value, mask)
    # One traced layer stands for layers with and without a window.
    with_window, without = mask.replace(uses_window=None), mask.replace(window=None, uses_window=None)
    return jax.lax.cond(mask.uses_window, lambda *args: one(*args, with_window), lambda *args: one(*args, without), query, key, value)


# --- cuDNN ----------------------------------------------------------------------------------------------------------------------------


def _cudnn(query: Queries, key: Keys, value: Keys, mask: Visible, *, implementation: Literal["xla", "cudnn"] = "cudnn") -> Queries:
    """CuDNN's flash attention. XLA takes the same arguments, on any device."""
    order, back, batch = None, None, len(query)
    length = query.shape[1]
    # Lengths of an odd number are not supported everywhere.
    odd = (key.shape[1] if mask.causal else 0) % 2, key.shape[1] % 2
    keys = jnp.full((batch,), key.shape[1], jnp.int32)
    if mask.keys is not None:
        order, back = _tokens_first(mask.keys)
        own = lambda x: jnp.concatenate([x[:, : mask.prefix], _take(x[:, mask.prefix :], order, back)], 1)
        query, key, value = _take(query, order, back) if mask.causal else query, own(key), own(value)
        # A text without tokens sees one that it should not, and has numbers for contexts. Nobody reads them.
        keys = jnp.maximum(mask.keys.sum(1, dtype=jnp.int32), 1) + mask.prefix
    if mask.causal:
        query = jnp.pad(query, [(0, 0), (mask.prefix, odd[0]), (0, 0), (0, 0)])
    key, value = (jnp.pad(x, [(0, 0), (0, odd[1]), (0, 0), (0, 0)]) for x in (key, value))
    # All queries are computed, those of padding too: what cuDNN leaves out need not be finite.
    queries = jnp.full((batch,), query.shape[1], jnp.int32)
    query, key, value, queries, keys = _batched_alike(query, key, value, queries, keys)
    window = None if mask.window is None else (mask.window - 1, 0)
    # A causal query sees no key behind it, so what fills up must be hidden from others alone.
    lengths = {} if mask.keys is None and (mask.causal or not odd[1]) else {"query_seq_lengths": queries, "key_value_seq_lengths": keys}
    out = jax.nn.dot_product_attention(
        query, key, value, is_causal=mask.causal, local_window_size=window, implementation=implementation, **lengths
    )
    out = _with_batched_gradient(out)
    if not mask.causal:
        return out
    out = out[:, mask.prefix : mask.prefix + length]
    return out if back is None else _take(out, back, order)


def _tokens_first(tokens: Bool[Array, "batch length"]) -> tuple[Int[Array, "batch length"], Int[Array, "batch length"]]:
    """Return the places of a row's tokens in their order, followed by those of its padding; and the inverse.

    >>> [x.tolist() for x in _tokens_first(jnp.array([[False, True, True]]))]
    [[[1, 2, 0]], [[2, 0, 1]]]
    """
    order = jnp.argsort(~tokens, axis=1, stable=True)
    return order, jnp.argsort(order, axis=1)


@jax.custom_vjp
def _take(x: Shaped[Array, "batch length heads head"], order: Array, back: Array) -> Shaped[Array, "batch length heads head"]:
    """``x[order]`` of each text. Its gradient goes by the inverse order, `back`: JAX would sum into places, which is slow on a GPU."""
    del back
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1)


_take.defvjp(lambda x, order, back: (_take(x, order, back), (order, back)), lambda kept, dy: (_take(dy, kept[1], kept[0]), None, None))


# JAX's rule for `vmap` of cuDNN's attention takes all arrays with the new axis, or none.


@jax.custom_batching.custom_vmap
def _alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays as they are; under `vmap` all with the new axis."""
    return arrays


@_alike.def_vmap
def _(size: int, batched: Sequence[bool], *arrays: Array) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
    if not any(batched):
        return arrays, tuple(batched)
    out = (x if has else jnp.broadcast_to(x[None], (size, *x.shape)) for x, has in zip(arrays, batched, strict=True))
    return tuple(out), (True,) * len(arrays)


@jax.custom_vjp
def _batched_alike(*arrays: Array) -> tuple[Array, ...]:
    return _alike(*arrays)


_batched_alike.defvjp(lambda *arrays: (_alike(*arrays), None), lambda _, gradients: tuple(gradients))


@jax.custom_vjp
def _with_batched_gradient(out: Array) -> Array:
    return out


_with_batched_gradient.defvjp(lambda out: (out, out), lambda out, gradient: (_alike(gradient, out)[0],))


# --- splash attention -------------------------------------------------------------------------------------------------------------------


def _splash(query: Queries, key: Keys, value: Keys, mask: Visible, *, interpret: bool) -> Queries:
    """Splash attention, a kernel for each text and head of keys."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, length, heads, head = query.shape
    groups, order, back = key.shape[2], None, None
    if mask.keys is not None and mask.window is not None:
        order, back = _tokens_first(mask.keys)
        query, key, value = (_take(x, order, back) for x in (query, key, value))
        mask = mask.replace(keys=jnp.take_along_axis(mask.keys, order, 1))
    filled = lambda x: jnp.pad(x, [(0, 0), (0, -x.shape[1] % _LANES), (0, 0), (0, -head % _LANES)])
    query, key, value = filled(query * jnp.asarray(head**-0.5, query.dtype)), filled(key), filled(value)
    shape = (query.shape[1], key.shape[1])
    if mask.window is not None:
        seen = masks.LocalMask(shape, (mask.window - 1, 0), 0)
    else:
        seen = masks.CausalMask(shape, offset=mask.prefix) if mask.causal else masks.FullMask(shape)
    queries, keys = (_block(size) for size in shape)
    sizes = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )
    run = splash.make_splash_mqa_single_device(masks.MultiHeadMask([seen] * (heads // groups)), block_sizes=sizes, interpret=interpret)
    # Queries [batch, groups, heads of a group, length, head], keys and values [batch, groups, length, head].
    query = jnp.moveaxis(query.reshape(batch, shape[0], groups, heads // groups, -1), 1, 3)
    key, value = (jnp.moveaxis(x, 1, 2) for x in (key, value))
    segments = splash.SegmentIds(*_segment_ids(mask, batch, length, shape))
    out: Any = jax.vmap(jax.vmap(run, in_axes=(0, 0, 0, None)))(query, key, value, segments)
    out = jnp.moveaxis(out, 3, 1).reshape(batch, shape[0], heads, -1)[:, :length, :, :head]
    return out if back is None else _take(out, back, order)


def _block(size: int) -> int:
    """Return the queries or keys of a block: a divisor of their number.

    >>> _block(128), _block(640), _block(4096)
    (128, 128, 512)
    """
    return next(block for block in (512, 256, _LANES) if size % block == 0)


def _segment_ids(mask: Visible, batch: int, length: int, shape: tuple[int, int]) -> tuple[Array, Array]:
    """Return the segments of queries and keys: 0 for padding and what fills up, from 1 on for the tokens of each text."""
    ones = jnp.ones((batch, length), jnp.int32)
    queries = ones if mask.query_segments is None else mask.query_segments + 1
    keys = ones if mask.key_segments is None else mask.key_segments + 1
    if mask.keys is not None:
        keys = jnp.where(mask.keys, keys, 0)
        # A query that is padding sees padding, so that its context is a number. Nobody reads it.
        queries = jnp.where(mask.keys, queries, 0)
    keys = jnp.pad(keys, [(0, 0), (mask.prefix, 0)], constant_values=1)
    filled = lambda x, size: jnp.pad(x, [(0, 0), (0, size - x.shape[1])])
    return filled(queries, shape[0]), filled(keys, shape[1])

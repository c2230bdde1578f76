"""A prefix: trained keys and values in front of every layer's own. What prefix-tuning and P-tuning v2 are made of."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.method import ADDED, Layer, Method, not_head, with_head
from jpeft.tree.kernels import AxesRules, axes_of, axes_rules
from jpeft.tree.select import select

# The key projections of common families. A fused projection produces queries, keys and values of equal width.
KEY = r"(.*/)?(key|k_lin|k_proj|(Self|EncDec)Attention/k|c_attn|query_key_value|qkv)/kernel"
FUSED = r"(.*/)?(c_attn|query_key_value|qkv)/kernel"
CORE = "core"  # the parameterless module beside the key projection: queries, keys, values and mask to context
# Beside the embedding of words is `positions`, the parameterless module that tells where each token is.
WORDS = r"(?P<body>(.*/)?)(embeddings/word_embeddings|wte|embed_tokens)/embedding"
INITS = ("random", "tokens")
SHIFT = "shift"  # the leaf that `bind` adds to `positions`


class Site(NamedTuple):
    """The attention of one layer, or of all layers of one `nn.scan`: what parameters say about it.

    The number of heads is not among it, so a prefix is kept flat, ``heads * head_dim`` wide, and takes the heads of the keys it meets.
    """

    kernel: str  # path of the key kernel
    core: str  # path of the attention core
    stack: tuple[int, ...]  # () or (layers,)
    inputs: int  # width of the residual stream
    width: int  # kv_heads * head_dim

    @property
    def layers(self) -> int:
        """Number of layers here."""
        return math.prod(self.stack)


def prefix(
    again: Callable[..., Method],
    *,
    length: int | None,
    default: int,
    init: str,
    tokens: tuple[int, ...] | None,
    mlp: int | None,
    std: float,
    dropout: float,
    shift: bool,
    target: str,
    width: int | None,
    axes: AxesRules | None,
    head: str | None,
) -> Method:
    """The method that `again`, one of the factories, makes of these options, which `jpeft.prefix_tuning` explains.

    The `default` length is that of a prefix which starts from no words.
    """
    rules = axes_rules(axes)
    if init not in INITS:
        raise ValueError(f"init={init!r} is not one of {', '.join(map(repr, INITS))}.")
    if tokens is not None and init != "tokens":
        raise ValueError(f"tokens are what init='tokens' starts from, and init is {init!r}.")
    if init == "tokens":
        if not tokens:
            raise ValueError("init='tokens' needs tokens=, the token ids of the text to start from.")
        if length not in (None, len(tokens)):
            raise ValueError(f"length={length}, but there are {len(tokens)} tokens to start from, a row for each: leave length out.")
    length = (len(tokens) if tokens else default) if length is None else length
    if length < 1:
        raise ValueError(f"length={length} must be at least 1.")
    if mlp is not None and mlp < 1:
        raise ValueError(f"mlp={mlp} must be None or at least 1.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is not in [0, 1).")

    options = dict(length=length, std=std, dropout=dropout, shift=shift, target=target, width=width, axes=axes, head=head)

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        found = sites(params, target=target, width=width, rules=rules, head=head)
        draw = lambda name, *shape: jax.random.normal(tree.key_for(key, name), shape)
        given = _given(stats, found, length)
        if init == "tokens" and given is None:
            raise ValueError(
                "init='tokens' starts from the keys and values that the model has for these tokens, and they were not given: "
                "stats=jpeft.stats.key_values(model, params, [tokens])."
            )
        if mlp is None:
            return _place(found, given) if given else _place(found, {
                site.core: {name: std * draw(f"{site.core}/{name}", *site.stack, length, site.width) for name in ("key", "value")}
                for site in found
            })  # fmt: skip
        d, out = found[0].inputs, 2 * sum(site.layers * site.width for site in found)
        uniform = lambda name, fan, *shape: jax.random.uniform(tree.key_for(key, name), shape, minval=-(fan**-0.5), maxval=fan**-0.5)
        leaves: dict[str, Any] = {
            "embedding": draw("embedding", length, d),
            "down": {"kernel": uniform("down/kernel", d, d, mlp), "bias": uniform("down/bias", d, mlp)},
        }
        up = {"kernel": uniform("up/kernel", mlp, mlp, out), "bias": uniform("up/bias", mlp, out)}
        if given:
            # The paper fits the network to given keys and values by 500 steps of Adam; the last layer alone does it exactly, for l <= m.
            up = {"kernel": jnp.linalg.pinv(_hidden(leaves)) @ _flat(found, given), "bias": jnp.zeros(out)}
        return {ADDED: {**leaves, "up": up}}

    def prefixes(params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        """The adapter with P in the place of the network."""
        if mlp is None:
            return adapter
        leaves, rest = adapter[ADDED], {name: leaf for name, leaf in adapter.items() if name != ADDED}
        rows = _hidden(leaves) @ leaves["up"]["kernel"] + leaves["up"]["bias"][None]  # (l, 2 L d)
        found = sites(params, target=target, width=width, rules=rules, head=head)
        return tree.unflatten(tree.flatten(rest) | tree.flatten(_place(found, _split(found, rows))))

    def bind_fn(params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        del rng
        grafts = tree.flatten(prefixes(params, adapter)) | (_shifts(params, length) if shift else {})
        return tree.graft(params, tree.unflatten(grafts))

    def call_fn(layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        if SHIFT in leaves[ADDED]:
            layout = layer(*inputs)
            return layout._replace(position_ids=layout.position_ids + length, offset=layout.offset + length)
        query, key, value, *rest = inputs
        mask, *rest = rest or [None]
        shape = key.shape
        if leaves[ADDED]["key"].shape[-1] != shape[-1] * shape[-2]:
            raise ValueError(
                f"The keys of '{layer.path}' have {shape[-2]} heads of {shape[-1]}, {shape[-1] * shape[-2]} in all, but its prefix is "
                f"{leaves[ADDED]['key'].shape[-1]} wide, as the key kernel told. Give the true one: width={shape[-1] * shape[-2]}."
            )
        rngs = [None, None] if rng is None or not dropout else list(jax.random.split(rng))
        key = jnp.concatenate([_batched(leaves[ADDED]["key"], key, dropout, rngs[0]), key], axis=-3)
        value = jnp.concatenate([_batched(leaves[ADDED]["value"], value, dropout, rngs[1]), value], axis=-3)
        return layer(query, key, value, None if mask is None else _widened(mask, length), *rest)

    def merge_fn(params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        return tree.merge_leaves(params, adapter, lambda path, leaf, leaves: leaf, why_not=_WHY)

    def fold_fn(params: tree.Params, adapter: tree.Adapter) -> tuple[Method, tree.Adapter]:
        return again(mlp=None, **options), prefixes(params, adapter)

    def shapes_fn(params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        del adapter
        return jax.eval_shape(again(mlp=mlp, **options).init, jax.random.key(0), params)

    return Method(
        init=with_head(init_fn, head),
        bind=bind_fn,
        call=call_fn,
        merge=merge_fn,
        fold=None if mlp is None else fold_fn,
        needs="key_values" if init == "tokens" else None,
        shapes=shapes_fn if init == "tokens" else None,
    )


_WHY = (
    "a prefix lengthens the keys and values of every attention, which no weight of the base can take up; keep using it through jpeft.wrap"
)


def sites(
    params: tree.Params, *, target: str = KEY, width: int | None = None, rules: AxesRules = (), head: str | None = "auto"
) -> list[Site]:
    """The attentions of a model, in the order of its layers."""
    leaves = {path: leaf.shape for path, leaf in not_head(params, head).items() if len(leaf.shape) > 1}
    found = []
    for path in sorted(select(leaves, target, params=params), key=_by_number):
        axes, shape = axes_of(path, leaves[path], rules), leaves[path]
        attention = path.split("/")[:-2]
        wide = width or axes.fan_out(shape) // (3 if re.fullmatch(FUSED, path) else 1)
        found.append(Site(path, "/".join([*attention, CORE]), tuple(shape[i] for i in axes.stack), axes.fan_in(shape), wide))
    return found


def _shifts(params: tree.Params, length: int) -> dict[str, jax.Array]:
    """A leaf for the module `positions` of every body whose words are embedded; a part of a model alone has none."""
    bodies = [match["body"] for path in tree.flatten(params) if (match := re.fullmatch(WORDS, path))]
    return {f"{body}positions/{ADDED}/{SHIFT}": jnp.array(length) for body in bodies}


def _by_number(path: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split("/")]


def _place(found: list[Site], prefixes: dict[str, dict[str, Any]]) -> tree.Adapter:
    return tree.unflatten(
        {f"{site.core}/{ADDED}/{name}": prefixes[site.core][name] for site in found for name in ("key", "value")}
    )  # fmt: skip


def _given(stats: Any, found: list[Site], length: int) -> dict[str, dict[str, Any]] | None:
    """The prefix in `stats`, checked; None if there is none (statistics may be another method's, in a chain)."""
    leaves = tree.flatten(stats) if isinstance(stats, dict) else {}
    if not any(f"/{CORE}/{ADDED}/" in f"/{path}" for path in leaves):
        return None
    out: dict[str, dict[str, Any]] = {}
    for site in found:
        for name in ("key", "value"):
            path, shape = f"{site.core}/{ADDED}/{name}", (*site.stack, length, site.width)
            if path not in leaves or leaves[path].shape != shape:
                got = f"has the shape {leaves[path].shape}" if path in leaves else "is missing"
                raise ValueError(f"The given prefix does not fit: '{path}' {got} where {shape} is needed; length={length}.")
            out.setdefault(site.core, {})[name] = jnp.array(leaves[path], jnp.float32)
    return out


def _hidden(leaves: dict[str, Any]) -> Float[Array, "l m"]:
    return jnp.tanh(leaves["embedding"] @ leaves["down"]["kernel"] + leaves["down"]["bias"][None])


def _split(found: list[Site], rows: Float[Array, "l out"]) -> dict[str, dict[str, Any]]:
    """The network's output as keys and values, layer by layer, in each layer the key first."""
    out, at = {}, 0
    for site in found:
        size = 2 * site.layers * site.width
        part = rows[:, at : at + size].reshape(-1, *site.stack, 2, site.width)
        out[site.core] = {name: jnp.moveaxis(part[..., i, :], 0, len(site.stack)) for i, name in enumerate(("key", "value"))}
        at += size
    return out


def _flat(found: list[Site], prefixes: dict[str, dict[str, Any]]) -> Float[Array, "l out"]:
    """The inverse of `_split`."""
    parts = []
    for site in found:
        pair = [jnp.moveaxis(prefixes[site.core][name], len(site.stack), 0) for name in ("key", "value")]
        parts.append(jnp.stack(pair, -2).reshape(pair[0].shape[0], -1))
    return jnp.concatenate(parts, 1)


def _batched(prefix: jax.Array, like: jax.Array, dropout: float, rng: jax.Array | None) -> jax.Array:
    """A prefix in the heads, dtype and batch of the keys (or values) that it goes in front of."""
    rows = prefix.reshape(prefix.shape[0], *like.shape[-2:]).astype(like.dtype)
    rows = jnp.broadcast_to(rows[(None,) * (like.ndim - 3)], (*like.shape[:-3], *rows.shape))  # (batch, l, heads, head_dim)
    if rng is None:
        return rows
    return jnp.where(jax.random.bernoulli(rng, 1 - dropout, rows.shape), rows / (1 - dropout), 0).astype(like.dtype)


def _widened(mask: jax.Array, length: int) -> jax.Array:
    """A mask over keys with the prefix in front, visible to all; a mask of numbers is one that is added to the scores."""
    visible = jnp.ones if jnp.issubdtype(mask.dtype, jnp.bool_) else jnp.zeros
    return jnp.concatenate([visible((*mask.shape[:-1], length), mask.dtype), mask], axis=-1)

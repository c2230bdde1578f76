"""Tokens put into a text on its way into a model: what soft and hard prompts have in common.

Two places of the model are wrapped, and neither needs a module made for it. The *body*, the module that takes the token ids, gets longer
ids, masks and positions, and its outputs are cut back to the tokens of the text, so heads, losses, labels and callers never see what was
put in. A row of a prompt is named by an id beyond the vocabulary, and the *word embedding* answers such an id with the row. Everything in
between (positions, causal masks, caches) follows from ids and mask, by the model's own rules.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jpeft import tree
from jpeft.method import ADDED, CallFn, Layer, not_head
from jpeft.tree.select import select

# The word embeddings of common families.
EMBEDDING = r"(.*/)?(word_embeddings|wte|embed_tokens|token_embeddings?|embedder|embed|embeddings?|shared)/embedding"
# Where [CLS] and [SEP] enclose every text: in encoders.
_ENCLOSED = re.compile(r"(.*/)?embeddings/word_embeddings/embedding")
# Inputs of a body that have one entry for each token, besides the ids.
_MASKS, _TYPES, _POSITIONS = {"attention_mask", "mask", "padding_mask"}, {"token_type_ids"}, {"position_ids", "positions"}
PSEUDO = -1  # in a block: a token whose embedding is trained

Place = Any  # "start", "end", ("before", id) or ("after", id)


class Site(NamedTuple):
    """Where a model takes tokens in."""

    table: str  # path of the word embedding
    body: str  # path of the module that takes the ids; "" for the whole model
    rows: int  # size of the vocabulary
    width: int  # of an embedding
    edges: tuple[int, int]  # tokens of each text that stay in front of its start and behind its end
    causal: bool  # a token is answered for by what was put in behind it

    @property
    def module(self) -> str:
        """Path of the embedding module."""
        return self.table.rpartition("/")[0]


class Block(NamedTuple):
    """Neighbouring tokens to put in."""

    place: Place
    tokens: tuple[int, ...]  # ids of the vocabulary, or PSEUDO


def site(
    params: tree.Params,
    inserted: tuple[Block, ...],
    *,
    embedding: str,
    body: str | None,
    edges: tuple[int, int] | None,
    causal: bool | None,
    head: str | None,
) -> Site:
    """The place where a model takes tokens in; it must know those that are put in, and their anchors.

    Raises:
      ValueError: if the embedding is not one table, the body does not contain it, or a token or an anchor is beyond the vocabulary.
    """
    leaves = {path: leaf for path, leaf in not_head(params, head).items() if len(leaf.shape) == 2}
    found = select(leaves, embedding, option="embedding", params=params)
    if len(found) > 1:
        raise ValueError(f"embedding={embedding!r} matches {', '.join(map(repr, found))}: name the one that embeds words.")
    table = found[0]
    if "/" not in table:
        raise ValueError(f"The embedding '{table}' is the whole model; a prompt needs a model around it that takes token ids.")
    if body is None:
        around = table.split("/")[:-2]
        body = "/".join(around[:-1] if around[-1:] == ["embeddings"] else around)
    elif not table.startswith(f"{body}/" if body else ""):
        raise ValueError(f"body={body!r} does not contain the embedding '{table}'; '' names the whole model.")
    rows, width = leaves[table].shape
    anchors = [block.place[1] for block in inserted if not isinstance(block.place, str)]
    named = [*anchors, *(token for block in inserted for token in block.tokens if token != PSEUDO)]
    if beyond := [token for token in named if not 0 <= token < rows]:
        raise ValueError(f"There is no token {beyond[0]}: the vocabulary has {rows}.")
    encoder = _ENCLOSED.fullmatch(table) is not None
    edges = edges or ((1, 1) if encoder else (0, 0))
    return Site(table, body, rows, width, edges, not encoder if causal is None else causal)


def blocks(template: Any) -> tuple[Block, ...]:
    """A template, checked: pairs of a place and either a number of pseudo tokens or their ids, `PSEUDO` among them.

    >>> blocks((("start", 2), (("before", 103), (PSEUDO, 7))))
    (Block(place='start', tokens=(-1, -1)), Block(place=('before', 103), tokens=(-1, 7)))

    Raises:
      ValueError: for anything else.
    """
    out = []
    for item in template:
        place, tokens = item if isinstance(item, tuple) and len(item) == 2 else (None, None)
        anchored = isinstance(place, tuple) and len(place) == 2 and place[0] in ("before", "after") and isinstance(place[1], int)
        if place not in ("start", "end") and not anchored:
            raise ValueError(
                f"template: {item!r} is not a pair of a place ('start', 'end', ('before', id) or ('after', id)) and tokens: "
                "a number of pseudo tokens, or a tuple of token ids with -1 for a pseudo token."
            )
        tokens = (PSEUDO,) * tokens if isinstance(tokens, int) else tokens
        if not isinstance(tokens, tuple) or not tokens or not all(isinstance(token, int) and token >= PSEUDO for token in tokens):
            raise ValueError(f"template: at {place!r} a number of pseudo tokens or a tuple of token ids must stand, not {item[1]!r}.")
        out.append(Block(place, tokens))
    return tuple(out)


def checked_edges(edges: Any) -> tuple[int, int] | None:
    """The option `edges`, or a ValueError."""
    if edges is not None and not (isinstance(edges, tuple) and len(edges) == 2 and all(isinstance(n, int) and n >= 0 for n in edges)):
        raise ValueError(f"edges={edges!r} must be None or two numbers: how many tokens stay outside at a text's start and end.")
    return edges


def bind(params: tree.Params, adapter: tree.Adapter, where: Site, prompt: Float[Array, "l d"] | None) -> tree.Params:
    """The base with an adapter, and what both places need to know: the prompt, and in the shape of an empty array the site's numbers."""
    numbers = (0, where.rows, *where.edges, int(where.causal))
    at_body = {"site": jnp.zeros(numbers), "prompt": jnp.zeros((0, where.width)) if prompt is None else prompt}
    if prompt is not None:
        at_table = {"site": jnp.zeros((0, where.rows)), "prompt": prompt}
        adapter = tree.unflatten(tree.flatten(adapter) | {f"{where.module}/{ADDED}/{name}": leaf for name, leaf in at_table.items()})
    return tree.put_grafts(tree.graft(params, adapter), {where.body: {ADDED: at_body}})


def call(inserted: tuple[Block, ...]) -> CallFn:
    """The middleware of a template."""

    def call_fn(layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        del rng
        if layer.method == "attend":
            return layer(*inputs)  # the vocabulary as a classifier: what is put in is no word
        if leaves[ADDED]["site"].ndim == 2:
            return _looked_up(layer, inputs, leaves[ADDED])
        return _lengthened(layer, inputs, leaves[ADDED], inserted)

    return call_fn


# --- the word embedding ---------------------------------------------------------------------------------------------------------------


def _looked_up(layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any]) -> Any:
    """Embeddings, where an id beyond the vocabulary is a row of the prompt."""
    ids, *rest = inputs
    prompt, first = leaves["prompt"], _first(layer, leaves)
    row = jnp.where((ids >= first) & (ids < first + len(prompt)), ids - first, len(prompt))
    ours = row < len(prompt)
    words = layer(jnp.where(ours, 0, ids), *rest)
    # Rows that are not ours are filled, not fetched: so they send nothing back to the prompt either.
    # Fetched in the prompt's own dtype, in which its gradient is then summed over the batch.
    rows = jnp.take(prompt, row, axis=0, mode="fill", fill_value=0)
    return jnp.where(ours[..., None], rows.astype(words.dtype), words)


def _first(layer: Layer, leaves: dict[str, Any]) -> int:
    """The id of the prompt's first row: beyond the vocabulary and the rows of prompts that other methods put in closer to the layer."""
    below = [other[ADDED] for other in layer.inner_middleware if "site" in other.get(ADDED, {})]
    return leaves["site"].shape[1] + sum(len(other["prompt"]) for other in below)


# --- the body -------------------------------------------------------------------------------------------------------------------------


def _lengthened(layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], inserted: tuple[Block, ...]) -> Any:
    """Run a body on the longer text, and cut its outputs back to the tokens that were given."""
    if layer.cached:
        return layer(*inputs)  # what is put in stands in the cache already
    if not inputs or jnp.ndim(inputs[0]) != 2 or not jnp.issubdtype(jnp.result_type(inputs[0]), jnp.integer):
        got = f"{jnp.result_type(inputs[0])}{list(jnp.shape(inputs[0]))}" if inputs else "nothing"
        raise ValueError(
            f"Tokens are put in where a model takes token ids [batch, length], but '{layer.path or 'the model'}' was given {got}. "
            "Name the module that takes the ids: body='encoder'."
        )
    ids = jnp.asarray(inputs[0], jnp.int32)
    named = dict(zip(layer.names[1:], inputs[1:]))
    mask = next((x for name, x in {**named, **layer.keywords}.items() if name in _MASKS and x is not None), None)
    *edges, causal = leaves["site"].shape[2:]
    plan = _plan(inserted, ids, mask, edges)
    first = _first(layer, leaves)
    tokens, row = [], 0
    for token in (token for block in inserted for token in block.tokens):
        tokens.append(first + row if token == PSEUDO else token)
        row += token == PSEUDO

    def widened(name: str, x: Any) -> Any:
        if getattr(x, "shape", ()) not in (ids.shape, (1, ids.shape[1])):
            if name in _MASKS and x is not None:
                raise ValueError(f"'{name}' of '{layer.path or 'the model'}' has shape {jnp.shape(x)}: only [batch, length] can grow.")
            return x
        x = jnp.broadcast_to(jnp.asarray(x), ids.shape)
        if name in _MASKS:
            return plan.widen(x, jnp.ones(len(tokens), x.dtype))
        if name in _TYPES:
            return plan.widen(x, jnp.zeros(len(tokens), x.dtype))
        if name in _POSITIONS:
            return plan.positions(x)
        raise ValueError(
            f"'{name}' of '{layer.path or 'the model'}' has an entry for each token, and what it says of a prompt's tokens is not known. "
            f"Known are {', '.join(sorted(_MASKS | _TYPES | _POSITIONS))}."
        )

    keywords = {name: widened(name, x) for name, x in layer.keywords.items()}
    if keywords.get("cache_length") is not None:
        keywords["cache_length"] += len(tokens)
    others = [widened(name, x) for name, x in named.items()]
    out = layer(plan.widen(ids, jnp.array(tokens, jnp.int32)), *others, **keywords)
    whole = ids.shape[1] + len(tokens)
    cut = lambda x: plan.cut(x, causal=bool(causal)) if getattr(x, "ndim", 0) == 3 and x.shape[:2] == (len(ids), whole) else x
    return jax.tree.map(cut, out)


class _Plan(NamedTuple):
    """Where the tokens of each text and those put in stand in the longer text."""

    before: Int[Array, "#batch blocks"]  # the token of the text that each block stands before
    moved: Int[Array, "#batch length"]  # place of each token of the text
    placed: Int[Array, "#batch new"]  # place of each token put in
    counts: tuple[int, ...]  # tokens of each block
    at: int | None  # the one place where all of them stand in every text; None if it differs

    def widen(self, x: Shaped[Array, "batch length"], new: Shaped[Array, "... new"]) -> Shaped[Array, "batch longer"]:
        """Put in one entry for each new token."""
        new = jnp.broadcast_to(new, (len(x), self.placed.shape[1]))
        if self.at is not None:
            return jnp.concatenate([x[:, : self.at], new, x[:, self.at :]], axis=1)
        order = jnp.argsort(jnp.concatenate([self.moved, self.placed], axis=1), axis=1)
        return jnp.take_along_axis(jnp.concatenate([x, new], axis=1), order, axis=1)

    def positions(self, x: Int[Array, "batch length"]) -> Int[Array, "batch longer"]:
        """Positions that count the new tokens."""
        after = jnp.concatenate([x, x[:, -1:] + 1], axis=1)  # of the token that follows; behind the last one, the next position
        start = jnp.take_along_axis(after, jnp.broadcast_to(self.before, (len(x), len(self.counts))), axis=1)
        passed = self.placed - jnp.repeat(self.before, jnp.array(self.counts), axis=1, total_repeat_length=sum(self.counts))
        new = jnp.repeat(start, jnp.array(self.counts), axis=1, total_repeat_length=sum(self.counts)) + passed
        return self.widen(x + (self.moved - jnp.arange(x.shape[1])[None]), new)

    def cut(self, x: Float[Array, "batch longer width"], *, causal: bool) -> Float[Array, "batch length width"]:
        """Leave the new tokens out. In a causal model the last of those behind a token is what says how the text goes on from there."""
        if self.at == 0 or (self.at is not None and not causal):
            return jnp.concatenate([x[:, : self.at], x[:, self.at + sum(self.counts) :]], axis=1)
        places = jnp.broadcast_to(self.moved, (len(x), self.moved.shape[1]))
        if causal:
            places = jnp.concatenate([places[:, 1:] - 1, jnp.full((len(x), 1), x.shape[1] - 1)], axis=1)
        take = lambda rows, places: rows.at[places].get(indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")
        return jax.vmap(take)(x, places)


def _plan(inserted: tuple[Block, ...], ids: Int[Array, "batch length"], mask: Any, edges: Sequence[int]) -> _Plan:
    length, counts = ids.shape[1], tuple(len(block.tokens) for block in inserted)
    # In front of everything it does not matter where padding stands, and without padding all texts are alike.
    alike = all(block.place == "start" for block in inserted) and (mask is None or edges[0] == 0)
    real = jnp.ones((1, length), bool) if alike else jnp.broadcast_to(True if mask is None else jnp.asarray(mask) != 0, ids.shape)
    before = jnp.stack([_place(block.place, ids, real, edges) for block in inserted], axis=1)
    counted = jnp.array(counts)[None, None]
    moved = jnp.arange(length)[None] + jnp.sum(counted * (before[:, None] <= jnp.arange(length)[None, :, None]), axis=2)
    order = jnp.arange(len(counts))
    earlier = (before[:, None] < before[:, :, None]) | ((before[:, None] == before[:, :, None]) & (order[None] < order[:, None])[None])
    starts = before + jnp.sum(counted * earlier, axis=2)
    placed = jnp.concatenate([starts[:, i, None] + jnp.arange(n)[None] for i, n in enumerate(counts)], axis=1)
    return _Plan(before, moved, placed, counts, min(edges[0], length) if alike else None)


def _place(
    place: Place, ids: Int[Array, "batch length"], real: Bool[Array, "#batch length"], edges: Sequence[int]
) -> Int[Array, " #batch"]:
    """The token of each text that a block stands before; the length, behind the last one."""
    stop = real.shape[1] - jnp.argmax(real[:, ::-1], axis=1)
    start = jnp.minimum(jnp.argmax(real, axis=1) + edges[0], stop)
    end = jnp.maximum(stop - edges[1], start)
    if isinstance(place, str):
        return start if place == "start" else end
    side, token = place
    found = (ids == token) & real
    # A text that was cut before its anchor has the block at its end.
    return jnp.where(found.any(1), jnp.argmax(found, axis=1) + (side == "after"), end)

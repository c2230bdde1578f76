"""The middleware of a prompt: what happens around the body of a model and around its word embedding.

The *body*, the module that takes the token ids, is run on the longer text: its ids, masks and positions become longer, and its outputs
are cut back to the tokens of the text. So heads, losses, labels and callers never see the inserted tokens.

A row of the prompt is named by an id beyond the vocabulary. The *word embedding* answers such an id with the row. Everything in between
(positions, causal masks, caches) follows from ids and mask by the model's own rules.

A text may hold an id that is no word, by mistake. It must not become a row: on its way into the longer text it is replaced by `NO_WORD`,
which no embedding has a row for. Where the ids are known it is an error.
"""

import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Shaped

from jpeft.additive.prompts.grown_outputs import cut_outputs, output_shapes
from jpeft.additive.prompts.insertion_plan import InsertionPlan, plan_insertion
from jpeft.additive.prompts.prompt_site import PromptSite
from jpeft.additive.prompts.template import PSEUDO, TokenBlock
from jpeft.core.layer import Layer
from jpeft.tree.adapters import ADDED

# Names under which bodies take inputs with one entry for each token.
MASKS, TOKEN_TYPES, POSITIONS = {"attention_mask", "mask", "padding_mask"}, {"token_type_ids"}, {"position_ids", "positions"}
KNOWN = MASKS | TOKEN_TYPES | POSITIONS

# The largest id: the lookup of an embedding gives NaN for it.
NO_WORD = int(np.iinfo(np.int32).max)


def first_row_id(layer: Layer, site: PromptSite) -> int:
    """The id of a prompt's first row. The ids of the words come first, then the rows of the prompts closer to the layer, then its own."""
    inner = [leaves[ADDED].get("site") for leaves in layer.inner_middleware if ADDED in leaves]
    return site.vocabulary + sum(other.rows for other in inner if isinstance(other, PromptSite))


# --- the word embedding ---------------------------------------------------------------------------------------------------------------


def look_up(layer: Layer, inputs: tuple[Any, ...], site: PromptSite, prompt: Float[Array, "*batch rows width"]) -> Any:
    """Run the word embedding; an id of a row gives the row of the prompt, which all texts have in common or each has its own.

    Raises:
      ValueError: for another number of texts than of prompts.
    """
    ids, *rest = inputs
    first = first_row_id(layer, site)
    is_row = (ids >= first) & (ids < first + site.rows)
    words = layer(jnp.where(is_row, 0, ids), *rest)  # [..., width]; ids beyond the vocabulary must not reach the table
    # The index `rows` is out of range and gives zeros, so a word sends no gradient to any row.
    index = jnp.where(is_row, ids - first, site.rows)
    take = lambda prompt, index: _take_rows(prompt, index, words.dtype)
    if prompt.ndim == 2:
        rows: Any = take(prompt, index)  # [..., width]
    elif prompt.shape[:-2] == ids.shape[:1]:
        rows = jax.vmap(take)(prompt, index)
    else:
        raise ValueError(f"'{layer.path}' is given {ids.shape[0]} texts, and there are prompts for {len(prompt)}.")
    return jnp.where(is_row[..., None], rows, words)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_rows(prompt: Float[Array, "rows width"], index: Int[Array, "*ids"], dtype: Any) -> Float[Array, "*ids width"]:
    """Rows of the prompt in another dtype, zeros for an index that is out of range."""
    return jnp.take(prompt.astype(dtype), index, axis=0, mode="fill", fill_value=0)


def _take_forward(prompt: jax.Array, index: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    return _take_rows(prompt, index, dtype), (prompt, index)


def _take_backward(dtype: Any, kept: Any, gradient: Float[Array, "*ids width"]) -> tuple[jax.Array, None]:
    # Summed over the batch in the prompt's own dtype, which is wider as a rule, without a wider copy of what is summed.
    prompt, index = kept
    is_row = jax.nn.one_hot(index, len(prompt), dtype=dtype)  # [*ids, rows]
    batch = tuple(range(index.ndim))
    total = jax.lax.dot_general(is_row, gradient, ((batch, batch), ((), ())), precision="highest", preferred_element_type=prompt.dtype)
    return total, None


_take_rows.defvjp(_take_forward, _take_backward)


# --- the body -------------------------------------------------------------------------------------------------------------------------


def run_on_longer_text(layer: Layer, inputs: tuple[Any, ...], site: PromptSite, blocks: tuple[TokenBlock, ...]) -> Any:
    """Run the body on the longer text, and cut its outputs back to the tokens of the text.

    Raises:
      ValueError: if the first input is not [batch, length] token ids, or if it is not known how to lengthen another input.
    """
    ids, first_row = _token_ids(inputs, layer.path, site), first_row_id(layer, site)
    if layer.cached:  # an earlier call has put the inserted tokens into the cache
        return layer(_known_ids(ids, site, NO_WORD), *inputs[1:])
    # A prompt around this one has put its rows in already; their ids follow those of this prompt.
    ids = _known_ids(ids, site, first_row + site.rows)
    names = [*layer.names[: len(inputs)], *(f"input {i}" for i in range(len(layer.names), len(inputs)))]
    others = dict(zip(names[1:], inputs[1:]))
    plan = plan_insertion(blocks, ids, _text_mask({**others, **layer.keywords}, ids.shape, layer.path, site), site.edges)
    new_ids = _inserted_ids(blocks, first_row)

    keywords = {name: _lengthen_input(plan, ids.shape, name, x) for name, x in layer.keywords.items()}
    if keywords.get("cache_length") is not None:
        keywords["cache_length"] += len(new_ids)  # callers ask for the slots of the text alone
    longer = (plan.lengthen(ids, new_ids), *(_lengthen_input(plan, ids.shape, name, x) for name, x in others.items()))
    unknown = {name: x for name, x in {**others, **layer.keywords}.items() if name not in KNOWN and ids.shape[1] in _sizes(x)}
    if unknown and output_shapes(layer, longer, keywords) is None:
        _refuse_input(*next(iter(unknown.items())), ids.shape, layer.path, site)
    out = layer(*longer, **keywords)
    shorten = functools.partial(plan.shorten, causal=site.causal)
    return cut_outputs(layer, (ids, *inputs[1:]), layer.keywords, out, longer[0].shape, shorten)


def _token_ids(inputs: tuple[Any, ...], path: str, site: PromptSite) -> Int[Array, "batch length"]:
    """The first input of the body, if it holds token ids."""
    if not inputs or jnp.ndim(inputs[0]) != 2 or not jnp.issubdtype(jnp.result_type(inputs[0]), jnp.integer):
        got = f"{jnp.result_type(inputs[0])}{list(jnp.shape(inputs[0]))}" if inputs else "nothing"
        parts = site.module.split("/")
        others = [repr(body) for i in range(len(parts)) if (body := "/".join(parts[:i])) != path]
        hint = f"Name the module that takes the ids: body={' or body='.join(others)}" if others else "Its first input must be the ids"
        raise ValueError(
            f"Tokens are put in where a model takes token ids [batch, length], but '{path or 'the model'}' was given {got} first. {hint}."
        )
    return jnp.asarray(inputs[0], jnp.int32)


def _known_ids(ids: Int[Array, "batch length"], site: PromptSite, others_from: int) -> Int[Array, "batch length"]:
    """The ids of a text, with `NO_WORD` in place of those that are neither words nor, from `others_from` on, rows of other prompts.

    Raises:
      ValueError: for such an id, where the ids are not traced.
    """
    known = ((ids >= 0) & (ids < site.vocabulary)) | (ids >= others_from)
    if not isinstance(known, Tracer) and not known.all():
        raise ValueError(
            f"The text holds the token id {np.asarray(ids)[~np.asarray(known)][0]}, and '{site.table}' has {site.vocabulary} rows, for the "
            f"ids 0 to {site.vocabulary - 1}. Does the tokenizer belong to the model?"
        )
    return jnp.where(known, ids, NO_WORD)


def _text_mask(named: dict[str, Any], shape: tuple[int, ...], path: str, site: PromptSite) -> Shaped[Array, "#batch length"] | None:
    """The mask of the body's inputs that marks padding by zeros; None if there is none."""
    masks = {name: x for name, x in named.items() if name in MASKS and x is not None}
    for name, x in masks.items():
        if not _for_each_token(x, shape):
            _refuse_input(name, x, shape, path, site)
    return jnp.asarray(next(iter(masks.values()))) if masks else None


def _for_each_token(x: Any, shape: tuple[int, ...]) -> bool:
    """Whether an input has an entry for each token, for all texts or for each text."""
    return getattr(x, "shape", ()) in (shape, (1, shape[1]))


def _sizes(x: Any) -> set[int]:
    """The sizes of all axes of an input, or of the arrays in it."""
    return {size for leaf in jax.tree.leaves(x) for size in getattr(leaf, "shape", ())}


def _inserted_ids(blocks: tuple[TokenBlock, ...], first_row: int) -> Int[Array, " new"]:
    """The ids of all inserted tokens; the pseudo tokens are numbered from `first_row` on."""
    ids, row = [], first_row
    for token in (token for block in blocks for token in block.tokens):
        ids.append(row if token == PSEUDO else token)
        row += token == PSEUDO
    return jnp.array(ids, jnp.int32)


def _lengthen_input(plan: InsertionPlan, shape: tuple[int, ...], name: str, x: Any) -> Any:
    """An input of the body besides the ids: longer if it is known to have an entry for each token, else as it is."""
    if name not in KNOWN or not _for_each_token(x, shape):
        return x
    x, new = jnp.broadcast_to(jnp.asarray(x), shape), plan.new_indices.shape[1]
    if name in MASKS:
        return plan.lengthen(x, jnp.ones(new, x.dtype))
    if name in TOKEN_TYPES:
        return plan.lengthen(x, jnp.zeros(new, x.dtype))
    return plan.lengthen_positions(x)


def _refuse_input(name: str, x: Any, shape: tuple[int, ...], path: str, site: PromptSite) -> NoReturn:
    """Refuse an input that goes by the text, and that nobody can lengthen.

    Raises:
      ValueError: always.
    """
    where = path or "the model"
    if _for_each_token(x, shape):
        raise ValueError(
            f"'{name}' of '{where}' has an entry for each token, and what it says of a prompt's tokens is not known. "
            f"Known are {', '.join(sorted(KNOWN))}."
        )
    # Whoever calls the body has made it, of the text without the prompt.
    parts = path.split("/") if path else []
    around = " or ".join(f"body={'/'.join(parts[:i])!r}" for i in reversed(range(len(parts))))
    way_out = f"Put the prompt in where it is made, at a module around '{path}': {around}" if around else "Give one of that shape"
    shapes = ", ".join(str(leaf.shape) for leaf in jax.tree.leaves(x) if hasattr(leaf, "shape"))
    raise ValueError(f"'{name}' of '{where}' has shape {shapes}: only [batch, length] can grow with the text. {way_out}.")

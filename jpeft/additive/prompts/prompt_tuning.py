"""Prompt tuning: trained embeddings put into the text, the model frozen."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.additive.prompts import insertion
from jpeft.additive.prompts.insertion import EMBEDDING, PSEUDO, Block, Site
from jpeft.method import ADDED, Method, factory, with_head

INITS = ("vocab", "uniform", "tokens", "labels")
SKIP = 2000  # ids in front of the words: BERT's vocabularies begin with a thousand unused ones and as many characters and word pieces
WHY_NO_MERGE = "a prompt lengthens the text, which no weight of the base can take up; keep using it through jpeft.wrap"


@factory
def prompt_tuning(
    *,
    length: int | None = None,
    init: str = "vocab",
    sample: int = 5000,
    tokens: tuple[int, ...] | None = None,
    labels: tuple[tuple[int, ...], ...] | None = None,
    template: tuple[Any, ...] | None = None,
    edges: tuple[int, int] | None = None,
    causal: bool | None = None,
    embedding: str = EMBEDDING,
    body: str | None = None,
    head: str | None = "auto",
) -> Method:
    r"""Prompt tuning: the model reads ``[P; E(x)]``, with trained P of l rows in front of the embeddings of the text.

    P stands behind [CLS], so classification reads the true one, and in front of all in a decoder. Its positions count, every token sees it,
    and outputs are those of the text's own tokens: logits, labels, masks and caches keep their lengths. A cache holds P once, from the
    call that makes it, and gets l more slots than were asked for.

    Args:
      length: Rows l. 20 by default, or as many as `tokens` or `template` have; above 20 the paper gains little, above 100 nothing.
      init: Where P starts. "vocab": embeddings of l different tokens drawn from `sample` common ones. "uniform": U[-0.5, 0.5]. "tokens":
        the embeddings of `tokens`, a text's ids, repeated or cut to l. "labels": the mean embedding of each class label's tokens, further
        rows as in "vocab"; best in the paper.
      sample: How many tokens "vocab" draws from: 5,000 as in the paper, those with the ids from 2,000 on. The paper takes the first,
        which in T5 are common words; in BERT's vocabularies the first thousand stand for nothing and the next are characters. From 0 on
        where the vocabulary has fewer than 2,000 + `sample` rows.
      tokens: Token ids of the text to start from. On jpeft's command line it may be the text itself.
      labels: Token ids of each class label. Where they are left out, they are the `stats` of `jpeft.apply`, and the trainer knows them.
      template: Where the rows stand, instead of all at the start: see `jpeft.p_tuning`.
      edges: How many tokens of each text stay outside of the prompt, in front of the start and behind the end. None is (1, 1) for encoders,
        whose texts are [CLS] ... [SEP], and else (0, 0). With (1, 0) the prompt of a Llama stands behind its BOS.
      causal: Whether the model looks back only. What it says at a token is then read behind the rows that a template puts in between that
        token and the next. None is False for encoders and else True; with all rows at the start it makes no difference.
      embedding: The table of word embeddings, a regex over paths.
      body: Path of the module that takes the token ids and whose outputs [batch, positions, width] are cut back to the text; "" is the
        whole model, None the module that holds the embedding.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` without a merge. ``jpeft.apply(..., stats=given)`` starts from a given prompt: an array (l, d), or the adapter that a
      prompt was trained in.

    Raises:
      ValueError: for options that do not fit together; from `init`, if there is no such embedding, or no such token in the template, or too
        few tokens to draw from, or the given prompt does not fit; from the first call, if the body is given no ids, or inputs of unknown
        meaning for each token.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"wte": {"embedding": jnp.ones((50, 8))}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method="prompt_tuning", length=3).adapter)
    {'wte': {'+': {'prompt': (3, 8)}}}

    It works for any linen model that embeds its ids by `nn.Embed` and takes its lengths from them, scanned and rematerialised ones too. A
    foreign classifier that pools over all positions pools over P as well. A model whose cache is made beforehand, filled with zeros, is
    taken to have the prompt in it already.

    Reference: Lester, Al-Rfou and Constant, The Power of Scale for Parameter-Efficient Prompt Tuning, 2021,
    https://arxiv.org/abs/2104.08691.

    Differs from the paper in the tokens that "vocab" draws from (see `sample`); from the authors' code, whose "uniform" is U[0, 0.5); and
    from HF PEFT: there P starts from N(0, 1), ten times an embedding and more, which often fails to learn, draws with replacement from all
    of the vocabulary, stands in front of [CLS], whose place a classifier then reads, and stays in the logits of a language model.
    """
    if init not in INITS:
        raise ValueError(f"init={init!r} is not one of {', '.join(map(repr, INITS))}.")
    for name, given, wants in (("tokens", tokens, init == "tokens"), ("labels", labels, init == "labels")):
        if given is not None and not wants:
            raise ValueError(f"{name} are what init={name!r} starts from, and init is {init!r}.")
    if init == "tokens" and not tokens:
        raise ValueError("init='tokens' needs tokens=, the token ids of the text to start from.")
    if sample < 1:
        raise ValueError(f"sample={sample} must be at least 1.")
    placed = layout(len(tokens) if tokens and length is None and template is None else length, template)
    count = pseudo_tokens(placed)
    edges = insertion.checked_edges(edges)

    def find(params: tree.Params) -> Site:
        return insertion.site(params, placed, embedding=embedding, body=body, edges=edges, causal=causal, head=head)

    def start(key: jax.Array, params: tree.Params, how: str, stats: Any) -> Float[Array, "l d"]:
        site = find(params)
        if (prompt := given_prompt(stats)) is not None:
            if prompt.shape != (count, site.width):
                raise ValueError(f"The given prompt has the shape {prompt.shape} where {(count, site.width)} is needed.")
            return jnp.array(prompt, jnp.float32)
        if how == "uniform":
            return jax.random.uniform(key, (count, site.width), minval=-0.5, maxval=0.5)
        table = tree.flatten(params)[site.table]
        if how == "tokens":
            assert tokens is not None
            return _rows(table, [tokens[i % len(tokens)] for i in range(count)])
        means = _label_means(table, labels if labels is not None else stats, count) if how == "labels" else []
        return jnp.concatenate([*means, _drawn(key, table, sample, count - len(means))])

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        path = f"{find(params).module}/{ADDED}/prompt"
        return tree.unflatten({path: start(tree.key_for(key, path), params, init, stats)})

    def bind_fn(params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        del rng
        site = find(params)
        return insertion.bind(params, adapter, site, tree.flatten(adapter)[f"{site.module}/{ADDED}/prompt"])

    def shapes_fn(params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        del adapter
        like = prompt_tuning(length=count, init="uniform", embedding=embedding, body=body, head=head)
        return jax.eval_shape(like.init, jax.random.key(0), params)

    needs_labels = init == "labels" and labels is None
    return Method(
        init=with_head(init_fn, head),
        bind=bind_fn,
        call=insertion.call(placed),
        merge=refuse_merge,
        needs="labels" if needs_labels else None,
        shapes=shapes_fn if needs_labels else None,
    )


def layout(length: int | None, template: tuple[Any, ...] | None) -> tuple[Block, ...]:
    """The blocks of a template, or of `length` pseudo tokens (20 if None) at the start.

    Raises:
      ValueError: for a length below 1 or other than the template's, or a template without pseudo tokens.
    """
    if length is not None and length < 1:
        raise ValueError(f"length={length} must be at least 1.")
    if template is None:
        return insertion.blocks((("start", 20 if length is None else length),))
    placed = insertion.blocks(template)
    count = pseudo_tokens(placed)
    if not count:
        raise ValueError("The template has no pseudo tokens, so there is nothing to train: jpeft.hard_prompt puts in plain tokens.")
    if length not in (None, count):
        raise ValueError(f"length={length}, but the template has {count} pseudo tokens; leave length out.")
    return placed


def pseudo_tokens(placed: tuple[Block, ...]) -> int:
    """How many of the tokens are pseudo tokens."""
    return sum(token == PSEUDO for block in placed for token in block.tokens)


def refuse_merge(params: tree.Params, adapter: tree.Adapter) -> tree.Params:
    """The merge of all prompts.

    Raises:
      ValueError: always, with the reason.
    """
    del params, adapter
    raise ValueError(f"Cannot merge: {WHY_NO_MERGE}.")


def given_prompt(stats: Any) -> Any:
    """The prompt in what `jpeft.apply` was given: an array, or an adapter that holds one; None if it is something else."""
    if getattr(stats, "ndim", 0) == 2:
        return stats
    leaves = tree.flatten(stats) if isinstance(stats, dict) else {}
    found = [leaf for path, leaf in leaves.items() if path.endswith(f"/{ADDED}/prompt")]
    return found[0] if found else None


def _drawn(key: jax.Array, table: Float[Array, "vocab d"], sample: int, count: int) -> Float[Array, "l d"]:
    among, skip = min(sample, len(table)), SKIP if len(table) >= SKIP + sample else 0
    if count > among:
        raise ValueError(f"{count} different tokens cannot be drawn from {among} of the vocabulary: raise sample.")
    return _rows(table, skip + jax.random.choice(key, among, (count,), replace=False))


def _label_means(table: Float[Array, "vocab d"], labels: Any, count: int) -> list[Float[Array, "1 d"]]:
    if not labels or not all(len(ids) for ids in labels):
        raise ValueError("init='labels' needs the token ids of each class label: labels=((2204,), (2919, 102)), or as stats=.")
    if len(labels) > count:
        raise ValueError(f"There are {len(labels)} labels and only {count} rows to start from them: raise length.")
    return [_rows(table, list(ids)).mean(0, keepdims=True) for ids in labels]


def _rows(table: Float[Array, "vocab d"], ids: Any) -> Float[Array, "l d"]:
    if isinstance(ids, list) and (wrong := [i for i in ids if not 0 <= i < len(table)]):
        raise ValueError(f"There is no token {wrong[0]}: the vocabulary has {len(table)}.")
    return jnp.take(jnp.asarray(table), jnp.asarray(ids), axis=0).astype(jnp.float32)

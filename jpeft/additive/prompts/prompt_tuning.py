"""Prompt tuning: trained embeddings inserted into the text, the model frozen."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.additive.prompts.prompt_method import PromptMethod
from jpeft.additive.prompts.prompt_site import PromptSite
from jpeft.additive.prompts.starting_rows import draw_embeddings, mean_embeddings, token_embeddings
from jpeft.additive.prompts.template import TokenBlock, trained_blocks
from jpeft.core.method import with_head
from jpeft.core.options import Count, CountOrZero, Length, option
from jpeft.core.statistics import LabelTokens, Prompt, Statistic, find


class PromptTuning(PromptMethod):
    r"""Prompt tuning: the model reads ``[P; E(x)]``, with l trained rows P in front of the embeddings of the text.

    P stands behind [CLS] in an encoder, so that classification reads the true [CLS], and in front of everything in a decoder. The rows
    count as positions, and every token may attend to them. The outputs are those of the text's tokens: logits, labels, masks and caches
    keep their lengths. A cache holds P once, from the call that makes the cache; l slots are added to those asked for.

    Args:
      length: Rows l: 20 by default, or as many as `tokens` or `template` have. Above 20 the paper gains little, above 100 nothing.
      init: Where P starts. "vocab": the embeddings of l different tokens, drawn from `sample` common ones. "uniform": U[-0.5, 0.5].
        "tokens": the embeddings of `tokens`, repeated or cut to l rows. "labels": the mean embedding of each class label's tokens, and
        further rows as in "vocab"; the paper finds it best.
      sample: How many tokens "vocab" draws from: those with ids from 2,000 on, or from 0 on if the vocabulary has fewer than
        2,000 + `sample` tokens. The paper takes 5,000, too, from 0 on; in BERT's vocabularies the first 2,000 are unused or characters.
      tokens: Token ids of the text to start from. jpeft's command line takes the text itself.
      labels: Token ids of each class label. If left out, `jpeft.apply` must be given them as `stats`; the trainer does so.
      template: Which rows and tokens are inserted, and where, instead of all at the start: see `jpeft.p_tuning`.
      edges: How many tokens of each text stay outside of the prompt: in front of the start, and behind the end. None is (1, 1) for
        encoders, whose texts are [CLS] ... [SEP], and (0, 0) otherwise. With (1, 0) the prompt of a Llama stands behind BOS.
      causal: Whether the model reads from left to right only. If so, and a block stands behind a token, the output at the block's last
        token counts as the token's own. None is False for encoders and True otherwise.
      embedding: The table of word embeddings, a regex over paths.
      body: Path of the module that takes the token ids and whose outputs [batch, positions, width] are cut back to the text. "" is the
        whole model, None the module that holds the embedding.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` without a merge. ``jpeft.apply(..., stats=given)`` starts from a given prompt: `jpeft.stats.Prompt`, an array [l, d], or
      the adapter that a prompt was trained in.

    Raises:
      ValueError: for options that do not fit together; from `init`, if the model has no such embedding, if the vocabulary lacks a token or
        has too few tokens to draw from, or if the given prompt has another shape; from the first call, if the body is not given token ids,
        or is given other inputs for each token whose meaning is not known.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"wte": {"embedding": jnp.ones((50, 8))}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method="prompt_tuning", length=3).adapter)
    {'wte': {'+': {'prompt': (3, 8)}}}

    It works for any linen model that embeds its ids by `nn.Embed` and takes its lengths from them, scanned and rematerialised ones too. A
    foreign classifier that pools over all positions pools over P as well. If a cache was made by an earlier call, P is taken to be in it.

    Reference: Lester, Al-Rfou and Constant, The Power of Scale for Parameter-Efficient Prompt Tuning, 2021,
    https://arxiv.org/abs/2104.08691.

    Differs from the paper in the tokens that "vocab" draws from (see `sample`), and from the authors' code, whose "uniform" is U[0, 0.5).
    HF PEFT starts P from N(0, 1), ten times an embedding and more, which often fails to learn; draws with replacement from the whole
    vocabulary; puts P in front of [CLS], so that a classifier reads P; and leaves P in the logits of a language model.
    """

    length: Length | None = None
    initializer: Literal["vocab", "uniform", "tokens", "labels"] = option(default="vocab", alias="init")
    sample: Count = 5000
    tokens: Sequence[CountOrZero] | None = None
    label_tokens: Sequence[Sequence[CountOrZero]] | None = option(default=None, alias="labels")

    name = "prompt_tuning"
    summary = "trained embeddings in front of the text's own"
    learning_rate = 1e-2

    def check(self) -> None:
        """Refuse options of another `init`, and a template that does not fit the length."""
        for name, given in (("tokens", self.tokens), ("labels", self.label_tokens)):
            if given is not None and self.initializer != name:
                raise ValueError(f"{self.name}: {name}= is for init={name!r}, and init is {self.initializer!r}.")
        if self.initializer == "tokens" and not self.tokens:
            raise ValueError(f"{self.name}: init='tokens' needs tokens=, the token ids of the text to start from.")
        super().check()

    @property
    def blocks(self) -> tuple[TokenBlock, ...]:
        """The template's blocks, or the rows at the start."""
        length = len(self.tokens) if self.tokens and self.length is None and self.template is None else self.length
        return trained_blocks(length, self.template)

    def prompt(self, adapter: tree.Adapter, site: PromptSite) -> Float[Array, "rows width"]:
        """P, as it is in the adapter."""
        return tree.flatten(adapter)[site.prompt_path]

    @property
    def requires_stats(self) -> tuple[type[Statistic], ...]:
        """The tokens of the labels, where they are needed and no option gives them."""
        return (LabelTokens,) if self.initializer == "labels" and self.label_tokens is None else ()

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """P at its start, and the task head."""
        site = self.site(params)
        given = find(stats, Prompt)
        key = tree.key_for(key, site.prompt_path)
        rows = self._start(key, params, site, stats) if given is None else _check_shape(given, site)
        return with_head({site.prompt_path: rows}, params, self.head)

    def _start(self, key: jax.Array, params: tree.Params, site: PromptSite, stats: Any) -> Float[Array, "rows width"]:
        if self.initializer == "uniform":
            return jax.random.uniform(key, (site.rows, site.width), minval=-0.5, maxval=0.5)
        table = jnp.asarray(tree.flatten(params)[site.table])
        if self.tokens:
            return token_embeddings(table, [self.tokens[i % len(self.tokens)] for i in range(site.rows)])
        means = mean_embeddings(table, self._labels(stats), site.rows) if self.initializer == "labels" else []
        return jnp.concatenate([*means, draw_embeddings(key, table, self.sample, site.rows - len(means))])

    def _labels(self, stats: Any) -> Sequence[Sequence[int]]:
        """The token ids of each label, from the option or the statistics; empty if neither gives them."""
        if self.label_tokens is not None:
            return self.label_tokens
        given = find(stats, LabelTokens)
        return () if given is None else given.ids

    def expected(self, params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        """The shapes of an adapter. They do not depend on the labels, which are not known when one is read from disk."""
        if not self.requires_stats:
            return super().expected(params, adapter)
        return self.replace(init="uniform").expected(params, adapter)


def _check_shape(given: Prompt, site: PromptSite) -> Float[Array, "rows width"]:
    if given.rows.shape != (site.rows, site.width):
        raise ValueError(f"The given prompt has the shape {given.rows.shape} where {(site.rows, site.width)} is needed.")
    return jnp.array(given.rows, jnp.float32)


prompt_tuning = PromptTuning

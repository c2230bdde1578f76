"""Hard prompts: words inserted into every text. Only a task head is trained, so they are the baseline of all other prompts."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.additive.prompts.prompt_method import PromptMethod
from jpeft.additive.prompts.prompt_site import PromptSite
from jpeft.additive.prompts.template import TokenBlock, count_pseudo_tokens, parse_template
from jpeft.core.method import with_head
from jpeft.core.options import CountOrZero


class HardPrompt(PromptMethod):
    r"""A hard prompt: the model reads ``[E(p); E(x)]``, with words p of its vocabulary in every text x. It has no parameters.

    The words are inserted as token ids, at the places where `jpeft.prompt_tuning` inserts its rows. Outputs, masks and caches are those of
    the text alone. Without `tokens` and `template` the text stays as it is, and only the head of the frozen base is trained.

    Args:
      tokens: Token ids at the start of each text: behind [CLS], or in front of everything in a decoder. jpeft's command line takes text.
      template: Blocks of token ids at other places: see `jpeft.p_tuning`.
      edges: As in `jpeft.prompt_tuning`.
      causal: As in `jpeft.prompt_tuning`.
      embedding: As in `jpeft.prompt_tuning`; the module that takes the ids is found by it.
      body: As in `jpeft.prompt_tuning`.
      head: Task head to train along: "auto", a regex, or None. Without a head the adapter is empty.

    Returns:
      A `Method` without a merge. A soft prompt can start from the same words: ``jpeft.prompt_tuning(init="tokens", tokens=...)``.

    Raises:
      ValueError: for both `tokens` and `template`, or a template with pseudo tokens; from `init`, for a token id beyond the vocabulary;
        otherwise as `jpeft.prompt_tuning`.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"wte": {"embedding": jnp.ones((50, 8))}}
    >>> jpeft.summary(jpeft.apply(params, method="hard_prompt", tokens=[7, 30, 2])).stored
    0

    A language model can also answer without any head, by the words of a verbaliser: see `jpeft.tasks.cloze.Cloze`.

    Reference: Schick and Schütze, Exploiting Cloze Questions for Few Shot Text Classification and Natural Language Inference, 2021,
    https://arxiv.org/abs/2001.07676. HF PEFT has no hard prompts.
    """

    tokens: Sequence[CountOrZero] = ()

    name = "hard_prompt"
    summary = "words put into every text, nothing trained but the head"
    learning_rate = 4e-3

    def check(self) -> None:
        """Refuse tokens beside a template, and pseudo tokens."""
        if self.tokens and self.template is not None:
            raise ValueError(
                f"hard_prompt: tokens={self.tokens} stand at the start of the text, and template= gives all tokens and their places: "
                "give one of them."
            )
        if count_pseudo_tokens(self.blocks):
            raise ValueError("The template has pseudo tokens, which something must train: use jpeft.prompt_tuning or jpeft.p_tuning.")

    @property
    def blocks(self) -> tuple[TokenBlock, ...]:
        """The template's blocks, or the tokens at the start."""
        if self.template is not None:
            return parse_template(self.template)
        return parse_template((("start", self.tokens),)) if self.tokens else ()

    def prompt(self, adapter: tree.Adapter, site: PromptSite) -> Float[Array, "rows width"] | None:
        """None: every inserted token is a word."""
        del adapter, site

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """The task head alone."""
        del key, stats
        if self.blocks:
            self.site(params)  # refuses a model without a place for the words
        return with_head({}, params, self.head)

    def bind(self, params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        """As for every prompt; without words, only the head is replaced."""
        return super().bind(params, adapter, rng=rng) if self.blocks else tree.graft(params, adapter)

    def merge(self, params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        """Refused, as for every prompt; without words, the base with the new head."""
        return super().merge(params, adapter) if self.blocks else tree.graft(params, adapter)


hard_prompt = HardPrompt

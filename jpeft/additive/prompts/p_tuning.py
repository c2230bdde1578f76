"""P-tuning: a prompt that a small network computes, at chosen places around the text."""

from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.additive.prompts.prompt_encoder import compute_prompt, init_encoder
from jpeft.additive.prompts.prompt_method import PromptMethod
from jpeft.additive.prompts.prompt_site import PromptSite
from jpeft.additive.prompts.prompt_tuning import prompt_tuning
from jpeft.additive.prompts.template import TokenBlock, trained_blocks
from jpeft.core.method import Method, with_head
from jpeft.core.options import Count, Length


class PTuning(PromptMethod):
    r"""P-tuning: ``T = {P[0:i], x, P[i:j], y, P[j:l]}`` with ``P = W_2 relu(W_1 BiLSTM(E) + b_1) + b_2``.

    The pseudo tokens of a template get the embeddings P. P is not trained itself: a network computes all rows together from a trained
    embedding E [l, d], so that neighbouring rows depend on each other. The model is frozen. `jpeft.fold` computes P once and leaves the
    network out; the result is an adapter of `jpeft.prompt_tuning` with the same template.

    Args:
      length: Pseudo tokens l at the start of the text, without a template; 20 by default.
      encoder: "lstm" is a bidirectional LSTM of two layers followed by an MLP of two; "mlp" is the MLP alone, which is faster. "none"
        has no network and P itself is trained, which is all that HF PEFT saves.
      hidden: Width of the LSTM in each direction. None is d/2, as in the authors' LAMA code; their few-shot code takes d.
      template: Blocks of tokens, as pairs of a place and tokens. Places are "start" and "end" of the text, and ("before", id) and
        ("after", id) the first token with that id; in a text without that id the block stands at the end. Tokens are a number of pseudo
        tokens, or a tuple of token ids in which -1 is a pseudo token and the others are real ones (anchors). The paper's template
        (3, 3, 3), for a text behind [MASK] = 103, is ``(("start", 3), (("after", 103), 3), ("end", 3))``.
      edges: As in `jpeft.prompt_tuning`: at "start" and "end", [CLS] and [SEP] stay outside.
      causal: As in `jpeft.prompt_tuning`.
      embedding: As in `jpeft.prompt_tuning`.
      body: As in `jpeft.prompt_tuning`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` without a merge, which folds.

    Raises:
      ValueError: for an unknown encoder, `hidden` without an LSTM, or a wrong template; otherwise as `jpeft.prompt_tuning`.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"wte": {"embedding": jnp.ones((50, 8))}}
    >>> peft = jpeft.apply(params, method="p_tuning", length=3)
    >>> peft.adapter["+"]["embedding"].shape, jax.tree.map(jnp.shape, jpeft.fold(peft).adapter)
    ((3, 8), {'wte': {'+': {'prompt': (3, 8)}}})

    Reference: Liu et al., GPT Understands, Too, 2021, https://arxiv.org/abs/2103.10385.

    Shapes are those of the authors' code, starting values those of torch (E from N(0, 1), all weights from U(±1/√n)). The paper reads its
    answer at a [MASK] in the text, by the language model's head; a task head works as well. HF PEFT puts all pseudo tokens in front of the
    text, takes an MLP of three layers and width d for each direction of the LSTM, and saves P alone, so that training cannot be continued.
    Here the adapter before `jpeft.fold` holds the network, and the folded one holds what HF PEFT saves.
    """

    length: Length | None = None
    encoder: Literal["lstm", "mlp", "none"] = "lstm"
    hidden: Count | None = None

    name = "p_tuning"
    summary = "trained embeddings around the text, made by an LSTM or MLP in training"
    learning_rate = 2e-2

    def check(self) -> None:
        """Refuse a width of the LSTM without an LSTM, and a template that does not fit the length."""
        if self.hidden is not None and self.encoder != "lstm":
            raise ValueError(f"p_tuning: hidden={self.hidden} is the width of the LSTM; it must be None for encoder={self.encoder!r}.")
        super().check()

    @property
    def blocks(self) -> tuple[TokenBlock, ...]:
        """The template's blocks, or the pseudo tokens at the start."""
        return trained_blocks(self.length, self.template)

    def prompt(self, adapter: tree.Adapter, site: PromptSite) -> Float[Array, "rows width"]:
        """P, computed by the network, which stands at the root of the adapter."""
        return compute_prompt(adapter[tree.ADDED]) if self.folds else tree.flatten(adapter)[site.prompt_path]

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """The network and its embedding at the root, and the task head."""
        site = self.site(params)
        if not self.folds:
            return self._without_network(site.rows).init(key, params, stats=stats)
        hidden = (self.hidden or max(site.width // 2, 1)) if self.encoder == "lstm" else None
        leaves = init_encoder(key, site.rows, site.width, hidden)
        return with_head({f"{tree.ADDED}/{path}": leaf for path, leaf in leaves.items()}, params, self.head)

    @property
    def folds(self) -> bool:
        """Only training needs the network."""
        return self.encoder != "none"

    def fold(self, params: tree.Params, adapter: tree.Adapter) -> tuple[Method, tree.Adapter]:
        """Prompt tuning with the computed prompt."""
        if not self.folds:
            return self, adapter
        site = self.site(params)
        rest = {path: leaf for path, leaf in tree.flatten(adapter).items() if not path.startswith(f"{tree.ADDED}/")}
        return self._without_network(site.rows), tree.unflatten(rest | {site.prompt_path: self.prompt(adapter, site)})

    def _without_network(self, rows: int) -> Method:
        """Prompt tuning with rows at the same places."""
        return prompt_tuning(
            length=rows if self.template is None else None,
            template=self.template,
            edges=self.edges,
            causal=self.causal,
            embedding=self.embedding,
            body=self.body,
            head=self.head,
        )


p_tuning = PTuning

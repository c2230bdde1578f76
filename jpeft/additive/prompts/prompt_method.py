"""The base of all prompts: methods that insert tokens into each text on its way into the model."""

import abc
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.additive.prompts.prompt_middleware import look_up, run_on_longer_text
from jpeft.additive.prompts.prompt_site import PromptSite, find_site
from jpeft.additive.prompts.template import TokenBlock
from jpeft.core.layer import Layer
from jpeft.core.method import Method
from jpeft.core.options import CountOrZero, NotEmpty, Pattern


class PromptMethod(Method):
    """A method that inserts tokens. A subclass defines which (`blocks`), their embeddings (`prompt`) and how these begin (`init`).

    Attributes:
      template: Which tokens are inserted and where; see `jpeft.p_tuning`.
      edges: How many tokens of each text stay outside of the prompt, at the start and at the end.
      causal: Whether the model reads from left to right only.
      embedding: The table of word embeddings: a role (`jpeft.layouts`), or a regex over paths.
      body: Path of the module that takes the token ids.
      head: Task head to train along: "auto", a regex, or None.
    """

    template: Annotated[Sequence[tuple[Any, Any]], NotEmpty()] | None = None
    edges: tuple[CountOrZero, CountOrZero] | None = None
    causal: bool | None = None
    embedding: Pattern = "@embedding"
    body: str | None = None
    head: Pattern | None = "auto"

    family = "additive"
    why_no_merge = "a prompt lengthens the text, which no weight of the base can take up; keep using it through jpeft.wrap"

    @property
    @abc.abstractmethod
    def blocks(self) -> tuple[TokenBlock, ...]:
        """The inserted tokens."""

    @abc.abstractmethod
    def prompt(self, adapter: tree.Adapter, site: PromptSite) -> Float[Array, "rows width"] | None:
        """The embeddings of the pseudo tokens; None for a prompt that has none."""

    def check(self) -> None:
        """Refuse a template that cannot be parsed."""
        _ = self.blocks

    def site(self, params: tree.Params) -> PromptSite:
        """Where the prompt enters the model.

        Raises:
          ValueError: if the model has no such place, or its vocabulary lacks one of the tokens.
        """
        return find_site(
            params,
            self.blocks,
            embedding=self.embedding,
            body=self.body,
            edges=self.edges,
            causal=self.causal,
            head=self.head,
        )

    def bind(self, params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        """Replace the head, and put the site beside the body, and site and prompt beside the word embedding."""
        del rng
        site = self.site(params)
        replaced, _, _ = tree.split(params, adapter)
        prompt = self.prompt(adapter, site)
        grafts: dict[str, Any] = {site.body: {tree.ADDED: {"site": site}}}
        if prompt is not None:
            grafts[site.module] = {tree.ADDED: {"site": site, "prompt": prompt}}
        return tree.put_grafts(tree.replace(params, replaced) if replaced else params, grafts)

    def goes_around(self, inputs: tuple[Any, ...], outputs: Any, leaves: dict[str, Any]) -> bool:
        """Whether a module's method takes token ids: a lookup gives an embedding for each, the body is given a text."""
        if not inputs or not jnp.issubdtype(jnp.result_type(inputs[0]), jnp.integer):
            return False
        if "prompt" in leaves:
            return getattr(outputs, "shape", None) == (*jnp.shape(inputs[0]), leaves["site"].width)
        return jnp.ndim(inputs[0]) == 2 and super().goes_around(inputs, outputs, leaves)

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """Look up rows in the word embedding, which alone has the prompt beside it; lengthen the text around the body."""
        del rng
        if layer.method == "attend":
            return layer(*inputs)  # the embedding as a classifier over words: rows of a prompt are no words
        own = leaves[tree.ADDED]
        if "prompt" in own:
            return look_up(layer, inputs, own["site"], own["prompt"])
        return run_on_longer_text(layer, inputs, own["site"], self.blocks)

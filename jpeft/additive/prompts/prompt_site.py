"""The site of a prompt: the two modules of a model that a prompt changes, found by the paths of the parameters."""

import dataclasses

import jax

from jpeft import layouts, tree
from jpeft.additive.prompts.template import PSEUDO, TokenBlock, count_pseudo_tokens
from jpeft.tree.head import not_head
from jpeft.tree.select import select


# A static node of the bound parameters: a pytree without leaves. Its numbers shape the computation, so they must be known while tracing.
# All of flax's lifted transforms (`nn.scan`, `nn.remat`, `nn.jit`, `nn.vmap`) hand such a node on unchanged; tests/test_prompt_site.py.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PromptSite:
    """Where and how one prompt enters one model.

    Attributes:
      table: Path of the word embedding's table, [vocabulary, width].
      body: Path of the module that takes the token ids; "" for the whole model.
      vocabulary: Number of words in the table.
      width: Size of an embedding.
      rows: Number of rows of the prompt, one for each pseudo token.
      edges: How many tokens of each text stay in front of an insertion at its start, and behind an insertion at its end.
      causal: Whether the model reads from left to right only.
    """

    table: str
    body: str
    vocabulary: int
    width: int
    rows: int
    edges: tuple[int, int]
    causal: bool

    @property
    def module(self) -> str:
        """Path of the module that owns the table."""
        return self.table.rpartition("/")[0]

    @property
    def prompt_path(self) -> str:
        """Path of the prompt in the adapter."""
        return f"{self.module}/{tree.ADDED}/prompt"


def find_site(
    params: tree.Params,
    blocks: tuple[TokenBlock, ...],
    *,
    embedding: str,
    body: str | None,
    edges: tuple[int, int] | None,
    causal: bool | None,
    head: str | None,
) -> PromptSite:
    """Find the word embedding and the body of a model.

    Args:
      params: The base.
      blocks: What is inserted.
      embedding: As the option of `jpeft.prompt_tuning`, like those that follow.
      body: Path of the body, or None for the module around the embedding.
      edges: None for what suits the family.
      causal: None for what suits the family.
      head: The task head, where no embedding is looked for.

    Raises:
      ValueError: if the embedding is not exactly one table, if the body is not around the embedding, or if the vocabulary lacks one of the
        inserted tokens or anchors.
    """
    tables = {path: leaf for path, leaf in not_head(params, head).items() if len(leaf.shape) == 2}
    found = select(tables, embedding, option="embedding", params=params)
    if len(found) > 1:
        raise ValueError(f"embedding={embedding!r} matches {', '.join(map(repr, found))}: name the one that embeds words.")
    table = found[0]
    if "/" not in table:
        raise ValueError(f"The embedding '{table}' is the whole model; a prompt needs a model around it that takes token ids.")
    vocabulary, width = tables[table].shape
    _check_tokens(blocks, vocabulary)
    # The texts of encoders begin with [CLS] and end with [SEP].
    encoder = (layout := layouts.detect(params)) is not None and layout.enclosed
    return PromptSite(
        table=table,
        body=_find_body(table, body),
        vocabulary=vocabulary,
        width=width,
        rows=count_pseudo_tokens(blocks),
        edges=edges or ((1, 1) if encoder else (0, 0)),
        causal=not encoder if causal is None else causal,
    )


def _find_body(table: str, body: str | None) -> str:
    """The path of the body: the given one, or else the module around the embedding module."""
    module = table.rpartition("/")[0]
    if body is None:
        around = module.split("/")[:-1]
        # Encoders keep their embeddings in a module `embeddings`, which adds positions. The body is the module around that one.
        return "/".join(around[:-1] if around[-1:] == ["embeddings"] else around)
    if body and not module.startswith(f"{body}/"):
        raise ValueError(f"body={body!r} does not contain the embedding '{table}'; '' names the whole model.")
    return body


def _check_tokens(blocks: tuple[TokenBlock, ...], vocabulary: int) -> None:
    """Refuse token ids, of anchors too, that the vocabulary does not have."""
    anchors = [block.place[1] for block in blocks if isinstance(block.place, tuple)]
    inserted = [token for block in blocks for token in block.tokens if token != PSEUDO]
    for token in [*anchors, *inserted]:
        if not 0 <= token < vocabulary:
            raise ValueError(f"There is no token {token}: the vocabulary has {vocabulary}, with the ids 0 to {vocabulary - 1}.")

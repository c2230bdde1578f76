"""Hard prompts: words put into every text, and nothing trained but a task head. What the others have to beat."""

from typing import Any

from jpeft import tree
from jpeft.additive.prompts import insertion
from jpeft.additive.prompts.insertion import EMBEDDING, PSEUDO, Site
from jpeft.additive.prompts.prompt_tuning import refuse_merge
from jpeft.method import Method, factory, with_head


@factory
def hard_prompt(
    *,
    tokens: tuple[int, ...] = (),
    template: tuple[Any, ...] | None = None,
    edges: tuple[int, int] | None = None,
    causal: bool | None = None,
    embedding: str = EMBEDDING,
    body: str | None = None,
    head: str | None = "auto",
) -> Method:
    r"""A hard prompt: the model reads ``[E(p); E(x)]``, with words p of its vocabulary in every text x. No parameters.

    The words are put in as ids, where `jpeft.prompt_tuning` puts its rows: outputs, masks and caches are those of the text alone. With
    neither `tokens` nor `template` the text stays as it is, and this is a frozen base with a trained head.

    Args:
      tokens: Token ids at the start of each text: behind [CLS], or in front of all in a decoder. On jpeft's command line it may be text.
      template: Blocks of token ids at other places: see `jpeft.p_tuning`.
      edges: As in `jpeft.prompt_tuning`.
      causal: As in `jpeft.prompt_tuning`.
      embedding: As in `jpeft.prompt_tuning`; it is how the module that takes the ids is found.
      body: As in `jpeft.prompt_tuning`.
      head: Task head to train along: "auto", a regex, or None. Without one the adapter is empty.

    Returns:
      A `Method` without a merge. Soft prompts start from the same words: ``jpeft.prompt_tuning(init="tokens", tokens=...)``.

    Raises:
      ValueError: for both `tokens` and `template`, or a template with pseudo tokens; from `init`, for an id beyond the vocabulary;
        otherwise as `jpeft.prompt_tuning`.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"wte": {"embedding": jnp.ones((50, 8))}}
    >>> jpeft.summary(jpeft.apply(params, method="hard_prompt", tokens=[7, 30, 2])).stored
    0

    To let a language model answer without any head, by the words of a verbaliser, see `jpeft.tasks.cloze.Cloze`.

    Reference: Schick and Schütze, Exploiting Cloze Questions for Few Shot Text Classification and Natural Language Inference, 2021,
    https://arxiv.org/abs/2001.07676. HF PEFT has no hard prompts.
    """
    if tokens and template is not None:
        raise ValueError(f"tokens={tokens} stand at the start, and a template says where its own stand: give one of them.")
    placed = insertion.blocks(template if template is not None else ((("start", tokens),) if tokens else ()))
    words = [token for block in placed for token in block.tokens]
    if PSEUDO in words:
        raise ValueError("The template has pseudo tokens, which something must train: use jpeft.prompt_tuning or jpeft.p_tuning.")
    edges = insertion.checked_edges(edges)

    def find(params: tree.Params) -> Site:
        return insertion.site(params, placed, embedding=embedding, body=body, edges=edges, causal=causal, head=head)

    def init_fn(key: Any, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del key, stats
        if words:
            find(params)
        return {}

    def bind_fn(params: tree.Params, adapter: tree.Adapter, *, rng: Any = None) -> tree.Params:
        del rng
        return insertion.bind(params, adapter, find(params), None) if words else tree.graft(params, adapter)

    def merge_fn(params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        return refuse_merge(params, adapter) if words else tree.merge_leaves(params, adapter, lambda path, leaf, leaves: leaf)

    return Method(init=with_head(init_fn, head), bind=bind_fn, call=insertion.call(placed), merge=merge_fn)

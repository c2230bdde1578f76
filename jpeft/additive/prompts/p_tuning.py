"""P-tuning: a prompt made by a small network, at chosen places around the text."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.additive.prompts import insertion
from jpeft.additive.prompts.insertion import EMBEDDING, Site
from jpeft.additive.prompts.prompt_tuning import layout, prompt_tuning, pseudo_tokens, refuse_merge
from jpeft.method import ADDED, Method, factory, with_head

ENCODERS = ("lstm", "mlp")


@factory
def p_tuning(
    *,
    length: int | None = None,
    encoder: str = "lstm",
    hidden: int | None = None,
    template: tuple[Any, ...] | None = None,
    edges: tuple[int, int] | None = None,
    causal: bool | None = None,
    embedding: str = EMBEDDING,
    body: str | None = None,
    head: str | None = "auto",
) -> Method:
    r"""P-tuning: ``T = {P[0:i], x, P[i:j], y, P[j:l]}`` with ``P = W_2 relu(W_1 BiLSTM(E) + b_1) + b_2``.

    The pseudo tokens P of a template are embeddings among those of the text. They are not trained themselves but made, all together, by a
    network from an embedding E (l, d) of its own, so that neighbours know of each other; the model is frozen. `jpeft.fold` computes P once
    and leaves the network out: what remains is `jpeft.prompt_tuning` with the same template.

    Args:
      length: Pseudo tokens l at the start, without a template. 20 by default.
      encoder: "lstm" is a bidirectional LSTM of two layers and an MLP of two, "mlp" the MLP alone, which is quicker.
      hidden: Width of the LSTM in each direction. None is d/2, as in the authors' LAMA code; d is that of their few-shot code.
      template: Blocks of pseudo tokens and where they stand, as pairs of a place and tokens. Places: "start" and "end" of the text,
        ("before", id) and ("after", id) the first token with that id in each text, the end of a text that has none. Tokens: how many pseudo
        tokens, or a tuple of token ids, real ones (anchors) and -1 for a pseudo token. With [MASK] = 103 in front of the text, the paper's
        (3, 3, 3) is ``(("start", 3), (("after", 103), 3), ("end", 3))``.
      edges: As in `jpeft.prompt_tuning`: at "start" and "end" [CLS] and [SEP] stay outside.
      causal: As in `jpeft.prompt_tuning`.
      embedding: As in `jpeft.prompt_tuning`.
      body: As in `jpeft.prompt_tuning`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` without a merge, which folds.

    Raises:
      ValueError: for an unknown encoder, a width below 1, a template that is none; otherwise as `jpeft.prompt_tuning`.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"wte": {"embedding": jnp.ones((50, 8))}}
    >>> peft = jpeft.apply(params, method="p_tuning", length=3)
    >>> peft.adapter["+"]["embedding"].shape, jax.tree.map(jnp.shape, jpeft.fold(peft).adapter)
    ((3, 8), {'wte': {'+': {'prompt': (3, 8)}}})

    Reference: Liu et al., GPT Understands, Too, 2021, https://arxiv.org/abs/2103.10385.

    Follows the authors' code in shapes, and torch in starting values (embedding N(0, 1), all else U(±1/√n)). The paper reads an answer off
    a [MASK] in the text by the language model's head; a task head works as well. HF PEFT puts all
    pseudo tokens in front, takes three layers for the MLP and one for each direction's width d, and stores P alone, so that training cannot
    go on; here the unfolded adapter holds the network, and the folded one what HF PEFT stores.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"encoder={encoder!r} is not one of {', '.join(map(repr, ENCODERS))}.")
    if hidden is not None and (hidden < 1 or encoder == "mlp"):
        raise ValueError(f"hidden={hidden} is the width of the LSTM: at least 1, and None for encoder='mlp'.")
    placed = layout(length, template)
    count = pseudo_tokens(placed)
    where: dict[str, Any] = dict(
        template=template, edges=insertion.checked_edges(edges), causal=causal, embedding=embedding, body=body, head=head
    )

    def find(params: tree.Params) -> Site:
        return insertion.site(params, placed, **{name: value for name, value in where.items() if name != "template"})

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del stats
        d = find(params).width
        wide = hidden or max(d // 2, 1)
        shapes: dict[str, tuple[int, ...]] = {}
        fans: dict[str, int] = {}
        if encoder == "lstm":
            for layer, inputs in enumerate((d, 2 * wide)):
                for direction in ("forward", "backward"):
                    for part, rows in (("input", inputs), ("hidden", wide)):
                        at = f"lstm/{layer}/{direction}/{part}"
                        shapes |= {f"{at}/kernel": (rows, 4 * wide), f"{at}/bias": (4 * wide,)}
                        fans |= dict.fromkeys((f"{at}/kernel", f"{at}/bias"), wide)
        for name, inputs in (("first", 2 * wide if encoder == "lstm" else d), ("second", d)):
            shapes |= {f"mlp/{name}/kernel": (inputs, d), f"mlp/{name}/bias": (d,)}
            fans |= dict.fromkeys((f"mlp/{name}/kernel", f"mlp/{name}/bias"), inputs)
        leaves = {
            path: jax.random.uniform(tree.key_for(key, path), shape, minval=-(fans[path] ** -0.5), maxval=fans[path] ** -0.5)
            for path, shape in shapes.items()
        }
        return {ADDED: tree.unflatten({"embedding": jax.random.normal(tree.key_for(key, "embedding"), (count, d)), **leaves})}

    def bind_fn(params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        del rng
        rest = {name: leaf for name, leaf in adapter.items() if name != ADDED}
        return insertion.bind(params, rest, find(params), encoded(adapter[ADDED]))

    def fold_fn(params: tree.Params, adapter: tree.Adapter) -> tuple[Method, tree.Adapter]:
        plain = prompt_tuning(length=count if template is None else None, **where)
        rest = {name: leaf for name, leaf in adapter.items() if name != ADDED}
        path = f"{find(params).module}/{ADDED}/prompt"
        return plain, tree.unflatten(tree.flatten(rest) | {path: encoded(adapter[ADDED])})

    return Method(init=with_head(init_fn, head), bind=bind_fn, call=insertion.call(placed), merge=refuse_merge, fold=fold_fn)


def encoded(leaves: dict[str, Any]) -> Float[Array, "l d"]:
    """The prompt that the network makes of its embedding; without an LSTM among the leaves, the MLP alone."""
    x = leaves["embedding"]
    for layer in sorted(leaves.get("lstm", {})):
        both = leaves["lstm"][layer]
        x = jnp.concatenate([lstm(both["forward"], x), lstm(both["backward"], x[::-1])[::-1]], axis=-1)
    return _linear(leaves["mlp"]["second"], jax.nn.relu(_linear(leaves["mlp"]["first"], x)))


def lstm(leaves: dict[str, Any], x: Float[Array, "l inputs"]) -> Float[Array, "l hidden"]:
    """An LSTM over rows, from zeros: ``c' = σ(f) c + σ(i) tanh(g)``, ``h' = σ(o) tanh(c')``, with torch's gates i, f, g, o side by side."""
    wide = leaves["hidden"]["kernel"].shape[0]

    def step(state: tuple[Array, Array], given: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = state
        i, f, g, o = jnp.split(given + h @ leaves["hidden"]["kernel"] + leaves["hidden"]["bias"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return jax.lax.scan(step, (jnp.zeros(wide), jnp.zeros(wide)), _linear(leaves["input"], x))[1]


def _linear(leaves: dict[str, Any], x: Float[Array, "l inputs"]) -> Float[Array, "l outputs"]:
    return x @ leaves["kernel"] + leaves["bias"][None]

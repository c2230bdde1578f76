"""Prefix-tuning: trained keys and values in front of every layer's own, made by a network in training."""

from jpeft.additive.prefixes.prefix import KEY, prefix
from jpeft.method import Method, factory
from jpeft.tree.kernels import AxesRules


@factory
def prefix_tuning(
    *,
    length: int | None = None,
    init: str = "random",
    tokens: tuple[int, ...] | None = None,
    mlp: int | None = 512,
    std: float = 0.02,
    dropout: float = 0.0,
    shift: bool = True,
    target: str = KEY,
    width: int | None = None,
    axes: AxesRules | None = None,
    head: str | None = "auto",
) -> Method:
    r"""Prefix-tuning: ``softmax(Q [P_K; K]ᵀ / √d) [P_V; V]`` in every layer, with trained P_K and P_V of `length` rows.

    In training ``P = W_2 tanh(W_1 P' + b_1) + b_2`` for all layers at once, which optimises better than P itself; `jpeft.fold` leaves
    ``2 L d l`` scalars (fewer where heads share keys). Queries and outputs are as many as they were; every query sees the whole prefix.

    Args:
      length: Rows l of the prefix: 10 by default, or one for each of `tokens`. About 10 for short outputs and classification, 200 for
        summarisation.
      init: Where P starts. "random", or "tokens": from the model's own keys and values of `tokens`, which the paper takes with little data.
      tokens: Token ids of the text to start from. On jpeft's command line it may be the text itself. What the model makes of them,
        ``jpeft.stats.key_values(model, params, [tokens])``, are the `stats` of `jpeft.apply`, and the trainer makes them.
      mlp: Inner width m of the network that makes the prefix (512 for table-to-text, 800 for summarisation in the paper); None trains P.
      std: Standard deviation of P where it is trained itself. Without meaning with `mlp`: P' is N(0, 1) and the rest as in torch.
      dropout: Probability with which a scalar of P is dropped, for each example, where the model uses dropout.
      shift: Let the tokens stand behind the prefix, at the positions from l on, as in HF PEFT and in the papers' code, which both hand the
        prefix to the model as a cache of l tokens. The model then holds l tokens fewer. False leaves them where they are.
      target: The key kernels, a regex. The attention core is the module ``core`` beside each.
      width: kv_heads * head_dim, where the key kernel does not tell: a fused projection with fewer heads for keys than for queries.
      axes: Geometry of kernels with more than two axes; see `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method`. Longer keys are no change of a weight, so it has no merge. `jpeft.apply(..., stats=adapter)` starts from a given prefix,
      another's adapter or `jpeft.stats.key_values` of words: under a causal mask the model then answers as if the words stood in front.

    Raises:
      ValueError: for a length or inner width below 1, an unknown `init`, or `tokens` without it or of another number than `length`; from
        `init`, if no kernel matches, the given prefix does not fit, or none is given where it starts from tokens; from the first
        call, if the model has no attention core at that place or its keys have another width.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"attn": {"key": {"kernel": jnp.ones((8, 8))}}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method="prefix_tuning", length=3, mlp=None).adapter)
    {'attn': {'core': {'+': {'key': (3, 8), 'value': (3, 8)}}}}

    Reference: Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021, https://arxiv.org/abs/2101.00190.

    Differs from HF PEFT: DistilBERT works, the network can be kept for training on, padded positions count from the first token that is
    not padding, and from words the network starts fitted exactly (by least squares in its last layer, for l <= m; in the paper by 500 steps
    of Adam). With rotary positions P_K is not rotated, as there.
    """
    return prefix(
        prefix_tuning, length=length, default=10, init=init, tokens=tokens, mlp=mlp, std=std, dropout=dropout, shift=shift,
        target=target, width=width, axes=axes, head=head,
    )  # fmt: skip

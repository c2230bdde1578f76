"""Prefix-tuning: trained keys and values in front of every layer's own, made by a network in training."""

from jpeft.additive.prefixes.prefix_method import PrefixMethod
from jpeft.core.options import Count


class PrefixTuning(PrefixMethod):
    r"""Prefix-tuning: ``softmax(Q [P_K; K]ᵀ / √d) [P_V; V]`` in every layer, with trained P_K and P_V of `length` rows.

    In training ``P = W_2 tanh(W_1 P' + b_1) + b_2`` for all layers at once, which optimises better than P itself; `jpeft.fold` leaves
    ``2 L d l`` scalars (fewer where heads share keys). The number of queries and outputs stays; every query sees the whole prefix.

    Args:
      length: Rows l of the prefix: 10 by default, or one for each of `tokens`. About 10 for short outputs and classification, 200 for
        summarisation.
      init: Where P starts. "random", or "tokens": from the model's own keys and values of `tokens`, as the paper does with little data.
      tokens: Token ids of the text to start from; on jpeft's command line also the text itself. `jpeft.apply` needs the model's keys and
        values for them, ``stats=jpeft.stats.key_values(model, params, [tokens])``; the trainer makes them.
      mlp: Inner width m of the network that makes the prefix (512 for table-to-text, 800 for summarisation in the paper); None trains P.
      std: Standard deviation of P where P itself is trained. It has no meaning with `mlp`: P' is N(0, 1) and the rest as in torch.
      dropout: Probability with which a scalar of P is dropped, for each example, where the model uses dropout.
      shift: Count the positions of the tokens from l on, as HF PEFT and the papers' code do, which hand the prefix to the model as a cache
        of l tokens. The model then holds l tokens fewer. False leaves positions as they are. They also stay as they are in a model whose
        word embedding has none of the usual names, because the module `positions` is looked for beside it.
      target: The key kernels, a regex. The attention core is the module ``core`` beside each.
      width: kv_heads * head_dim, where the key kernel does not tell it: for a fused projection with fewer heads for keys than for queries.
      axes: Geometry of kernels with more than two axes; see `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method`. It lengthens keys and values, which no weight can do, so it has no merge. `jpeft.apply(..., stats=...)` starts from a
      given prefix: another adapter, or `jpeft.stats.key_values` of words. Under a causal mask the model then answers as if the words
      stood in front.

    Raises:
      ValueError: for a length or inner width below 1, an unknown `init`, or `tokens` without it or of another number than `length`; from
        `init`, if no kernel matches, the given prefix does not fit, or none is given where it starts from tokens; from the first call, if
        the model has no attention core at that place or its keys have another width.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"attn": {"key": {"kernel": jnp.ones((8, 8))}}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method="prefix_tuning", length=3, mlp=None).adapter)
    {'attn': {'core': {'+': {'key': (3, 8), 'value': (3, 8)}}}}

    Reference: Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021, https://arxiv.org/abs/2101.00190.

    Differs from HF PEFT: DistilBERT works, an adapter keeps its network so that training can continue, and positions count from the first
    token that is not padding. The network is fitted to words exactly, by least squares in its last layer (for l <= m), where the paper
    takes 500 steps of Adam. As in HF PEFT, P_K is not rotated in models with rotary positions.
    """

    mlp: Count | None = 512

    name = "prefix_tuning"
    summary = "trained keys and values in every layer, made by an MLP in training"
    learning_rate = 1e-3
    head_lr_scale = 20.0

    @property
    def default_length(self) -> int:
        """10."""
        return 10


prefix_tuning = PrefixTuning

"""P-tuning v2: deep prompts for understanding, with a task head."""

from jpeft.additive.prefixes.prefix import KEY, prefix
from jpeft.method import Method, factory
from jpeft.tree.kernels import AxesRules


@factory
def p_tuning_v2(
    *,
    length: int | None = None,
    init: str = "random",
    tokens: tuple[int, ...] | None = None,
    mlp: int | None = None,
    std: float = 0.02,
    dropout: float = 0.1,
    shift: bool = True,
    target: str = KEY,
    width: int | None = None,
    axes: AxesRules | None = None,
    head: str | None = "auto",
) -> Method:
    r"""P-tuning v2: ``softmax(Q [P_K; K]ᵀ / √d) [P_V; V]`` in every layer, and a linear head on the [CLS] or on each token.

    Prefix-tuning for classifying and labelling: P itself is trained, along with a fresh task head, and no verbaliser is needed.

    Args:
      length: Rows l of the prompt: 20 by default, or one for each of `tokens`; below 20 for simple classification, about 100 for sequence
        labelling.
      init: As in `jpeft.prefix_tuning`.
      tokens: As in `jpeft.prefix_tuning`.
      mlp: Inner width of a network that makes the prompt (the paper's is 512), which helps on some tasks; None trains P.
      std: Standard deviation of P.
      dropout: Probability with which a scalar of P is dropped, for each example, where the model uses dropout.
      shift: As in `jpeft.prefix_tuning`.
      target: As in `jpeft.prefix_tuning`.
      width: As in `jpeft.prefix_tuning`.
      axes: As in `jpeft.prefix_tuning`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` without a merge. With `mlp` it folds: see `jpeft.fold`.

    Raises:
      ValueError: as `jpeft.prefix_tuning`.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"attn": {"key": {"kernel": jnp.ones((8, 8))}}, "classifier": {"kernel": jnp.ones((8, 2)), "bias": jnp.zeros(2)}}
    >>> jpeft.summary(jpeft.apply(params, method="p_tuning_v2", length=3)).trained
    66

    Reference: Liu et al., P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks, 2022,
    https://arxiv.org/abs/2110.07602.

    Follows the authors' code (THUDM/P-tuning-v2) in the dropout. Its embedding is declared N(0, 1) and then initialised anew by
    transformers with the deviation 0.02, which is therefore the default here.
    """
    return prefix(
        p_tuning_v2, length=length, default=20, init=init, tokens=tokens, mlp=mlp, std=std, dropout=dropout, shift=shift,
        target=target, width=width, axes=axes, head=head,
    )  # fmt: skip

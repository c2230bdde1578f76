"""P-tuning v2: deep prompts for understanding, with a task head."""

from jpeft.additive.prefixes.prefix_method import PrefixMethod
from jpeft.core.options import Probability


class PTuningV2(PrefixMethod):
    r"""P-tuning v2: ``softmax(Q [P_K; K]ᵀ / √d) [P_V; V]`` in every layer, and a linear head on the [CLS] or on each token.

    Prefix-tuning for classification and labelling: P itself is trained, together with a fresh task head. No verbaliser is needed.

    Args:
      length: Rows l of the prompt: 20 by default, or one for each of `tokens`; below 20 for simple classification, about 100 for sequence
        labelling.
      init: As in `jpeft.prefix_tuning`.
      tokens: As in `jpeft.prefix_tuning`.
      mlp: Inner width of a network that makes the prompt (the paper's is 512), which helps on some tasks; None trains P.
      std: Standard deviation of P; with `mlp` that of P' and of the network's kernels.
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

    The dropout is that of the authors' code (THUDM/P-tuning-v2). The default deviation is 0.02: their code declares the embedding as
    N(0, 1), but transformers then initialises it again with the deviation 0.02. The same holds for the network of `mlp`: its kernels begin
    as N(0, 0.02²) and its biases at zero.
    """

    dropout: Probability = 0.1

    name = "p_tuning_v2"
    summary = "deep prompts: trained keys and values in every layer and a task head"
    learning_rate = 1e-2

    @property
    def default_length(self) -> int:
        """20."""
        return 20

    @property
    def network_std(self) -> float:
        """That of P."""
        return self.std


p_tuning_v2 = PTuningV2

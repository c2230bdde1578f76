"""FishMask: train the weights that carry the most Fisher information."""

from typing import Any

import jax
import numpy as np

from jpeft import tree
from jpeft.core.statistics import Fisher
from jpeft.method import Method, Stage, factory, not_head
from jpeft.selective import sparse


@factory
def fish_mask(
    *,
    sparsity: float = 0.005,
    refresh: int = 0,
    head: str | None = "auto",
) -> Method:
    r"""FishMask: ``theta = theta_0 + m * delta``, m = 1 for the k weights of highest Fisher information, fixed before training.

    k of all weights together, not of each tensor, are chosen once. The adapter holds these k differences and where they belong, so that
    gradients, optimizer moments and the checkpoint are of size k and not of the model's size; see `jpeft.selective.sparse`.

    Args:
      sparsity: Share of the parameters that may change; 0.005 is the paper's main setting. The head is trained whole and counted inside:
        ``k = int(total * sparsity) - |head|``.
      refresh: How many times the mask is chosen anew in training, after equal parts of the steps, by the Fisher information of the model
        as it then is (`jpeft.advance` with new ``stats``). What was learnt stays: entries chosen again go on, all others are kept as they
        are and no longer trained, so up to ``(refresh + 1) k`` entries differ from the base in the end.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` that works in any framework and merges by adding the differences. `jpeft.apply` needs ``stats=``, the Fisher information
      (`jpeft.stats.fisher`), as arrays; the parameters may be abstract.

    Raises:
      ValueError: for a sparsity outside (0, 1] or a negative refresh; from `init`, without stats, or if they are abstract, of another
        model, or zero outside the head, or if the head uses up the budget.

    >>> import jax.numpy as jnp, jpeft
    >>> from jpeft.stats import fisher
    >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> losses = lambda params, batch: (batch["x"] @ params["kernel"]).sum(-1)
    >>> stats = fisher(losses, params, [{"x": jnp.array([[0.1, 1.0], [0.2, 1.0]])}])
    >>> peft = jpeft.apply(params, method="fish_mask", sparsity=0.5, stats=stats)
    >>> peft.adapter["kernel"]["indices"]
    Array([[2., 3.]], dtype=float32)

    Reference: Sung, Nair and Raffel, Training Neural Networks with Fixed Sparse Masks, 2021, https://arxiv.org/abs/2111.09839.

    Differs from the authors' code, which multiplies dense gradients by the mask before the optimizer's step, so that weight decay still
    moves what the mask excludes, and memory is that of full fine-tuning. Decay here acts on the difference to the pretrained weights.
    """
    if not 0 < sparsity <= 1:
        raise ValueError(f"sparsity={sparsity} must be a share of the parameters, above 0 and at most 1.")

    if refresh < 0:
        raise ValueError(f"refresh={refresh} must not be negative: it counts how often the mask is chosen anew.")

    def choose(params: tree.Params, stats: Any) -> dict[str, np.ndarray]:
        return sparse.choose_from(params, stats, sparsity, head, "fish_mask", _HOW)

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del key
        return tree.unflatten(sparse.leaves(not_head(params, head), choose(params, stats)))

    def refresh_fn(params: tree.Params, adapter: tree.Adapter, *, key: jax.Array, stats: Any = None) -> tuple[Method, tree.Adapter]:
        del key
        replaced, beside, _ = tree.split(params, adapter)
        anew = sparse.chosen_anew(not_head(params, head), beside, choose(params, stats), "fish_mask")
        return fish_mask(sparsity=sparsity, refresh=refresh - 1, head=head), tree.unflatten(replaced | anew)

    stages = tuple(Stage("refresh", 1 / (refresh + 1), refresh_fn, requires_stats=(Fisher,)) for _ in range(refresh))
    return sparse.method(init_fn, sparsity, head, needs="fisher", stages=stages)


_HOW = (
    "Make the Fisher information of your data first: from jpeft.stats import fisher; stats = fisher(losses, params, batches), with "
    "losses(params, batch) the loss of each example; then jpeft.apply(params, method='fish_mask', stats=stats)."
)

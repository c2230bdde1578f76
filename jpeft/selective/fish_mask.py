"""FishMask: train the weights that carry the most Fisher information."""

from typing import Annotated, Any

import jax

from jpeft import tree
from jpeft.core.method import Method
from jpeft.core.options import Range
from jpeft.core.stages import Stage
from jpeft.core.statistics import Fisher
from jpeft.selective import sparse
from jpeft.selective.choice import ScoreKinds
from jpeft.selective.sparse_method import SparseMethod
from jpeft.tree.head import not_head


class FishMask(SparseMethod):
    r"""FishMask: ``theta = theta_0 + m * delta``, m = 1 for the k weights of highest Fisher information, fixed before training.

    The k weights are chosen once, from all weights together and not from each tensor. The adapter holds their k differences and indices, so
    gradients, optimizer moments and the checkpoint are of size k and not of the model's size; see `jpeft.selective.sparse`.

    Args:
      sparsity: Share of the parameters that may change; 0.005 is the paper's main setting. The head is trained whole and counted inside:
        ``k = int(total * sparsity) - |head|``.
      refresh: How many times the mask is chosen again in training, after equal parts of the steps, by the Fisher information of the model
        as it then is (`jpeft.advance` with new ``stats``). No training is lost: entries that are chosen again train further, all others
        keep their differences and are no longer trained. So up to ``(refresh + 1) k`` entries differ from the base in the end.
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

    Differs from the authors' code, which multiplies dense gradients by the mask before the optimizer's step. There, weight decay still
    moves weights outside the mask, and memory is that of full fine-tuning. Here, decay acts on the difference to the pretrained weights.
    """

    refresh: Annotated[int, Range(0, 1000)] = 0

    name = "fish_mask"
    summary = "train the weights of highest Fisher information (needs stats)"
    learning_rate = 2e-3
    how_to_score = (
        "Make the Fisher information of your data first: from jpeft.stats import fisher; stats = fisher(losses, params, batches), with "
        "losses(params, batch) the loss of each example; then jpeft.apply(params, method='fish_mask', stats=stats)."
    )

    @property
    def score_kinds(self) -> ScoreKinds:
        """The Fisher information."""
        return (Fisher,)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One for each refresh still to come. Each has an equal share of the steps, as has the present stage."""
        share = 1 / (self.refresh + 1)
        return tuple(Stage("refresh", share, self._choose_again, requires_stats=(Fisher,)) for _ in range(self.refresh))

    def _choose_again(
        self, params: tree.Params, adapter: tree.Adapter, *, key: jax.Array, stats: Any = None
    ) -> tuple[Method, tree.Adapter]:
        del key
        replaced, beside, _ = tree.split(params, adapter)
        differences = sparse.reselect(not_head(params, self.head), beside, self.choose(params, stats), self.name)
        return self.replace(refresh=self.refresh - 1), tree.unflatten(replaced | differences)


fish_mask = FishMask

"""DiffPruning: learn which weights to change with gates that an L0 penalty closes; then train only the k largest changes."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jpeft import layouts, tree
from jpeft.core.groups import Group
from jpeft.core.method import TRAIN, Method, with_head
from jpeft.core.options import NotNegative, Pattern, Positive, Share, ShareBelowOne
from jpeft.core.stages import Stage
from jpeft.core.statistics import Fisher, Movement
from jpeft.selective import choice, hard_concrete, sparse
from jpeft.selective.sparse_method import SparseMethod
from jpeft.tree.head import not_head
from jpeft.tree.kernels import STACKED

# lambda = 1.25e-7 for each of BERT-large's 335 million parameters: the penalty of a model whose gates are all open, in units of the loss.
OPEN_PENALTY = 1.25e-7 * 335_141_888

W, ALPHA, ALPHA_GROUP = "w", "alpha", "alpha_group"  # leaves beside each base leaf
WEIGHTS, GATES = "weights", "gates"  # labels


class DiffPruningOptions(Method):
    """The options of DiffPruning, which both stages have."""

    sparsity: Share = 0.005
    structured: bool = True
    l0: NotNegative | None = None
    alpha: float = 5.0
    gate_rate: Positive = 0.1
    weight_rate: Positive = 0.2
    mask_share: ShareBelowOne = 0.5
    draw: bool = False
    head: Pattern | None = "auto"

    name = "diff_pruning"
    family = "selective"
    begins_within = 0.0
    summary = "learn which weights to change by gates, then train the k largest changes"
    learning_rate = 1e-3
    why_no_merge = None


class DiffPruning(DiffPruningOptions):
    r"""DiffPruning: ``theta = theta_0 + z * w`` with gates z, whose expected number a penalty reduces; then the k largest changes only.

    Two stages. *Gates*: a dense difference w and one hard-concrete gate for each of its entries are trained together, against
    ``lambda E||z||_0 = lambda sum_i sigmoid(alpha_i)``. Structured: ``delta_i = z_i z_g w_i`` with one more gate for every weight and bias
    tensor, and the penalty sums ``sigmoid(alpha_i) sigmoid(alpha_g)``. *Mask*: the k entries with the largest ``|z * w|`` of all tensors
    together start from their w before gating, stored as k values and indices (`jpeft.selective.sparse`); no gates, no penalty.

    In training, u is drawn at every step, one for each parameter and shared by the batch, from the ``dropout`` rng that the model is given.
    Without an rng (at evaluation, in `jpeft.merge`) each gate is at its median, so that results do not depend on a draw.

    Args:
      sparsity: Share of the parameters that may change; 0.005 as in the paper. The head is trained whole, without gates, and counted
        inside: ``k = int(total * sparsity) - |head|`` entries and the head change in the end.
      structured: Gate whole tensors besides single weights, which gains a point on GLUE in the paper. Each scanned layer has its own.
      l0: lambda. The paper's is 1.25e-7 for the 335 million parameters of BERT-large, 41.9 with all gates open. By default that sum is kept
        for a model of any size, because the size of the loss does not grow with the model either.
      alpha: Where alpha and alpha_g begin: 5, gates that are open 99.3 % of the time.
      gate_rate: Constant learning rate of alpha, by Adam without decay, clipped on its own: 0.1 as in the authors' code.
      weight_rate: Learning rate of w in the first stage as a multiple of that of the second: 1e-5 to 5e-5 in the paper. The head learns at
        the full rate in both.
      mask_share: Share of the steps for the second stage: half, as the paper's three epochs and three more.
      draw: Choose the entries by one draw of the gates, as the paper does, rather than by their medians.
      head: Task head to train along: "auto", a regex, or None.
      stage: "gates", or "mask" to begin with the second stage: ``stats`` then has a score for each parameter and chooses the k entries.
        `jpeft.stats.movement` of full fine-tuning gives the paper's non-adaptive baseline.

    Returns:
      A `Method` that works in any framework and merges by adding the difference; `jpeft.advance` leads from the first stage to the second.

    Raises:
      ValueError: for a sparsity or share out of range, rates that are not positive, an unknown stage; from `jpeft.advance`, if the head
        uses up the budget; from `init` of the second stage, without stats, or if they are zero outside the head.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> peft = jpeft.apply({"dense": {"kernel": jnp.ones((8, 4))}}, method="diff_pruning")
    >>> jax.tree.map(jnp.shape, peft.adapter)
    {'dense': {'kernel': {'alpha': (8, 4), 'alpha_group': (), 'w': (8, 4)}}}
    >>> sorted(set(jax.tree.leaves(peft.method.labels(peft.adapter))))
    ['gates', 'weights']

    Reference: Guo, Rush and Kim, Parameter-Efficient Transfer Learning with Diff Pruning, 2020, https://arxiv.org/abs/2012.07463.

    Differs from the authors' code: the structured penalty is the paper's product (the code adds ``sigmoid(alpha_g)`` once for each tensor);
    k is exact (there a threshold is bisected); the second stage continues with the trained head (there each stage draws the head again and
    adds the difference, which is right under one seed only). If fewer than k gates are open, closed entries fill the rest, those of largest
    ``|w|`` times the probability that their gates are open.
    """

    stage = "gates"

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Differences of zero, open gates, and the head."""
        del key, stats
        out: dict[str, Any] = {}
        layers = layouts.layer_axes(params)
        for path, leaf in not_head(params, self.head).items():
            dtype = sparse.difference_dtype(leaf)
            out[f"{path}/{W}"] = jnp.zeros(leaf.shape, dtype)
            out[f"{path}/{ALPHA}"] = jnp.full(leaf.shape, self.alpha, dtype)
            if self.structured:
                out[f"{path}/{ALPHA_GROUP}"] = jnp.full(_group_shape(path, leaf.shape, layers.get(path)), self.alpha, dtype)
        return with_head(out, params, self.head)

    def bind(self, params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        """Add the gated differences. With an rng, gates are drawn; without one, they are at their medians."""

        def add(path: str, leaf: jax.Array, leaves: dict[str, Any]) -> jax.Array:
            return (leaf.astype(leaves[W].dtype) + self._difference(path, leaves, rng)).astype(leaf.dtype)

        return tree.merge_leaves(params, adapter, add)

    def labels(self, adapter: tree.Adapter) -> Any:
        """Two groups, "weights" for w and "gates" for alpha; the head is trained as usual."""
        flat = tree.flatten(adapter)
        kinds = {W: WEIGHTS, ALPHA: GATES, ALPHA_GROUP: GATES}

        def label(path: str) -> str:
            owner, _, name = path.rpartition("/")
            return kinds[name] if f"{owner}/{ALPHA}" in flat else TRAIN

        return tree.unflatten({path: label(path) for path in flat})

    @property
    def groups(self) -> tuple[tuple[str, Group], ...]:
        """The learning rates of w and of alpha."""
        return ((WEIGHTS, Group(lr_scale=self.weight_rate)), (GATES, Group(fixed_lr=self.gate_rate, clip=1.0)))

    def penalty(self, adapter: tree.Adapter) -> jax.Array:
        """``lambda`` times the expected number of open gates."""
        flat = tree.flatten(adapter)
        expected, count = jnp.zeros(()), 0
        for path in [path.removesuffix(f"/{ALPHA}") for path in flat if path.endswith(f"/{ALPHA}")]:
            alphas = {name: flat[f"{path}/{name}"] for name in ((ALPHA, ALPHA_GROUP) if self.structured else (ALPHA,))}
            expected += self._open_probability(alphas).sum()
            count += alphas[ALPHA].size
        return (OPEN_PENALTY / count if self.l0 is None else self.l0) * expected

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The mask, with a learning-rate schedule that begins again."""
        return (Stage("mask", self.mask_share, self._project, restart_schedule=True),)

    def _project(self, params: tree.Params, adapter: tree.Adapter, *, key: jax.Array, stats: Any = None) -> tuple[Method, tree.Adapter]:
        """The second stage: the k entries of largest gated difference, each with its difference before gating."""
        del stats
        replaced, beside, _ = tree.split(params, adapter)
        base = {path: leaf for path, leaf in tree.flatten(params).items() if path in beside}
        gated = {path: jnp.abs(self._difference(path, leaves, key if self.draw else None)) for path, leaves in beside.items()}
        scores = choice.read_scores({path: base[path] for path in gated}, tree.unflatten(gated), self.name, _HOW_TO_SCORE)
        k = choice.budget(params, self.sparsity, self.head)
        if sum(np.count_nonzero(score) for score in scores.values()) < k:
            # Everything open is chosen anyway. So open entries get one score above all others, and closed entries compete for the rest.
            closed = {path: np.asarray(jnp.abs(leaves[W]) * self._open_probability(leaves)) for path, leaves in beside.items()}
            above = 1 + max(score.max() for score in closed.values())
            scores = {path: np.where(score > 0, above, closed[path]) for path, score in scores.items()}
        weights = {path: np.asarray(leaves[W]) for path, leaves in beside.items()}
        differences = sparse.new_differences(base, choice.choose_largest(scores, k), weights)
        return self.replace(stage="mask"), tree.unflatten(replaced | differences)

    def _difference(self, path: str, leaves: dict[str, Any], key: jax.Array | None) -> Float[Array, "*shape"]:
        """``z_i z_g w_i`` for each entry of a tensor. Each tensor and each group of gates draws from its own key."""
        z = _gates(leaves[ALPHA], key, path)
        z_group = _gates(leaves[ALPHA_GROUP], key, f"{path}/group") if self.structured else 1
        return z * leaves[W] * z_group

    def _open_probability(self, leaves: dict[str, Any]) -> Float[Array, "*shape"]:
        """``P(z_i z_g > 0)`` for each entry of a tensor."""
        own = hard_concrete.open_probability(leaves[ALPHA])
        return own * hard_concrete.open_probability(leaves[ALPHA_GROUP]) if self.structured else own


class DiffPruningMask(DiffPruningOptions, SparseMethod):
    """The second stage of DiffPruning: train the chosen entries only. See `jpeft.diff_pruning` for the options."""

    stage = "mask"
    how_to_score = (
        "For the second stage alone, give scores as arrays in the shapes of the parameters, such as jpeft.stats.movement(params, tuned); "
        "to have the gates choose, begin with stage='gates' and call jpeft.advance(peft), outside of jit, after their training."
    )

    @property
    def score_kinds(self) -> choice.ScoreKinds:
        """How far each parameter has moved, or any other score."""
        return (Movement, Fisher)


DiffPruning.later_stages = (DiffPruningMask,)


def _gates(alpha: Float[Array, "*shape"], key: jax.Array | None, path: str) -> Float[Array, "*shape"]:
    """Gates drawn from the key of a path, or their medians."""
    return hard_concrete.median(alpha) if key is None else hard_concrete.sample(tree.key_for(key, path), alpha)


def _group_shape(path: str, shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    """The shape of ``alpha_group``: a scalar for each tensor, or [layers, 1, ...] for a scanned stack's leaf, one number for each layer."""
    if axis is None and (not shape or re.fullmatch(STACKED, path) is None):
        return ()
    return tuple(size if i == (axis or 0) % len(shape) else 1 for i, size in enumerate(shape))


_HOW_TO_SCORE = DiffPruningMask.how_to_score
diff_pruning = DiffPruning

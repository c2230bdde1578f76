"""DiffPruning: learn by gates, which an L0 penalty closes, which weights to change; then fine-tune the k largest changes alone."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import tree
from jpeft.method import TRAIN, Group, Method, Stage, factory, not_head, with_head
from jpeft.selective import hard_concrete, sparse
from jpeft.tree.kernels import STACKED

# lambda = 1.25e-7 for each of BERT-large's 335 million parameters: the penalty of a model whose gates are all open, in units of the loss.
OPEN_PENALTY = 1.25e-7 * 335_141_888

W, ALPHA, ALPHA_GROUP = "w", "alpha", "alpha_group"
WEIGHTS, GATES = "weights", "gates"  # labels


@factory
def diff_pruning(
    *,
    sparsity: float = 0.005,
    structured: bool = True,
    l0: float | None = None,
    alpha: float = 5.0,
    gate_rate: float = 0.1,
    weight_rate: float = 0.2,
    mask_share: float = 0.5,
    draw: bool = False,
    head: str | None = "auto",
    stage: str = "gates",
) -> Method:
    r"""DiffPruning: ``theta = theta_0 + z * w`` with gates z that a penalty on their expected number closes; then the k largest, alone.

    Two stages. *Gates*: a dense difference w and one hard-concrete gate for each of its entries are trained together, against
    ``lambda E||z||_0 = lambda sum_i sigmoid(alpha_i)``; structured, ``delta_i = z_i z_g w_i`` with one more gate for every weight and bias
    tensor, and the penalty sums ``sigmoid(alpha_i) sigmoid(alpha_g)``. *Mask*: the k entries with the largest ``|z * w|`` of all tensors
    together go on from their w before gating, stored as k values and indices (`jpeft.selective.sparse`); no gates, no penalty.

    In training, u is drawn anew at every step, one for each parameter and shared by the batch, from the ``dropout`` rng that the model is
    given. Without one (at evaluation, in `jpeft.merge`) each gate is at its median, so that results do not depend on a draw.

    Args:
      sparsity: Share of the parameters that may change; 0.005 as in the paper. The head is trained whole, without gates, and counted
        inside: ``k = int(total * sparsity) - |head|`` entries and the head change in the end.
      structured: Gate whole tensors besides single weights, which gains a point on GLUE in the paper. Scanned layers count one by one.
      l0: lambda. The paper's is 1.25e-7 for the 335 million parameters of BERT-large: 41.9 with all gates open. By default that sum is kept
        for a model of any size, as the loss, which stands against it, does not grow with the model.
      alpha: Where alpha and alpha_g begin: 5, gates that are open 99.3 % of the time.
      gate_rate: Constant learning rate of alpha, by Adam without decay, clipped by itself: 0.1 as in the authors' code.
      weight_rate: Learning rate of w in the first stage as a multiple of that of the second: 1e-5 to 5e-5 in the paper. The head learns at
        the full rate in both.
      mask_share: Share of the steps for the second stage: half, as the paper's three epochs and three more.
      draw: Choose by one draw of the gates, as the paper does, rather than by their medians.
      head: Task head to train along: "auto", a regex, or None.
      stage: "gates", or "mask" to begin with the second stage: k entries chosen by ``stats``, a score for each parameter, e.g. how far full
        fine-tuning moved it (`jpeft.stats.movement`), which is the paper's non-adaptive baseline.

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
    k is exact (there a threshold is bisected); the trained head goes on as it is (there each stage draws it anew and adds the difference,
    which is right only under one seed). If fewer than k gates are open, the rest are those of largest ``|w|`` times
    the probability that their gates are open.
    """
    if not 0 < sparsity <= 1:
        raise ValueError(f"sparsity={sparsity} must be a share of the parameters, above 0 and at most 1.")
    if not 0 < mask_share < 1:
        raise ValueError(f"mask_share={mask_share} must be a share of the steps, above 0 and below 1.")
    if gate_rate <= 0 or weight_rate <= 0:
        raise ValueError(f"gate_rate={gate_rate} and weight_rate={weight_rate} must be positive.")
    if l0 is not None and l0 < 0:
        raise ValueError(f"l0={l0} must not be negative.")
    if stage not in ("gates", "mask"):
        raise ValueError(f"stage={stage!r} is not one of 'gates', 'mask'.")

    def init_mask(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del key
        chosen = sparse.choose_from(params, stats, sparsity, head, "diff_pruning", _HOW)
        return tree.unflatten(sparse.leaves(not_head(params, head), chosen))

    if stage == "mask":
        return sparse.method(init_mask, sparsity, head, needs="movement")

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del key, stats
        out: dict[str, Any] = {}
        for path, leaf in not_head(params, head).items():
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            out[f"{path}/{W}"] = jnp.zeros(leaf.shape, dtype)
            out[f"{path}/{ALPHA}"] = jnp.full(leaf.shape, alpha, dtype)
            if structured:
                out[f"{path}/{ALPHA_GROUP}"] = jnp.full(_group_shape(path, leaf.shape), alpha, dtype)
        return tree.unflatten(out)

    def difference(path: str, leaves: dict[str, Any], key: jax.Array | None) -> jax.Array:
        z = _gates(leaves[ALPHA], key, path)
        return z * leaves[W] * (_gates(leaves[ALPHA_GROUP], key, f"{path}/group") if structured else 1)

    def open_probability(leaves: dict[str, Any]) -> jax.Array:
        """``P(z_i z_g > 0)`` for each entry of a tensor."""
        own = hard_concrete.open_probability(leaves[ALPHA])
        return own * hard_concrete.open_probability(leaves[ALPHA_GROUP]) if structured else own

    def bind_fn(params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        def add(path: str, leaf: jax.Array, leaves: dict[str, Any]) -> jax.Array:
            return (leaf.astype(leaves[W].dtype) + difference(path, leaves, rng)).astype(leaf.dtype)

        return tree.merge_leaves(params, adapter, add)

    def labels_fn(adapter: tree.Adapter) -> Any:
        flat = tree.flatten(adapter)
        gated = {path.removesuffix(ALPHA) for path in flat if path.endswith(f"/{ALPHA}")}
        kinds = {W: WEIGHTS, ALPHA: GATES, ALPHA_GROUP: GATES}
        split = {path: path.rpartition("/") for path in flat}
        return tree.unflatten({path: kinds[name] if f"{owner}/" in gated else TRAIN for path, (owner, _, name) in split.items()})

    def penalty_fn(adapter: tree.Adapter) -> jax.Array:
        flat = tree.flatten(adapter)
        gated = [path.removesuffix(f"/{ALPHA}") for path in flat if path.endswith(f"/{ALPHA}")]
        expected, count = jnp.zeros(()), 0
        for path in gated:
            alphas = {name: flat[f"{path}/{name}"] for name in ((ALPHA, ALPHA_GROUP) if structured else (ALPHA,))}
            expected += open_probability(alphas).sum()
            count += alphas[ALPHA].size
        return (OPEN_PENALTY / count if l0 is None else l0) * expected

    def project(params: tree.Params, adapter: tree.Adapter, *, key: jax.Array, stats: Any = None) -> tuple[Method, tree.Adapter]:
        del stats
        replaced, beside, _ = tree.split(params, adapter)
        base = tree.flatten(params)
        size = {path: jnp.abs(difference(path, leaves, key if draw else None)) for path, leaves in beside.items()}
        scores = sparse.concrete({path: base[path] for path in size}, tree.unflatten(size), "diff_pruning", _HOW)
        keep = sparse.budget(params, sparsity, head)
        if sum(np.count_nonzero(score) for score in scores.values()) < keep:
            # All that is open is chosen, so only the order of what is closed matters.
            closed = {path: np.asarray(jnp.abs(part[W]) * open_probability(part)) for path, part in beside.items()}
            above = 1 + max(score.max() for score in closed.values())
            scores = {path: np.where(score > 0, above, closed[path]) for path, score in scores.items()}
        values = {path: np.asarray(part[W]) for path, part in beside.items()}
        chosen = sparse.leaves({path: base[path] for path in beside}, sparse.choose(scores, keep), values)
        return masked, tree.unflatten(replaced | chosen)

    masked = diff_pruning(
        sparsity=sparsity, structured=structured, l0=l0, alpha=alpha, gate_rate=gate_rate, weight_rate=weight_rate,
        mask_share=mask_share, draw=draw, head=head, stage="mask",
    )  # fmt: skip
    return Method(
        init=with_head(init_fn, head),
        bind=bind_fn,
        merge=lambda params, adapter: bind_fn(params, adapter),
        labels=labels_fn,
        penalty=penalty_fn,
        stages=(Stage("mask", mask_share, project, restart_schedule=True),),
        groups=((WEIGHTS, Group(lr_scale=weight_rate)), (GATES, Group(fixed_lr=gate_rate, clip=1.0))),
    )


def _gates(alpha: jax.Array, key: jax.Array | None, path: str) -> jax.Array:
    return hard_concrete.median(alpha) if key is None else hard_concrete.sample(tree.key_for(key, path), alpha)


def _group_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One scalar a tensor; of a scanned stack's leaf, one for each layer."""
    return (shape[0], *(1 for _ in shape[1:])) if shape and re.fullmatch(STACKED, path) else ()


_HOW = (
    "For the second stage alone, give scores as arrays in the shapes of the parameters, e.g. stats=jpeft.stats.movement(params, tuned); to "
    "have them learnt, begin with stage='gates' and move on by jpeft.advance(peft), outside of jit."
)

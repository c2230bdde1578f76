"""AdaLoRA: low-rank updates in the form of a singular value decomposition, whose ranks go to the kernels that need them most."""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.core.initializers import normal
from jpeft.core.layer import Layer, Linear
from jpeft.core.limits import LARGEST, Range
from jpeft.core.options import Count, CountOrZero, NotNegative, Positive, Probability, ShareBelowOne
from jpeft.core.update_rule import UpdateRule
from jpeft.distributed import gather_to_host
from jpeft.layouts import layer_axes
from jpeft.reparameterized import low_rank, rank_budget, two_view
from jpeft.reparameterized.matrix_form import MatrixForm
from jpeft.reparameterized.rank_budget import Averages, Budget
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves, Matrix, WeightMethod
from jpeft.tree.kernels import axes_of, axes_rules

RANK = low_rank.RANK
Steps = CountOrZero | ShareBelowOne  # a number of steps, or a share of all of them
AllSteps = Annotated[int, Range(1, LARGEST)]


class BudgetState(NamedTuple):
    """What the budget keeps beside the optimizer's state. The trees have the paths of the adapter's leaves.

    Attributes:
      step: Updates so far.
      sensitivity: Moving average of ``|p dL/dp|`` of each entry.
      uncertainty: Moving average of how far that is from its average.
      kept: Which triplets the last choice keeps, beside each kernel as ``e``.
    """

    step: Any
    sensitivity: Any
    uncertainty: Any
    kept: Any


class AdaLoRA(WeightMethod):
    r"""AdaLoRA: ``W' = W + s a diag(e) b``, and a budget of ranks for all kernels together, spent where the loss is most sensitive.

    A *triplet* is a column of ``a``, an entry of ``e`` and a row of ``b``. After step t the budget keeps ``R(t)`` of the ``R0`` triplets
    that training began with, those with the highest scores, and sets ``e`` of all others to zero:
    ``R(t) = R1 + (R0 - R1) (1 - (t - t_init) / (T - t_final - t_init))^3`` from step t_init until t_final steps before the end T; then the
    choice stays. A score is sensitivity times uncertainty, two moving averages of ``I = |p dL/dp|``:
    ``S = beta1 S + (1 - beta1) I``, ``U = beta2 U + (1 - beta2) |I - S|``; a triplet's is that of ``e`` plus the means of those of its
    column and row. All of it is part of the optimizer that `jpeft.optimizer` makes, inside the compiled step, and of the optimizer's state.
    ``e`` is zero at the start, so the adapted model begins as the base. The penalty ``orthogonal * mean(|aᵀ a - I|, |b bᵀ - I|)`` keeps
    the factors near those of a singular value decomposition.

    Args:
      rank: Triplets of each kernel at the start.
      target_rank: Triplets of each kernel in the end, on average.
      alpha: ``s = alpha / (rank + 1e-5)``, also after ranks have gone.
      total_steps: T, the number of updates that the optimizer will make. The trainer fills it in.
      t_init: Steps with all triplets; a number, or a share of T below one.
      t_final: Steps with the last choice; a number, or a share of T below one.
      interval: Steps between two choices.
      beta1: Of the average S.
      beta2: Of the average U.
      orthogonal: Weight of the penalty.
      dropout: Rate on the input of the branch alone; active when the model is given a ``dropout`` rng.
      target: Which kernels: a regex for whole paths, or a list of names; by default every kernel but the head's.
      axes: Geometry of kernels with more than two axes, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A mergeable `Method`. `jpeft.fold` leaves out the triplets whose ``e`` is zero, as the trainer does with what it saves.

    Raises:
      ValueError: for a target rank above the rank, or steps that leave nothing between t_init and t_final; from `jpeft.optimizer` without
        total_steps; from `init`, for a target that matches nothing or a kernel whose geometry is not known.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method=jpeft.adalora(total_steps=1000)).adapter)
    {'query': {'kernel': {'a': (32, 12), 'b': (12, 16), 'e': (12,)}}}

    Reference: Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023,
    https://arxiv.org/abs/2303.10512.

    Follows the authors' code and HF PEFT in the scale, the scores and the penalty (a norm, where the paper squares it). Differs from HF
    PEFT in the budget, which nobody has to call, in steps that are counted from 1, and in the defaults of t_init and t_final, about the
    paper's (there 0).
    """

    rank: Count = 12
    target_rank: Count = 8
    alpha: Positive = 16.0
    total_steps: AllSteps | None = None
    t_init: Steps = 0.1
    t_final: Steps = 0.5
    interval: Count = 1
    beta1: ShareBelowOne = 0.85
    beta2: ShareBelowOne = 0.85
    orthogonal: NotNegative = 0.5
    dropout: Probability = 0.0

    name = "adalora"
    summary = "low-rank updates whose ranks a budget gives to the kernels that need them most"
    learning_rate = 3e-3
    adds_to_kernel = True
    leaf_axes = low_rank.LEAF_AXES | {"e": (RANK,)}

    def check(self) -> None:
        """Refuse a budget that would grow, or that has no steps to fall in."""
        if self.target_rank > self.rank:
            raise ValueError(f"adalora: target_rank={self.target_rank} is more than rank={self.rank}, with which each kernel begins.")
        if self.total_steps is not None and self._span(self.total_steps)[0] >= self._span(self.total_steps)[1]:
            raise ValueError(
                f"adalora: t_init={self.t_init} and t_final={self.t_final} leave nothing of the {self.total_steps} steps for ranks to "
                "go in. Give smaller ones, or shares of the steps, such as t_init=0.1."
            )

    def _span(self, steps: int) -> tuple[int, int]:
        """The last step with all triplets, and the step of the last choice, which is the first at least."""
        begin, final = (at if isinstance(at, int) else round(at * steps) for at in (self.t_init, self.t_final))
        return begin, steps - final

    def for_steps(self, steps: int) -> "AdaLoRA":
        """The method with `total_steps`, if it has none."""
        return self if self.total_steps is not None else type(self)(**{**dict(self.options), "total_steps": max(steps, 1)})

    # --- one kernel -------------------------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """``s``."""
        return self.alpha / (self.rank + 1e-5)

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """``a`` and ``b`` random, N(0, 0.02^2), ``e`` zero."""
        (inputs, outputs), (key_a, key_b) = kernel.shape, jax.random.split(key)
        draw = normal(0.02)
        return {"a": draw(key_a, (inputs, self.rank)), "e": jnp.zeros(self.rank), "b": draw(key_b, (self.rank, outputs))}

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """``W + s a diag(e) b``."""
        return low_rank.update(kernel, {"a": leaves["a"] * leaves["e"][None], "b": leaves["b"]}, self.scale)

    def as_low_rank(self, leaves: Leaves, path: str) -> tuple[Array, Array]:
        """``s a diag(e)`` and ``b``."""
        return self.scale * leaves["a"] * leaves["e"][..., None, :], leaves["b"]

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """LoRA with the factors ``a diag(e)`` and ``b``."""
        form = MatrixForm(layer.params[linear.name].shape, linear.axes)
        matrices = self.to_matrices(form, leaves)
        scaled = form.leaf_from_matrix(matrices["a"] * matrices["e"][..., None, :], self.leaf_axes["a"])
        return two_view.low_rank(layer, linear, self.scale, inputs, scaled, leaves["b"], dropout=self.dropout, rng=rng)

    # --- the budget -------------------------------------------------------------------------------------------------------------------

    def penalty_on(self, params: tree.Params, adapter: tree.Adapter) -> jax.Array:
        """``orthogonal`` times the mean distance of all factors from orthogonal ones."""
        matrices = {path: self.to_matrices(form, leaves) for path, (form, leaves) in self._placed(params, adapter).items()}
        count = sum(2 * each["e"].size // each["e"].shape[-1] for each in matrices.values())
        total = sum((rank_budget.orthogonality(each["a"], each["b"]) for each in matrices.values()), jnp.zeros(()))
        return self.orthogonal * total / max(count, 1)

    def penalty(self, adapter: tree.Adapter) -> jax.Array:
        """Refused: the geometry of the kernels is needed, too."""
        raise ValueError("The penalty of adalora depends on the geometry of the kernels: take jpeft.penalty(peft).")

    def update_rule(self, params: tree.Params, adapter: tree.Adapter) -> UpdateRule | None:
        """The budget; None where there are no more triplets than in the end.

        Raises:
          ValueError: without `total_steps`.
        """
        forms = {path: form for path, (form, _) in self._placed(params, adapter).items()}
        ranks = {path: tree.flatten(adapter)[f"{path}/e"].size for path in forms}  # of all kernels of a stack
        target = self.target_rank * sum(int(np.prod(form.stack)) for form in forms.values())
        if sum(ranks.values()) <= target:
            return None
        if self.total_steps is None:
            raise ValueError(
                "AdaLoRA spreads its budget over the steps of a training, so its optimizer must know their number: "
                "jpeft.adalora(total_steps=1000). With target_rank equal to rank, all ranks stay and no number is needed."
            )
        begin, end = self._span(self.total_steps)
        budget = Budget(begin, end, self.interval, sum(ranks.values()), target)
        return UpdateRule(lambda adapter: self._first_state(forms, adapter), lambda *args: self._allocate(budget, forms, *args))

    def _first_state(self, forms: Mapping[str, MatrixForm], adapter: tree.Adapter) -> BudgetState:
        leaves = tree.flatten(adapter)
        zeros = lambda: tree.unflatten({f"{path}/{name}": jnp.zeros_like(leaves[f"{path}/{name}"]) for path in forms for name in "aeb"})
        kept = tree.unflatten({f"{path}/e": jnp.ones(leaves[f"{path}/e"].shape, bool) for path in forms})
        return BudgetState(jnp.zeros((), jnp.int32), zeros(), zeros(), kept)

    def _allocate(self, budget: Budget, forms: Mapping[str, MatrixForm], grads: Any, updates: Any, state: BudgetState, adapter: Any) -> Any:
        """Updates that leave ``e`` at zero where the budget has no room, and the next state."""
        step, flat = state.step + 1, [tree.flatten(each) for each in (grads, updates, adapter, state.sensitivity, state.uncertainty)]
        averages = {}
        for path in (f"{path}/{name}" for path in forms for name in "aeb"):
            grad, update, value, *old = (each[path] for each in flat)
            new = rank_budget.averaged(Averages(*old), value + update, grad, (self.beta1, self.beta2))
            # The last choice is made by the averages of the step before it.
            averages[path] = Averages(*(jnp.where(step < budget.end, now, before) for now, before in zip(new, old, strict=True)))
        scores = {path: self._score(form, path, averages) for path, form in forms.items()}
        best, held = rank_budget.keep(scores, budget.at_traced(step)), tree.flatten(state.kept)
        kept, moved = {}, {}
        for path, form in forms.items():
            e = f"{path}/e"
            kept[e] = jnp.where(budget.chooses(step), form.leaf_from_matrix(best[path], (RANK,)), held[e])
            # Between two choices every triplet is free to move.
            free = kept[e] | ~(budget.chooses(step) | (step > budget.end))
            moved[e] = jnp.where(free, flat[1][e], -flat[2][e])
        tree_of = lambda name: tree.unflatten({path: getattr(each, name) for path, each in averages.items()})
        after = BudgetState(step, tree_of("sensitivity"), tree_of("uncertainty"), tree.unflatten(kept))
        return tree.replace(updates, moved), after

    def _score(self, form: MatrixForm, path: str, averages: Mapping[str, Averages]) -> Float[Array, "*stack rank"]:
        to_matrix = lambda name, leaf: form.leaf_to_matrix(leaf, self.leaf_axes[name])
        return rank_budget.score({n: Averages(*(to_matrix(n, leaf) for leaf in averages[f"{path}/{n}"])) for n in "aeb"})

    # --- adapters with fewer ranks ------------------------------------------------------------------------------------------------------

    def expected(self, params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        """A kernel may have fewer triplets than `rank`, or none, once the budget is spent."""
        shapes = tree.flatten(super().expected(params, adapter))
        return tree.unflatten(low_rank.stored_ranks(shapes, tree.flatten(adapter), self.forms(params), self.leaf_axes, lambda _: self.rank))

    @property
    def folds(self) -> bool:
        """Whether triplets without an effect can be left out."""
        return True

    def fold(self, params: tree.Params, adapter: tree.Adapter) -> tuple["AdaLoRA", tree.Adapter]:
        """The same adapter without the triplets whose ``e`` is zero. In a stack all kernels keep as many as the largest of them.

        Inside of `jax.jit`, where their number is not known, and for an adapter that has not been trained, it stays as it is.
        """
        placed = self._placed(params, adapter)
        if any(isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)) for leaf in jax.tree.leaves(adapter)):
            return self, adapter
        whole = {path: gather_to_host(leaves) for path, (_, leaves) in placed.items()}
        if all((np.asarray(leaves["e"]) != 0).all() for leaves in whole.values()):
            return self, adapter
        out = {path: leaf for path, leaf in tree.flatten(adapter).items() if path.rpartition("/")[0] not in placed}
        for path, (form, _) in placed.items():
            matrices = {name: np.asarray(leaf) for name, leaf in self.to_matrices(form, whole[path]).items()}
            if matrices["e"].any():
                new = rank_budget.without_zeros(matrices)
                out |= {f"{path}/{name}": form.leaf_from_matrix(jnp.asarray(leaf), self.leaf_axes[name]) for name, leaf in new.items()}
        return (self, tree.unflatten(out)) if any(path.endswith("/e") for path in out) else (self, adapter)

    def _placed(self, params: tree.Params, adapter: tree.Adapter) -> dict[str, tuple[MatrixForm, Leaves]]:
        """The leaves beside each kernel, with the kernel's form."""
        shapes, rules, layers = tree.flatten(params), axes_rules(self.axes), layer_axes(params)
        form = lambda path, shape: MatrixForm(shape, axes_of(path, shape, rules, layers=layers))
        return {path: (form(path, tuple(shapes[path].shape)), leaves) for path, leaves in tree.split(params, adapter)[1].items()}


adalora = AdaLoRA

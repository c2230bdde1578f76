"""The bases of methods whose adapter is sparse differences and the head."""

import abc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft import tree
from jpeft.core.method import Method, with_head
from jpeft.core.options import Pattern, Share
from jpeft.core.statistics import Statistic
from jpeft.selective import choice, sparse
from jpeft.selective.indices import INDICES, VALUES, count_digits, decode, label_pairs
from jpeft.tree.head import head_leaves, not_head


class SparseDifferences(Method):
    """A method whose adapter is sparse differences (`jpeft.selective.sparse`) and the head. A subclass says where they are."""

    family = "selective"
    why_no_merge = None
    reduce_grads_locally = True
    begins_within = 0.0

    def bind(self, params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        """Add the differences to the base."""
        del rng
        return tree.merge_leaves(params, adapter, lambda path, leaf, leaves: sparse.add_differences(leaf, leaves))

    def labels(self, adapter: tree.Adapter) -> Any:
        """Everything is trained except the indices and the differences that are kept."""
        return label_pairs(adapter, is_frozen=lambda path: path.endswith(f"/{sparse.KEPT}"))

    def count_changed(self, params: tree.Params, adapter: tree.Adapter) -> int:
        """The differences, those that are kept included, and the head."""
        replaced, beside, _ = tree.split(params, adapter)
        return tree.size(replaced) + sum(values.size for leaves in beside.values() for _, values in sparse.pairs_of(leaves))


class SparseMethod(SparseDifferences):
    """Train the k entries of highest score, stored as sparse differences (`jpeft.selective.sparse`). A subclass says what the scores are.

    Attributes:
      how_to_score: How to make the scores, for error messages.
      sparsity: Share of the parameters that may change; the head is trained whole and counted inside.
      head: Task head to train along: "auto", a regex, or None.
    """

    sparsity: Share = 0.005
    head: Pattern | None = "auto"

    how_to_score: ClassVar[str]

    @property
    @abc.abstractmethod
    def score_kinds(self) -> choice.ScoreKinds:
        """The kinds of statistics that can be the scores; the first kind that the user gave is used."""

    @property
    def requires_stats(self) -> tuple[type[Statistic], ...]:
        """The kind that suits the method best."""
        return self.score_kinds[:1]

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Zero differences at the chosen entries, and the head."""
        del key
        return with_head(sparse.new_differences(not_head(params, self.head), self.choose(params, stats)), params, self.head)

    def choose(self, params: tree.Params, stats: Any) -> sparse.Chosen:
        """The entries outside the head that the statistics choose.

        Raises:
          ValueError: without usable statistics, for statistics that are zero everywhere, or if the head uses up the budget.
        """
        given = choice.find_scores(stats, self.score_kinds)
        scores = choice.read_scores(not_head(params, self.head), given, self.name, self.how_to_score)
        if not any(score.any() for score in scores.values()):
            raise ValueError(
                f"{self.name}: the statistics are zero everywhere outside the head, so they say nothing about what to train. A head that "
                f"begins at zero passes no gradient on: give it small random values before taking them. {self.how_to_score}"
            )
        return choice.choose_largest(scores, choice.budget(params, self.sparsity, self.head))

    def expected(self, params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        """The shapes of an adapter on this base. Statistics choose the entries, so the adapter itself tells how many each leaf has.

        Of an empty adapter, the shapes of a new one whose entries are spread evenly over all leaves.

        Raises:
          ValueError: if the number of trained entries is not the budget, or an index is out of range.
        """
        flat = tree.flatten(params)
        _, beside, _ = tree.split(params, adapter)
        head = head_leaves(params, self.head)
        out: dict[str, Any] = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in head.items()}
        trained = 0
        for path, leaves in beside.items():
            if VALUES in leaves or sparse.KEPT not in leaves:
                trained += leaves[VALUES].size if VALUES in leaves else 0
                out |= _expected_pair(path, path, flat[path], leaves)
            if sparse.KEPT in leaves:
                out |= _expected_pair(f"{path}/{sparse.KEPT}", path, flat[path], leaves[sparse.KEPT])
        k = choice.budget(params, self.sparsity, self.head)
        if not adapter:
            return tree.unflatten(out | _spread(not_head(params, self.head), k))
        if trained != k:
            raise ValueError(f"The adapter changes {trained:,} entries, where sparsity={self.sparsity} of this base is {k:,}.")
        return tree.unflatten(out)


def _spread(leaves: dict[str, Any], k: int) -> dict[str, Any]:
    """The shapes of k differences that are spread evenly over some base leaves."""
    out, total, seen, given = {}, sum(leaf.size for leaf in leaves.values()), 0, 0
    for path, leaf in leaves.items():
        seen += leaf.size
        number, given = k * seen // total - given, k * seen // total
        if number:
            out[f"{path}/{VALUES}"] = jax.ShapeDtypeStruct((number,), sparse.difference_dtype(leaf))
            out[f"{path}/{INDICES}"] = jax.ShapeDtypeStruct((count_digits(leaf.size), number), jnp.float32)
    return out


def _expected_pair(path: str, base_path: str, base: Any, pair: dict[str, Any]) -> dict[str, Any]:
    """The shapes of a pair of values and indices at a path, by path."""
    k = pair[VALUES].size if VALUES in pair else 0
    if k and INDICES in pair and pair[INDICES].ndim == 2 and (last := int(decode(pair[INDICES]).max())) >= base.size:
        raise ValueError(f"The adapter changes entry {last:,} of '{base_path}', which has {base.size:,}.")
    return {
        f"{path}/{VALUES}": jax.ShapeDtypeStruct((k,), sparse.difference_dtype(base)),
        f"{path}/{INDICES}": jax.ShapeDtypeStruct((count_digits(base.size), k), jnp.float32),
    }

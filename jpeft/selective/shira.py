"""SHiRA: train a few entries of each kernel, scattered at random."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jpeft import tree
from jpeft.core.method import with_head
from jpeft.core.options import Axes, Count, CountOrZero, Names, Pattern, PerPath
from jpeft.layouts import layer_axes
from jpeft.selective import sparse
from jpeft.selective.choice import is_abstract
from jpeft.selective.indices import INDICES, VALUES, decode, encode
from jpeft.selective.sparse_method import SparseDifferences
from jpeft.tree.head import not_head
from jpeft.tree.kernels import KernelAxes, axes_of, axes_rules
from jpeft.tree.select import check_rules, first_match, select


class SHiRA(SparseDifferences):
    r"""SHiRA: ``W' = W + S`` with a sparse S of ``K = r (in + out)`` entries, as many as LoRA's factors have, at random places.

    The places are drawn before training and stay. S has a high rank, and S of several adapters hardly overlap. The adapter holds K values
    and indices beside each kernel (`jpeft.selective.sparse`); each layer of a stack and each expert has K entries of its own.

    ``values`` [K] is HF PEFT's ``shira_weight`` and ``indices`` [digits, K] hold flat positions in the kernel, ascending, where
    ``shira_indices`` [2, K] are (output, input) of ``W^T``: for a kernel [in, out], index ``i`` is ``(i % out, i // out)``. The values are
    in the order of the indices here, and in the order of HF's indices there.

    Args:
      rank: r; or rules ``{regex or name: r}``, first match wins. Each rule must match.
      seed: Of the places, which do not depend on the key of the other methods.
      target: Which kernels: a regex for whole paths, or a list of names; by default every kernel but the head's.
      axes: Geometry of kernels with more than two axes, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` that works in any framework and merges by adding S.

    Raises:
      ValueError: for a rank below 1; from `init`, for a target that matches nothing, a kernel whose geometry is not known, or a kernel with
        fewer than K entries.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method=jpeft.shira(rank=2)).adapter)
    {'query': {'kernel': {'indices': (1, 96), 'values': (96,)}}}

    Reference: Bhardwaj et al., Sparse High Rank Adapters, 2024, https://arxiv.org/abs/2406.13175.

    Of the paper's masks the random one is here, as in HF PEFT; by gradients `jpeft.fish_mask` chooses, from all kernels together.
    """

    rank: PerPath[Count] = 32
    seed: CountOrZero = 0
    target: Names = r"(.*/)?kernel"
    axes: Axes | None = None
    head: Pattern | None = "auto"

    name = "shira"
    summary = "train a few entries of each kernel, scattered at random"
    learning_rate = 3e-3

    def kernels(self, params: tree.Params) -> list[str]:
        """The paths of the kernels that get leaves.

        Raises:
          ValueError: if the target matches nothing.
        """
        leaves = not_head(params, self.head)
        candidates = [path for path, leaf in leaves.items() if len(leaf.shape) > 1 and not path.endswith("bias")]
        return select(candidates, self.target, params=params)

    def check_base(self, params: tree.Params) -> None:
        """Refuse rules that are for none of the chosen kernels."""
        check_rules(self.rank, self.kernels(params), "rank")

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Zeros at random places, and the task head."""
        del key, stats
        base, rules, layers = tree.flatten(params), axes_rules(self.axes), layer_axes(params)
        out: dict[str, Any] = {}
        for path in self.kernels(params):
            leaf = base[path]
            axes = axes_of(path, tuple(leaf.shape), rules, layers=layers)
            places = self._places(tree.key_for(jax.random.key(self.seed), path), path, tuple(leaf.shape), axes)
            out[f"{path}/{VALUES}"] = jnp.zeros(places.size, sparse.difference_dtype(leaf))
            out[f"{path}/{INDICES}"] = encode(places, leaf.size)
        return with_head(out, params, self.head)

    def _places(self, key: jax.Array, path: str, shape: tuple[int, ...], axes: KernelAxes) -> Int[Array, " k"]:
        """Flat positions in a kernel, ascending: K for each matrix of its stack."""
        (ins, outs), r = (axes.fan_in(shape), axes.fan_out(shape)), first_match(path, self.rank, "rank")
        k, stack = r * (ins + outs), [shape[i] for i in axes.stack]
        if k > ins * outs:
            raise ValueError(f"shira: rank={r} asks for {k:,} entries of '{path}', {ins} x {outs}, which has {ins * outs:,}.")
        if math.prod(shape) >= 2**31:
            raise ValueError(f"'{path}' has the shape {shape}; sparse differences index fewer than 2^31 entries.")
        count = math.prod(stack)
        # One matrix after the other: all permutations at once would need memory for an index of each entry of the stack.
        drawn = jax.lax.map(lambda key: _draw(key, ins * outs, k), jax.random.split(key, count))  # [count, k]
        which = jnp.broadcast_to(jnp.arange(count)[:, None], drawn.shape)
        order = (*axes.stack, *axes.inputs, *axes.outputs)
        at = [
            *(jnp.unravel_index(which, stack) if stack else ()),
            *jnp.unravel_index(drawn // outs, [shape[i] for i in axes.inputs]),
            *jnp.unravel_index(drawn % outs, [shape[i] for i in axes.outputs]),
        ]
        flat = jnp.ravel_multi_index(tuple(at[order.index(i)] for i in range(len(shape))), shape, mode="clip")
        return jnp.sort(flat.reshape(-1))

    def expected(self, params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        """The shapes that `init` makes.

        Raises:
          ValueError: if an index of the adapter is beyond its kernel.
        """
        base, (_, beside, _) = tree.flatten(params), tree.split(params, adapter)
        for path, leaves in beside.items():
            indices: Float[Array, "digits k"] | None = leaves.get(INDICES)
            if indices is None or is_abstract(indices) or indices.ndim != 2 or not indices.size:
                continue
            if (last := int(decode(indices).max())) >= base[path].size:
                raise ValueError(f"The adapter changes entry {last:,} of '{path}', which has {base[path].size:,}.")
        return super().expected(params, adapter)


def _draw(key: jax.Array, size: int, k: int) -> Int[Array, " k"]:
    """K different whole numbers below a size, at random."""
    if size < 2**20 or k > size // 4:
        return jax.random.permutation(key, size)[:k]
    # The first k different ones of twice as many draws, without sorting all entries of a large kernel. With k below a fourth of them, more
    # than 1.5 k are different, but for less than one case in e^(k / 100).
    draws = jax.random.randint(key, (2 * k,), 0, size)
    order = jnp.argsort(draws, stable=True)
    first = jnp.concatenate([jnp.ones(1, bool), jnp.diff(draws[order]) != 0])
    repeated = jnp.zeros(2 * k, bool).at[order].set(~first)
    return draws[jnp.argsort(repeated, stable=True)[:k]]


shira = SHiRA

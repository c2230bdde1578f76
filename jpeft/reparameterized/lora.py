"""LoRA: low-rank updates of kernels."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jpeft import tree
from jpeft.core.groups import Group
from jpeft.core.layer import Layer, Linear
from jpeft.core.limits import Range
from jpeft.core.method import FREEZE, with_head
from jpeft.core.options import Count, Names, PerPath, Positive, Probability, option
from jpeft.core.rates import Rates
from jpeft.core.statistics import InputMoments, Statistic, find
from jpeft.reparameterized import low_rank, starts, tied_tables, two_view
from jpeft.reparameterized.matrix_form import OUTPUTS, MatrixForm
from jpeft.reparameterized.weight_method import Inputs, Key, Leaves, Matrix, Vector, WeightMethod
from jpeft.tree.kernels import KernelAxes
from jpeft.tree.select import first_match

FASTER = "b"  # label of the factor with a learning rate of its own
BIAS = "bias"  # leaf of LoRA's own bias


class LoRA(WeightMethod):
    r"""LoRA: ``W' = W + s a b`` with a low-rank ``a b``, trained in place of ``W``.

    ``h = W x + (alpha / r) b a dropout(x)`` in the paper's symbols; here, with Flax's (in, out) kernels, ``y = layer(x) + s (x a) b``,
    ``a`` of shape ``[*stack, *inputs, r]``, ``b`` of shape ``[*stack, r, *outputs]``, ``s = alpha / r``. ``b`` is zero at the start, so
    the adapted model begins as the base. One ``a`` is shared by all heads of a kernel with a head axis.

    Args:
      rank: r; or rules ``{regex or name: r}``, first match wins: with ``{"query": 16, ".*": 4}`` the queries have 16. Each rule must match.
      alpha: Scale before the division by r; or rules. 16 for rank 8 is what the authors' GLUE scripts use.
      target: Which kernels. A regex for whole paths, or a list of names as in HF PEFT, ``["query", "value"]``; by default every kernel
        but the head's, which reaches full fine-tuning's quality where query and value alone do not (Schulman et al., 2025,
        https://thinkingmachines.ai/blog/lora). ``embedding`` leaves can be targets too.
      dropout: Rate on the input of the branch alone; active when the model is given a ``dropout`` rng.
      rslora: ``s = alpha / sqrt(r)``, which keeps the update's size as r grows (https://arxiv.org/abs/2312.03732).
      init: ``a`` is uniform in +-1/sqrt(fan_in) ("kaiming", the authors' code) or N(0, 1/r^2) ("gaussian"). For embeddings it is ``b``
        that is random, N(0, 1), and ``a`` that is zero. Other starts (`jpeft.reparameterized.starts`): "orthogonal", random factors with a
        product of zero; "pissa" and "olora", the kernel's largest directions by SVD or QR; "corda" and "corda-kpm", by SVD of the
        kernel weighted with its inputs; "eva", the directions of the inputs. The last three take `jpeft.stats.input_moments`. Where the
        start's product is not zero, the adapter keeps its factors too, ``W' = W + s (a b - a0 b0)``, and the base stays as it is.
      rho: With "eva": a kernel may have up to rho times its rank. The ranks of all kernels go to the directions with the largest shares of
        their inputs' variance; ``s`` stays as it is.
      freeze_a: LoRA-FA: train ``b`` alone. The backward pass then keeps ``x a`` in place of x (https://arxiv.org/abs/2308.03303). Of an
        embedding ``a`` is trained alone.
      b_lr_scale: LoRA+: the learning rate of ``b`` as a multiple of that of ``a``, 16 say (https://arxiv.org/abs/2402.12354). An embedding
        keeps one rate for both.
      lora_bias: Train a bias of LoRA's own too, ``y += s (x a b + bias)``, zero at the start. A layer that has a bias takes it up when
        it is merged; without one, it does not merge.
      view: How training computes it. "two-view" takes forward and dX from the merged kernel and da, db from the factors
        (`jpeft.reparameterized.two_view`); "factored" is the equation above, and the one for forward-mode derivatives; "joined" adds
        the update inside the layer's product, which spares bfloat16 a trip of the outputs and a rounding for copies of inputs and kernel
        (`jpeft.reparameterized.joined`); "auto" takes the cheaper one of the first two for each layer's shape and dtypes.
      axes: Geometry of kernels with more than two axes, ``((regex, KernelAxes), ...)``, e.g. from `jpeft.kernel_axes`.
      head: Task head to train along: "auto", a regex, or None.
      tied: Of a target that is a table of embeddings and the head, too: "both" changes its look-ups and the scores that it gives; "lookup"
        the look-ups alone, as HF PEFT does. No one table can hold that, so the latter does not merge.

    Returns:
      A mergeable `Method`.

    Raises:
      ValueError: for a rank below 1, a dropout rate outside [0, 1), an unknown view or init; from `init` for a target that matches nothing
        or a kernel whose geometry is not known.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((32, 16)), "bias": jnp.zeros(16)}}
    >>> peft = jpeft.apply(params, method=jpeft.lora(rank=4))
    >>> jax.tree.map(jnp.shape, peft.adapter)
    {'query': {'kernel': {'a': (32, 4), 'b': (4, 16)}}}

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, https://arxiv.org/abs/2106.09685.

    Differs from HF PEFT in the default target (there query and value, by architecture) and alpha (there 8), and in computing in the
    layer's own dtype with float32 factors (there a bfloat16 input is cast to float32 for the branch).
    """

    rank: PerPath[Count] = 8
    alpha: PerPath[Positive] = 16.0
    target: Names = r"(.*/)?kernel"
    dropout: Probability = 0.0
    rslora: bool = False
    initializer: starts.Kind = option(default="kaiming", alias="init")
    rho: Annotated[float, Range(1)] = 1.0
    freeze_a: bool = False
    b_lr_scale: Positive = 1.0
    lora_bias: bool = False
    view: Literal["auto", "two-view", "factored", "joined"] = "auto"
    tied: tied_tables.Tied = "both"

    name = "lora"
    summary = "low-rank updates of kernels, merged for inference"
    learning_rate = 3e-3
    adds_to_kernel = True
    leaf_axes = starts.LEAF_AXES | {BIAS: (OUTPUTS,)}

    def check(self) -> None:
        """Refuse a redistribution of ranks where there is nothing to go by."""
        if self.rho != 1 and self.initializer != "eva":
            raise ValueError(
                f"lora: rho={self.rho} moves ranks between kernels by the statistics of init='eva', and init is {self.initializer!r}."
            )

    def scale(self, path: str) -> float:
        """``s`` of the kernel at a path."""
        return low_rank.scale(path, self.rank, self.alpha, self.rslora)

    @classmethod
    def rates_for(cls, options: Mapping[str, Any]) -> Rates:
        """A sixth of the usual rate for a start with two factors that are far from zero; the head's stays the same."""
        start = options.get("init", options.get("initializer"))
        return Rates(5e-4, 30.0) if start in starts.FAR_FROM_ZERO else super().rates_for(options)

    # --- the start --------------------------------------------------------------------------------------------------------------------

    @property
    def requires_stats(self) -> tuple[type[Statistic], ...]:
        """The inputs of the kernels, for a start that looks at them."""
        return (InputMoments,) if self.initializer in starts.NEED_INPUTS else ()

    def init(self, key: Key, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Leaves for each chosen kernel, and the task head.

        Raises:
          ValueError: if the start takes statistics and they are not given, or not for these kernels.
        """
        if not self.requires_stats:
            return super().init(key, params, stats=stats)
        moments = find(stats, InputMoments)
        if moments is None:
            raise ValueError(f"lora: init={self.initializer!r} takes the statistics stats=..., made by {InputMoments.made_by}.")
        forms = self.forms(params)
        ranks = {path: first_match(path, self.rank, "rank") for path in forms}
        scales = {path: self.scale(path) for path in forms}
        leaves = starts.by_inputs(self.initializer, key, tree.flatten(params), forms, moments.values, ranks, scales, self.rho)
        for path, form in forms.items():
            if f"{path}/a" in leaves:
                leaves |= {f"{path}/{name}": leaf for name, leaf in self._own_bias(form, path).items()}
        return with_head(leaves, params, self.head)

    def init_kernel(self, key: Key, kernel: Matrix, path: str) -> Leaves:
        """``a`` random and ``b`` zero, or both in directions of the kernel."""
        return starts.of_kernel(self.initializer, key, kernel, path, first_match(path, self.rank, "rank"), self.scale(path))

    def init_leaves(self, key: Key, kernel: Any, form: MatrixForm, path: str) -> Leaves:
        """The random start is drawn for all kernels of a stack at once: only the shape of the kernel is needed."""
        if self.initializer in ("kaiming", "gaussian"):
            leaves = low_rank.factors(key, path, form.shape, form.axes, first_match(path, self.rank, "rank"), self.initializer)
        else:
            leaves = super().init_leaves(key, kernel, form, path)
        return leaves | self._own_bias(form, path)

    def _own_bias(self, form: MatrixForm, path: str) -> dict[str, Any]:
        """LoRA's own bias, if there is one: zeros."""
        if not self.lora_bias:
            return {}
        if tied_tables.is_table(path):
            raise ValueError(f"lora: lora_bias=True gives each output a bias, and '{path}' is a table of embeddings. Choose other kernels.")
        return {BIAS: jnp.zeros(form.leaf_shape((OUTPUTS,), {}))}

    def expected(self, params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        """The shapes do not depend on statistics, unless ranks may be moved between kernels: then they are those that the adapter has."""
        if not self.requires_stats:
            return super().expected(params, adapter)
        alike = self.replace(rho=1.0, init="pissa" if self.initializer != "eva" else "kaiming")
        shapes = tree.flatten(alike.expected(params, adapter))
        most = lambda path: round(first_match(path, self.rank, "rank") * self.rho)
        held = tree.flatten(adapter) if self.rho > 1 else {}
        return tree.unflatten(low_rank.stored_ranks(shapes, held, self.forms(params), self.leaf_axes, most))

    # --- training ---------------------------------------------------------------------------------------------------------------------

    def labels(self, adapter: tree.Adapter) -> Any:
        """The factors of the start are frozen, and so is ``a`` with `freeze_a`. ``b`` is a group where it has its own learning rate."""
        leaves, labels = tree.flatten(adapter), {}
        for kernel in {path.rpartition("/")[0] for path in leaves if path.endswith("/a") and f"{path[:-1]}b" in leaves}:
            lookup = kernel.rpartition("/")[2] == "embedding"
            if self.b_lr_scale != 1 and not lookup:
                labels[f"{kernel}/b"] = FASTER
            if self.freeze_a:
                labels[f"{kernel}/{self._random_factor(kernel)}"] = FREEZE
            labels |= {path: FREEZE for path in (f"{kernel}/a0", f"{kernel}/b0") if path in leaves}
        return tree.replace(super().labels(adapter), labels)

    @property
    def groups(self) -> tuple[tuple[str, Group], ...]:
        """``b`` with a learning rate of its own."""
        return ((FASTER, Group(lr_scale=self.b_lr_scale)),) if self.b_lr_scale != 1 else ()

    def _random_factor(self, path: str) -> str:
        """The factor that is random at the start: of an embedding it is ``b``."""
        return "b" if path.rpartition("/")[2] == "embedding" else "a"

    def _held(self, leaves: Mapping[str, Any], path: str) -> dict[str, Any]:
        """The leaves, those that are not trained without a gradient: then nothing is computed or kept for it."""
        frozen = {"a0", "b0"} | ({self._random_factor(path)} if self.freeze_a else set())
        return {name: jax.lax.stop_gradient(leaf) if name in frozen else leaf for name, leaf in leaves.items()}

    # --- merging ----------------------------------------------------------------------------------------------------------------------

    def merge(self, params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        """The new kernels.

        Raises:
          ValueError: for a change of the look-ups of a table alone; for a bias of LoRA's own where the layer has none.
        """
        base, beside = tree.flatten(params), tree.split(params, adapter)[1]
        tied_tables.check_merge(self.tied, beside, self.name)
        for module in (path.rpartition("/")[0] for path, leaves in beside.items() if BIAS in leaves):
            if (f"{module}/bias" if module else "bias") not in base:
                raise ValueError(
                    f"Cannot merge: lora has a bias of its own for '{module}' (lora_bias=True), and that layer has none to take it up. "
                    "Keep using it through jpeft.wrap."
                )
        return super().merge(params, adapter)

    def merge_layer(self, layer: Layer, leaves: Leaves) -> Mapping[str, Any] | None:
        """The layer's parameters with the new kernel; as they are where the scores of a table stay, and None where a bias has no place."""
        if self.tied == "lookup" and layer.method == "attend":
            return layer.merged(layer.params)
        without_place = any(BIAS in part for part in leaves.values()) and "bias" not in layer.params
        return None if without_place else super().merge_layer(layer, leaves)

    # --- one kernel -------------------------------------------------------------------------------------------------------------------

    def new_kernel(self, kernel: Matrix, leaves: Leaves, path: str) -> Matrix:
        """``W + s a b``, or ``W + s (a b - a0 b0)``."""
        return low_rank.update(kernel, self._held(leaves, path), self.scale(path))

    def new_bias(self, bias: Vector, leaves: Leaves, path: str) -> Vector:
        """``bias + s c``, with LoRA's own c."""
        return bias + self.scale(path) * leaves[BIAS]

    def as_low_rank(self, leaves: Leaves, path: str) -> tuple[Array, Array] | None:
        """``s a`` and ``b``; with the factors of the start, ``s [a, -a0]`` and ``[b; b0]``.

        None for a change of the look-ups of a table alone, or of a bias.
        """
        if (self.tied == "lookup" and tied_tables.is_table(path)) or BIAS in leaves:
            return None
        if "a0" not in leaves:
            return self.scale(path) * leaves["a"], leaves["b"]
        a, b = jnp.concatenate([leaves["a"], -leaves["a0"]], -1), jnp.concatenate([leaves["b"], leaves["b0"]], -2)
        return self.scale(path) * a, b

    def call_linear(self, layer: Layer, linear: Linear, inputs: Inputs, leaves: Leaves, path: str, rng: Key | None) -> Any:
        """One of the views, whichever is cheaper for the layer's shape."""
        if tied_tables.scores(self.tied, path, inputs[0]):
            return layer(*inputs)
        held, s = self._held(leaves, path), self.scale(path)
        start = (held["a0"], held["b0"]) if "a0" in held else None
        # With a frozen `a` the factored view keeps `x a` for the backward pass, and not x.
        view = "factored" if self.view == "auto" and self.freeze_a else self.view
        y = two_view.low_rank(layer, linear, s, inputs, held["a"], held["b"], view=view, dropout=self.dropout, rng=rng, start=start)
        if BIAS not in held:
            return y
        if linear.add_bias is None:
            raise ValueError(f"'{path}': lora_bias=True adds a bias to the layer's outputs, and this layer's have no axes for one.")
        return linear.add_bias(y, (s * held[BIAS]).astype(y.dtype))

    def _call_unknown(
        self, layer: Layer, inputs: Inputs, leaves: Mapping[str, Any], axes: Mapping[str, KernelAxes], rng: Key | None
    ) -> Any:
        """Products of a layer of an unknown class; where that layer has a bias, it takes up LoRA's own, once for all of them."""
        if "bias" in layer.params and any(BIAS in part for part in leaves.values()):
            new = self._new_params(layer.params, leaves, axes, layer.path)["bias"]
            if new is not layer.params["bias"]:
                layer = layer.with_params({"bias": new})
                leaves = {name: {key: leaf for key, leaf in part.items() if key != BIAS} for name, part in leaves.items()}
        return super()._call_unknown(layer, inputs, leaves, axes, rng)

    def _run_on_new_params(self, layer: Layer, inputs: Inputs, leaves: Mapping[str, Any], axes: Mapping[str, KernelAxes]) -> Any:
        """A layer whose products are not seen, on its new parameters, where these are all that changes."""
        has_bias = any(BIAS in part for part in leaves.values()) and "bias" not in layer.params
        if has_bias or (self.tied == "lookup" and any(map(tied_tables.is_table, leaves))):
            option = "lora_bias=True" if has_bias else "tied='lookup'"
            raise ValueError(f"lora: '{layer.path}' uses {', '.join(leaves)} in a way that {option} cannot be brought into; leave it out.")
        return super()._run_on_new_params(layer, inputs, leaves, axes)


lora = LoRA

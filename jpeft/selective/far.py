"""FAR, Freeze And Reconfigure: prime the feed-forward layers, then train only the output neurons that moved the most."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import layouts, tree
from jpeft.core.layer import Layer
from jpeft.core.method import Method, with_head
from jpeft.core.options import Names, Pattern, Share, ShareBelowOne
from jpeft.core.stages import Stage
from jpeft.core.statistics import Fisher, Movement, Statistic
from jpeft.selective.choice import find_scores
from jpeft.selective.columns import place_columns, place_leaves, run_with_columns
from jpeft.selective.indices import INDICES, VALUES, label_pairs
from jpeft.tree.head import not_head
from jpeft.tree.kernels import STACKED
from jpeft.tree.select import select


class NeuronMethod(Method):
    """The options of FAR, which both stages have, and the leaves that they name."""

    retention: Share = 0.25
    target: Names = "@ffn_in|@ffn_out"
    also: Names | None = None
    priming_share: ShareBelowOne = 0.1
    head: Pattern | None = "auto"

    name = "far"
    family = "selective"
    summary = "train the feed-forward neurons that move the most in a short priming"
    learning_rate = 1e-3
    why_no_merge = None
    begins_within = 0.0

    def find_targets(self, params: tree.Params) -> tuple[list[str], list[str]]:
        """The paths of the kernels, and of the leaves that the option `also` names besides.

        Raises:
          ValueError: if an option names nothing, or a kernel has not one axis of inputs and one of outputs.
        """
        leaves = not_head(params, self.head)
        kernels = select([path for path in leaves if len(leaves[path].shape) > 1], self.target, params=params)
        layers = _layer_axes(params)
        for path in kernels:
            shape = leaves[path].shape
            if len(shape) != 2 + (path in layers):  # [inputs, outputs], or [layers, inputs, outputs]
                raise ValueError(f"far: '{path}' {shape} is no kernel with one axis of inputs and one of outputs: choose another target.")
        taken = {*kernels, *map(_bias_path, kernels)}
        also = select(leaves, self.also, option="also", params=params) if self.also is not None else []
        return kernels, [path for path in also if path not in taken]

    def choose_learners(self, params: tree.Params, scores: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves of the learners, by path: in each layer, the neurons with the largest sum of scores.

        Args:
          params: The base.
          scores: How far each weight has moved, by path.
          source: The weights from which learners continue, by path. It has no leaves that another method of a chain replaces. If the kernel
            is missing, neurons are ranked by their bias and only the bias is trained.
        """
        out: dict[str, Any] = {}
        layers = _layer_axes(params)
        for path in self.find_targets(params)[0]:
            names = [name for name in (path, _bias_path(path)) if name in source]
            if not names:
                continue
            axis = layers.get(path, 0)
            moved = jnp.moveaxis(jnp.abs(scores[names[0]].astype(jnp.float32)), axis, 0)
            moved = moved.sum(-2) if names[0] == path else moved  # [*stack, outputs]
            at = largest_neurons(moved, max(1, round(self.retention * moved.shape[-1])))
            for name in names:
                leaf = jnp.moveaxis(source[name], axis, 0)
                index = at if leaf.ndim == at.ndim else at[..., None, :]  # a kernel has an axis of inputs more
                out[f"{name}/{VALUES}"] = tree.trained_copy(jnp.moveaxis(jnp.take_along_axis(leaf, index, -1), 0, axis))
                out[f"{name}/{INDICES}"] = jnp.moveaxis(at.astype(jnp.float32), 0, axis)
        return out


class FAR(NeuronMethod):
    r"""FAR: ``y = x W + b`` with W and b trained for the output neurons j of largest ``||W_after[:, j] - W_before[:, j]||_1`` only.

    Two stages. *Priming*: the linear layers of the MLPs are trained whole, for a small share of the steps. *Learners*: in each layer, the
    ``round(retention * outputs)`` neurons whose weights have moved the most train further; all others return to their pretrained weights
    and stay there. From then on a step forms no gradient and keeps no moments for them: the layer runs whole, and a `custom_vjp` takes the
    gradient of the learners alone (`jpeft.selective.columns`).

    Args:
      retention: Share of the output neurons of each layer that are learners.
      target: The kernels: a regex, a list of names, or roles (`jpeft.layouts`); their biases are trained too. By default the linear
        layers of all MLPs.
      also: Further leaves that are trained whole in both stages: a regex or names, such as ``r".*attention/.*"``. The paper trains MLPs
        only.
      priming_share: Share of the steps for priming.
      head: Task head to train along: "auto", a regex, or None.
      stage: "priming", or "learners" to begin with the second stage: ``stats`` then says how far each parameter has moved
        (`jpeft.stats.movement`), and learners start from the pretrained weights. Other scores, such as the Fisher information, are
        summed over each neuron's weights in the same way.

    Returns:
      A mergeable `Method`; merged, the weights of frozen neurons are bit for bit the pretrained ones. `jpeft.advance` leads from the first
      stage to the second. The first works in any framework. The second works in any framework too, but where the model is not linen's it
      costs as much as full training.

    Raises:
      ValueError: for a share out of range or an unknown stage; from `init`, if nothing matches, if a kernel has not one axis of inputs and
        one of outputs, or, beginning with the second stage, without stats.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"mlp": {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}}}
    >>> peft = jpeft.advance(jpeft.apply(params, method="far"))
    >>> jax.tree.map(jnp.shape, peft.adapter["mlp"]["up"])
    {'bias': {'indices': (2,), 'values': (2,)}, 'kernel': {'indices': (2,), 'values': (4, 2)}}

    Reference: Vucetic et al., Efficient Fine-Tuning of BERT Models on the Edge, 2022, https://arxiv.org/abs/2205.01541.

    Differs from the paper in how the layer is computed. There the layer is split into a trained and a frozen one, and the outputs are
    permuted back into order; here it stays whole, with equal outputs and gradients. The paper does not give the length and learning rate of
    the priming. The inputs of these layers are kept for the backward pass as before; FAR saves the FLOPs, buffers and moments of gradients.
    """

    stage = "priming"

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Copies of whole kernels and biases, of the leaves that `also` names, and the head."""
        del key, stats
        base, (kernels, also) = tree.flatten(params), self.find_targets(params)
        paths = [path for kernel in kernels for path in (kernel, _bias_path(kernel)) if path in base]
        return with_head({path: tree.trained_copy(base[path]) for path in [*paths, *also]}, params, self.head)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The learners, for the steps after the priming."""
        return (Stage("learners", 1 - self.priming_share, self._reconfigure),)

    def _reconfigure(self, params: tree.Params, adapter: tree.Adapter, *, key: jax.Array, stats: Any = None) -> tuple[Method, tree.Adapter]:
        del key, stats
        base, (kernels, _) = tree.flatten(params), self.find_targets(params)
        trained, _, _ = tree.split(params, adapter)
        in_layers = {name for path in kernels for name in (path, _bias_path(path))}
        moved = {path: leaf.astype(jnp.float32) - base[path].astype(jnp.float32) for path, leaf in trained.items() if path in in_layers}
        whole = {path: leaf for path, leaf in trained.items() if path not in in_layers}
        return self.replace(stage="learners"), tree.unflatten(self.choose_learners(params, moved, trained) | whole)


class FARLearners(NeuronMethod):
    """The second stage of FAR: train the learners only. See `jpeft.far` for the options."""

    stage = "learners"

    @property
    def requires_stats(self) -> tuple[type[Statistic], ...]:
        """How far each parameter has moved."""
        return (Movement,)

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """The learners at their pretrained weights, copies of the leaves that `also` names, and the head.

        Raises:
          ValueError: without scores for the kernels.
        """
        del key
        base, (kernels, also) = tree.flatten(params), self.find_targets(params)
        moved = find_scores(stats, (Movement, Fisher))
        if moved is None:
            raise ValueError(f"far: the stage 'learners' starts from how far each parameter has moved, and was given none. {_HOW_TO_SCORE}")
        scores = tree.flatten(moved)
        wrong = [path for path in kernels if path not in scores or scores[path].shape != base[path].shape]
        if wrong:
            raise ValueError(
                f"far: stats lacks {len(wrong)} of the kernels, or has them in another shape, such as '{wrong[0]}'. {_HOW_TO_SCORE}"
            )
        own = self.choose_learners(params, scores, base) | {path: tree.trained_copy(base[path]) for path in also}
        return with_head(own, params, self.head)

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """The layer with its learners, in the cheap way if it is linear in its kernel."""
        del rng
        linear = layer.linear
        if linear is not None and linear.apply_columns is not None and linear.name in leaves and not layer.is_wrapped:
            return run_with_columns(layer, linear, inputs, leaves)
        merged = layer.merged(layer.params)
        if merged is not None:
            return layer.innermost.run(place_leaves(merged, leaves), *inputs)
        # No parameter can hold the change of the middleware in between, such as a bottleneck.
        return layer.run(place_leaves(layer.params, leaves), *inputs)

    def merge(self, params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        """The learners' weights in their places."""
        layers = _layer_axes(params)
        place = lambda path, leaf, leaves: place_columns(jnp.asarray(leaf), **leaves, axis=layers.get(path, 0))
        return tree.merge_leaves(params, adapter, place)

    def merge_layer(self, layer: Layer, leaves: dict[str, Any]) -> Mapping[str, Any] | None:
        """The layer's parameters, as other middleware leaves them, with the learners' weights in their places."""
        params = layer.merged(layer.params)
        return None if params is None else place_leaves(params, leaves)

    def labels(self, adapter: tree.Adapter) -> Any:
        """Everything is trained except the indices."""
        return label_pairs(adapter)

    def count_changed(self, params: tree.Params, adapter: tree.Adapter) -> int:
        """The learners' weights, and all leaves that are trained whole."""
        replaced, beside, _ = tree.split(params, adapter)
        return tree.size(replaced) + sum(pair[VALUES].size for pair in beside.values())

    def expected(self, params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        """The shapes that `init` makes. They do not depend on the statistics, so zeros serve as statistics."""
        del adapter
        init = lambda params: self.init(jax.random.key(0), params, stats=Movement(jax.tree.map(jnp.zeros_like, params)))
        return jax.eval_shape(init, params)


FAR.later_stages = (FARLearners,)


def largest_neurons(moved: Float[Array, "*stack outputs"], count: int) -> Array:
    """The numbers of the neurons with the largest scores in each layer, ascending [*stack, count]; of equal scores, the first.

    >>> import jax.numpy as jnp
    >>> largest_neurons(jnp.array([1.0, 3.0, 3.0, 5.0]), 2)
    Array([1, 3], dtype=int32)
    """
    return jnp.sort(jnp.argsort(-moved, axis=-1)[..., :count], axis=-1)  # argsort is stable


def _layer_axes(params: tree.Params) -> dict[str, int]:
    """The axis of the layers of each leaf that holds those of a stack, by path."""
    by_name = {path: 0 for path, leaf in tree.flatten(params).items() if len(leaf.shape) > 2 and re.fullmatch(STACKED, path)}
    found = layouts.layer_axes(params)
    return {path: axis for path, axis in {**by_name, **found}.items() if axis is not None}


def _bias_path(kernel: str) -> str:
    return f"{kernel.removesuffix('kernel')}bias"


_HOW_TO_SCORE = (
    "Give stats=jpeft.stats.movement(params, primed), arrays in the shapes of the parameters; or begin with stage='priming', train, and "
    "call jpeft.advance(peft)."
)
far = FAR

"""FAR, Freeze And Reconfigure: prime the feed-forward layers, then train the output neurons that moved the most, and those alone."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import tree
from jpeft.method import FREEZE, TRAIN, Layer, Method, Stage, factory, not_head, passthrough, with_head
from jpeft.selective import columns as learners
from jpeft.tree.kernels import STACKED
from jpeft.tree.select import select

# The linear layers of the MLP, by their names in common families. Attention's own `output/dense` is none of them.
FEED_FORWARD = (
    r"(.*/)?(intermediate/dense|(?<!attention/)output/dense|(ffn/)?lin[12]|fc[12]|c_fc|mlp/c_proj|(up|gate|down)_proj|wi(_[01])?|wo|"
    r"(mlp/)?(up|gate|down)|mlp/Dense_[01])/kernel"
)


@factory
def far(
    *,
    retention: float = 0.25,
    target: str | Sequence[str] = FEED_FORWARD,
    also: str | Sequence[str] | None = None,
    priming_share: float = 0.1,
    head: str | None = "auto",
    stage: str = "priming",
) -> Method:
    r"""FAR: ``y = x W + b`` with W and b trained for the output neurons j of largest ``||W_after[:, j] - W_before[:, j]||_1`` only.

    Two stages. *Priming*: the linear layers of the MLPs are trained whole, for a small share of the steps. *Learners*: in each layer, the
    ``round(retention * outputs)`` neurons whose weights have moved the most go on from where they are; all others go back to their
    pretrained weights and stay there. From then on a step forms no gradient for them, and keeps no moments: the layer runs whole, and a
    `custom_vjp` takes the learners' gradient alone (`jpeft.selective.columns`).

    Args:
      retention: Share of the output neurons of each layer that are learners.
      target: The kernels, a regex or a list of names; biases come along. By default the linear layers of all MLPs.
      also: What else is trained whole in both stages: a regex or names, such as ``r".*attention/.*"``. The paper reconfigures MLPs only.
      priming_share: Share of the steps for priming.
      head: Task head to train along: "auto", a regex, or None.
      stage: "priming", or "learners" to begin with the second stage: by ``stats``, how far each parameter has moved
        (`jpeft.stats.movement`), from the pretrained weights.

    Returns:
      A mergeable `Method`; merged, the weights of frozen neurons are bit for bit the pretrained ones. `jpeft.advance` leads from the first
      stage to the second. The first works in any framework; the second costs as much as full training where the model is not linen's.

    Raises:
      ValueError: for a share out of range or an unknown stage; from `init`, if nothing matches, a kernel has not one axis of inputs and one
        of outputs, or, beginning with the second stage, without stats.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"mlp": {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}}}
    >>> peft = jpeft.advance(jpeft.apply(params, method="far"))
    >>> jax.tree.map(jnp.shape, peft.adapter["mlp"]["up"])
    {'bias': {'indices': (2,), 'values': (2,)}, 'kernel': {'indices': (2,), 'values': (4, 2)}}

    Reference: Vucetic et al., Efficient Fine-Tuning of BERT Models on the Edge, 2022, https://arxiv.org/abs/2205.01541.

    Differs from the paper in how the layer is computed: there it is split into a trained and a frozen one and the outputs are permuted back
    into order; here it stays in one piece, with equal outputs and gradients for every choice of learners. Length and learning rate of the
    priming are not given there. What is kept for the backward pass, the inputs of these layers, is the same as before: what FAR saves
    here are the FLOPs, buffers and moments of the gradients.
    """
    if not 0 < retention <= 1:
        raise ValueError(f"retention={retention} must be a share of the neurons, above 0 and at most 1.")
    if not 0 < priming_share < 1:
        raise ValueError(f"priming_share={priming_share} must be a share of the steps, above 0 and below 1.")
    if stage not in ("priming", "learners"):
        raise ValueError(f"stage={stage!r} is not one of 'priming', 'learners'.")

    def targets(params: tree.Params) -> tuple[list[str], list[str]]:
        """Paths of the kernels, and of what else is trained."""
        leaves = not_head(params, head)
        kernels = select([path for path in leaves if len(leaves[path].shape) > 1], target, params=params)
        for path in kernels:
            if len(leaves[path].shape) != 2 + bool(re.fullmatch(STACKED, path) and len(leaves[path].shape) > 2):
                raise ValueError(
                    f"far: '{path}' {leaves[path].shape} is no kernel with one axis of inputs and one of outputs: choose another target."
                )
        taken = {*kernels, *(_bias(path) for path in kernels)}
        more = select(leaves, also, option="also", params=params) if also is not None else []
        return kernels, [path for path in more if path not in taken]

    def reconfigured(params: tree.Params, score: dict[str, jax.Array], source: dict[str, Any]) -> tree.Adapter:
        """The learners by the movement of each weight; they go on from `source`.

        That lacks what another method of a chain replaces: a layer's bias, or its kernel, and then the bias alone tells and learns.
        """
        out: dict[str, Any] = {}
        for path in targets(params)[0]:
            names = [name for name in (path, _bias(path)) if name in source]
            if not names:
                continue
            moved = jnp.abs(score[names[0]].astype(jnp.float32))
            moved = moved.sum(-2) if names[0] == path else moved  # [*stack, outputs]
            count = max(1, round(retention * moved.shape[-1]))
            # Stable, so that of equal neurons the first are taken.
            at = jnp.sort(jnp.argsort(-moved, axis=-1)[..., :count], axis=-1)
            for name in names:
                index = at if source[name].ndim == at.ndim else at[..., None, :]
                out[f"{name}/{learners.VALUES}"] = jnp.take_along_axis(source[name], index, -1)
                out[f"{name}/{learners.INDICES}"] = at.astype(jnp.float32)
        return out

    def init_learners(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del key
        base, (kernels, more) = tree.flatten(params), targets(params)
        if stats is None:
            raise ValueError(f"far: beginning with the learners takes how far each parameter has moved, and was given none. {_HOW}")
        scores = tree.flatten(stats)
        wrong = [path for path in kernels if path not in scores or scores[path].shape != base[path].shape]
        if wrong:
            raise ValueError(f"far: stats lacks {len(wrong)} of the kernels, or has them in another shape, such as '{wrong[0]}'. {_HOW}")
        return tree.unflatten(reconfigured(params, scores, base) | {path: tree.copy(base[path]) for path in more})

    def labels_fn(adapter: tree.Adapter) -> Any:
        flat = tree.flatten(adapter)
        fixed = lambda path: path.endswith(f"/{learners.INDICES}") and f"{path.removesuffix(learners.INDICES)}{learners.VALUES}" in flat
        return tree.unflatten({path: FREEZE if fixed(path) else TRAIN for path in flat})

    def call_fn(layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        del rng
        linear = layer.linear
        wrapped = any(isinstance(own, Mapping) for own in layer.params.values())
        if linear is None or linear.apply_columns is None or linear.name not in leaves or wrapped:
            # All that is known of a module of the user's own is its parameters. Nor is a layer linear any more that another method of a
            # chain has wrapped: list FAR before it.
            new = {name: learners.placed(layer.params[name], **part) for name, part in leaves.items()}
            return layer.run({**layer.params, **new}, *inputs)
        return learners.apply(layer, linear, inputs, leaves)

    def merge_fn(params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        return tree.merge_leaves(params, adapter, lambda path, leaf, leaves: learners.placed(leaf, **leaves))

    def changed_fn(params: tree.Params, adapter: tree.Adapter) -> int:
        replaced, beside, _ = tree.split(params, adapter)
        return tree.size(replaced) + sum(part[learners.VALUES].size for part in beside.values())

    def shapes_fn(params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        del adapter
        zeros = lambda p: jax.tree.map(jnp.zeros_like, p)
        return jax.eval_shape(lambda p: with_head(init_learners, head)(jax.random.key(0), p, stats=zeros(p)), params)

    if stage == "learners":
        return Method(
            init=with_head(init_learners, head),
            call=call_fn,
            merge=merge_fn,
            labels=labels_fn,
            changed=changed_fn,
            shapes=shapes_fn,
            needs="movement",
        )

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del key, stats
        base, (kernels, more) = tree.flatten(params), targets(params)
        paths = [path for kernel in kernels for path in (kernel, _bias(kernel)) if path in base]
        return tree.unflatten({path: tree.copy(base[path]) for path in [*paths, *more]})

    def reconfigure(params: tree.Params, adapter: tree.Adapter, *, key: jax.Array, stats: Any = None) -> tuple[Method, tree.Adapter]:
        del key, stats
        base, (kernels, _) = tree.flatten(params), targets(params)
        trained, _, _ = tree.split(params, adapter)
        taken = {name for path in kernels for name in (path, _bias(path))}
        moved = {path: leaf.astype(jnp.float32) - base[path].astype(jnp.float32) for path, leaf in trained.items() if path in taken}
        whole = {path: leaf for path, leaf in trained.items() if path not in taken}
        return reconfigured_method, tree.unflatten(reconfigured(params, moved, trained) | whole)

    reconfigured_method = far(retention=retention, target=target, also=also, priming_share=priming_share, head=head, stage="learners")
    return Method(
        init=with_head(init_fn, head),
        call=passthrough,
        merge=tree.graft,
        stages=(Stage("learners", 1 - priming_share, reconfigure),),
    )


def _bias(kernel: str) -> str:
    return f"{kernel.removesuffix('kernel')}bias"


_HOW = (
    "Give stats=jpeft.stats.movement(params, primed), arrays in the shapes of the parameters; or begin with stage='priming', train, and "
    "call jpeft.advance(peft)."
)

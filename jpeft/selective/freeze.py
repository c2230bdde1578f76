"""Freeze: train the top layers, keep the rest."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import tree
from jpeft.method import Method, factory, not_head, passthrough, with_head
from jpeft.tree.kernels import STACKED
from jpeft.tree.select import select

_INDEXED = re.compile(r"(?P<stack>.*?[^/\d])[_/](?P<index>\d+)/(?P<rest>.*)")
_AFTER = r"(pooler|ln_f|final_?layer_?norm|final_norm|norm|layer_?norm|encoder_norm|decoder_norm|ln_post)(/.*)?"


@factory
def freeze(
    *,
    top: int = 2,
    layers: str | None = None,
    also: str | Sequence[str] | None = "auto",
    target: str | Sequence[str] | None = None,
    head: str | None = "auto",
) -> Method:
    r"""Freeze: train the ``top`` layers nearest the output, what stands after them, and the task head; all else stays as it is.

    With L layers, ``theta_l' = theta_l + delta_l`` for ``l >= L - top`` and ``theta_l' = theta_l`` below. It is the one selective method
    whose backward pass is really shorter: nothing below the lowest trained layer is differentiated. (Not so for layers stacked by
    `nn.scan`, whose backward pass runs through the whole stack; there only the trained slice has gradients and optimizer state.)

    Args:
      top: How many layers, counted from the output. 0 trains the head (and `also`) alone.
      layers: Regex for the paths of the layers, with a group ``(\d+)`` for the index; found by itself where one stack of numbered (or
        scanned) layers holds the most parameters.
      also: Leaves to train besides: "auto" for the pooler and final norm that follow the layers (with ``top=0``: none), a regex, names, or
        None.
      target: Ignore layers: train exactly these paths (a regex or a list of names) and the head.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` that replaces leaves, works in any framework and merges by keeping them.

    Raises:
      ValueError: for a negative `top`; from `init`, if there are fewer layers than `top`, or none, or two stacks.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {f"layer_{i}": {"kernel": jnp.ones((4, 4))} for i in range(3)} | {"ln_f": {"scale": jnp.ones(4)}}
    >>> list(jpeft.flatten(jpeft.apply(params, method="freeze", top=1).adapter))
    ['layer_2/kernel', 'ln_f/scale']

    Reference: Lee, Tang and Lin, What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning, 2019,
    https://arxiv.org/abs/1911.03090.
    """
    if top < 0:
        raise ValueError(f"top={top} must not be negative: it counts the trained layers from the output.")

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del key, stats
        leaves = not_head(params, head)
        if target is not None:
            return tree.unflatten({path: tree.copy(leaves[path]) for path in select(leaves, target, params=params)})
        stack = find_layers(leaves, layers) if top else {}
        trained = {
            path: take(leaves[path]) if index is None else tree.copy(leaves[path]) for path, index in uppermost(stack, leaves).items()
        }
        outside = [path for path in leaves if path not in stack]
        if also == "auto":
            after = [path for path in outside if top and re.search(rf"(^|/){_AFTER}$", path) and "embed" not in path]
        else:
            after = select(outside, also, option="also", params=params) if also is not None else []
        return tree.unflatten(trained | {path: tree.copy(leaves[path]) for path in after})

    def uppermost(stack: dict[str, int | None], leaves: dict[str, Any]) -> dict[str, int | None]:
        stacked = {leaves[path].shape[:1] for path, index in stack.items() if index is None}
        if len(stacked) > 1 or () in stacked:
            raise ValueError(
                f"freeze: the leaves below {next(iter(stack)).rpartition('/')[0]!r} do not share a leading axis, so they are no stack of "
                "layers. Say where the layers are with layers=r'...(\\d+)...', or name the leaves with target=...."
            )
        total = stacked.pop()[0] if stacked else 1 + max((i for i in stack.values() if i is not None), default=-1)
        if top > total:
            raise ValueError(f"top={top}, but the model has {total} layers.")
        return {path: index for path, index in stack.items() if index is None or index >= total - top}

    def take(leaf: Any) -> Any:
        return jnp.array(leaf[leaf.shape[0] - top :], copy=True)

    def bind_fn(params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        del rng
        base = tree.flatten(params)
        new = tree.flatten(adapter)
        whole = {
            path: leaf if leaf.shape == base[path].shape else jnp.concatenate([base[path][: -leaf.shape[0]], leaf])
            for path, leaf in new.items()
        }
        return tree.replace(params, whole)

    def changed_fn(params: tree.Params, adapter: tree.Adapter) -> int:
        del params
        return tree.size(adapter)

    return Method(init=with_head(init_fn, head), bind=bind_fn, call=passthrough, merge=bind_fn, changed=changed_fn)


def find_layers(leaves: dict[str, Any], pattern: str | None) -> dict[str, int | None]:
    """The leaves that belong to the stack of layers, with the index of each one's layer; None for leaves that hold all layers.

    Raises:
      ValueError: if there is no stack, or two of equal size.
    """
    if pattern is not None:
        regex = re.compile(pattern)
        if regex.groups != 1:
            raise ValueError(f"layers={pattern!r} needs exactly one group, (\\d+), for the layer's index.")
        found: dict[str, int | None] = {path: int(m[1]) for path in leaves if (m := regex.match(path))}
        if not found:
            raise ValueError(f"layers={pattern!r} matches none of the {len(leaves)} parameters, such as {list(leaves)[:5]}.")
        return found
    # Candidates by (name, whether indexed). A path may be in two: `layers/ln_1` is in a scanned stack `layers`, or in layers called `ln`.
    stacks: dict[tuple[str, bool], dict[str, int | None]] = {}
    for path in leaves:
        if m := _INDEXED.fullmatch(path):
            stacks.setdefault((m["stack"], True), {})[path] = int(m["index"])
        if m := re.fullmatch(STACKED, path):
            stacks.setdefault((m["stack"], False), {})[path] = None
    stacks = {key: paths for key, paths in stacks.items() if not key[1] or set(paths.values()) == set(range(len(set(paths.values()))))}
    sizes = {key: (sum(leaves[path].size for path in paths), key[1]) for key, paths in stacks.items()}
    largest = [key for key, size in sizes.items() if size == max(sizes.values())]
    if len(largest) != 1:
        what = f"several stacks of equal size, {[name for name, _ in largest]}" if largest else "no numbered or stacked layers"
        raise ValueError(
            f"freeze: found {what}. Say which with layers=r'encoder/layer/(\\d+)/', or name the leaves with target=...; "
            f"parameters begin with {list(leaves)[:5]}."
        )
    return stacks[largest[0]]

"""The keys and values that the projections of a model's attention make of the rows of a prompt."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import layouts, tree
from jpeft.additive.prefixes.attention_sites import AttentionSite
from jpeft.core.options import Axes, Names
from jpeft.tree.kernels import KernelAxes, axes_of, axes_rules
from jpeft.tree.paths import Path
from jpeft.tree.select import select

VALUE = "@value"


class Linear(NamedTuple):
    """A linear layer, or those of all layers of a stack.

    Attributes:
      kernel: As matrices.
      bias: None if there is none.
    """

    kernel: Float[Array, "*stack inputs outputs"]
    bias: Float[Array, "*stack outputs"] | None

    def columns(self, start: int, stop: int) -> "Linear":
        """The layer of some of the outputs."""
        return Linear(self.kernel[..., start:stop], None if self.bias is None else self.bias[..., start:stop])

    def top(self, count: int) -> "Linear":
        """Those of the last layers of a stack."""
        return Linear(self.kernel[-count:], None if self.bias is None else self.bias[-count:])

    def __call__(self, rows: Float[Array, "*stack l inputs"]) -> Float[Array, "*stack l outputs"]:
        """The outputs for rows, in their dtype; the product is that of the kernel's dtype, as in the layer."""
        y = jnp.matmul(rows.astype(self.kernel.dtype), self.kernel, preferred_element_type=rows.dtype)
        return y if self.bias is None else y + self.bias[..., None, :].astype(y.dtype)


class Projections(NamedTuple):
    """The projections of one attention, or of a stack of them.

    Attributes:
      key: To keys.
      value: To values.
      query: To queries, where the output of a prompt is to be computed from the input of attention; else None.
      heads: Number of heads, in that case.
    """

    key: Linear
    value: Linear
    query: Linear | None = None
    heads: int = 0

    def of_prompt(self, prompt: Float[Array, "*top l inputs"]) -> dict[str, jax.Array]:
        """The leaves that attention to a prompt needs: keys and values, flat; or by head what gives scores of inputs, and values.

        A prompt of fewer layers than the stack's is that of the last ones.
        """
        stacked = self.key.kernel.ndim > 2
        take = (lambda linear: linear.top(len(prompt))) if stacked else (lambda linear: linear)
        key, value = take(self.key)(prompt), take(self.value)(prompt)  # [*top, l, width]
        if self.query is None:
            return {"key": key, "value": value}
        query = take(self.query)
        split = lambda x: x.reshape(*x.shape[:-1], self.heads, -1)  # [..., heads, head]
        key, kernel = split(key), split(query.kernel.astype(key.dtype))
        scale = key.shape[-1] ** -0.5
        shift = jnp.zeros(key.shape[-2:], key.dtype) if query.bias is None else split(query.bias.astype(key.dtype))
        return {
            "scores": scale * jnp.einsum("...dhc,...lhc->...hdl", kernel, key),
            "shift": scale * jnp.einsum("...hc,...lhc->...hl", shift, key),
            "value": jnp.swapaxes(split(value), -3, -2),  # [*top, heads, l, head]
        }


def find_projections(
    params: tree.Params, sites: Sequence[AttentionSite], *, value: Names, axes: Axes | None, heads: int | None
) -> list[Projections]:
    """The projections of each attention.

    Args:
      params: The base.
      sites: The attentions.
      value: The value kernels, where keys and values have kernels of their own.
      axes: Geometry of kernels with more than two axes.
      heads: Number of heads, if the projection to queries is wanted; else None.

    Raises:
      ValueError: if there is no kernel for values, or none for all three where queries are wanted; or if the heads do not fit.
    """
    base, layers = tree.flatten(params), layouts.layer_axes(params)
    fused = set(layouts.find(params, "@qkv", required=False))
    kernels = {path: leaf for path, leaf in base.items() if len(leaf.shape) > 1}
    apart = [site.kernel for site in sites if site.kernel not in fused]
    if apart and heads is not None:
        raise ValueError(
            f"project=False is for attention whose queries, keys and values come from one kernel, as in GPT-2, and '{apart[0]}' makes "
            "keys alone. Leave it out: HF PEFT projects the output of the prompts in such models too."
        )
    values = select(kernels, value, option="value", params=params) if apart else []

    def linear(path: Path) -> Linear:
        return _linear(base, path, axes_of(path, base[path].shape, axes_rules(axes), layers=layers))

    def projections(site: AttentionSite) -> Projections:
        if site.kernel in fused:
            return _split(site, linear(site.kernel), heads)
        beside = [path for path in values if path.split("/")[:-2] == site.kernel.split("/")[:-2]]
        if len(beside) != 1:
            found = f"names {len(beside)} kernels beside '{site.kernel}'"
            raise ValueError(f"value={value!r} {found} and must name the one that makes values.")
        return Projections(linear(site.kernel), linear(beside[0]))

    return [projections(site) for site in sites]


def _split(site: AttentionSite, fused: Linear, heads: int | None) -> Projections:
    """One projection to queries, keys and values as three."""
    outputs = fused.kernel.shape[-1]
    queries = outputs - 2 * site.width
    key, value = fused.columns(queries, queries + site.width), fused.columns(queries + site.width, outputs)
    if heads is None:
        return Projections(key, value)
    if queries != site.width or queries % heads:
        raise ValueError(
            f"'{site.kernel}' makes queries of width {queries} and keys of width {site.width}: project=False is for heads={heads} that "
            "divide both alike."
        )
    return Projections(key, value, fused.columns(0, queries), heads)


def _linear(base: dict[str, Any], path: Path, geometry: KernelAxes) -> Linear:
    """A kernel and the bias beside it, as matrices and vectors with the axes of a stack in front."""
    leaf = base[path]
    stack = tuple(leaf.shape[i] for i in geometry.stack)
    kernel = jnp.transpose(leaf, geometry.stack + geometry.inputs + geometry.outputs)
    kernel = kernel.reshape(*stack, geometry.fan_in(leaf.shape), geometry.fan_out(leaf.shape))
    bias = base.get(f"{path.rpartition('/')[0]}/bias")
    return Linear(kernel, None if bias is None else jnp.asarray(bias).reshape(*stack, -1))

"""Where the library adapters has its bottlenecks in a torch model, and what their tensors are called."""

import re
from typing import Any, NamedTuple

import numpy as np

from jpeft import layouts
from jpeft.additive.bottlenecks.bottleneck_method import BottleneckMethod
from jpeft.additive.bottlenecks.compacter import RULE
from jpeft.additive.bottlenecks.parallel_adapter import RESIDUAL
from jpeft.additive.bottlenecks.sites import SiteKind, find_sites
from jpeft.hf_peft.sites import Base
from jpeft.tree.adapters import ADDED
from jpeft.tree.paths import Path

# Leaves -> tensors of a bottleneck, and whether they are transposed.
_PLAIN = {
    "down/kernel": ("adapter_down.0.weight", True),
    "down/bias": ("adapter_down.0.bias", False),
    "up/kernel": ("adapter_up.weight", True),
    "up/bias": ("adapter_up.bias", False),
}
_WITH_NORM = {
    "norm/scale": ("adapter_norm_before.weight", False),
    "norm/bias": ("adapter_norm_before.bias", False),
    "down/kernel": ("adapter_down.1.weight", True),
    "down/bias": ("adapter_down.1.bias", False),
    "up/kernel": ("adapter_up.weight", True),
    "up/bias": ("adapter_up.bias", False),
}
_COMPACTER = {
    f"{side}/{leaf}": (f"adapter_{side}{'.0' if side == 'down' else ''}.{tensor}", False)
    for side in ("down", "up")
    for leaf, tensor in (("left", "W_left"), ("right", "W_right"), ("bias", "b"))
}
# The norm in front of a bottleneck is the first layer of its way down, too, and the library writes it under both names.
SECOND_NAMES = {"adapter_norm_before.weight": "adapter_down.0.weight", "adapter_norm_before.bias": "adapter_down.0.bias"}

# BERT and its relatives have their bottlenecks in the module of the residual sum, all others beside it in the layer.
_IN_OUTPUT = re.compile(r"(.*\.\d+(?:\.attention)?\.output)\.(?:dense|LayerNorm)")


class Place(NamedTuple):
    """One leaf of the adapter.

    Attributes:
      path: In the adapter.
      names: Of its tensors, one for each layer of a stack, with ``{name}`` for the name of the adapter.
      transposed: Whether the tensor is the leaf's transpose.
      stacked: Whether layers are stacked.
    """

    path: Path
    names: tuple[str, ...]
    transposed: bool
    stacked: bool

    def to_tensors(self, leaf: Any) -> dict[str, np.ndarray]:
        """The tensors by name."""
        parts = np.asarray(leaf) if self.stacked else np.asarray(leaf)[None]
        return {name: np.ascontiguousarray(part.T if self.transposed else part) for name, part in zip(self.names, parts, strict=True)}

    def to_leaf(self, tensors: list[np.ndarray]) -> np.ndarray:
        """The leaf of the tensors."""
        parts = [tensor.T if self.transposed else tensor for tensor in tensors]
        return np.stack(parts) if self.stacked else parts[0]


def places(method: BottleneckMethod, base: Base) -> list[Place]:
    """The leaves of all bottlenecks of a method.

    Raises:
      ValueError: if one stands where the library has none.
    """
    norm = getattr(method, "own_norm", False)
    tensors = _COMPACTER if method.name == "compacter" else _WITH_NORM if norm else _PLAIN
    attention = set(layouts.find(base.params, "@attention_out", required=False))
    out: list[Place] = []
    if method.name == "compacter":
        out.append(Place(RULE, (f"{base.body}shared_parameters.{{name}}.phm_rule",), False, False))
    for site in find_sites(base.params, method.target_in(base.params), axes=method.axes, head=method.head):
        around = [_place(torch.module, in_attention=site.leaf in attention) for torch in base.at(site.leaf)]
        inside = f"{site.path}/{ADDED}/" + (f"{RESIDUAL}/" if method.name == "parallel_adapter" and site.kind is SiteKind.RESIDUAL else "")
        for leaf, (tensor, transposed) in tensors.items():
            names = tuple(f"{place}.adapters.{{name}}.{tensor}" for place in around)
            out.append(Place(inside + leaf, names, transposed, base.count(site.leaf) is not None))
    if not out or len({name for place in out for name in place.names}) < sum(len(place.names) for place in out):
        raise ValueError(
            f"The library adapters has one bottleneck behind attention and one behind the feed-forward layer; {method!r} differs."
        )
    return out


def _place(module: str, *, in_attention: bool) -> str:
    if (match := _IN_OUTPUT.fullmatch(module)) is not None:
        return match[1]
    layer = re.match(r"(.*?\.\d+)\.", module)
    if layer is None:
        raise ValueError(f"'{module}' is in no layer of the torch model, where the library adapters has its bottlenecks.")
    return f"{layer[1]}.{'attention_adapters' if in_attention else 'output_adapters'}"

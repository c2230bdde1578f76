"""`target_parameters`: adapters of the stacked kernels of experts, which are one parameter of their module in torch.

HF PEFT keeps the factors of all experts in one A [r * experts, inputs] and one B [outputs, r * experts], beside the module and not beside
the parameter. Where several parameters of a module are adapted, each further one is wrapped around those before it, so that the tensors of
the first stand deepest, below ``base_layer``. Up to version 0.18 A and B were on the other sides of a parameter [experts, outputs, inputs].
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jpeft.hf_peft.config import Config
from jpeft.hf_peft.sites import EXPERTS, Base, Site

Arrays = dict[str, np.ndarray]
A, B = "lora_A.weight", "lora_B.weight"
FLIPPED = "parameters whose factors are on the other sides"  # key that `place` adds to a configuration


def chosen(config: Config, base: Base) -> list[Site]:
    """The parameters that the configuration chooses.

    Raises:
      ValueError: for a name that no parameter has.
    """
    known = [site for site in base.sites.values() if site.kind == EXPERTS]
    fits = lambda site, name: site.name == name or site.name.endswith(f".{name}")
    for name in config["target_parameters"] or ():
        if not any(fits(site, name) for site in known):
            there = ", ".join(site.name for site in known[:4]) or "none"
            raise config.error(f"target_parameters names {name!r}, which is no stacked kernel of experts of the model. There are: {there}.")
    return [site for site in known if any(fits(site, name) for name in config["target_parameters"] or ())]


def shapes(config: Config, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
    """Those of A and B."""
    count = site.shape[0]
    first, second = (site.outputs, site.inputs) if site.name in config[FLIPPED] else (site.inputs, site.outputs)
    return {A: (rank * count, first), B: (second, rank * count)}


def levels(sites: Sequence[Site]) -> dict[str, str]:
    """Where the tensors of some parameters of one module stand, by the parameter's name; the first is the deepest."""
    parent = sites[0].name.rpartition(".")[0]
    return {site.name: parent + ".base_layer" * (len(sites) - 1 - i) for i, site in enumerate(sites)}


def by_parent(sites: Iterable[Site]) -> list[list[Site]]:
    """The parameters of each module."""
    out: dict[str, list[Site]] = {}
    for site in sites:
        out.setdefault(site.name.rpartition(".")[0], []).append(site)
    return list(out.values())


def place(config: Config, sites: Sequence[Site], found: Mapping[str, tuple[int, ...]]) -> tuple[Config, dict[str, str]]:
    """Find the tensors of the parameters in a file.

    The order of a module's parameters in torch is not known here, nor whether the experts' kernels lie there as [inputs, outputs]. The
    shapes in the file tell; where they leave a choice, it is the order of the names, and [outputs, inputs].

    Args:
      config: The configuration.
      sites: The parameters.
      found: The shapes of the tensors in the file, by their names without a prefix.

    Returns:
      The configuration with what was found, and the names in the file of tensors by the names that they are expected under.
    """
    old = _is_old(config["peft_version"])
    flipped: list[str] = []
    aliases: dict[str, str] = {}
    for group in by_parent(sites):
        orders = [list(order) for order in itertools.permutations(group)] if len(group) < 5 else [group]
        order = next((order for order in orders if _fits(order, found)), group)
        for name, prefix in levels(order).items():
            site = next(site for site in order if site.name == name)
            aliases |= {f"{prefix}.{tensor}": f"{site.module}.{tensor}" for tensor in (A, B)}
            width = found.get(f"{prefix}.{A}", (0, 0))[-1]
            if (old and site.inputs == site.outputs) or (width == site.outputs != site.inputs):
                flipped.append(name)
    return config.replace(**{FLIPPED: flipped}), aliases


def _fits(order: Sequence[Site], found: Mapping[str, tuple[int, ...]]) -> bool:
    sizes = lambda prefix: {found.get(f"{prefix}.{A}", (0, 0))[-1], found.get(f"{prefix}.{B}", (0, 0))[0]}
    where = levels(order)
    return all(sizes(where[site.name]) == {site.inputs, site.outputs} for site in order)


def _is_old(version: str | None) -> bool:
    """Whether a version of HF PEFT is older than 0.19."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return match is not None and (int(match[1]), int(match[2])) < (0, 19)


def read(config: Config, site: Site, tensors: Arrays) -> Arrays:
    """``a`` [experts, inputs, r] and ``b`` [experts, r, outputs]."""
    count = site.shape[0]
    first = tensors[A].reshape(count, -1, tensors[A].shape[-1])  # [experts, r, ...]
    second = tensors[B].reshape(len(tensors[B]), -1, count)  # [..., r, experts]
    if site.name in config[FLIPPED]:
        return {"a": second.transpose(2, 0, 1), "b": first}
    return {"a": first.transpose(0, 2, 1), "b": second.transpose(2, 1, 0)}


def write(leaves: Arrays) -> Arrays:
    """A and B."""
    a, b = leaves["a"].transpose(0, 2, 1), leaves["b"].transpose(2, 1, 0)
    return {A: a.reshape(-1, a.shape[-1]), B: b.reshape(len(b), -1)}

"""Heads with labels of the library adapters: those of the torch classes, and its own, which are layers by number."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.core.options import shown
from jpeft.hf_peft.sites import Base
from jpeft.hf_peft.tensors import Tensors
from jpeft.models.checkpoints.folder import read_json

CONFIG, WEIGHTS = "head_config.json", "model_head.safetensors"

# The two layers of a classifier in torch.
_FIRST = re.compile(r"(.*\.)?(pooler|classifier)\.dense")
_LAST = re.compile(r"classifier(\.out_proj)?")


def read_head(folder: Path, base: Base) -> dict[str, np.ndarray]:
    """The leaves of the head that stands beside an adapter, by path; none if there is no head, or that of a language model.

    Raises:
      ValueError: for a head that the model does not have.
    """
    if not (folder / WEIGHTS).is_file() or base.task not in ("SEQ_CLS", "TOKEN_CLS"):
        return {}
    tensors = Tensors(folder, WEIGHTS)
    about = read_json(folder / CONFIG, f"{folder} holds {WEIGHTS} without {CONFIG}.").get("config")
    names = _numbered(folder / CONFIG, about, tensors, base) if isinstance(about, dict) else {name: name for name in tensors.names}
    out: dict[str, np.ndarray] = {}
    for stored, name in names.items():
        site = base.sites.get(name)
        tensor = tensors.read_raw(stored)
        if site is None or tensor.shape != site.shape:
            there = "no such parameter" if site is None else f"the shape {site.shape}"
            raise ValueError(f"{tensors.file} holds '{stored}' {tensor.shape} of the head, and the model has {there}.")
        out[site.path] = site.from_torch(tensor)
    return out


def _numbered(file: Path, about: Mapping[str, Any], tensors: Tensors, base: Base) -> dict[str, str]:
    """The torch names of the layers of a head of the library's own."""
    layers, pooler = about.get("layers"), bool(about.get("use_pooler"))
    modules = [site.module for site in base.kernels.values()]
    first, last = (next((module for module in modules if rule.fullmatch(module)), None) for rule in (_FIRST, _LAST))
    two = layers == 2 and not pooler and about.get("activation_function") == "tanh" and first is not None
    one = layers == 1 and (pooler or base.task == "TOKEN_CLS")
    if (
        about.get("head_type") not in ("classification", "tagging")
        or last is None
        or not (one or two)
        or about.get("bias", True) is not True
    ):
        raise ValueError(
            f"{file}: a head of the type {shown(about.get('head_type'))} with layers={shown(layers)}, activation_function="
            f"{shown(about.get('activation_function'))} and use_pooler={pooler} is none that the model has."
        )
    numbers = sorted({int(match[1]) for name in tensors.names if (match := re.fullmatch(r"heads\..+\.(\d+)\.(?:weight|bias)", name))})
    wanted = [first, last] if two else [last]
    if len(numbers) != len(wanted):
        raise ValueError(f"{file} says that the head has {len(wanted)} layers, and {tensors.file} has {len(numbers)}.")
    names = {str(number): module for number, module in zip(numbers, wanted, strict=True)}
    return {name: f"{names[name.split('.')[-2]]}.{name.rpartition('.')[2]}" for name in tensors.names}


def head_of(name: str, replaced: Mapping[str, Any], base: Base, labels: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the configuration of a head that was trained.

    Args:
      name: Of the adapter.
      replaced: The trained leaves of the head, by path.
      base: The base.
      labels: The names of its outputs; empty if they have none.

    Raises:
      ValueError: for other parameters than those of a head.
    """
    sites = {site.module: [] for site in base.sites.values() if site.path in replaced}
    for site in base.sites.values():
        if site.path in replaced:
            sites[site.module].append(site)
    unfit = [module for module in sites if not (_FIRST.fullmatch(module) or _LAST.fullmatch(module))]
    if unfit or not any(_LAST.fullmatch(module) for module in sites):
        raise ValueError(
            f"The library adapters holds a head with labels beside an adapter, and '{next(iter(unfit or sites))}' is trained, too."
        )
    outputs = next(site.shape[0] for module, own in sites.items() for site in own if _LAST.fullmatch(module))
    numbered = {label: i for i, label in enumerate(labels or [f"LABEL_{i}" for i in range(outputs)])}
    torch = {site.name: site.to_torch(replaced[site.path]) for own in sites.values() for site in own}
    if not any(_FIRST.fullmatch(module) and "pooler" in module for module in sites):
        return torch, {"config": None, "label2id": numbered, "num_labels": outputs, "name": None}
    # The class of torch does not count the pooler to its head; the library's own head has it as its first layer.
    as_layer = lambda each: f"heads.{name}.{4 if _LAST.fullmatch(each.rpartition('.')[0]) else 1}.{each.rpartition('.')[2]}"
    about = {"head_type": "classification", "layers": 2, "activation_function": "tanh", "use_pooler": False, "bias": True}
    about |= {"dropout_prob": None, "label2id": numbered, "num_labels": outputs}
    return {as_layer(each): tensor for each, tensor in torch.items()}, {"config": about, "name": name}

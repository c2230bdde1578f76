"""ADALORA: LoRA in the form of a singular value decomposition, some of whose ranks are gone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.hf_peft.assemble import take_apart
from jpeft.hf_peft.config import ANY, COUNT, FLAG, NUMBER, RATE, TARGETING, WHOLE, Config, Key, Kind, one_of
from jpeft.hf_peft.formats.base import Arrays, Shapes, WeightFormat
from jpeft.hf_peft.formats.lora import REFUSED
from jpeft.hf_peft.ranks import whole
from jpeft.hf_peft.sites import Base, Site
from jpeft.reparameterized.adalora import RANK, AdaLoRA
from jpeft.reparameterized.weight_method import WeightMethod
from jpeft.tree.paths import Path


def _is_kept(value: Any) -> bool:
    """Whether a value is HF PEFT's list of the ranks that are kept in each module."""
    flags = lambda each: isinstance(each, list) and all(isinstance(flag, bool) for flag in each)
    return value is None or (isinstance(value, dict) and all(flags(each) for each in value.values()))


KEPT = "kept"  # beside the leaves of a kernel: which triplets are written
_KEPT = Kind("an object of names and lists of true and false", _is_kept)
_STEPS = Kind("a whole number of at least 0", lambda value: WHOLE.fits(value) and 0 <= value <= 10**9)
_STEPS_OR_NULL = Kind("a whole number of at least 1, or null", lambda value: value is None or COUNT.fits(value))
_SHARE = Kind("a number from 0 to below 1", RATE.fits)


class AdaLoRAFormat(WeightFormat):
    """``lora_A`` is ``a`` transposed, ``lora_E`` is ``e`` as a column, ``lora_B`` is ``b`` transposed; the scale is that of `init_r`."""

    peft_type = "ADALORA"
    methods = ("adalora",)
    kinds = ("linear", "conv1d")
    pads = True
    folds = False  # the places of triplets that are gone are written
    refused = REFUSED | {"lora_bias": False, "target_parameters": None, "use_dora": False}
    keys = {key: about for key, about in TARGETING.items() if key != "init_weights"} | {
        "init_r": Key(12, COUNT),
        "target_r": Key(8, COUNT),
        "lora_alpha": Key(8, NUMBER),
        "lora_dropout": Key(0.0, RATE),
        "tinit": Key(0, _STEPS),
        "tfinal": Key(0, _STEPS),
        "deltaT": Key(1, COUNT),
        "beta1": Key(0.85, _SHARE),
        "beta2": Key(0.85, _SHARE),
        "orth_reg_weight": Key(0.5, NUMBER),
        "total_step": Key(None, _STEPS_OR_NULL),
        "rank_pattern": Key(None, _KEPT),
        "bias": Key("none", one_of("none", "all", "lora_only")),
        "trainable_token_indices": Key(None),
        "ensure_weight_tying": Key(False, FLAG),
        # LoRA's own, which AdaLoRA has and does not read.
        "r": Key(8, ANY),
        "alpha_pattern": Key({}, ANY),
        "use_rslora": Key(False, ANY),
        "init_lora_weights": Key(True, ANY),
        "loftq_config": Key({}, ANY),
        "eva_config": Key(None, ANY),
        "megatron_config": Key(None, ANY),
        "megatron_core": Key("megatron.core", ANY),
        "qalora_group_size": Key(16, ANY),
    }

    # --- reading --------------------------------------------------------------------------------------------------------------------------

    def shapes(self, config: Config, site: Site, name: str) -> Shapes:
        """Those of the ranks that are left, which may be none."""
        r = self._rank(config, name)
        return {"lora_A": (r, site.inputs), "lora_E": (r, 1), "lora_B": (site.outputs, r)}

    def _rank(self, config: Config, name: str) -> int:
        kept = (config["rank_pattern"] or {}).get(f"{name}.lora_E")
        if kept is not None and len(kept) != config["init_r"]:
            raise config.error(f"rank_pattern has {len(kept)} values for '{name}', and init_r is {config['init_r']}.")
        return config["init_r"] if kept is None else sum(kept)

    def method(self, config: Config, sites: Mapping[str, Site]) -> WeightMethod:
        """`jpeft.adalora`."""
        r, alpha = config["init_r"], config["lora_alpha"]
        return AdaLoRA(
            rank=r,
            target_rank=min(config["target_r"], r),
            alpha=float(alpha if alpha > 0 else r),
            total_steps=config["total_step"],
            t_init=config["tinit"],
            t_final=config["tfinal"],
            interval=config["deltaT"],
            beta1=float(config["beta1"]),
            beta2=float(config["beta2"]),
            orthogonal=float(config["orth_reg_weight"]),
            dropout=float(config["lora_dropout"]),
        )

    def read(self, config: Config, site: Site, tensors: Arrays) -> Arrays:
        """``a``, ``e`` and ``b``."""
        return {"a": tensors["lora_A"].T, "e": tensors["lora_E"][:, 0], "b": tensors["lora_B"].T}

    def adjust(self, config: Config, method: Any, sites: Mapping[str, Site], leaves: dict[str, Arrays]) -> dict[str, Arrays]:
        """With zeros at the places of triplets that are gone, which `jpeft.fold` leaves out."""
        out = dict(leaves)
        for name, site in sites.items():
            kept = (config["rank_pattern"] or {}).get(f"{name}.lora_E")
            if kept is not None:
                place = {leaf: AdaLoRA.leaf_axes[leaf].index(RANK) for leaf in leaves[site.module]}
                out[site.module] = {leaf: _spread(leaves[site.module][leaf], np.array(kept), axis) for leaf, axis in place.items()}
        return out

    # --- writing --------------------------------------------------------------------------------------------------------------------------

    def parts(self, method: Any, leaves: Mapping[Path, Any], base: Base) -> tuple[dict[str, Arrays], list[Site]]:
        """The leaves of each site. A kernel that was chosen and has no triplets left has empty leaves."""
        parts, sites = take_apart(leaves, base, method.leaf_axes, pads=True)
        begins = all((own["e"] == 0).all() for own in parts.values())  # an adapter that has not been trained has all of them
        parts = {module: own | {KEPT: (own["e"] != 0) | begins} for module, own in parts.items()}
        there = {site.name for site in sites}
        for site in (site for path in method.kernels(base.params) for site in base.at(path) if site.name not in there):
            parts[site.module] = _none(site, next(iter(parts.values()))["a"].dtype)
            sites.append(site)
        order = {name: i for i, name in enumerate(base.sites)}
        return parts, sorted(sites, key=lambda site: order[site.name])

    def write(self, method: Any, site: Site, leaves: Arrays) -> Arrays:
        """A, E and B of the triplets that are left."""
        kept = leaves[KEPT]
        return {"lora_A": leaves["a"][:, kept].T, "lora_E": leaves["e"][kept, None], "lora_B": leaves["b"][kept].T}

    def config(self, method: Any, sites: Sequence[Site], leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """The budget, and which ranks are kept where some are gone."""
        flags = {site.module: leaves[site.module][KEPT].tolist() for site in sites}
        # Of triplets that were left out already the places are not known: they come last.
        kept = {f"{module}.lora_E": own + [False] * (method.rank - len(own)) for module, own in flags.items()}
        # HF PEFT refuses an adapter of which it does not know the number of steps.
        steps = method.total_steps or 1
        begin, end = (at if isinstance(at, int) else round(at * steps) for at in (method.t_init, method.t_final))
        if method.total_steps is None:
            begin = end = 0
        return {
            "init_r": method.rank,
            "target_r": method.target_rank,
            "lora_alpha": whole(method.alpha),
            "lora_dropout": method.dropout,
            "tinit": begin,
            "tfinal": end,
            "deltaT": method.interval,
            "beta1": method.beta1,
            "beta2": method.beta2,
            "orth_reg_weight": method.orthogonal,
            "total_step": steps,
            "rank_pattern": None if all(all(own) for own in kept.values()) else kept,
        }


def _none(site: Site, dtype: Any) -> Arrays:
    """The leaves of a kernel that has no triplets left."""
    a, b = np.zeros((site.inputs, 0), dtype), np.zeros((0, site.outputs), dtype)
    return {"a": a, "e": np.zeros(0, dtype), "b": b, KEPT: np.zeros(0, bool)}


def _spread(leaf: np.ndarray, kept: np.ndarray, axis: int) -> np.ndarray:
    """A leaf with zeros at the places along an axis that are not kept."""
    out = np.zeros((*leaf.shape[:axis], len(kept), *leaf.shape[axis + 1 :]), leaf.dtype)
    out[(*[slice(None)] * axis, kept)] = leaf
    return out

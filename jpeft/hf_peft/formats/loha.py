"""LOHA: products of two low-rank updates."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.hf_peft.config import ANY, COUNT, COUNT_RULES, FLAG, POSITIVE, POSITIVE_RULES, RATE, TARGETING, Config, Key
from jpeft.hf_peft.formats.base import Arrays, Shapes, WeightFormat
from jpeft.hf_peft.ranks import Ranked
from jpeft.hf_peft.sites import CONV, Site
from jpeft.reparameterized.loha import LoHa
from jpeft.reparameterized.weight_method import WeightMethod

RANKED = Ranked("r", "alpha")

# LoHa and LoKr: HF PEFT's base class of both.
LYCORIS = {key: about for key, about in TARGETING.items() if key != "fan_in_fan_out"} | {
    "r": Key(8, COUNT),
    "alpha": Key(8, POSITIVE),
    "rank_dropout": Key(0.0, RATE),
    "module_dropout": Key(0.0, RATE),
    "use_effective_conv2d": Key(False, FLAG),
    "rank_pattern": Key({}, COUNT_RULES),
    "alpha_pattern": Key({}, POSITIVE_RULES),
    "init_weights": Key(True, ANY),
}


class LoHaFormat(WeightFormat):
    """``hada_w1_a`` is ``w1_a`` transposed, and so on; of convolutions the inputs lie in another order."""

    peft_type = "LOHA"
    methods = ("loha",)
    kinds = ("linear", "conv")
    pads = True
    keys = LYCORIS

    def shapes(self, config: Config, site: Site, name: str) -> Shapes:
        """Those of both products."""
        r, _ = RANKED.of(config, name)
        out: Shapes = {}
        for i in (1, 2):
            if is_factorised(site, effective=config["use_effective_conv2d"]):
                out[f"hada_t{i}"] = (r, r, *core(site))
                out |= {f"hada_w{i}_a": (r, site.outputs), f"hada_w{i}_b": (r, site.shape[1])}
            else:
                out |= {f"hada_w{i}_a": (site.outputs, r), f"hada_w{i}_b": (r, site.inputs)}
        return out

    def method(self, config: Config, sites: Mapping[str, Site]) -> WeightMethod:
        """`jpeft.loha`."""
        return LoHa(**RANKED.options(config, sites), **lycoris_options(config))

    def adjust(self, config: Config, method: Any, sites: Mapping[str, Site], leaves: dict[str, Arrays]) -> dict[str, Arrays]:
        """The first factor takes up the difference of scales."""
        return RANKED.adjust(config, method, sites, leaves, first=("w1_a",))

    def read(self, config: Config, site: Site, tensors: Arrays) -> Arrays:
        """Two pairs of factors, with two cores where convolutions are factorised."""
        leaves: Arrays = {}
        for i in (1, 2):
            a, b = tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"]
            if f"hada_t{i}" in tensors:
                t = tensors[f"hada_t{i}"]
                leaves |= {f"t{i}": t.reshape(*t.shape[:2], -1), f"w{i}_a": a, f"c{i}": b.T}
            else:
                leaves |= {f"w{i}_a": a.T, f"w{i}_b": _reordered(b, site).T}
        return leaves

    def write(self, method: Any, site: Site, leaves: Arrays) -> Arrays:
        """The inverse."""
        out: Arrays = {}
        for i in (1, 2):
            if f"t{i}" in leaves:
                t = leaves[f"t{i}"]
                out |= {
                    f"hada_t{i}": t.reshape(*t.shape[:2], *core(site)),
                    f"hada_w{i}_a": leaves[f"w{i}_a"],
                    f"hada_w{i}_b": leaves[f"c{i}"].T,
                }
            else:
                out |= {f"hada_w{i}_a": leaves[f"w{i}_a"].T, f"hada_w{i}_b": _reordered(leaves[f"w{i}_b"].T, site, back=True)}
        return out

    def config(self, method: Any, sites: Sequence[Site], leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """Ranks and scales."""
        ranks = {site.module: len(leaves[site.module]["w1_a"]) for site in sites}
        return RANKED.written(method, sites, ranks) | lycoris_config(method)


def is_factorised(site: Site, *, effective: bool) -> bool:
    """Whether HF PEFT factorises the window of a convolution, too."""
    return site.kind == CONV and effective and any(size > 1 for size in site.shape[2:])


def core(site: Site) -> tuple[int, ...]:
    """The window as the core of a factorised convolution has it: of two axes at least."""
    window = site.shape[2:]
    return window if len(window) > 1 else (*window, 1)


def lycoris_config(method: Any) -> dict[str, Any]:
    """What LoHa and LoKr have in common."""
    dropouts = {"rank_dropout": method.rank_dropout, "module_dropout": method.module_dropout}
    return {"use_effective_conv2d": method.effective_conv, **dropouts, "init_weights": True}


def lycoris_options(config: Config) -> dict[str, Any]:
    """The inverse."""
    dropouts = {key: float(config[key]) for key in ("rank_dropout", "module_dropout")}
    return {"effective_conv": config["use_effective_conv2d"], **dropouts}


def _reordered(b: np.ndarray, site: Site, *, back: bool = False) -> np.ndarray:
    """The inputs of a convolution, [r, (channel, window)] there and [r, (window, channel)] here."""
    if site.kind != CONV:
        return b
    channels, window = site.shape[1], int(np.prod(site.shape[2:]))
    return b.reshape(len(b), *((window, channels) if back else (channels, window))).swapaxes(1, 2).reshape(b.shape)

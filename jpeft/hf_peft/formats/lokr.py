"""LOKR: Kronecker products of two small matrices."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.hf_peft.config import FLAG, Config, Key, Kind
from jpeft.hf_peft.formats.base import Arrays, Shapes, WeightFormat
from jpeft.hf_peft.formats.loha import LYCORIS, RANKED, core, is_factorised, lycoris_config, lycoris_options
from jpeft.hf_peft.sites import CONV, Site
from jpeft.reparameterized.lokr import LoKr, factorization
from jpeft.reparameterized.weight_method import WeightMethod
from jpeft.tree.select import first_match

_FACTOR = Kind("-1 or a whole number of at least 1", lambda value: type(value) is int and (value == -1 or 1 <= value <= 10**9))


class LoKrFormat(WeightFormat):
    """The leaves are HF PEFT's; of convolutions the window's axes are one axis here."""

    peft_type = "LOKR"
    methods = ("lokr",)
    kinds = ("linear", "conv")
    keys = LYCORIS | {"decompose_both": Key(False, FLAG), "decompose_factor": Key(-1, _FACTOR), "rank_dropout_scale": Key(False, FLAG)}

    def shapes(self, config: Config, site: Site, name: str) -> Shapes:
        """Those of the two matrices, each whole or of low rank."""
        r, _ = RANKED.of(config, name)
        window = site.shape[2:] if site.kind == CONV else ()
        (l, k), (m, n) = (factorization(size, config["decompose_factor"]) for size in site.shape[:2])
        if config["decompose_both"] and r < max(l, m) / 2:
            out: Shapes = {"lokr_w1_a": (l, r), "lokr_w1_b": (r, m)}
        else:
            out = {"lokr_w1": (l, m)}
        if r >= max(k, n) / 2:
            return out | {"lokr_w2": (k, n, *window)}
        if is_factorised(site, effective=config["use_effective_conv2d"]):
            return out | {"lokr_t2": (r, r, *core(site)), "lokr_w2_a": (r, k), "lokr_w2_b": (r, n)}
        return out | {"lokr_w2_a": (k, r), "lokr_w2_b": (r, n * int(np.prod(window)))}

    def method(self, config: Config, sites: Mapping[str, Site]) -> WeightMethod:
        """`jpeft.lokr`."""
        return LoKr(
            **RANKED.options(config, sites),
            decompose_both=config["decompose_both"],
            decompose_factor=config["decompose_factor"],
            rank_dropout_scale=config["rank_dropout_scale"],
            **lycoris_options(config),
        )

    def adjust(self, config: Config, method: Any, sites: Mapping[str, Site], leaves: dict[str, Arrays]) -> dict[str, Arrays]:
        """The first matrix takes up the difference of scales."""
        return RANKED.adjust(config, method, sites, leaves, first=("w1", "w1_a"))

    def read(self, config: Config, site: Site, tensors: Arrays) -> Arrays:
        """The same names, but for those of convolutions."""
        leaves = {name.removeprefix("lokr_"): tensor for name, tensor in tensors.items()}
        window = int(np.prod(site.shape[2:]))
        if "t2" in leaves:
            r = len(leaves["t2"])
            return leaves | {"t2": leaves["t2"].reshape(r, r, window), "w2_a": leaves["w2_a"].T}
        if window > 1:
            name = "w2_b" if "w2_b" in leaves else "w2"
            whole = leaves.pop(name)
            leaves[f"{name}_conv"] = whole.reshape(len(whole), -1, window)
        return leaves

    def write(self, method: Any, site: Site, leaves: Arrays) -> Arrays:
        """The inverse."""
        out = {f"lokr_{name}": leaf for name, leaf in leaves.items() if not name.endswith("_conv")}
        if "t2" in leaves:
            r = len(leaves["t2"])
            out |= {"lokr_t2": leaves["t2"].reshape(r, r, *core(site)), "lokr_w2_a": leaves["w2_a"].T}
        if "w2_conv" in leaves:
            out["lokr_w2"] = leaves["w2_conv"].reshape(*leaves["w2_conv"].shape[:2], *site.shape[2:])
        if "w2_b_conv" in leaves:
            out["lokr_w2_b"] = leaves["w2_b_conv"].reshape(len(leaves["w2_b_conv"]), -1)
        return out

    def config(self, method: Any, sites: Sequence[Site], leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """Ranks, which no shape tells where both matrices are whole, and how the sizes are cut."""
        ranks = {site.module: first_match(site.path, method.rank, "rank") for site in sites}
        own = {key: getattr(method, key) for key in ("decompose_both", "decompose_factor", "rank_dropout_scale")}
        return RANKED.written(method, sites, ranks) | lycoris_config(method) | own

"""MISS: one block that is added to all parts of a kernel."""

from collections.abc import Mapping, Sequence
from typing import Any

from jpeft.hf_peft.config import COUNT, RATE, TARGETING, Config, Key, one_of
from jpeft.hf_peft.formats.base import Arrays, Shapes, WeightFormat
from jpeft.hf_peft.ranks import one_rank
from jpeft.hf_peft.sites import Site
from jpeft.reparameterized.miss import MiSS
from jpeft.tree.select import first_match

_BLOCK = "miss_block"
_LEAVES = {"miss": "d", "bat": "d_bat", "mini": "d_mini"}


class MiSSFormat(WeightFormat):
    """``miss_block`` is ``d``, ``d_bat`` or ``d_mini``."""

    peft_type = "MISS"
    methods = ("miss",)
    kinds = ("linear",)
    keys = {key: about for key, about in TARGETING.items() if key != "fan_in_fan_out"} | {
        "r": Key(64, COUNT),
        "mini_r": Key(1, COUNT),
        "miss_dropout": Key(0.0, RATE),
        "init_weights": Key(True, one_of(True, False, "bat", "mini")),
        "bias": Key("none", one_of("none", "all", "MiSS_only")),
    }

    def shapes(self, config: Config, site: Site, name: str) -> Shapes:
        """That of the block."""
        r = config["r"]
        kinds = {"bat": (site.outputs // r, r, r), "mini": (r, config["mini_r"])}
        return {_BLOCK: kinds.get(config["init_weights"], (r, site.outputs))}

    def method(self, config: Config, sites: Mapping[str, Site]) -> MiSS:
        """`jpeft.miss`."""
        variant = config["init_weights"] if isinstance(config["init_weights"], str) else "miss"
        # HF PEFT has no dropout in "bat" either.
        dropout = 0.0 if variant == "bat" else float(config["miss_dropout"])
        return MiSS(rank=config["r"], variant=variant, mini_rank=config["mini_r"], dropout=dropout)

    def read(self, config: Config, site: Site, tensors: Arrays) -> Arrays:
        """The block, by the name of its variant."""
        variant = config["init_weights"] if isinstance(config["init_weights"], str) else "miss"
        return {_LEAVES[variant]: tensors[_BLOCK]}

    def write(self, method: Any, site: Site, leaves: Arrays) -> Arrays:
        """The same."""
        return {_BLOCK: leaves[_LEAVES[method.variant]]}

    def config(self, method: Any, sites: Sequence[Site], leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """The rank, which all modules have in common, and the variant."""
        r = one_rank({site.module: first_match(site.path, method.rank, "rank") for site in sites}, self.peft_type)
        variant: Any = True if method.variant == "miss" else method.variant
        return {"r": r, "mini_r": method.mini_rank, "miss_dropout": method.dropout, "init_weights": variant}

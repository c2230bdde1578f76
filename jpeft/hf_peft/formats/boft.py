"""BOFT: products of sparse rotations of inputs, and a scale for each output."""

from collections.abc import Mapping, Sequence
from typing import Any

from jpeft.hf_peft.config import COUNT, RATE, TARGETING, Config, Key, one_of
from jpeft.hf_peft.formats.base import Arrays, Shapes, WeightFormat
from jpeft.hf_peft.formats.oft import COUNT_OR_ZERO, check_blocks
from jpeft.hf_peft.sites import Base, Site
from jpeft.reparameterized.boft import BOFT


class BOFTFormat(WeightFormat):
    """``boft_R`` is ``r``, and ``boft_s`` is ``s`` as a column."""

    peft_type = "BOFT"
    methods = ("boft",)
    kinds = ("linear",)
    keys = TARGETING | {
        "boft_block_size": Key(4, COUNT_OR_ZERO),
        "boft_block_num": Key(0, COUNT_OR_ZERO),
        "boft_n_butterfly_factor": Key(1, COUNT),
        "boft_dropout": Key(0.0, RATE),
        "bias": Key("none", one_of("none", "all", "boft_only")),
    }

    def check(self, config: Config, base: Base) -> None:
        """Refuse blocks whose number and size are both given, or neither."""
        check_blocks(config, "boft_block_num", "boft_block_size")

    def shapes(self, config: Config, site: Site, name: str) -> Shapes:
        """Those of the rotations and the scales."""
        count = config["boft_block_num"] or max(1, site.inputs // config["boft_block_size"])
        size = config["boft_block_size"] or max(1, site.inputs // config["boft_block_num"])
        return {"boft_R": (config["boft_n_butterfly_factor"], count, size, size), "boft_s": (site.outputs, 1)}

    def method(self, config: Config, sites: Mapping[str, Site]) -> BOFT:
        """`jpeft.boft`."""
        count, size = config["boft_block_num"], config["boft_block_size"]
        cut: dict[str, Any] = {"block_num": count} if count else {"block_size": size}
        return BOFT(**cut, n_butterfly_factor=config["boft_n_butterfly_factor"], block_dropout=float(config["boft_dropout"]))

    def read(self, config: Config, site: Site, tensors: Arrays) -> Arrays:
        """``r`` and ``s``."""
        return {"r": tensors["boft_R"], "s": tensors["boft_s"][:, 0]}

    def write(self, method: Any, site: Site, leaves: Arrays) -> Arrays:
        """The inverse."""
        return {"boft_R": leaves["r"], "boft_s": leaves["s"][:, None]}

    def config(self, method: Any, sites: Sequence[Site], leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """The blocks and the number of factors."""
        return {
            "boft_block_size": 0 if method.block_num else method.block_size,
            "boft_block_num": method.block_num or 0,
            "boft_n_butterfly_factor": method.n_butterfly_factor,
            "boft_dropout": method.block_dropout,
            "init_weights": True,
        }

"""OFT: rotations of inputs in blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

from jpeft.hf_peft.config import COUNT, FLAG, POSITIVE, RATE, TARGETING, Config, Key, Kind, one_of
from jpeft.hf_peft.formats.base import Arrays, Shapes, WeightFormat
from jpeft.hf_peft.sites import Base, Site
from jpeft.reparameterized.oft import OFT, nearest_divisor

COUNT_OR_ZERO = Kind("a whole number of at least 0", lambda value: value == 0 or COUNT.fits(value))
_TERMS = Kind("a whole number from 2 to 64", lambda value: type(value) is int and 2 <= value <= 64)


class OFTFormat(WeightFormat):
    """``oft_R.weight`` is ``q``."""

    peft_type = "OFT"
    methods = ("oft",)
    kinds = ("linear",)
    keys = TARGETING | {
        "r": Key(0, COUNT_OR_ZERO),
        "oft_block_size": Key(32, COUNT_OR_ZERO),
        "module_dropout": Key(0.0, RATE),
        "coft": Key(False, FLAG),
        "eps": Key(6e-5, POSITIVE),
        "block_share": Key(False, FLAG),
        "use_cayley_neumann": Key(True, FLAG),
        "num_cayley_neumann_terms": Key(5, _TERMS),
        "bias": Key("none", one_of("none", "all", "oft_only")),
    }

    def check(self, config: Config, base: Base) -> None:
        """Refuse blocks whose number and size are both given, or neither."""
        check_blocks(config, "r", "oft_block_size")

    def shapes(self, config: Config, site: Site, name: str) -> Shapes:
        """That of the entries above the diagonals."""
        if config["r"]:
            count = nearest_divisor(site.inputs, config["r"])
            size = site.inputs // count
        else:
            size = nearest_divisor(site.inputs, config["oft_block_size"])
            count = site.inputs // size
        return {"oft_R.weight": (1 if config["block_share"] else count, size * (size - 1) // 2)}

    def method(self, config: Config, sites: Mapping[str, Site]) -> OFT:
        """`jpeft.oft`."""
        cut: dict[str, Any] = {"block_num": config["r"]} if config["r"] else {"block_size": config["oft_block_size"]}
        return OFT(
            **cut,
            block_share=config["block_share"],
            terms=config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else None,
            coft=config["coft"],
            eps=float(config["eps"]),
            block_dropout=float(config["module_dropout"]),
        )

    def read(self, config: Config, site: Site, tensors: Arrays) -> Arrays:
        """``q``."""
        return {"q": tensors["oft_R.weight"]}

    def write(self, method: Any, site: Site, leaves: Arrays) -> Arrays:
        """The same."""
        return {"oft_R.weight": leaves["q"]}

    def config(self, method: Any, sites: Sequence[Site], leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """The blocks, and how they turn."""
        return {
            "r": method.block_num or 0,
            "oft_block_size": 0 if method.block_num else method.block_size,
            "module_dropout": method.block_dropout,
            "coft": method.coft,
            "eps": method.eps,
            "block_share": method.block_share,
            "use_cayley_neumann": method.terms is not None,
            "num_cayley_neumann_terms": 5 if method.terms is None else method.terms,
            "init_weights": True,
        }


def check_blocks(config: Config, count: str, size: str) -> None:
    """Check that one of number and size of the blocks is given; the other is 0.

    Raises:
      ValueError: naming the keys.
    """
    if bool(config[count]) == bool(config[size]):
        raise config.error(f"one of {count}={config[count]} and {size}={config[size]} must be 0.")

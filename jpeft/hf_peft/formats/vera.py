"""VERA: vectors that scale random matrices, which all modules share."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.hf_peft.assemble import take_apart
from jpeft.hf_peft.config import COUNT, FLAG, POSITIVE, RATE, TARGETING, Config, Key, Kind, one_of
from jpeft.hf_peft.formats.base import Arrays, Shapes, WeightFormat
from jpeft.hf_peft.ranks import whole
from jpeft.hf_peft.sites import Base, Site
from jpeft.reparameterized.vera import VeRA
from jpeft.tree.adapters import ADDED
from jpeft.tree.paths import Path

A, B = "base_model.vera_A", "base_model.vera_B"
_SEED = Kind("a whole number of at least 0", lambda value: type(value) is int and 0 <= value < 2**63)


class VeRAFormat(WeightFormat):
    """``vera_lambda_d`` is ``d`` and ``vera_lambda_b`` is ``b``; the shared matrices stand once, transposed."""

    peft_type = "VERA"
    methods = ("vera",)
    bare = (A, B)
    keys = {key: about for key, about in TARGETING.items() if key != "exclude_modules"} | {
        "r": Key(256, COUNT),
        "projection_prng_key": Key(0, _SEED),
        "save_projection": Key(True, FLAG),
        "vera_dropout": Key(0.0, RATE),
        "d_initial": Key(0.1, POSITIVE),
        "bias": Key("none", one_of("none", "all", "vera_only")),
    }

    def check(self, config: Config, base: Base) -> None:
        """Refuse an adapter without the matrices, which torch's generator alone could make again."""
        if not config["save_projection"]:
            raise config.error(
                "save_projection is false, so the file lacks vera_A and vera_B, which only torch's generator makes from a seed: write the "
                "adapter anew with save_projection=True, in Python with peft."
            )

    def shapes(self, config: Config, site: Site, name: str) -> Shapes:
        """Those of the vectors."""
        return {"vera_lambda_d": (config["r"],), "vera_lambda_b": (site.outputs,)}

    def shared(self, config: Config, sites: Sequence[Site]) -> Shapes:
        """Those of the matrices, which are as large as the largest of the modules."""
        ins, outs = (max((size(site) for site in sites), default=0) for size in (lambda site: site.inputs, lambda site: site.outputs))
        return {A: (config["r"], ins), B: (outs, config["r"])}

    def method(self, config: Config, sites: Mapping[str, Site]) -> VeRA:
        """`jpeft.vera`."""
        return VeRA(
            rank=config["r"],
            d_initial=float(config["d_initial"]),
            seed=config["projection_prng_key"] % 2**31,
            dropout=float(config["vera_dropout"]),
        )

    def read(self, config: Config, site: Site, tensors: Arrays) -> Arrays:
        """The vectors."""
        return {"d": tensors["vera_lambda_d"], "b": tensors["vera_lambda_b"]}

    def read_shared(self, config: Config, tensors: Arrays) -> Arrays:
        """The matrices, at the adapter's root."""
        return {f"{ADDED}/a": tensors[A].T, f"{ADDED}/b": tensors[B].T}

    def parts(self, method: Any, leaves: Mapping[Path, Any], base: Base) -> tuple[dict[str, Arrays], list[Site]]:
        """The vectors of each site."""
        own = {path: leaf for path, leaf in leaves.items() if not path.startswith(f"{ADDED}/")}
        return take_apart(own, base, method.leaf_axes, pads=self.pads)

    def write(self, method: Any, site: Site, leaves: Arrays) -> Arrays:
        """The vectors."""
        return {"vera_lambda_d": leaves["d"], "vera_lambda_b": leaves["b"]}

    def write_shared(self, method: Any, leaves: Mapping[Path, Any]) -> Arrays:
        """The matrices."""
        return {A: np.asarray(leaves[f"{ADDED}/a"]).T, B: np.asarray(leaves[f"{ADDED}/b"]).T}

    def config(self, method: Any, sites: Sequence[Site], leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """The rank, and how the adapter began."""
        return {
            "r": method.rank,
            "projection_prng_key": method.seed,
            "save_projection": True,
            "vera_dropout": method.dropout,
            "d_initial": whole(method.d_initial),
            "init_weights": True,
        }

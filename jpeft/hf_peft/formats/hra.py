"""HRA: Householder reflections of inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

from jpeft.hf_peft.config import COUNT, FLAG, TARGETING, Config, Key, one_of
from jpeft.hf_peft.formats.base import Arrays, Shapes, WeightFormat
from jpeft.hf_peft.ranks import one_rank
from jpeft.hf_peft.sites import Site
from jpeft.reparameterized.hra import HRA


class HRAFormat(WeightFormat):
    """``hra_u`` is ``u``."""

    peft_type = "HRA"
    methods = ("hra",)
    kinds = ("linear",)
    keys = {key: about for key, about in TARGETING.items() if key != "fan_in_fan_out"} | {
        "r": Key(8, COUNT),
        "apply_GS": Key(False, FLAG),
        "bias": Key("none", one_of("none", "all", "hra_only")),
    }

    def shapes(self, config: Config, site: Site, name: str) -> Shapes:
        """That of the vectors."""
        return {"hra_u": (site.inputs, config["r"])}

    def method(self, config: Config, sites: Mapping[str, Site]) -> HRA:
        """`jpeft.hra`."""
        return HRA(rank=config["r"], apply_gs=config["apply_GS"])

    def read(self, config: Config, site: Site, tensors: Arrays) -> Arrays:
        """``u``."""
        return {"u": tensors["hra_u"]}

    def write(self, method: Any, site: Site, leaves: Arrays) -> Arrays:
        """The same."""
        return {"hra_u": leaves["u"]}

    def config(self, method: Any, sites: Sequence[Site], leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """The rank, which all modules have in common."""
        r = one_rank({module: leaf["u"].shape[1] for module, leaf in leaves.items()}, self.peft_type)
        return {"r": r, "apply_GS": method.apply_gs, "init_weights": True}

"""IA3: (IA)³, of linear layers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jpeft.hf_peft import targets
from jpeft.hf_peft.config import TARGETING, TARGETS, Config, Key
from jpeft.hf_peft.formats.base import Arrays, Shapes, WeightFormat
from jpeft.hf_peft.sites import Base, Site
from jpeft.reparameterized.ia3 import IA3

VECTOR = "ia3_l"
# HF PEFT's choice of modules whose inputs are scaled, by the type of the model.
_FEEDFORWARD = {
    "gpt2": ("mlp.c_proj",),
    **dict.fromkeys(("bert", "roberta"), ("output.dense",)),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("down_proj",)),
}


class IA3Format(WeightFormat):
    """``ia3_l`` is the vector of the outputs [outputs, 1], or that of the inputs [1, inputs] in the modules of `feedforward_modules`."""

    peft_type = "IA3"
    methods = ("ia3",)
    keys = {key: TARGETING[key] for key in ("target_modules", "exclude_modules", "fan_in_fan_out")} | {
        "feedforward_modules": Key(None, TARGETS),
        "init_ia3_weights": Key(True),
    }

    def shapes(self, config: Config, site: Site, name: str) -> Shapes:
        """That of the vector."""
        return {VECTOR: (1, site.inputs) if self._scales_inputs(config, name) else (site.outputs, 1)}

    def expected(self, config: Config, base: Base, sites: Sequence[Site], rename: Any) -> Shapes:
        """The tensors of all sites."""
        return super().expected(_with_defaults(config, base), base, sites, rename)

    def load(self, file: Any, sites: Sequence[Site]) -> Any:
        """The method, and the leaves of all kernels."""
        return super().load(file.replace(config=_with_defaults(file.config, file.base)), sites)

    def _scales_inputs(self, config: Config, name: str) -> bool:
        """HF PEFT's `_check_target_module_feedforward`: a name is for whatever ends with it, dot or not."""
        given = config["feedforward_modules"]
        if isinstance(given, str):
            return re.fullmatch(given, name) is not None
        return any(name.endswith(each) for each in given or ())

    def method(self, config: Config, sites: Mapping[str, Site]) -> IA3:
        """`jpeft.ia3`; `aim` says which kernels."""
        return IA3()

    def read(self, config: Config, site: Site, tensors: Arrays) -> Arrays:
        """``l_out`` or ``l_in``."""
        vector = tensors[VECTOR]
        # [1, inputs] or [outputs, 1]; of one input or output, either.
        name = "l_in" if vector.shape[0] == 1 and vector.shape[1] == site.inputs else "l_out"
        return {name: vector.reshape(-1)}

    def aim(self, method: Any, sites: Sequence[Site], config: Config, base: Base) -> Any:
        """The method with a target for each of the two kinds."""
        inner = [site for site in sites if self._scales_inputs(config, site.module)]
        outer = [site for site in sites if site not in inner]
        candidates = method.candidates(base.params)
        inner_target = targets.path_target(inner, candidates) if inner else None
        # A kernel that both options name is one whose inputs are scaled.
        return method.replace(target=targets.path_target(outer, candidates) if outer else inner_target, feedforward=inner_target)

    def write(self, method: Any, site: Site, leaves: Arrays) -> Arrays:
        """The vector."""
        return {VECTOR: leaves["l_in"].reshape(1, -1) if "l_in" in leaves else leaves["l_out"].reshape(-1, 1)}

    def config(self, method: Any, sites: Sequence[Site], leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """Nothing beside the choice of modules."""
        return {"init_ia3_weights": True}

    def choice(self, method: Any, sites: Sequence[Site], base: Base, leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """The modules, and among them those whose inputs are scaled."""
        inner = [site.module for site in sites if "l_in" in leaves[site.module]]
        outer = [site.module for site in sites if "l_in" not in leaves[site.module]]
        names = targets.names_for(inner, base.modules)
        if any(module.endswith(name) for name in names for module in outer):
            names = inner
        chosen = sorted({*targets.names_for(outer, base.modules), *names})
        return super().choice(method, sites, base, leaves) | {"target_modules": chosen, "feedforward_modules": names}


def _with_defaults(config: Config, base: Base) -> Config:
    """The configuration with HF PEFT's modules where it names none."""
    if config["feedforward_modules"] is not None:
        return config
    return config.replace(feedforward_modules=list(_FEEDFORWARD.get(base.model_type or "", ())))

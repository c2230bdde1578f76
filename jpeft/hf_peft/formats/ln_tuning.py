"""LN_TUNING: copies of normalisations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpeft.core.method import Method
from jpeft.hf_peft import targets, whole
from jpeft.hf_peft.config import TARGETING, Config
from jpeft.hf_peft.formats.base import Arrays, File, Format, Shapes, Written
from jpeft.hf_peft.sites import Base, Site
from jpeft.selective.ln_tuning import LnTuning
from jpeft.tree.paths import Path

COPY = "ln_tuning_layers"


class LnTuningFormat(Format):
    """``ln_tuning_layers.weight`` and ``.bias`` are those of the module, trained."""

    peft_type = "LN_TUNING"
    methods = ("ln_tuning",)
    replaces = True
    keys = {key: TARGETING[key] for key in ("target_modules", "exclude_modules")}

    def targets(self, config: Config, base: Base, rename: Callable[[str], str]) -> list[Site]:
        """All parameters of the modules."""
        chosen = set(targets.chosen(config, dict.fromkeys(rename(site.module) for site in base.sites.values()), base))
        found = [site for site in base.sites.values() if rename(site.module) in chosen]
        if any(site.form is not None for site in found):
            wrong = next(site for site in found if site.form is not None)
            raise config.error(f"target_modules chooses '{wrong.module}', which is no normalisation.")
        return found

    def expected(self, config: Config, base: Base, sites: Sequence[Site], rename: Callable[[str], str]) -> Shapes:
        """Those of the modules."""
        return {_copied(site): site.shape for site in sites}

    def load(self, file: File, sites: Sequence[Site]) -> tuple[Method, Arrays]:
        """`jpeft.ln_tuning`."""
        for path in dict.fromkeys(site.path for site in sites):
            whole.require_whole_stack(path, sites, file.base, self.peft_type)
        by_name = {site.name: site for site in sites}
        leaves = whole.leaves_of(sites, lambda name: file.read(_copied(by_name[name])))
        return LnTuning(target=targets.path_regex(list(leaves)), head=file.head), leaves

    def save(self, method: Any, leaves: Mapping[Path, Any], base: Base) -> Written:
        """The copies. A module is copied whole, with what was not trained of it as the base has it."""
        modules = list(dict.fromkeys(site.module for path in leaves for site in base.at(path)))
        tensors = {
            _copied(site): site.to_torch(leaves.get(site.path, base.leaves[site.path]))
            for site in base.sites.values()
            if site.module in set(modules)
        }
        return Written(tensors, {"target_modules": targets.names_for(modules, base.modules)}, modules)


def _copied(site: Site) -> str:
    """The name of the trained copy of a parameter."""
    return f"{site.module}.{COPY}.{site.name.rpartition('.')[2]}"

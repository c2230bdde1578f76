"""SHIRA: a few entries of each kernel."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.core.method import Method
from jpeft.hf_peft import targets
from jpeft.hf_peft.config import ANY, COUNT, TARGETING, WHOLE, Config, Key, Kind
from jpeft.hf_peft.formats.base import Arrays, File, Shapes, TargetFormat, Written
from jpeft.hf_peft.ranks import one_rank
from jpeft.hf_peft.sites import Base, Site
from jpeft.selective.indices import decode, encode
from jpeft.selective.shira import SHiRA
from jpeft.selective.sparse import INDICES, VALUES
from jpeft.tree.paths import Path

_SEED = Kind("a whole number from 0 to 2**31 - 1, or null", lambda value: value is None or (WHOLE.fits(value) and 0 <= value < 2**31))
_WEIGHT, _INDICES = "shira_weight", "shira_indices"


class SHiRAFormat(TargetFormat):
    """``shira_weight`` are the values, at the rows and columns ``shira_indices`` of torch's matrix."""

    peft_type = "SHIRA"
    methods = ("shira",)
    kinds = ("linear",)
    keys = {key: TARGETING[key] for key in ("target_modules", "fan_in_fan_out", "init_weights")} | {
        "r": Key(32, COUNT),
        # How the places were chosen; where they are is in the file.
        "mask_type": Key("random", ANY),
        "random_seed": Key(None, _SEED),
    }

    def shapes(self, config: Config, site: Site, name: str) -> Shapes:
        """As many entries as LoRA's factors have."""
        k = config["r"] * (site.inputs + site.outputs)
        return {_WEIGHT: (k,), _INDICES: (2, k)}

    def load(self, file: File, sites: Sequence[Site]) -> tuple[Method, Arrays]:
        """The method, and the values of all kernels in the order of their places."""
        config, base = file.config, file.base
        candidates = [path for path, leaf in base.leaves.items() if len(leaf.shape) > 1 and not path.endswith("bias")]
        seed = config["random_seed"] or 0
        method = SHiRA(rank=config["r"], seed=seed, axes=base.axes, head=file.head, target=targets.path_target(sites, candidates))
        by_path: dict[Path, list[Site]] = {}
        for site in sites:
            by_path.setdefault(site.path, []).append(site)
        out: Arrays = {}
        for path, own in by_path.items():
            if (count := base.count(path)) is not None and len(own) != count:
                raise ValueError(
                    f"The layers of '{path}' are stacked, and the adapter has {self.peft_type} for some of them, or of different sizes, "
                    "which no number stands for: load the base with scan=False (--scan False)."
                )
            found = [self._read_one(file, site) for site in own]
            places, values = (np.concatenate([each[i] for each in found]) for i in (0, 1))
            order = np.argsort(places, kind="stable")
            out |= {f"{path}/{VALUES}": values[order], f"{path}/{INDICES}": np.asarray(encode(places[order], base.leaves[path].size))}
        return method, out

    def _read_one(self, file: File, site: Site) -> tuple[np.ndarray, np.ndarray]:
        """The places of a module's entries in its parameter, and their values."""
        found = file.read(f"{site.module}.{_INDICES}")
        if (found != np.rint(found)).any():
            raise file.config.error(f"'{site.module}.{_INDICES}' holds places that are no whole numbers.")
        rows, columns = found.astype(np.int64)
        if min(rows.min(), columns.min()) < 0 or rows.max() >= site.outputs or columns.max() >= site.inputs:
            raise file.config.error(f"'{site.module}.{_INDICES}' holds places outside of the kernel, {site.outputs} x {site.inputs}.")
        places = _places(site, file.base)[rows, columns]
        if len(np.unique(places)) < len(places):
            raise file.config.error(f"'{site.module}.{_INDICES}' holds a place twice.")
        return places, file.read(f"{site.module}.{_WEIGHT}")

    def save(self, method: Any, leaves: Mapping[Path, Any], base: Base) -> Written:
        """The values of all kernels, row by row."""
        paths = dict.fromkeys(path.rpartition("/")[0] for path in leaves)
        tensors: Arrays = {}
        ranks: dict[str, int] = {}
        sites = [site for path in paths for site in base.at(path)]
        if len({site.path for site in sites}) < len(paths) or any(site.kind not in self.kinds for site in sites):
            raise ValueError(f"HF PEFT's {self.peft_type} is for linear layers, and the adapter has entries elsewhere: {', '.join(paths)}.")
        for site in sites:
            places, values = np.asarray(decode(leaves[f"{site.path}/{INDICES}"])), np.asarray(leaves[f"{site.path}/{VALUES}"])
            own = _places(site, base).reshape(-1)  # row by row
            order = np.argsort(own)
            at = np.searchsorted(own, places, sorter=order).clip(max=len(own) - 1)
            here = own[order[at]] == places  # of the layers of a stack, this one's
            where = order[at][here]
            by_row = np.argsort(where)
            k = site.inputs + site.outputs
            if len(where) % k or not len(where):
                raise ValueError(f"HF PEFT's {self.peft_type} has r * {k} entries in '{site.path}', and the adapter has {len(where)}.")
            ranks[site.module] = len(where) // k
            indices = np.stack(np.divmod(where[by_row], site.inputs)).astype(np.int32)
            tensors |= {f"{site.module}.{_WEIGHT}": values[here][by_row], f"{site.module}.{_INDICES}": indices}
        config = {"r": one_rank(ranks, self.peft_type), "mask_type": "random", "random_seed": method.seed or None, "init_weights": True}
        return Written(tensors, config | self.choice(method, sites, base, {}), [site.module for site in sites])


def _places(site: Site, base: Base) -> np.ndarray:
    """For each entry of torch's matrix [outputs, inputs], its flat place in the parameter, with the stack."""
    leaf = base.leaves[site.path]
    return site.to_torch(np.arange(leaf.size, dtype=np.int32).reshape(leaf.shape)).astype(np.int64)

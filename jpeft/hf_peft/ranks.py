"""Ranks and scales: one value for all modules and patterns for some, here and in HF PEFT.

A stack of layers has one rank and one scale here, and its layers may differ there: layers of a lower rank are filled up with zeros, and one
of their factors takes up what their scale is more than that of the stack.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpeft.hf_peft import targets
from jpeft.hf_peft.assemble import Arrays
from jpeft.hf_peft.config import Config
from jpeft.hf_peft.sites import Site
from jpeft.tree.select import first_match


class Ranked(NamedTuple):
    """Keys of the configuration.

    Attributes:
      rank: Of the rank.
      alpha: Of the scale, before it is divided by the rank.
    """

    rank: str = "r"
    alpha: str = "alpha"

    def of(self, config: Config, name: str) -> tuple[int, int | float]:
        """Rank and alpha of a module."""
        value = lambda patterns, key: targets.pattern_value(config[patterns], name, config[key])
        return value("rank_pattern", self.rank), value("alpha_pattern", self.alpha)

    def options(self, config: Config, sites: Mapping[str, Site]) -> dict[str, Any]:
        """The options ``rank`` and ``alpha`` of a method: of layers in a stack, what the layer of the highest rank has.

        Args:
          config: The configuration.
          sites: By the names of their modules in the file.
        """
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for name, site in sites.items():
            r, alpha = self.of(config, name)
            if r > ranks.get(site.path, 0):
                ranks[site.path], alphas[site.path] = r, float(alpha)
        return {
            "rank": targets.path_rules(ranks, config[self.rank]),
            "alpha": targets.path_rules(alphas, float(config[self.alpha])),
        }

    def adjust(
        self, config: Config, method: Any, sites: Mapping[str, Site], leaves: Mapping[str, Arrays], *, first: Sequence[str]
    ) -> dict[str, Arrays]:
        """The leaves of each site, where a factor takes up the difference between two scales.

        Args:
          config: The configuration.
          method: The method.
          sites: By the names of their modules in the file.
          leaves: Of each site, by its module.
          first: Names of the factor, of which a layer has one.
        """
        out = dict(leaves)
        for name, site in sites.items():
            r, alpha = self.of(config, name)
            whole = first_match(site.path, method.alpha, "alpha") / first_match(site.path, method.rank, "rank")
            if site.index is not None and alpha / r != whole:
                own = out[site.module]
                factor = next(each for each in first if each in own)
                out[site.module] = own | {factor: own[factor] * np.float32(alpha / r / whole)}
        return out

    def written(self, method: Any, sites: Sequence[Site], ranks: Mapping[str, int]) -> dict[str, Any]:
        """The keys of the configuration.

        Args:
          method: The method.
          sites: All sites with leaves.
          ranks: The rank of each, by its module.
        """
        alphas: dict[str, int | float] = {}
        for site in sites:
            # Of a layer that was filled up with zeros the scale is still that of the full rank.
            full, alpha = first_match(site.path, method.rank, "rank"), first_match(site.path, method.alpha, "alpha")
            alphas[site.module] = whole(alpha if ranks[site.module] == full else alpha * ranks[site.module] / full)
        r, rank_pattern = targets.patterns_for(ranks, targets.common_of(method.rank))
        alpha, alpha_pattern = targets.patterns_for(alphas, whole(targets.common_of(method.alpha)))
        return {self.rank: r, self.alpha: alpha, "rank_pattern": dict(rank_pattern), "alpha_pattern": dict(alpha_pattern)}


def whole(value: Any) -> Any:
    """A number as JSON should have it.

    >>> whole(16.0), whole(0.5), whole(None)
    (16, 0.5, None)
    """
    return int(value) if isinstance(value, float) and value.is_integer() else value


def one_rank(ranks: Mapping[str, int], peft_type: str) -> int:
    """The rank of all modules.

    Raises:
      ValueError: if they have several.
    """
    if len(set(ranks.values())) > 1:
        modules = {rank: module for module, rank in ranks.items()}
        shown = ", ".join(f"{rank} in '{module}'" for rank, module in sorted(modules.items()))
        raise ValueError(f"HF PEFT's {peft_type} has one rank for all modules, and the adapter has several: {shown}.")
    return next(iter(ranks.values()))

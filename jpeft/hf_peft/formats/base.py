"""The contract of a format: how one of HF PEFT's types of adapter and a method of jpeft become each other."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jpeft.core.method import Method
from jpeft.core.options import shown
from jpeft.hf_peft import targets
from jpeft.hf_peft.assemble import join, take_apart
from jpeft.hf_peft.config import COMMON, Config, Key
from jpeft.hf_peft.sites import EXPERTS, Base, Site
from jpeft.reparameterized.weight_method import WeightMethod
from jpeft.tree.paths import Path

Shapes = dict[str, tuple[int, ...]]  # of tensors by name
Arrays = dict[str, np.ndarray]  # by name or path


class Written(NamedTuple):
    """What a format makes of an adapter.

    Attributes:
      tensors: By their names in the file, without the prefix.
      config: Keys of the configuration beside those of all types.
      modules: The modules that the type calls its targets, whose own biases are named apart.
    """

    tensors: Arrays
    config: dict[str, Any]
    modules: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class File:
    """What a format is given to read.

    Attributes:
      config: The configuration.
      base: The base.
      read: Reads one of the tensors that `Format.expected` names.
      rename: A module's name here as the file has it, which may lack the name of the body.
      head: For the option ``head`` of the method: what `modules_to_save` chooses, as a regex, "auto" or None.
    """

    config: Config
    base: Base
    read: Callable[[str], np.ndarray]
    rename: Callable[[str], str]
    head: str | None

    def replace(self, **changes: Any) -> "File":
        """The same with other fields."""
        return dataclasses.replace(self, **changes)


class Format(abc.ABC):
    """One type of adapter. There is one instance of each class in `jpeft.hf_peft.formats`, found by its file.

    Attributes:
      peft_type: HF PEFT's name.
      keys: The keys of the configuration that it knows beside those of all types.
      refused: Keys of options that jpeft does not have, with the value that says that the option is not used.
      methods: The names of the methods that it holds.
      prefix: What stands in front of the names of tensors in the file.
      bare: The names of tensors that have nothing in front.
      saves_modules: Whether the type holds whole modules, such as a head, too.
      needs_head: Whether HF PEFT opens no classifier without its head in the file.
      follows_ties: Whether a change of a word embedding changes a head that is tied to it.
      folds: Whether the adapter is written as `jpeft.fold` leaves it.
      splits_ties: Whether the method can change the look-ups of such an embedding alone, by its option ``tied``.
      keeps_ties: The methods whose change of such an embedding it holds for look-ups and head together.
      replaces: Whether the method's own leaves replace parameters of the base.
    """

    peft_type: ClassVar[str]
    keys: ClassVar[Mapping[str, Key]]
    refused: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    methods: ClassVar[tuple[str, ...]]
    prefix: ClassVar[str] = "base_model.model."
    bare: ClassVar[tuple[str, ...]] = ()
    saves_modules: ClassVar[bool] = True
    needs_head: ClassVar[bool] = False
    follows_ties: ClassVar[bool] = False
    folds: ClassVar[bool] = True
    splits_ties: ClassVar[bool] = False
    keeps_ties: ClassVar[tuple[str, ...]] = ()
    replaces: ClassVar[bool] = False

    def check(self, config: Config, base: Base) -> None:  # noqa: B027
        """Refuse what this type can be asked for and jpeft cannot do.

        Raises:
          ValueError: naming the key.
        """

    def prepare(self, config: Config, base: Base, found: Mapping[str, tuple[int, ...]]) -> tuple[Config, dict[str, str]]:
        """What the shapes in the file tell beside the configuration.

        Args:
          config: The configuration.
          base: The base.
          found: The shapes of the tensors in the file, by their names without a prefix.

        Returns:
          The configuration with further values; and for tensors that stand in the file under other names than `expected` has, the expected
          ones by those in the file.
        """
        return config, {}

    def aliases(self, sites: Sequence[Site]) -> dict[str, str]:
        """The names in the file of tensors that `save` gives other names, by those."""
        return {}

    def targets(self, config: Config, base: Base, rename: Callable[[str], str]) -> list[Site]:
        """The sites that the adapter changes; none for a type that chooses no modules."""
        return []

    @property
    def unused(self) -> dict[str, Any]:
        """All keys that HF PEFT writes, with the values of options that are not used."""
        known = {key: about.default for key, about in (COMMON | dict(self.keys)).items()}
        if not self.saves_modules:
            del known["modules_to_save"]
        return known | dict(self.refused)

    @abc.abstractmethod
    def expected(self, config: Config, base: Base, sites: Sequence[Site], rename: Callable[[str], str]) -> Shapes:
        """The tensors that the file must hold, without those of `modules_to_save` and the like."""

    @abc.abstractmethod
    def load(self, file: File, sites: Sequence[Site]) -> tuple[Method, Arrays]:
        """The method, and its leaves by path."""

    @abc.abstractmethod
    def save(self, method: Any, leaves: Mapping[Path, Any], base: Base) -> Written:
        """The inverse of `load`.

        Raises:
          ValueError: for what the type cannot hold.
        """


class TargetFormat(Format):
    """A type of adapter that puts tensors beside the kernels of the modules that its configuration chooses.

    Attributes:
      kinds: The kinds of sites that it knows.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")

    @abc.abstractmethod
    def shapes(self, config: Config, site: Site, name: str) -> Shapes:
        """The tensors of one site by their names below the module, such as ``{"lora_A.weight": (8, 64)}``.

        Args:
          config: The configuration.
          site: The site.
          name: Its module as the file names it, for `targets.pattern_value`.
        """

    def targets(self, config: Config, base: Base, rename: Callable[[str], str]) -> list[Site]:
        """The kernels that the configuration chooses."""
        known = {rename(module): site for module, site in base.kernels.items() if site.kind != EXPERTS}
        found = [known[name] for name in targets.chosen(config, known, base)]
        if not found and not config.get("target_parameters"):
            there = ", ".join(list(known)[:6])
            raise config.error(f"target_modules={shown(config['target_modules'])} chooses no module of the model, which has {there}, ...")
        wrong = [site for site in found if site.kind not in self.kinds]
        if wrong:
            raise config.error(
                f"target_modules chooses '{wrong[0].module}', which is of the kind {wrong[0].kind!r}; jpeft reads {self.peft_type} for "
                f"{', '.join(self.kinds)}."
            )
        return found

    def expected(self, config: Config, base: Base, sites: Sequence[Site], rename: Callable[[str], str]) -> Shapes:
        """The tensors of all sites."""
        return {f"{site.module}.{name}": shape for site in sites for name, shape in self.shapes(config, site, rename(site.module)).items()}

    def choice(self, method: Any, sites: Sequence[Site], base: Base, leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """The keys of the configuration that choose these sites."""
        names, layers = targets.layered_names_for([site.module for site in sites], base.modules)
        chosen: dict[str, Any] = {"target_modules": names}
        if "layers_to_transform" in self.keys and layers is not None:
            chosen["layers_to_transform"] = layers
        elif layers is not None:
            chosen["target_modules"] = targets.names_for([site.module for site in sites], base.modules)
        if "fan_in_fan_out" in self.keys:
            chosen["fan_in_fan_out"] = any(site.kind == "conv1d" for site in sites)
        return chosen


class WeightFormat(TargetFormat):
    """A type of adapter that changes kernels one by one, as a `WeightMethod` does.

    A subclass says what stands beside one kernel. Where layers are stacked, a layer without an adapter, or with one of a lower rank, is
    filled up with zeros, if `pads` says that this changes nothing.

    Attributes:
      pads: Whether a layer whose leaves are all zero is as if it had none, and trains none.
    """

    pads: ClassVar[bool] = False

    @abc.abstractmethod
    def method(self, config: Config, sites: Mapping[str, Site]) -> WeightMethod:
        """The method with its options, but for `target`, `axes` and `head`.

        Args:
          config: The configuration.
          sites: By the names of their modules in the file.
        """

    @abc.abstractmethod
    def read(self, config: Config, site: Site, tensors: Arrays) -> Arrays:
        """The leaves beside one kernel as matrices, with the axes of the method's `leaf_axes`."""

    @abc.abstractmethod
    def write(self, method: Any, site: Site, leaves: Arrays) -> Arrays:
        """The inverse of `read`."""

    @abc.abstractmethod
    def config(self, method: Any, sites: Sequence[Site], leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """The keys of the configuration, but for those that choose modules.

        Args:
          method: The method.
          sites: All sites with leaves.
          leaves: Of each of them, by the site's module.
        """

    def adjust(self, config: Config, method: Any, sites: Mapping[str, Site], leaves: dict[str, Arrays]) -> dict[str, Arrays]:
        """The leaves, where the method has one option for all layers of a stack and the configuration one for each.

        Args:
          config: The configuration.
          method: The method.
          sites: By the names of their modules in the file.
          leaves: Of each site, by the site's module.
        """
        return leaves

    def complete(self, file: File, sites: Sequence[Site], leaves: dict[str, Arrays]) -> dict[str, Arrays]:
        """The leaves with those that are made of the base, and not of the file."""
        return leaves

    # --- for subclasses with tensors that all modules share -------------------------------------------------------------------------------

    def shared(self, config: Config, sites: Sequence[Site]) -> Shapes:
        """Tensors that stand once for all modules, by their names in the file."""
        return {}

    def read_shared(self, config: Config, tensors: Arrays) -> Arrays:
        """The leaves by path that are made of them."""
        return {}

    def write_shared(self, method: Any, leaves: Mapping[Path, Any]) -> Arrays:
        """The inverse."""
        return {}

    # --- what follows ---------------------------------------------------------------------------------------------------------------------

    def expected(self, config: Config, base: Base, sites: Sequence[Site], rename: Callable[[str], str]) -> Shapes:
        """The tensors of all sites."""
        return super().expected(config, base, sites, rename) | self.shared(config, sites)

    def load(self, file: File, sites: Sequence[Site]) -> tuple[Method, Arrays]:
        """The method, and the leaves of all kernels."""
        config, base = file.config, file.base
        named = {file.rename(site.module): site for site in sites}
        method = self.method(config, named)
        leaves: dict[str, Arrays] = {}
        for site in sites:
            tensors = {name: file.read(f"{site.module}.{name}") for name in self.shapes(config, site, file.rename(site.module))}
            leaves[site.module] = self.read(config, site, tensors)
        leaves = self.adjust(config, method, named, self.complete(file, sites, leaves))
        method = self.aim(method.replace(axes=base.axes, head=file.head), sites, config, base)
        joined = join(leaves, sites, base, method.leaf_axes, pads=self.pads, what=self.peft_type)
        shared = {name: file.read(name) for name in self.shared(config, sites)}
        return method, joined | self.read_shared(config, shared)

    def aim(self, method: Any, sites: Sequence[Site], config: Config, base: Base) -> Any:
        """The method with a target that chooses these sites."""
        return method.replace(target=targets.path_target(sites, method.candidates(base.params)))

    def parts(self, method: Any, leaves: Mapping[Path, Any], base: Base) -> tuple[dict[str, Arrays], list[Site]]:
        """The leaves of each site as matrices, by the site's module, and the sites that are written."""
        return take_apart(leaves, base, method.leaf_axes, pads=self.pads)

    def save(self, method: Any, leaves: Mapping[Path, Any], base: Base) -> Written:
        """The tensors of all kernels."""
        parts, sites = self.parts(method, leaves, base)
        unfit = [site for site in sites if site.kind not in self.kinds]
        if unfit:
            raise ValueError(f"HF PEFT's {self.peft_type} is not written for '{unfit[0].path}', which is of the kind {unfit[0].kind!r}.")
        tensors: Arrays = {}
        for site in sites:
            tensors |= {f"{site.module}.{name}": tensor for name, tensor in self.write(method, site, parts[site.module]).items()}
        config = self.config(method, sites, parts) | self.choice(method, sites, base, parts)
        aliases = self.aliases(sites)
        named = {aliases.get(name, name): tensor for name, tensor in tensors.items()}
        return Written(named | self.write_shared(method, leaves), config, [site.module for site in sites])

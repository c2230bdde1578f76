"""LORA: LoRA, rsLoRA and DoRA, of linear layers, convolutions and embeddings."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.hf_peft import experts, starts, targets
from jpeft.hf_peft.config import ANY, COUNT, COUNT_RULES, FLAG, NAMES, POSITIVE, POSITIVE_RULES, RATE, TARGETING, Config, Key, one_of
from jpeft.hf_peft.formats.base import Arrays, File, Shapes, WeightFormat
from jpeft.hf_peft.sites import CONV, EMBEDDING, EXPERTS, Base, Site
from jpeft.reparameterized.dora import DoRA
from jpeft.reparameterized.lora import LoRA
from jpeft.reparameterized.low_rank import scale
from jpeft.reparameterized.weight_method import WeightMethod
from jpeft.tree.select import first_match

BIAS = "lora_B.bias"


class LoRAFormat(WeightFormat):
    """``lora_A`` is ``a`` transposed, ``lora_B`` is ``b`` transposed, ``lora_magnitude_vector`` is ``m``."""

    peft_type = "LORA"
    methods = ("lora", "dora")
    kinds = ("linear", "conv1d", "conv", "embedding", "experts")
    pads = True
    splits_ties = True
    keys = TARGETING | {
        "r": Key(8, COUNT),
        "lora_alpha": Key(8, POSITIVE),
        "lora_dropout": Key(0.0, RATE),
        "use_rslora": Key(False, FLAG),
        "use_dora": Key(False, FLAG),
        "bias": Key("none", one_of("none", "all", "lora_only")),
        "rank_pattern": Key({}, COUNT_RULES),
        "alpha_pattern": Key({}, POSITIVE_RULES),
        "init_lora_weights": Key(True),
        "trainable_token_indices": Key(None),
        "target_parameters": Key(None, NAMES),
        "lora_bias": Key(False, FLAG),
        "ensure_weight_tying": Key(False, FLAG),
        # How an adapter begins, or is spread over devices: of no meaning once it is trained.
        "loftq_config": Key({}, ANY),
        "eva_config": Key(None, ANY),
        "megatron_config": Key(None, ANY),
        "megatron_core": Key("megatron.core", ANY),
        "qalora_group_size": Key(16, ANY),  # of use_qalora, which is not known
    }

    # --- reading --------------------------------------------------------------------------------------------------------------------------

    def check(self, config: Config, base: Base) -> None:
        """Refuse adapters whose base was changed when they began, in a way that the base alone does not tell."""
        starts.start_of(config)
        if config["use_dora"] and config["lora_bias"]:
            raise config.error("use_dora=true and lora_bias=true do not go together.")

    def prepare(self, config: Config, base: Base, found: Mapping[str, tuple[int, ...]]) -> tuple[Config, dict[str, str]]:
        """Where the tensors of experts stand."""
        return experts.place(config, experts.chosen(config, base), found)

    def targets(self, config: Config, base: Base, rename: Callable[[str], str]) -> list[Site]:
        """The kernels, and the parameters of experts."""
        found = experts.chosen(config, base)
        if found and (config["use_dora"] or config["lora_bias"] or starts.start_of(config)):
            raise config.error("target_parameters goes with plain LoRA alone.")
        return [*super().targets(config, base, rename), *found]

    def aliases(self, sites: Sequence[Site]) -> dict[str, str]:
        """The tensors of experts stand beside the module."""
        out = {}
        for group in experts.by_parent(site for site in sites if site.kind == EXPERTS):
            for name, prefix in experts.levels(group).items():
                out |= {f"{name}.{tensor}": f"{prefix}.{tensor}" for tensor in (experts.A, experts.B)}
        return out

    def choice(self, method: Any, sites: Sequence[Site], base: Base, leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """The modules, and the parameters of experts."""
        modules, parameters = [site for site in sites if site.kind != EXPERTS], [site.name for site in sites if site.kind == EXPERTS]
        chosen = super().choice(method, modules, base, leaves) if modules else {"target_modules": [], "fan_in_fan_out": False}
        if not parameters:
            return chosen
        if getattr(method, "dropout", 0.0) or "a0" in leaves[parameters[0]] or "m" in leaves[parameters[0]]:
            raise ValueError(
                f"HF PEFT adapts '{parameters[0]}', stacked kernels of experts, by LoRA without dropout or another start alone."
            )
        names = [site.name for site in base.sites.values() if site.kind == EXPERTS]
        return chosen | {"target_parameters": targets.names_for(parameters, names)}

    def shapes(self, config: Config, site: Site, name: str) -> Shapes:
        """Those of A and B, and of the magnitude."""
        r, _ = _rank_and_alpha(config, name)
        if site.kind == EXPERTS:
            return dict(experts.shapes(config, site, r))
        if site.kind == EMBEDDING:
            shapes: Shapes = {"lora_embedding_A": (r, site.inputs), "lora_embedding_B": (site.outputs, r)}
            magnitude: tuple[int, ...] = (site.outputs,)
        elif site.kind == CONV:
            window = site.shape[2:]
            shapes = {"lora_A.weight": (r, *site.shape[1:]), "lora_B.weight": (site.outputs, r, *(1 for _ in window))}
            magnitude = (1, site.outputs, *(1 for _ in window))
        else:
            shapes = {"lora_A.weight": (r, site.inputs), "lora_B.weight": (site.outputs, r)}
            magnitude = (site.outputs,)
        shapes |= {BIAS: (site.outputs,)} if config["lora_bias"] else {}
        return shapes | ({"lora_magnitude_vector": magnitude} if config["use_dora"] else {})

    def method(self, config: Config, sites: Mapping[str, Site]) -> WeightMethod:
        """`jpeft.lora`, or `jpeft.dora`."""
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for name, site in sites.items():  # of layers in a stack, what the layer of the highest rank has
            r, alpha = _rank_and_alpha(config, name)
            if r > ranks.get(site.path, 0):
                ranks[site.path], alphas[site.path] = r, float(alpha)
        options: dict[str, Any] = {
            "rank": targets.path_rules(ranks, config["r"]),
            "alpha": targets.path_rules(alphas, float(config["lora_alpha"])),
            "rslora": config["use_rslora"],
        }
        if config["init_lora_weights"] in ("gaussian", "orthogonal"):
            options["init"] = config["init_lora_weights"]
        if config["use_dora"]:
            options["init"] = "gaussian" if options.get("init") == "gaussian" else "kaiming"
            return DoRA(**options, dropout=config["lora_dropout"])
        if (kind := starts.start_of(config)) is not None:
            starts.check_start(config, kind, list(sites.values()))
            options["init"] = kind
        return LoRA(**options, dropout=config["lora_dropout"], lora_bias=config["lora_bias"])

    def aim(self, method: Any, sites: Sequence[Site], config: Config, base: Base) -> Any:
        """A table that is the head too is changed in its look-ups alone."""
        table = base.word if base.tied is not None else None
        if table is None or all(site.path != table.path for site in sites):
            return super().aim(method, sites, config, base)
        if config["ensure_weight_tying"]:
            raise config.error(
                f"ensure_weight_tying=true adapts '{table.module}' and '{base.tied}' by one pair of factors, which jpeft does not read."
            )
        return super().aim(method.replace(tied="lookup"), sites, config, base)

    def adjust(self, config: Config, method: Any, sites: Mapping[str, Site], leaves: dict[str, Arrays]) -> dict[str, Arrays]:
        """In a stack ``b`` takes up what the scale of a layer is more than that of the stack."""
        out = dict(leaves)
        for name, site in sites.items():
            r, alpha = _rank_and_alpha(config, name)
            own = _scale(config, r, alpha)
            if site.index is not None and own != (whole := scale(site.path, method.rank, method.alpha, method.rslora)):
                factors = {factor: leaf * np.float32(own / whole) for factor, leaf in out[site.module].items() if factor in ("b", "b0")}
                out[site.module] = out[site.module] | factors
        return out

    def complete(self, file: File, sites: Sequence[Site], leaves: dict[str, Arrays]) -> dict[str, Arrays]:
        """With the factors of the start, where it was in directions of the kernels."""
        kind = starts.start_of(file.config)
        if kind is None:
            return leaves
        out = dict(leaves)
        for site in sites:
            r, alpha = _rank_and_alpha(file.config, file.rename(site.module))
            out[site.module] = out[site.module] | starts.factors(kind, file.base, site, r, _scale(file.config, r, alpha))
        return out

    def read(self, config: Config, site: Site, tensors: Arrays) -> Arrays:
        """``a`` and ``b``, and ``m``."""
        if site.kind == EXPERTS:
            return experts.read(config, site, tensors)
        first, second = ("lora_embedding_A", "lora_embedding_B") if site.kind == EMBEDDING else ("lora_A.weight", "lora_B.weight")
        a, b = tensors[first], tensors[second]
        if site.kind == CONV:  # [r, channels, *window] -> [*window, channels, r]
            a = np.moveaxis(a, (0, 1), (-1, -2)).reshape(-1, len(a))
            leaves = {"a": a, "b": b.reshape(len(b), -1).T}
        else:
            leaves = {"a": a.T, "b": b.T}
        leaves |= {"bias": tensors[BIAS]} if config["lora_bias"] else {}
        return leaves | ({"m": tensors["lora_magnitude_vector"].reshape(-1)} if config["use_dora"] else {})

    # --- writing --------------------------------------------------------------------------------------------------------------------------

    def write(self, method: Any, site: Site, leaves: Arrays) -> Arrays:
        """A and B, and the magnitude."""
        if site.kind == EXPERTS:
            return experts.write(leaves)
        if "a0" in leaves:  # s (a b - a0 b0) as one product
            a, b = np.concatenate([leaves["a"], -leaves["a0"]], -1), np.concatenate([leaves["b"], leaves["b0"]], 0)
            leaves = leaves | {"a": a, "b": b}
        a, b = leaves["a"].T, leaves["b"].T
        window = site.shape[2:] if site.kind == CONV else ()
        if site.kind == EMBEDDING:
            tensors = {"lora_embedding_A": a, "lora_embedding_B": b}
        elif site.kind == CONV:
            a = np.moveaxis(leaves["a"].reshape(*window, site.shape[1], -1), (-1, -2), (0, 1))
            tensors = {"lora_A.weight": a, "lora_B.weight": b.reshape(*b.shape, *(1 for _ in window))}
        else:
            tensors = {"lora_A.weight": a, "lora_B.weight": b}
        tensors |= {BIAS: leaves["bias"]} if "bias" in leaves else {}
        if "m" in leaves:
            shape = (1, site.outputs, *(1 for _ in window)) if site.kind == CONV else (site.outputs,)
            tensors["lora_magnitude_vector"] = leaves["m"].reshape(shape)
        return tensors

    def config(self, method: Any, sites: Sequence[Site], leaves: Mapping[str, Arrays]) -> dict[str, Any]:
        """Ranks and scales."""
        ranks, alphas = {}, {}
        for site in sites:
            full = first_match(site.path, method.rank, "rank")
            alpha, own = first_match(site.path, method.alpha, "alpha"), leaves[site.module]
            r = own["a"].shape[-1] * (2 if "a0" in own else 1)
            ranks[site.module] = r
            # Of a layer that was filled up with zeros the scale is still that of the full rank.
            alphas[site.module] = _whole(alpha * (math.sqrt(r / full) if method.rslora else r / full) if r != full else alpha)
        common = (targets.common_of(method.rank), _whole(targets.common_of(method.alpha)))
        common = (None, None) if any("a0" in own for own in leaves.values()) else common
        r, rank_pattern = targets.patterns_for(ranks, common[0])
        alpha, alpha_pattern = targets.patterns_for(alphas, common[1])
        # HF PEFT opens no adapter with a bias of its own and another start.
        named = method.initializer in ("gaussian", "orthogonal") and not getattr(method, "lora_bias", False)
        return {
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "use_rslora": method.rslora,
            "use_dora": isinstance(method, DoRA),
            "lora_dropout": method.dropout,
            "lora_bias": getattr(method, "lora_bias", False),
            "init_lora_weights": method.initializer if named else True,
        }


def _rank_and_alpha(config: Config, name: str) -> tuple[int, int | float]:
    """Those of a module."""
    value = lambda patterns, default: targets.pattern_value(config[patterns], name, config[default])
    return value("rank_pattern", "r"), value("alpha_pattern", "lora_alpha")


def _scale(config: Config, r: int, alpha: int | float) -> float:
    """``s`` of a module."""
    return alpha / (math.sqrt(r) if config["use_rslora"] else r)


def _whole(value: Any) -> Any:
    """A number as JSON should have it: 16 and not 16.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value

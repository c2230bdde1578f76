"""LORA: LoRA, rsLoRA and DoRA, of linear layers, convolutions and embeddings."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.core.method import Method
from jpeft.hf_peft import experts, starts, targets, whole
from jpeft.hf_peft.config import ANY, COUNT, COUNT_RULES, FLAG, NAMES, POSITIVE, POSITIVE_RULES, RATE, TARGETING, Config, Key, one_of
from jpeft.hf_peft.formats.base import Arrays, File, Shapes, WeightFormat, Written
from jpeft.hf_peft.sites import CONV, EMBEDDING, EXPERTS, Base, Site
from jpeft.reparameterized.dora import DoRA
from jpeft.reparameterized.lora import LoRA
from jpeft.reparameterized.low_rank import scale
from jpeft.reparameterized.weight_method import WeightMethod
from jpeft.tree.paths import Path
from jpeft.tree.select import first_match

BIAS = "lora_B.bias"

# Options of LORA and ADALORA that jpeft does not have.
REFUSED = {
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "corda_config", "kasa_config", "layer_replication", "lora_ga_config")),
    **dict.fromkeys(("monteclora_config", "use_bdlora", "velora_config")),
    "use_qalora": False,
}


class LoRAFormat(WeightFormat):
    """``lora_A`` is ``a`` transposed, ``lora_B`` is ``b`` transposed, ``lora_magnitude_vector`` is ``m``."""

    peft_type = "LORA"
    methods = ("lora", "dora")
    kinds = ("linear", "conv1d", "conv", "embedding", "experts")
    pads = True
    splits_ties = True
    keeps_ties = ("lora",)
    refused = REFUSED
    keys = {key: about for key, about in TARGETING.items() if key != "init_weights"} | {
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
        chosen = super().targets(config, base, rename)
        if _keeps_tie(config) and config["use_dora"] and (table := _tied_table(chosen, base)) is not None:
            raise config.error(
                f"use_dora with ensure_weight_tying gives '{table.module}' and '{base.tied}' two magnitudes; here they are one."
            )
        return [*chosen, *found]

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
        """A table that is the head too is changed in its look-ups alone, unless the two are kept tied."""
        tied = "both" if _tied_table(sites, base) is None or _keeps_tie(config) else "lookup"
        return super().aim(method.replace(tied=tied), sites, config, base)

    def expected(self, config: Config, base: Base, sites: Sequence[Site], rename: Callable[[str], str]) -> Shapes:
        """The tensors of all sites, and those of a head that is kept tied to the table."""
        shapes = super().expected(config, base, sites, rename)
        table = _tied_table(sites, base)
        if table is None or not _keeps_tie(config):
            return shapes
        return shapes | {head: shapes[own][::-1] for head, own in _head_copies(table, base).items()}

    def load(self, file: File, sites: Sequence[Site]) -> tuple[Method, Arrays]:
        """The method, and the leaves of all kernels."""
        table = _tied_table(sites, file.base)
        if table is not None and _keeps_tie(file.config):
            numbers = [_rank_and_alpha(file.config, name) for name in (file.rename(table.module), str(file.base.tied))]
            if numbers[0] != numbers[1]:
                raise file.config.error(
                    f"ensure_weight_tying is true, and rank_pattern and alpha_pattern give '{file.base.tied}' other numbers than "
                    f"'{table.module}', with which it is tied."
                )
            for head, own in _head_copies(table, file.base).items():
                if not np.array_equal(file.read(head), file.read(own).T):
                    raise file.config.error(f"ensure_weight_tying is true, and '{head}' is not the transpose of '{own}'.")
        return super().load(file, sites)

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

    def save(self, method: Any, leaves: Mapping[Path, Any], base: Base) -> Written:
        """The tensors of all kernels. A table and the head that it is too are tied in HF PEFT if they are asked to be."""
        written = super().save(method, leaves, base)
        sites = [site for path in leaves for site in base.at(path.rpartition("/")[0])]
        table = _tied_table(sites, base)
        if table is None or method.tied == "lookup":
            return written
        if not whole.names_embeddings([table.module]):
            whole.check_tied_target(sites, base, method.name)
        copies = {head: written.tensors[own].T for head, own in _head_copies(table, base).items()}
        config: dict[str, Any] = written.config | {"ensure_weight_tying": True}
        for patterns, common in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            if (value := targets.pattern_value(config[patterns], table.module, config[common])) != config[common]:
                config[patterns] = config[patterns] | {str(base.tied): value}
        return written._replace(tensors=written.tensors | copies, config=config)

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


def _tied_table(sites: Sequence[Site], base: Base) -> Site | None:
    """The word embedding, if it is adapted and is the head, too."""
    return base.word if base.tied is not None and base.word is not None and any(site.path == base.word.path for site in sites) else None


def _keeps_tie(config: Config) -> bool:
    """Whether HF PEFT keeps the table and the head tied."""
    saved = whole.names_embeddings(config["modules_to_save"])
    return config["ensure_weight_tying"] and not saved and whole.names_embeddings(config["target_modules"])


def _head_copies(table: Site, base: Base) -> dict[str, str]:
    """The factors of a head that is kept tied, and those of the table that they are the transposes of."""
    pairs = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
    return {f"{base.tied}.{head}": f"{table.module}.{own}" for head, own in pairs.items()}


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

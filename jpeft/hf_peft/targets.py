"""HF PEFT's rules for choosing modules, and the other way round: the shortest names that choose some modules."""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from jpeft.hf_peft.config import Config, names_in
from jpeft.hf_peft.sites import CONV1D, LINEAR, Base, Site
from jpeft.tree.paths import Path
from jpeft.tree.select import select

T = TypeVar("T", bound=Hashable)
ALL_LINEAR = "all-linear"

# HF PEFT's choice for models whose adapters do not say: type of adapter -> type of model -> names. The others choose as LORA does.
_ATTENTION = {
    "gpt2": ("c_attn",),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), ("query", "value")),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("q_proj", "v_proj")),
}
DEFAULTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "IA3": {
        "gpt2": ("c_attn", "mlp.c_proj"),
        **dict.fromkeys(("bert", "roberta"), ("key", "value", "output.dense")),
        **dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
        **dict.fromkeys(("qwen2", "qwen3"), ("q_proj", "v_proj", "down_proj")),
    },
    "LN_TUNING": {
        "gpt2": ("ln_1", "ln_2", "ln_f"),
        **dict.fromkeys(("llama", "mistral"), ("input_layernorm", "post_attention_layernorm", "norm")),
        **dict.fromkeys(("qwen2", "qwen3"), ("post_attention_layernorm",)),
    },
    "ADALORA": {
        "gpt2": ("c_attn",),
        "bert": ("query", "value"),
        "roberta": ("query", "key", "value", "dense"),
        **dict.fromkeys(("llama", "qwen2", "qwen3"), ("q_proj", "v_proj")),
    },
}


def default_targets(peft_type: str, model_type: str | None) -> tuple[str, ...] | None:
    """HF PEFT's choice for a type of model; None if it has none."""
    return DEFAULTS.get(peft_type, _ATTENTION).get(model_type or "")


# --- what a configuration chooses -------------------------------------------------------------------------------------------------------


def chosen(config: Config, names: Iterable[str], base: Base) -> list[str]:
    """The modules that a configuration chooses.

    Args:
      config: With `target_modules` and the options beside it.
      names: Of the modules that can be chosen, as the file names them.
      base: For what HF PEFT reads off the model.

    Raises:
      ValueError: if it chooses by default, and HF PEFT has none for the model.
    """
    targets = config["target_modules"]
    if targets is None and config.get("target_parameters"):
        return []
    if targets is None or targets == "":
        targets = default_targets(config["peft_type"], base.model_type)
        if targets is None:
            raise config.error(
                f"target_modules is not given, and HF PEFT has no default for a model of the type {base.model_type!r}: name the modules."
            )
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = _all_linear(base, str(config["task_type"]))
    try:
        return [name for name in names if _is_chosen(config, targets, name)]
    except re.error as error:  # HF PEFT takes names in some of these lists for regular expressions
        raise config.error(
            f"modules_to_save or layers_pattern holds {error.pattern!r}, which is no regular expression: {error}."
        ) from error


def _is_chosen(config: Config, targets: Sequence[str] | str, name: str) -> bool:
    """HF PEFT's `check_target_module_exists`."""
    excluded = config.get("exclude_modules")
    if excluded and _is_named(excluded, name):
        return False
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config["modules_to_save"] or ()):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if not _is_named(targets, name):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or name in targets:
        return True
    patterns = names_in(config.get("layers_pattern"))
    regexes = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    found = next((match for regex in regexes if (match := re.match(regex, name))), None)
    return found is not None and int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)


def _is_named(names: Sequence[str] | str, name: str) -> bool:
    """Whether a regex is for the whole name, or one of the names is the name or a suffix of it."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return name in names or any(name.endswith(f".{each}") for each in names)


def _all_linear(base: Base, task: str) -> list[str]:
    """All linear layers but the output: that of a language model, else the classifier."""
    linear = [site.module for site in base.kernels.values() if site.kind in (LINEAR, CONV1D)]
    if "lm_head" in linear:
        return [name for name in linear if name != "lm_head"]
    head = next((name for name in ("score", "classifier") if name in base.modules), None) if task == "SEQ_CLS" else None
    return [name for name in linear if name != head]


def pattern_value(patterns: Mapping[str, T] | None, name: str, default: T) -> T:
    """The value of a module by `rank_pattern` or `alpha_pattern`: that of the first key that fits the end of its name.

    >>> pattern_value({"query": 4, "layer.0.query": 2}, "layer.0.query", 8)
    4
    """
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def saved_modules(names: Sequence[str], modules: Iterable[str]) -> list[str]:
    """The outermost modules that `modules_to_save` chooses: those whose names end with one of the names, as HF PEFT compares them."""
    found = [module for module in modules if any(module.endswith(name) for name in names)]
    return [module for module in found if not any(module.startswith(f"{other}.") for other in found)]


# --- what chooses some modules ------------------------------------------------------------------------------------------------------------


def names_for(wanted: Sequence[str], modules: Sequence[str]) -> list[str]:
    """The shortest names that choose some modules as a list of `target_modules` does, and no others.

    >>> names_for(["layer.0.attention.query", "layer.1.attention.query"], ["layer.0.attention.query", "layer.1.attention.query", "pooler"])
    ['query']
    """
    left, found = list(dict.fromkeys(wanted)), []
    others = [module for module in modules if module not in set(left)]
    for depth in range(1, 1 + max((name.count(".") for name in left), default=0)):
        for suffix in dict.fromkeys(".".join(name.split(".")[-depth:]) for name in left):
            if not any(_is_named([suffix], other) for other in others):
                found.append(suffix)
                left = [name for name in left if not _is_named([suffix], name)]
    return sorted({*found, *left})


def layered_names_for(wanted: Sequence[str], modules: Sequence[str]) -> tuple[list[str], list[int] | None]:
    """As `names_for`, and the numbers of the layers for `layers_to_transform`, where names with numbers become shorter by it; else None."""
    plain = names_for(wanted, modules)
    if not any(part.isdecimal() for name in plain for part in name.split(".")):
        return plain, None
    number = lambda name: int(match[1]) if (match := re.match(r".*?\.[^.]*\.(\d+)\.", name)) else None
    layers = {number(name) for name in wanted}
    if None in layers or not layers:
        return plain, None
    inside = [module for module in modules if number(module) in layers]
    names = names_for(wanted, inside)
    # A name without a number that ends in one of these is not chosen where numbers are asked for.
    return (names, sorted(layers)) if len("".join(names)) < len("".join(plain)) else (plain, None)  # pyright: ignore[reportReturnType, reportArgumentType]


def patterns_for(values: Mapping[str, T], common: T | None = None) -> tuple[T, dict[str, T]]:
    """The common value, and the shortest patterns for the others, as `rank_pattern` has them.

    Args:
      values: By module.
      common: The value that needs no pattern; None for the most common one.

    >>> patterns_for({"layer.0.query": 8, "layer.1.query": 8, "layer.0.value": 4, "layer.1.value": 4, "pooler": 8})
    (8, {'value': 4})
    """
    usual = Counter(values.values()).most_common(1)[0][0] if common is None else common
    patterns: dict[str, T] = {}
    for name in (name for name, value in values.items() if value != usual):
        last = name.rpartition(".")[2]
        alike = {value for other, value in values.items() if re.match(rf"(.*\.)?({last})$", other)}
        patterns[last if alike == {values[name]} else name] = values[name]
    return usual, patterns


# --- paths of the parameters here ---------------------------------------------------------------------------------------------------------


def path_target(sites: Sequence[Site], candidates: Sequence[Path]) -> str | tuple[str, ...]:
    """A target that chooses the kernels of some sites from all candidates: a list of names where one does, else a regex."""
    wanted = list(dict.fromkeys(site.path for site in sites))
    names = sorted({path.split("/")[-2] if "/" in path else path for path in wanted})
    if set(select(candidates, names)) == set(wanted):
        return tuple(names)
    return path_regex(wanted)


def path_regex(paths: Sequence[Path]) -> str:
    """A regex for some paths. Those that differ by one number are put together.

    >>> path_regex(["layer/0/query/kernel", "layer/3/query/kernel", "pooler/kernel"])
    'layer/(0|3)/query/kernel|pooler/kernel'
    """
    groups: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split("/")
        numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
        if len(numbers) == 1:
            at = numbers[0]
            marked = "/".join([*map(re.escape, parts[:at]), "\0", *map(re.escape, parts[at + 1 :])])
            groups.setdefault(marked, []).append(parts[at])
        else:
            groups.setdefault(re.escape(path), [])
    joined = {marked: numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})" for marked, numbers in groups.items() if numbers}
    return "|".join(marked.replace("\0", joined[marked]) if marked in joined else marked for marked in groups)


def path_rules(values: Mapping[Path, T], common: T) -> Any:
    """An option that may be rules: one value, or rules by path that end with the common value.

    >>> path_rules({"a/kernel": 4, "b/kernel": 8}, 8), path_rules({"a/kernel": 4, "b/kernel": 4}, 8)
    ({'a/kernel': 4, '.*': 8}, 4)
    """
    if len(found := set(values.values())) == 1:
        return found.pop()
    others = [value for value in dict.fromkeys(values.values()) if value != common]
    return {path_regex([path for path, own in values.items() if own == value]): value for value in others} | {".*": common}


def common_of(option: Any) -> Any:
    """The common value of an option that `path_rules` made; None for other rules."""
    if not isinstance(option, tuple):
        return option
    return option[-1][1] if option[-1][0] == ".*" else None

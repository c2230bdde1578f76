"""What a folder holds beside its adapter: whole modules (`modules_to_save`), biases (`bias`), and rows of tokens.

Here a head is the option ``head`` of the method, biases are the method `bitfit`, and tokens are `trainable_tokens`; the three are parts of
a chain.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jpeft import tree
from jpeft.hf_peft.config import Config
from jpeft.hf_peft.sites import EMBEDDING, Base, Site
from jpeft.hf_peft.targets import path_regex, saved_modules
from jpeft.selective.bitfit import bitfit
from jpeft.selective.trainable_tokens import ROWS, TrainableTokens
from jpeft.tree.head import head_leaves
from jpeft.tree.paths import Path

Arrays = dict[str, np.ndarray]
TOKENS = "token_adapter.trainable_tokens_delta"

# Heads that HF PEFT trains whole for a task, whatever the configuration says.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}

# The way out where adapters tell the word embedding from the head.
UNTIE = "Load the base with a head of its own: jpeft.models.load(..., untie=True), or --untie"


# --- modules_to_save ----------------------------------------------------------------------------------------------------------------------


def saved_sites(config: Config, base: Base) -> list[Site]:
    """The parameters of the modules that the adapter holds whole.

    Raises:
      ValueError: for a name that no module has.
    """
    given = config["modules_to_save"] or []
    names = list(dict.fromkeys([*given, *HEADS.get(str(config["task_type"]), ())]))
    heads = HEADS.get(str(config["task_type"]), ())
    is_tied = lambda name: base.tied is not None and base.tied.endswith(name)
    missing = [name for name in given if not saved_modules([name], base.modules) and name not in heads and not is_tied(name)]
    if missing:
        raise config.error(f"modules_to_save names {', '.join(map(repr, missing))}, which the model does not have.")
    modules = saved_modules(names, base.modules)
    return [site for site in base.sites.values() if any(f"{site.module}.".startswith(f"{module}.") for module in modules)]


def tied_copy(config: Config, base: Base, saved: Sequence[Site]) -> str | None:
    """The tensor of a head that is the word embedding, where both are held whole; None if neither is.

    Raises:
      ValueError: if one of them alone is: here they are one.
    """
    if base.tied is None or base.word is None:
        return None
    named = any(base.tied.endswith(name) for name in config["modules_to_save"] or ())
    if named == any(site.path == base.word.path for site in saved):
        return f"{base.tied}.weight" if named else None
    alone, other = (base.tied, base.word.module) if named else (base.word.module, base.tied)
    raise config.error(
        f"modules_to_save holds '{alone}' without '{other}'. The model ties the two, so both would change; in HF PEFT the one alone does. "
        f"{UNTIE}."
    )


def check_tied_target(sites: Sequence[Site], base: Base, what: str) -> None:
    """Refuse an adapter of a word embedding that is also the head: HF PEFT changes the look-up alone, and jpeft the scores too.

    Raises:
      ValueError: naming the table.
    """
    if base.tied is not None and base.word is not None and any(site.path == base.word.path for site in sites):
        raise ValueError(
            f"{what} adapts '{base.word.module}', which is the head of the model too. HF PEFT changes its look-up alone, and here the "
            f"scores change as well, so the outputs would differ. {UNTIE}; or change the look-up alone, by the option tied='lookup' of "
            "lora and dora; or adapt other layers."
        )


def check_tied_head(names: Iterable[str], base: Base, file: os.PathLike[str]) -> None:
    """Refuse an adapter of a head that is the word embedding: the tables are one here.

    Args:
      names: Of the tensors in the file, without prefixes.
      base: The base.
      file: For the message.

    Raises:
      ValueError: saying how to load the base.
    """
    if base.tied is not None and any(name.startswith(f"{base.tied}.") and name != f"{base.tied}.weight" for name in names):
        raise ValueError(f"{file} holds an adapter of '{base.tied}', which in this base is the word embedding. {UNTIE}.")


def head_option(sites: Sequence[Site], base: Base) -> str | None:
    """The option ``head`` of a method that trains the parameters of these sites whole."""
    paths = list(dict.fromkeys(site.path for site in sites))
    if not paths:
        return None
    for path in paths:
        require_whole_stack(path, sites, base, "modules_to_save")
    return "auto" if set(head_leaves(base.params, "auto")) == set(paths) else path_regex(paths)


def require_whole_stack(path: Path, sites: Sequence[Site], base: Base, what: str) -> None:
    """Refuse a part of stacked layers.

    Raises:
      ValueError: naming the way out.
    """
    count, there = base.count(path), sum(site.path == path for site in sites)
    if count not in (None, there):
        raise ValueError(
            f"{what}: the layers of '{path}' are stacked, and only {there} of {count} are in the adapter: load the base with scan=False "
            "(--scan False)."
        )


def leaves_of(sites: Sequence[Site], read: Callable[[str], np.ndarray]) -> Arrays:
    """The leaves that torch tensors make up, by path."""
    layers: dict[Path, list[np.ndarray]] = {}
    stack = {site.path: site for site in sites}
    for site in sites:
        layers.setdefault(site.path, []).append(site.from_torch(read(site.name)))
    join = lambda path, parts: parts[0] if stack[path].index is None else np.stack(parts)
    return {path: join(path, parts) for path, parts in layers.items()}


# --- biases -------------------------------------------------------------------------------------------------------------------------------


def bias_sites(config: Config, base: Base, targets: Sequence[Site], whole: Sequence[Site]) -> list[Site]:
    """The biases that the adapter holds, but for those of modules that it holds whole."""
    mode = config.get("bias", "none")
    if mode == "none":
        return []
    held, chosen = {site.name for site in whole}, {site.module for site in targets}
    biases = [site for site in base.sites.values() if site.name.endswith(".bias") and site.name not in held]
    return [site for site in biases if mode == "all" or site.module in chosen]


def bias_part(sites: Sequence[Site], base: Base, mode: str) -> Any:
    """The method that trains these biases."""
    paths = list(dict.fromkeys(site.path for site in sites))
    for path in paths:
        require_whole_stack(path, sites, base, f"bias={mode!r}")
    return bitfit(subset="all" if mode == "all" else path_regex(paths), head=None)


# --- tokens -------------------------------------------------------------------------------------------------------------------------------


def token_sites(config: Config, base: Base, key: str = "trainable_token_indices") -> dict[str, tuple[Site, tuple[int, ...]]]:
    """The tables of which the adapter holds some rows: by the names of the tensors, with the tokens.

    Raises:
      ValueError: for a module that is no table of embeddings, or a value of another form.
    """
    given = config.get(key)
    if not given:
        return {}
    tables = {site.module: site for site in base.sites.values() if site.kind == EMBEDDING}
    if isinstance(given, list):
        if base.word is None:
            raise config.error(f"{key} is about the word embedding, and the model has none that jpeft knows.")
        given = {base.word.module: given}
    if not isinstance(given, dict) or not all(_is_tokens(tokens) for tokens in given.values()):
        raise config.error(f"{key} must be a list of token ids, or an object of modules and such lists.")
    out: dict[str, tuple[Site, tuple[int, ...]]] = {}
    for name, tokens in given.items():
        modules = [module for module in base.modules if module.endswith(name)]
        sites = [tables[module] for module in modules if module in tables]
        if not sites:
            raise config.error(f"{key} names {name!r}, which is no table of embeddings of the model. There are {', '.join(tables)}.")
        for site in sites:
            if max(tokens) >= site.inputs:
                raise config.error(f"{key} has the token {max(tokens)}, but '{site.path}' has {site.inputs} rows.")
            out[f"{site.module}.{TOKENS}"] = (site, tuple(tokens))
    return out


def _is_tokens(tokens: Any) -> bool:
    return isinstance(tokens, list) and bool(tokens) and all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens)


def token_parts(
    tables: Mapping[str, tuple[Site, tuple[int, ...]]], base: Base, read: Callable[[str], np.ndarray], head: str | None = None
) -> dict[str, tuple[TrainableTokens, Arrays]]:
    """For each table the method that trains its rows, and the differences of the rows."""
    out = {}
    for i, (name, (site, tokens)) in enumerate(tables.items()):
        method = TrainableTokens(tokens=tokens, embedding=path_regex([site.path]), output=None, head=head)
        rows = read(name) - np.asarray(base.leaves[site.path], np.float32)[list(tokens)]
        out["tokens" if i == 0 else f"tokens_{i + 1}"] = (method, {f"{site.path}/{ROWS}": rows})
    return out


def token_tensors(method: TrainableTokens, leaves: Mapping[Path, Any], base: Base) -> dict[str, np.ndarray]:
    """The rows of tables as HF PEFT has them: the new rows, by module.

    Raises:
      ValueError: for columns of a head that is not tied, which HF PEFT holds no rows for.
    """
    out = {}
    for path, leaf in tree.flatten(leaves).items():
        owner, name = path.rpartition("/")[::2]
        sites = base.at(owner)
        if name != ROWS or not sites:
            raise ValueError(
                f"trainable_tokens trains '{owner}' too, the scores of the tokens, which HF PEFT cannot hold: it holds rows of embeddings. "
                "Train with output=None to export."
            )
        table = np.asarray(base.leaves[owner], np.float32)
        out[sites[0].module] = table[list(method.tokens or ())] + np.asarray(leaf, np.float32)
    return out

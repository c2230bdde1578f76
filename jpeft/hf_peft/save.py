"""Write an adapter as a folder of HF PEFT."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft import tree
from jpeft.checkpoint.files import check_output, replace_folder, use_umask
from jpeft.checkpoint.temporary import Temporary
from jpeft.core.method import Method
from jpeft.core.peft import Peft, check_peft
from jpeft.core.peft import fold as fold_peft
from jpeft.distributed import gather_to_host, on_first_process
from jpeft.extras import explained
from jpeft.hf_peft import training, whole
from jpeft.hf_peft.config import CONFIG, WEIGHTS
from jpeft.hf_peft.formats import format_for, formats
from jpeft.hf_peft.formats.base import Arrays, Format, Written
from jpeft.hf_peft.sites import Base, Names, base_of
from jpeft.hf_peft.targets import names_for, saved_modules
from jpeft.selective.trainable_tokens import TrainableTokens
from jpeft.tree.head import head_leaves

# The version whose formats these are.
_VERSION = "0.21.2"


def save_hf(
    folder: str | os.PathLike[str],
    peft: Peft,
    *,
    model: Any = None,
    names: Names | None = None,
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter as HF PEFT does: adapter_config.json and adapter_model.safetensors. Of several processes all call it.

    Whatever reads HF PEFT's adapters reads it: peft and transformers, vLLM, the converter of llama.cpp. A head that was trained along is
    in `modules_to_save`. A chain is written where one folder can hold it: one adapter with trained modules, biases and tokens.

    Args:
      folder: A new folder.
      peft: The adapter.
      model: The model of the base, one of `jpeft.models`: it tells the torch names of its parameters.
      names: For any other model: the torch name of each parameter; see `jpeft.load_hf`.
      base: Name or folder of the base, for adapter_config.json: some programs look the base up there.
      overwrite: Replace an adapter that is at `folder`.

    Raises:
      ValueError: for what HF PEFT cannot hold, with what it can; if `folder` exists.

    >>> import os, tempfile, jax.numpy as jnp, jpeft
    >>> params = {"layers": {"q": {"kernel": jnp.ones((3, 8, 4))}}}
    >>> folder = tempfile.mkdtemp() + "/out"
    >>> jpeft.save_hf(folder, jpeft.apply(params, method="lora"), names={"layers/q/kernel": "model.layers.*.q.weight"})
    >>> sorted(os.listdir(folder))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_peft(peft, "save_hf")
    described = base_of(peft.params, model=model, names=names, axes=_axes(peft.method))
    target = Path(folder).expanduser().absolute()
    on_first_process(lambda: _check_target(target, overwrite=overwrite))
    parts = _sort(peft.replace(adapter=gather_to_host(tree.unflatten(tree.flatten(peft.adapter)))))
    form, tensors, config = _write(parts, described)
    config |= {"base_model_name_or_path": base}
    on_first_process(lambda: _write_folder(target, form, tensors, config, parts, overwrite=overwrite))


class _Parts(NamedTuple):
    """The parts of an adapter by what HF PEFT calls them."""

    original: Method  # the main part as it is trained
    method: Method  # the same folded
    own: dict[str, Any]  # its leaves, but for whole modules beside it
    training: dict[str, Any]  # the leaves that folding leaves out
    tokens: list[tuple[TrainableTokens, dict[str, Any]]]
    replaced: dict[str, Any]  # the leaves of all parts that replace those of the base


def _write(parts: _Parts, base: Base) -> tuple[Format, Arrays, dict[str, Any]]:
    """The format of an adapter, its tensors, and the configuration."""
    form = format_for(parts.original.name)
    assert form is not None
    if not (form.follows_ties or parts.method.name in form.keeps_ties or getattr(parts.method, "tied", None) == "lookup"):
        whole.check_tied_target([site for path in parts.own for site in base.at(path.rpartition("/")[0])], base, parts.method.name)
    written = form.save(parts.method, parts.own, base)
    modules, biases = _split_replaced(parts.replaced, base)
    if modules and not form.saves_modules:
        raise ValueError(f"HF PEFT's {form.peft_type} holds no modules beside it, and '{modules[0]}' is trained: chain it with a lora.")
    replaced = dict(parts.replaced)
    if form.needs_head:
        heads = [site for site in base.sites.values() if site.module.split(".")[0] in whole.HEADS.get(str(base.task), ())]
        replaced = {site.path: base.leaves[site.path] for site in heads} | replaced
        modules = list(dict.fromkeys([*modules, *(site.module for site in heads)]))
        biases = [module for module in biases if module not in modules]
    task = _task(base, modules) if form.saves_modules else base.task
    tensors: Arrays = dict(written.tensors)
    chosen = set(modules)
    tensors |= {site.name: site.to_torch(replaced[site.path]) for site in base.sites.values() if site.module in chosen}
    names = _names_to_save(modules, base, task)
    if base.tied is not None and base.word is not None and base.word.module in chosen:  # HF PEFT would tie the head to the base's table
        tensors[f"{base.tied}.weight"] = tensors[base.word.name].copy()
        names.append(base.tied)
    config: dict[str, Any] = {"modules_to_save": names or None} if form.saves_modules else {}
    if biases:
        config["bias"] = _bias_mode(form, biases, written)
        tensors |= _bias_tensors(biases, replaced, written, base, config["bias"])
        tensors |= _bias_copies(names, tensors, base) if config["bias"] == "all" else {}
    if parts.tokens:
        config["trainable_token_indices"] = _add_tokens(form, parts.tokens, tensors, base)
    else:
        tensors |= _adapted_embeddings(written, base)
    about = {"peft_type": form.peft_type, "peft_version": _VERSION, "task_type": task, "inference_mode": True}
    auto = base.torch_class if task is None else None  # by which HF PEFT finds the class of the base where no task tells it
    return form, tensors, form.unused | config | written.config | about | {"auto_mapping": auto}


def _sort(peft: Peft) -> _Parts:
    """Tell the parts of an adapter apart.

    Raises:
      ValueError: for parts that HF PEFT would keep in a folder each, or has no type for.
    """
    folded = fold_peft(peft)
    named = lambda method: dict(method.parts) or {method.name: method}
    originals, parts = named(peft.method), dict(zip(named(peft.method), named(folded.method).values(), strict=True))
    trained, adapters = _collections(peft), dict(zip(originals, _collections(folded).values(), strict=True))
    for name in [name for name, method in originals.items() if (form := format_for(method.name)) is not None and not form.folds]:
        parts[name], adapters[name] = originals[name], trained[name]
    base = tree.flatten(peft.params)
    replaced: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for name in parts:
        for path, leaf in adapters[name].items():
            if path in base:
                replaced.setdefault(path, leaf)
        own[name] = {path: leaf for path, leaf in adapters[name].items() if path not in base}
    mains = [name for name, method in parts.items() if own[name] and not isinstance(method, TrainableTokens)]
    tokens = [name for name, method in parts.items() if isinstance(method, TrainableTokens)]
    if not mains:  # rows of tokens, or whole modules, are the adapter where there is no other
        copies = [name for name, method in parts.items() if (form := format_for(method.name)) is not None and form.replaces]
        mains, tokens = (tokens, []) if tokens else (copies, [])
    if len(mains) != 1:
        raise ValueError(_several(mains) if mains else _no_type(peft.method, replaces=True))
    (main,) = mains
    if (form := format_for(originals[main].name)) is None:
        raise ValueError(_no_type(originals[main], replaces=False))
    if form.replaces:
        head = head_leaves(peft.params, getattr(parts[main], "head", None))
        own[main] = {path: replaced.pop(path) for path in adapters[main] if path in base and path not in head}
    # A method that stays the same, as AdaLoRA does without its empty ranks, is trained on as it is written.
    changes = originals[main].folds and parts[main] != originals[main]
    left = {path: leaf for path, leaf in trained[main].items() if path not in adapters[main]} if changes else {}
    return _Parts(originals[main], parts[main], own[main], left, [(parts[name], own[name]) for name in tokens], replaced)


def _collections(peft: Peft) -> dict[str, dict[str, Any]]:
    """The leaves of each part by path."""
    return {name: tree.flatten(part) for name, part in peft.method.to_collections(peft.adapter).items()}


def _several(mains: list[str]) -> str:
    """Why a chain of several adapters is not written."""
    return (
        f"One folder of HF PEFT holds one adapter, with trained modules, biases and tokens beside it, and the chain has {len(mains)}: "
        f"{', '.join(mains)}. Export them one by one, or merge all but one of them into the base first."
    )


def _no_type(method: Method, *, replaces: bool) -> str:
    """Why there is no folder for a method, and what else there is."""
    known = sorted({name for each in formats().values() for name in each.methods})
    said = f"HF PEFT has no type of adapter for {method.name}. It has types for {', '.join(known)}."
    if replaces:
        said += " Trained biases and whole modules it holds beside one of these: jpeft.chain(lora=..., ...)."
    if method.why_no_merge is None or method.parts:
        said += " Or export the merged model: jpeft.models.save(folder, model, jpeft.merge(peft))."
    return said


def _split_replaced(replaced: Mapping[str, Any], base: Base) -> tuple[list[str], list[str]]:
    """The modules that are trained whole, and the modules of which the bias alone is trained.

    Raises:
      ValueError: for leaves without a torch name, or weights without the bias beside them.
    """
    trained: dict[str, set[str]] = {}
    for path in replaced:
        sites = base.at(path)
        if not sites:
            raise ValueError(f"'{path}' has no name in the torch model, so it cannot be written for HF PEFT.")
        for site in sites:
            trained.setdefault(site.module, set()).add(site.name)
    has = lambda module: {site.name for site in base.sites.values() if site.module == module}
    # The bias of a head whose weight is the word embedding is no module.
    modules = [module for module, names in trained.items() if names == has(module) != {f"{module}.bias"}]
    biases = [module for module, names in trained.items() if module not in modules and names == {f"{module}.bias"}]
    odd = [module for module in trained if module not in modules and module not in biases]
    if odd:
        raise ValueError(
            f"HF PEFT holds whole modules, or biases, and of '{odd[0]}' {', '.join(sorted(trained[odd[0]]))} alone is trained."
        )
    return modules, biases


def _names_to_save(modules: list[str], base: Base, task: str | None) -> list[str]:
    """Names for `modules_to_save`, which HF PEFT compares with the ends of names. Those of the task's heads it adds in any case."""
    heads = list(whole.HEADS.get(str(task), ()))
    by_task = [module for module in base.modules if any(module.endswith(head) for head in heads)]
    rest = [module for module in modules if not any(f"{module}.".startswith(f"{head}.") for head in by_task)]
    if not rest:
        return heads
    inside = lambda module: {site.module for site in base.sites.values() if f"{site.module}.".startswith(f"{module}.")}
    whole_ones = [module for module in base.modules if inside(module) <= set(rest)]
    outer = [module for module in whole_ones if not any(module.startswith(f"{other}.") for other in whole_ones)]
    found: list[str] = []
    for name in sorted({module.rpartition(".")[2] for module in outer}, key=len):
        alike = [module for module in base.modules if module.endswith(name)]
        allowed = all(inside(module) <= set(modules) for module in alike)
        if allowed and not all(any(module.endswith(each) for each in found) for module in alike):
            found.append(name)
    left = [module for module in outer if not any(module.endswith(name) for name in found)]
    return [*heads, *sorted(found), *left]


def _bias_mode(form: Format, biases: list[str], written: Written) -> str:
    """HF PEFT's name for a choice of biases.

    Raises:
      ValueError: if the type holds none.
    """
    if "bias" not in form.keys:
        raise ValueError(f"HF PEFT's {form.peft_type} holds no biases, and {len(biases)} are trained, such as that of '{biases[0]}'.")
    own = "lora_only" if form.peft_type in ("LORA", "ADALORA") else f"{form.peft_type.lower()}_only"
    return own if set(biases) <= set(written.modules) else "all"


def _bias_tensors(biases: list[str], replaced: Mapping[str, Any], written: Written, base: Base, mode: str) -> Arrays:
    """All biases of the mode. Those that are not trained have the value of the base."""
    targets = set(written.modules)
    out: Arrays = {}
    for site in base.sites.values():
        if not site.name.endswith(".bias") or (mode != "all" and site.module not in targets):
            continue
        if site.path in replaced and site.module not in biases:
            continue  # of a module that is held whole
        name = f"{site.module}.base_layer.bias" if site.module in targets else site.name
        out[name] = site.to_torch(replaced[site.path]) if site.path in replaced else base.tensor(site)
    return out | {second: out[first].copy() for second, first in base.second_names.items() if first in out}


def _bias_copies(names: list[str], tensors: Mapping[str, np.ndarray], base: Base) -> Arrays:
    """The biases of modules that are held whole, which HF PEFT repeats with ``bias="all"``: as trained, and as the base has them."""
    out: Arrays = {}
    for outer in saved_modules(names, base.modules):
        for site in (site for site in base.sites.values() if site.name.endswith(".bias") and site.name.startswith(f"{outer}.")):
            inner = site.name.removeprefix(f"{outer}.")
            adapter = "default." if "." in inner else ""  # HF PEFT takes the adapter's name out of the end of names alone
            out[f"{outer}.modules_to_save.{adapter}{inner}"] = tensors[site.name].copy()
            out[f"{outer}.original_module.{inner}"] = base.tensor(site)
    return out


def _adapted_embeddings(written: Written, base: Base) -> Arrays:
    """The base's own embedding and head where they are adapted: HF PEFT adds them if the targets name one of these two."""
    if not set(whole.EMBEDDINGS) & set(written.config.get("target_modules") or ()):
        return {}
    ends = [base.word, base.sites.get("lm_head.weight")]
    found = {site.module: base.tensor(site) for site in ends if site is not None and site.module in set(written.modules)}
    if written.config.get("ensure_weight_tying") and base.word is not None:
        found[str(base.tied)] = found[base.word.module].copy()
    return {f"{module}.base_layer.weight": tensor for module, tensor in found.items()}


def _add_tokens(form: Format, tokens: list[tuple[TrainableTokens, dict[str, Any]]], tensors: Arrays, base: Base) -> Any:
    """Add the rows of tokens to the tensors, and return `trainable_token_indices`."""
    if "trainable_token_indices" not in form.keys:
        raise ValueError(f"HF PEFT's {form.peft_type} holds no rows of tokens beside it: export trainable_tokens by itself.")
    indices: dict[str, list[int]] = {}
    for method, leaves in tokens:
        for module, rows in whole.token_tensors(method, leaves, base).items():
            if module in indices:
                raise ValueError(f"Two parts train rows of '{module}', and HF PEFT holds one set of rows of each table.")
            tensors[f"{module}.{whole.TOKENS}"] = rows
            indices[module] = list(method.tokens or ())
    if base.word is not None and list(indices) == [base.word.module]:
        return indices[base.word.module]  # the table that is meant where none is named
    short = names_for(list(indices), base.modules)
    return {next(name for name in short if module.endswith(name)): ids for module, ids in indices.items()}


def _task(base: Base, modules: list[str]) -> str | None:
    """HF PEFT's task. It trains the head of a classifier whole, so a classifier without a trained head is of no task."""
    heads = whole.HEADS.get(str(base.task))
    if heads is None:
        return base.task
    return base.task if any(module.split(".")[0] in heads for module in modules) else None


def _axes(method: Method) -> Any:
    return next((axes for part in [method, *(part for _, part in method.parts)] if (axes := getattr(part, "axes", None))), None)


# --- the folder ---------------------------------------------------------------------------------------------------------------------------


def _check_target(target: Path, *, overwrite: bool) -> None:
    if os.path.lexists(target) and not overwrite:
        raise ValueError(f"'{target}' exists already. Choose another place, or replace it: overwrite=True.")
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise ValueError(f"'{target}' is no adapter of HF PEFT (it holds no {CONFIG}), so it is not replaced. Choose another place.")
    check_output(target, folder=True)


def _write_folder(target: Path, form: Format, tensors: Arrays, config: Mapping[str, Any], parts: _Parts, *, overwrite: bool) -> None:
    with explained():
        from safetensors.numpy import save_file
    temporary = Temporary(target)
    try:
        partial = temporary.make_folder()
        # safetensors writes the underlying buffer whatever the strides.
        in_file = {name if name in form.bare else form.prefix + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(in_file, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
        if parts.training:
            training.write(partial, parts.original, parts.training)
        use_umask(partial)
        replace_folder(partial, target, overwrite=overwrite)
    finally:
        temporary.remove()

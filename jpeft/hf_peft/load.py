"""Load an adapter of HF PEFT onto a base."""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft import tree
from jpeft.core.chain import chain
from jpeft.core.method import Method
from jpeft.core.peft import Peft
from jpeft.hf_peft import training, whole
from jpeft.hf_peft.config import COMMON, CONFIG, Config, checked, read_content
from jpeft.hf_peft.folder import find_adapter
from jpeft.hf_peft.formats import format_of
from jpeft.hf_peft.formats.base import File, Format
from jpeft.hf_peft.sites import Base, Names, base_of
from jpeft.hf_peft.tensors import Tensors, candidates, check_tensors, shifted, unshifted
from jpeft.hosts.registry import unwrap


def load_hf(
    folder: str | os.PathLike[str],
    params: tree.Params,
    *,
    model: Any = None,
    names: Names | None = None,
    axes: Any = None,
    name: str | None = None,
    revision: str | None = None,
) -> Peft:
    r"""Load an adapter of HF PEFT onto the base that it was trained on. Torch and peft are not needed.

    What the folder holds beside the adapter comes along: a trained head and other `modules_to_save`, biases, rows of tokens. Biases and
    tokens are parts of a chain. The result runs, merges, and is trained on like any other `Peft`, and `jpeft.save_hf` writes it back.

    Args:
      folder: A folder with adapter_config.json and adapter_model.safetensors, or a hub id.
      params: The base.
      model: The model of the base, one of `jpeft.models`: it tells the torch names of its parameters.
      names: For any other model: the torch name of each parameter, as rules ``{regex of a path: torch name}``, of which the first that
        matches the whole path counts, or as a function from the path to the name or None. ``\1`` stands for the first group, and ``*``
        for the number of a layer where layers are stacked.
      axes: With `names`: geometry of kernels with more than two axes, from `jpeft.kernel_axes`.
      name: Of the adapter, where it is in a folder of that name inside `folder`.
      revision: Branch, tag or commit of a repository on the hub.

    Returns:
      A `Peft`.

    Raises:
      ValueError: if there is no such adapter; for a type or an option that is not known; for tensors that are missing, have no place in the
        model, have another shape, or are not finite.

    >>> import tempfile, jax.numpy as jnp, jpeft
    >>> params = {"blocks_0": {"q": {"kernel": jnp.ones((8, 4))}}}
    >>> names = {r"blocks_(\d+)/(\w+)/kernel": r"model.layers.\1.\2.weight"}
    >>> folder = tempfile.mkdtemp() + "/out"
    >>> jpeft.save_hf(folder, jpeft.apply(params, method="lora", rank=2), names=names)
    >>> jpeft.load_hf(folder, params, names=names).adapter["blocks_0"]["q"]["kernel"]["a"].shape
    (8, 2)
    """
    base = base_of(unwrap(params), model=model, names=names, axes=axes)
    found = find_adapter(folder, name=name, revision=revision)
    content = read_content(found)
    form = format_of(content.get("peft_type"), found / CONFIG)
    config = checked(found / CONFIG, content, COMMON | dict(form.keys), form.peft_type)
    return _load(form, config, base, Tensors(found))


def _load(form: Format, config: Config, base: Base, tensors: Tensors) -> Peft:
    form.check(config, base)
    modules = [site.module for site in base.sites.values()]
    way = tensors.way(modules, base.body)
    rename = lambda module: unshifted(module, way) if way else module
    shapes = tensors.shapes(way)
    whole.check_tied_head(shapes, base, tensors.file)
    config, aliases = form.prepare(config, base, shapes)
    targets = form.targets(config, base, rename)
    saved = whole.saved_sites(config, base) if form.saves_modules else []
    biases = whole.bias_sites(config, base, targets, saved)
    tokens = whole.token_sites(config, base)
    tied = whole.tied_copy(config, base, saved)
    if not (form.follows_ties or form.splits_ties):
        whole.check_tied_target(targets, base, str(config.file))
    expected = form.expected(config, base, targets, rename)
    expected |= {site.name: site.shape for site in [*saved, *biases]}
    expected |= {tied: base.word.shape} if tied is not None and base.word is not None else {}
    expected |= {name: (len(ids), site.outputs) for name, (site, ids) in tokens.items()}
    spare = [name for name in tensors.match(expected, way, aliases | dict(base.second_names)) if not _is_of_base(name, tensors, base, way)]
    check_tensors(tensors, expected, spare)
    if tied is not None and base.word is not None and not np.array_equal(tensors.read(tied), tensors.read(base.word.name)):
        raise config.error(
            f"modules_to_save holds '{base.word.name}' and '{tied}' with different numbers, and the model ties the two. {whole.UNTIE}."
        )

    head = whole.head_option(saved, base)
    file = File(config, base, tensors.read, rename, head)
    method, leaves = form.load(file, targets)
    if (trained := training.read(tensors.file.parent)) is not None:
        method, leaves = trained[0].replace(head=head), trained[1]
    leaves = leaves | whole.leaves_of(saved, tensors.read)
    parts: dict[str, tuple[Method, Mapping[str, Any]]] = {method.name: (method, leaves)}
    values = {site.name: tensors.read(site.name) for site in biases}
    if values:
        changed = [base.sites[name] for name in values]
        parts["bitfit"] = (whole.bias_part(changed, base, config.get("bias", "none")), whole.leaves_of(changed, values.__getitem__))
    parts |= whole.token_parts(tokens, base, tensors.read)
    return _peft(base, parts, config)


def _is_of_base(name: str, tensors: Tensors, base: Base, way: str) -> bool:
    """Whether a tensor that was not asked for is the base's own, as HF PEFT adds embeddings whose size was changed.

    Raises:
      ValueError: if it has the name of one, but other numbers.
    """
    known = next((found for one in candidates(name) for found in (shifted(one, way), one) if found in base.sites), None)
    if known is None:
        return False
    own, there = base.tensor(base.sites[known]), tensors.read_raw(name)
    dtype = tensors.dtype(name)
    if own.shape == there.shape and np.array_equal(own.astype(dtype), there.astype(dtype)):
        return True
    what = f"has shape {there.shape} there and {own.shape} in the base" if own.shape != there.shape else "differs from that of the base"
    raise ValueError(
        f"{tensors.file} holds '{known}', a parameter of the base that is neither adapted nor in modules_to_save, and it {what}: the "
        "adapter was trained on another base. Load that base, with its own embeddings."
    )


def _peft(base: Base, parts: Mapping[str, tuple[Method, Mapping[str, Any]]], config: Config) -> Peft:
    """The parts as one `Peft`."""
    made = {name: tree.unflatten({path: jnp.array(leaf) for path, leaf in leaves.items()}) for name, (_, leaves) in parts.items()}
    if len(parts) == 1:
        ((name, (method, _)),) = parts.items()
        adapter = made[name]
    else:
        method, adapter = chain(**{name: method for name, (method, _) in parts.items()}), made
    shapes = lambda tree_: {path: tuple(leaf.shape) for path, leaf in tree.flatten(tree_).items()}
    try:
        expected, found = shapes(method.expected(base.params, adapter)), shapes(adapter)
    except ValueError as error:
        raise config.error(f"the adapter does not fit these parameters: {error}") from error
    if expected != found:
        differ = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
        raise config.error(f"the adapter does not fit these parameters: {tree.first_few(differ)}.")
    return Peft(base.params, adapter, method)

"""Writes a model as a Hugging Face folder."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn

from jpeft.checkpoint.files import replace_folder, use_umask
from jpeft.checkpoint.temporary import Temporary
from jpeft.extras import explained
from jpeft.models import families
from jpeft.models.checkpoints.folder import config_class
from jpeft.models.checkpoints.layout import Entry, checkpoint_layout
from jpeft.models.checkpoints.shards import LARGEST_FILE, check_size, write_tensors
from jpeft.tree.paths import flatten


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    params: Mapping[str, Any],
    *,
    labels: Sequence[str] | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: int | str = LARGEST_FILE,
) -> None:
    """Write a Hugging Face folder: config.json, model.safetensors and, if given, the tokenizer.

    The torch classes of `transformers` open the folder with `from_pretrained`, and `load` reads it back. The folder appears when it is
    complete. If saving fails, an older folder of that name is left as it was.

    Args:
      folder: the folder to create.
      model: the model that `params` belong to.
      params: plain parameters, without the adapter of a method (`jpeft.merge` returns such parameters).
      labels: names of the classes, for the configuration.
      tokenizer: any object with `save_pretrained`.
      overwrite: replace an existing model folder.
      max_shard_size: the largest file of weights, in bytes or as "5GB" (KB, MB, GB or TB). A larger model is written into several files
        with an index, model.safetensors.index.json; each file is copied from the parameters on its own.

    Raises:
      ValueError: if `params` are not those of `model`, the number of labels is not that of the head's outputs, `folder` exists, or
        `max_shard_size` is no size.
    """
    with explained():  # said before anything else
        import safetensors  # noqa: F401

    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists; pass overwrite=True to replace it.")
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} exists and is not a model folder (it has no config.json), so it is not replaced.")
    # Check everything before the first file is written.
    layout = checkpoint_layout(model)
    leaves = flatten(params)
    _check_params(layout, leaves)
    config = _make_hf_config(model, labels)
    size = check_size(max_shard_size)

    # Write into a folder beside it and rename that at the end: a rename is atomic, so no half-written folder is ever seen.
    temporary = Temporary(folder)
    try:
        partial = temporary.make_folder()
        write_tensors(partial, layout, leaves, _second_names(model, layout), size)
        config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        use_umask(partial)
        replace_folder(partial, folder, overwrite=overwrite)
    finally:
        temporary.remove()


def _second_names(model: nn.Module, layout: Sequence[Entry]) -> dict[str, str]:
    """Return the names of tensors by their second names, under which torch reads them where nothing ties the two."""
    config: Any = model.config  # pyright: ignore[reportAttributeAccessIssue]
    if getattr(config, "tie_word_embeddings", True):
        return {}
    pairs = families.family_of(config.model_type).names.second_names
    names = [name for entry in layout for name in entry.names]
    seconds = {re.sub(pattern, replacement, name): name for pattern, replacement in pairs for name in names}
    return {second: name for second, name in seconds.items() if second != name}


def _check_params(layout: list[Entry], leaves: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the leaves are exactly the parameters of the layout."""
    shapes = {entry.path: entry.shape for entry in layout}
    missing, extra = sorted(shapes.keys() - leaves.keys()), sorted(leaves.keys() - shapes.keys())
    if missing or extra:
        raise ValueError(
            "These are not the model's plain parameters (the tree inside {'params': ...}, merged): "
            f"missing {missing[:4] or 'nothing'}, not in the model {extra[:4] or 'nothing'}."
        )
    for path, shape in shapes.items():
        if tuple(leaves[path].shape) != shape:
            raise ValueError(f"{path} has shape {tuple(leaves[path].shape)}, the model needs {shape}.")


def _make_hf_config(model: nn.Module, labels: Sequence[str] | None) -> Any:
    """Return the configuration of `transformers` for a model."""
    model_type = model.config.model_type
    family = families.family_of(model_type)
    described = family.task_model(model)
    fields = model.config.to_hf()
    if described.has_labels:
        count = model.num_labels
        labels = tuple(labels) if labels is not None else tuple(f"LABEL_{i}" for i in range(count))
        if len(labels) != count:
            raise ValueError(f"{len(labels)} labels ({', '.join(labels)}), but the head has {count} outputs.")
        fields |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    fields |= {"architectures": [family.hf_classes[model_type] + described.hf_suffix], "dtype": model.config.param_dtype.name}
    return config_class(model_type)(**fields)

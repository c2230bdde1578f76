"""Pretrained models in and out of Hugging Face folders: config.json, safetensors, tokenizer.

Torch is not needed; `transformers` is imported where it is used, for configurations and tokenizers alone.
"""

import dataclasses
import functools
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jpeft import distributed
from jpeft.checkpoint.files import replace_folder
from jpeft.models import families
from jpeft.models.bert_config import BertConfig
from jpeft.models.decoder_config import DecoderConfig
from jpeft.models.weights import HEAD, POOLER, Entry, Tensors, checkpoint_layout, read_json
from jpeft.sharding import Rules, place
from jpeft.tree.paths import flatten, unflatten

# Read when transformers is imported, which otherwise advises to install torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# --- reading ---


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A pretrained model; what `load` returns."""

    model: nn.Module
    params: dict[str, Any]  # the tree inside {"params": ...}
    labels: tuple[str, ...]  # of a classification head, in the order of its outputs; else empty
    new: frozenset[str]  # paths of parameters the checkpoint lacks, freshly initialised
    unused: frozenset[str]  # names of tensors the model has no place for
    folder: Path  # the local folder everything was read from

    @property
    def config(self) -> BertConfig | DecoderConfig:
        """The model's configuration."""
        return self.model.config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, read when first asked for; ValueError if there is none."""
        if not any((self.folder / name).exists() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
            raise ValueError(f"{self.folder} holds no tokenizer (tokenizer.json, vocab.txt or vocab.json)")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)


def load(
    path: str | os.PathLike[str],
    *,
    task: str = "sequence-classification",
    labels: Sequence[str] | None = None,
    num_labels: int | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: bool | Literal["dots"] = False,
    scan: bool = False,
    fresh_head: bool = False,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Loaded:
    """A model with the weights of a local folder or of a repository on the Hugging Face hub.

    Args:
      path: a folder with config.json and model.safetensors (or its shards and their index), or a hub id.
      task: "encoder", "sequence-classification", "token-classification" or "masked-lm" for an encoder, "decoder" (without a
        head) or "causal-lm" for a decoder; "language-model" for the one of "masked-lm" and "causal-lm" that the model is.
      labels: names of the classes; those of the checkpoint's configuration if None.
      num_labels: instead of `labels`, if they have no names.
      dtype: of the computation.
      param_dtype: of the parameters, whatever the checkpoint's.
      remat: recompute each block in the backward pass; "dots" stores the products of matrices, and recomputes what lies between them.
      scan: stack the layers' parameters and trace one block.
      fresh_head: initialise the head anew although the checkpoint has one.
      key: for what is freshly initialised; `jax.random.key(0)` if None.
      mesh: put the parameters on these devices (`jpeft.sharding.make_mesh`). Each process reads its own devices' parts alone and holds one
        of them at a time, so no host needs room for the model.
      rules: how they are split over it; the family's own (`partition_rules`) if None.

    Returns:
      A `Loaded`. Its `new` lists what the checkpoint lacked, its `unused` what the model has no place for.

    Raises:
      ValueError: if the folder, its configuration or its weights are missing, unsupported, damaged or of other shapes,
        or the labels are not known; for rules without a mesh.

    >>> loaded = load("distilbert-base-cased", labels=("no", "yes"), scan=True)  # doctest: +SKIP
    """
    if task not in families.TASKS:
        raise ValueError(f"unknown task {task!r}; there are {', '.join(families.TASKS)}")
    folder = _folder(path)
    raw, hf_config = _read_config(folder, task)
    family = families.of(hf_config.model_type)
    task = family.language_model if task == families.LANGUAGE_MODEL else task
    config = family.config.from_hf(hf_config, dtype=dtype, param_dtype=param_dtype, remat=remat, scan=scan)
    if rules is not None and mesh is None:
        raise ValueError("rules= say how parameters are split over a mesh: pass mesh= too")
    if task == "masked-lm" and not getattr(hf_config, "tie_word_embeddings", True):
        raise ValueError(f"{folder / 'config.json'} has tie_word_embeddings=false; only a tied decoder is supported")

    classify = task.endswith("classification")
    known = {"id2label", "num_labels", "_num_labels"} & raw.keys()
    names = _labels(labels, num_labels, hf_config.id2label if known else None) if classify else ()
    # A configuration of two unnamed labels, the default, is written without them.
    cls: Any = family.tasks[task][0]
    model = cls(config, len(names) or hf_config.num_labels) if classify else cls(config)

    stored = Tensors(folder, config.model_type)
    split = family.partition if rules is None else rules
    where = None if mesh is None else lambda entry: NamedSharding(mesh, place(entry.path, entry.shape, mesh, split).spec)
    params, new = _read_params(model, stored, fresh_head, jax.random.key(0) if key is None else key, where)
    if classify and not names:
        if any(HEAD.fullmatch(name) for name in new):
            raise ValueError(f"{folder} names no labels and has no {task} head: pass labels=(...) or num_labels=")
        names = tuple(hf_config.id2label[i] for i in range(hf_config.num_labels))
    return Loaded(model, params, names, frozenset(new), stored.unused(tied=task.endswith("-lm")), folder)


_WEIGHTS = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
_NEEDED = [*_WEIGHTS, "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]


def _folder(path: str | os.PathLike[str]) -> Path:
    """The local folder: `path` itself, or a download of what a model needs from the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file; give the folder that holds config.json and model.safetensors")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
        raise ValueError(f"there is no folder {path}, and it does not look like a hub id ('name' or 'owner/name')")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=_NEEDED))
    except (OSError, ValueError) as error:  # the hub's own errors are kinds of these
        raise ValueError(f"there is no folder {path}, and the hub did not give it either: {error}") from error


def _read_config(folder: Path, task: str) -> tuple[dict[str, Any], Any]:
    """config.json as it stands, and as a configuration of `transformers`."""
    file = folder / "config.json"
    raw = read_json(file, f"{folder} has no config.json: not a Hugging Face model folder")
    supported = families.model_types(task)
    if raw.get("model_type") not in supported:
        raise ValueError(f"{file}: model_type {raw.get('model_type')!r}; supported: {', '.join(supported)}, for the task {task!r}")
    from transformers import AutoConfig

    try:
        return raw, AutoConfig.from_pretrained(folder)
    except Exception as error:  # the validation of `transformers` raises types of its own
        raise ValueError(f"{file}: {error}") from error


def _labels(labels: Sequence[str] | None, num_labels: int | None, stored: Mapping[int, str] | None) -> tuple[str, ...]:
    """The caller's labels, or the checkpoint's (where they are as many as asked for); empty if neither has any."""
    if labels is not None:
        if isinstance(labels, str) or len(set(labels)) != len(labels) or not labels:
            raise ValueError(f"labels must be distinct names, at least one, not {labels!r}")
        if num_labels not in (None, len(labels)):
            raise ValueError(f"num_labels={num_labels}, but there are {len(labels)} labels: {', '.join(labels)}")
        return tuple(labels)
    if num_labels is not None and num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, not {num_labels}")
    if stored is not None and num_labels in (None, len(stored)):
        return tuple(stored[i] for i in range(len(stored)))
    return tuple(f"LABEL_{i}" for i in range(num_labels or 0))


Where = Callable[[Entry], NamedSharding]


def _read_params(
    model: nn.Module, stored: Tensors, fresh_head: bool, key: jax.Array, where: Where | None
) -> tuple[dict[str, Any], list[str]]:
    """All parameters, and the paths of those that are freshly initialised."""
    params, new, missing = {}, [], []
    for entry in checkpoint_layout(model):
        head, pooler = HEAD.fullmatch(entry.path), POOLER.fullmatch(entry.path)
        absent = [name for name in entry.names if name not in stored]
        if (head and fresh_head) or ((head or pooler) and absent):
            made = _fresh(entry, model.config, key)
            params[entry.path] = made if where is None else distributed.place(made, where(entry))
            new.append(entry.path)
        elif absent:
            missing += absent
        elif where is None:
            params[entry.path] = jnp.asarray(entry.join([stored.read(name, entry.tensor_shape) for name in entry.names]))
        else:
            params[entry.path] = _read_shards(entry, stored, where(entry))
    if missing:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors of the {model.config.model_type} body: {shown}")
    return unflatten(params), new


def _read_shards(entry: Entry, stored: Tensors, sharding: NamedSharding) -> jax.Array:
    """A parameter on its mesh. Each part that this process's devices hold is read once, and dropped when it is on them."""
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(entry.shape).items():
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index or (), entry.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        names, part = entry.within(tuple(slice(*bound) for bound in bounds))
        read = entry.join([stored.read(name, entry.tensor_shape, part) for name in names])
        shards += [jax.device_put(read, device) for device in devices]
    return jax.make_array_from_single_device_arrays(entry.shape, sharding, shards)


def _fresh(entry: Entry, config: BertConfig | DecoderConfig, key: jax.Array) -> jax.Array:
    """Hugging Face's initialisation: kernels N(0, initializer_range²), LayerNorm scales 1, biases 0."""
    last = entry.path.rsplit("/", 1)[-1]
    if last == "kernel":
        # A key of its own for each path, so that one head's numbers do not depend on what else is missing.
        key = jax.random.fold_in(key, zlib.crc32(entry.path.encode()))
        return config.initializer_range * jax.random.normal(key, entry.shape, entry.dtype)
    return jnp.full(entry.shape, 1 if last == "scale" else 0, entry.dtype)


# --- writing ---


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    params: Mapping[str, Any],
    *,
    labels: Sequence[str] | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a Hugging Face folder: config.json, model.safetensors and, if given, the tokenizer.

    `transformers`' torch classes open it with `from_pretrained`, and `load` reads it back. The folder appears when it
    is complete, or not at all.

    Args:
      folder: to be created.
      model: the model `params` belong to.
      params: plain parameters, without a method's additions (`jpeft.merge` gives them).
      labels: names of the classes, for the configuration.
      tokenizer: anything with `save_pretrained`.
      overwrite: replace an existing model folder.

    Raises:
      ValueError: if `params` are not those of `model`, the number of labels is not the head's, or `folder` exists.
    """
    from safetensors.numpy import save_file

    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists; pass overwrite=True to replace it")
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} exists and is not a model folder (no config.json); it will not be replaced")
    layout = checkpoint_layout(model)
    leaves = flatten(params)
    _check_params(layout, leaves)
    config = _hf_config(model, labels)

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir()
        tensors = {name: tensor for entry in layout for name, tensor in entry.split(leaves[entry.path]).items()}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_params(layout: list[Entry], leaves: Mapping[str, Any]) -> None:
    wanted = {entry.path: entry.shape for entry in layout}
    missing, extra = sorted(wanted.keys() - leaves.keys()), sorted(leaves.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            "these are not the model's plain parameters (the tree inside {'params': ...}, merged): "
            f"missing {missing[:4] or 'nothing'}, not in the model {extra[:4] or 'nothing'}"
        )
    for path, shape in wanted.items():
        if tuple(leaves[path].shape) != shape:
            raise ValueError(f"{path} has shape {tuple(leaves[path].shape)}, the model needs {shape}")


def _hf_config(model: nn.Module, labels: Sequence[str] | None) -> Any:
    from transformers import AutoConfig

    family, model_type = families.of(model.config.model_type), model.config.model_type
    kind = next(suffix for cls, suffix in family.tasks.values() if isinstance(model, cls))
    count = getattr(model, "num_labels", 0)
    fields = model.config.to_hf()
    if count:
        labels = tuple(labels) if labels is not None else tuple(f"LABEL_{i}" for i in range(count))
        if len(labels) != count:
            raise ValueError(f"{len(labels)} labels ({', '.join(labels)}), but the head has {count} outputs")
        fields |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    fields |= {"architectures": [family.names[model_type] + kind], "dtype": model.config.param_dtype.name}
    return AutoConfig.for_model(model_type, **fields)

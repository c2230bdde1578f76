"""Reads a model from a Hugging Face folder, onto the devices of a mesh if asked."""

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jpeft import distributed
from jpeft.deprecation import renamed_fields
from jpeft.models import families
from jpeft.models.checkpoints.added_tokens import add_tokens as with_tokens
from jpeft.models.checkpoints.folder import find_folder, import_transformers, read_config
from jpeft.models.checkpoints.layout import Entry, checkpoint_layout
from jpeft.models.checkpoints.tensors import Tensors
from jpeft.models.common.config import ModelConfig
from jpeft.sharding import Rules, place
from jpeft.tree.paths import unflatten


@renamed_fields(new="initialised")
@dataclasses.dataclass(frozen=True)
class Loaded:
    """A pretrained model, as `load` returns it."""

    model: nn.Module
    params: dict[str, Any]  # the tree inside {"params": ...}
    labels: tuple[str, ...]  # of a head with labels, in the order of its outputs; else empty
    initialised: frozenset[str]  # paths of parameters that the checkpoint lacks, so that they are freshly initialised
    unused: frozenset[str]  # names of tensors that the model does not have
    folder: Path  # the local folder that everything was read from
    # The tokens that `load(add_tokens=...)` gave rows to, with their ids. These rows are to be trained.
    added: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, read on first use.

        Raises:
          ValueError: if the folder has none.
        """
        if not any((self.folder / name).exists() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
            raise ValueError(f"{self.folder} holds no tokenizer (tokenizer.json, vocab.txt or vocab.json).")
        return import_transformers().AutoTokenizer.from_pretrained(self.folder)


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
    add_tokens: Sequence[str] = (),
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Loaded:
    """Return a model with the weights of a local folder or of a repository on the Hugging Face hub.

    Args:
      path: a folder with config.json and model.safetensors (or its shards and their index), or a hub id.
      task: "encoder", "sequence-classification", "token-classification" or "masked-lm" for an encoder; "decoder" (without a head) or
        "causal-lm" for a decoder; "language-model" for "masked-lm" or "causal-lm", whichever the family has.
      labels: names of the classes; None for those in the checkpoint's configuration.
      num_labels: number of classes, instead of `labels`, if they have no names.
      dtype: of the computation.
      param_dtype: of the parameters, whatever the checkpoint's dtype is.
      remat: recompute each block in the backward pass; "dots" stores the results of matrix products and recomputes the rest.
      scan: stack the parameters of the blocks and trace one block.
      fresh_head: initialise the head anew even if the checkpoint has one.
      add_tokens: tokens that the model does not have, such as ("<ENT>",): they are added to the tokenizer, and as rows to the embedding
        (and to the head of a language model). A row begins as the mean of the checkpoint's rows; `jpeft.trainable_tokens` trains it.
      key: for parameters that are freshly initialised; None for `jax.random.key(0)`.
      mesh: put the parameters on these devices (`jpeft.sharding.make_mesh`). Each process reads only the parts that its own devices hold,
        one parameter at a time, so no host needs memory for the whole model.
      rules: how the parameters are split over the mesh; None for the family's own (`partition_rules`).

    Returns:
      A `Loaded`. Its `initialised` lists the parameters that the checkpoint lacks, its `unused` the tensors that the model does not have.

    Raises:
      ValueError: if the folder, its configuration or its weights are missing, unsupported, damaged or of other shapes; if the labels are
        not known; if rules are given without a mesh; for tokens that cannot be added.

    >>> loaded = load("distilbert-base-cased", labels=("no", "yes"), scan=True)  # doctest: +SKIP
    """
    if task not in families.tasks():
        raise ValueError(f"Unknown task {task!r}; there are {', '.join(families.tasks())}.")
    if rules is not None and mesh is None:
        raise ValueError("rules= say how parameters are split over a mesh: pass mesh= too.")
    folder = find_folder(path)
    content, hf_config = read_config(folder, task)
    family = families.family_of(hf_config.model_type)
    described = family.models[families.resolve_task(family, task) or task]
    config = family.config.from_hf(hf_config, dtype=dtype, param_dtype=param_dtype, remat=remat, scan=scan)
    if described.requires_tied_head and not getattr(hf_config, "tie_word_embeddings", True):
        raise ValueError(f"{folder / 'config.json'} has tie_word_embeddings=false; only a tied decoder is supported.")

    known = {"id2label", "num_labels", "_num_labels"} & content.keys()
    names = _choose_labels(labels, num_labels, hf_config.id2label if known else None) if described.has_labels else ()
    # `transformers` writes the default, two unnamed labels, by leaving them out.
    cls: Any = described.module
    model = cls(config, len(names) or hf_config.num_labels) if described.has_labels else cls(config)

    tensors = Tensors(folder, config.model_type)
    split = family.partition if rules is None else rules
    shard = None if mesh is None else lambda entry: NamedSharding(mesh, place(entry.path, entry.shape, mesh, split).spec)
    params, initialised = _read_params(model, tensors, fresh_head, jax.random.key(0) if key is None else key, shard)
    if described.has_labels and not names:
        if any(family.roles.matches("head", path) for path in initialised):
            raise ValueError(f"{folder} names no labels and has no {task} head: pass labels=(...) or num_labels=.")
        names = tuple(hf_config.id2label[i] for i in range(hf_config.num_labels))
    loaded = Loaded(model, params, names, frozenset(initialised), tensors.unused(scores_words=described.scores_words), folder)
    return with_tokens(loaded, add_tokens, mesh, split) if add_tokens else loaded


def _choose_labels(labels: Sequence[str] | None, num_labels: int | None, stored: Mapping[int, str] | None) -> tuple[str, ...]:
    """Return the caller's labels, else the checkpoint's if they are as many as asked for, else numbered ones; () if none are known."""
    if labels is not None:
        if isinstance(labels, str) or len(set(labels)) != len(labels) or not labels:
            raise ValueError(f"labels must be distinct names, at least one, not {labels!r}.")
        if num_labels not in (None, len(labels)):
            raise ValueError(f"num_labels={num_labels}, but there are {len(labels)} labels: {', '.join(labels)}.")
        return tuple(labels)
    if num_labels is not None and num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, not {num_labels}.")
    if stored is not None and num_labels in (None, len(stored)):
        return tuple(stored[i] for i in range(len(stored)))
    return tuple(f"LABEL_{i}" for i in range(num_labels or 0))


Shard = Callable[[Entry], NamedSharding]


def _read_params(
    model: nn.Module, tensors: Tensors, fresh_head: bool, key: jax.Array, shard: Shard | None
) -> tuple[dict[str, Any], list[str]]:
    """Return all parameters, and the paths of those that are freshly initialised."""
    roles = families.family_of(model.config.model_type).roles
    params, initialised, missing = {}, [], []
    for entry in checkpoint_layout(model):
        in_head, in_pooler = roles.matches("head", entry.path), roles.matches("pooler", entry.path)
        absent = [name for name in entry.names if name not in tensors]
        # Every task has its own head, and not every task needs the pooler, so a checkpoint may lack both. It may not lack the body.
        if (in_head and fresh_head) or ((in_head or in_pooler) and absent):
            leaf = _initialise(entry, model.config, key)
            params[entry.path] = leaf if shard is None else distributed.place(leaf, shard(entry))
            initialised.append(entry.path)
        elif absent:
            missing += absent
        elif shard is None:
            params[entry.path] = jnp.asarray(entry.join([tensors.read(name, entry.tensor_shape) for name in entry.names]))
        else:
            params[entry.path] = _read_shards(entry, tensors, shard(entry))
    if missing:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise ValueError(f"The checkpoint lacks {len(missing)} tensors of the {model.config.model_type} body: {shown}.")
    return unflatten(params), initialised


def _read_shards(entry: Entry, tensors: Tensors, sharding: NamedSharding) -> jax.Array:
    """Return a parameter on its mesh.

    Each part that this process's devices hold is read once, even if several devices hold it, and freed once it is on them.
    """
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}  # (start, stop) for each axis of a part -> the devices that hold it
    for device, index in sharding.addressable_devices_indices_map(entry.shape).items():
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index or (), entry.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        names, part = entry.find_part(tuple(slice(*bound) for bound in bounds))
        leaf = entry.join([tensors.read(name, entry.tensor_shape, part) for name in names])
        shards += [jax.device_put(leaf, device) for device in devices]
    return jax.make_array_from_single_device_arrays(entry.shape, sharding, shards)


def _initialise(entry: Entry, config: ModelConfig, key: jax.Array) -> jax.Array:
    """Return a fresh parameter as Hugging Face initialises it: kernels N(0, initializer_range²), scales of norms 1, biases 0."""
    last = entry.path.rsplit("/", 1)[-1]
    if last == "kernel":
        # The key depends on the path, so that the values do not depend on which other parameters are missing.
        key = jax.random.fold_in(key, zlib.crc32(entry.path.encode()))
        return config.initializer_range * jax.random.normal(key, entry.shape, entry.dtype)
    return jnp.full(entry.shape, 1 if last == "scale" else 0, entry.dtype)

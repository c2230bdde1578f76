"""Which tensors of a Hugging Face checkpoint make up which parameter, and how they are found in its files.

Parameter paths are Hugging Face's tensor names with slashes, so one rule, `checkpoint_layout`, serves both directions:
a Linear's weight is (out, in) there and (in, out) here (GPT-2 alone stores most of its kernels as we do), and parameters
of scanned layers are the tensors stacked.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jpeft.models import families
from jpeft.tree.paths import flatten

# Last component of a parameter's path -> last component of the tensor's name.
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}

# What may be missing from a checkpoint: the head, as every task has its own, and the pooler, as not all tasks need it.
HEAD = re.compile(r"(classifier|pre_classifier|cls|lm_head|vocab_\w+)/.*")
POOLER = re.compile(r"(\w+/)?pooler/.*")

# Written into many checkpoints, needed by none.
_BUFFER = re.compile(r".*\.position_ids|h\.\d+\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")

# Copies of the word embedding and of the decoder's bias under a second name.
_TIED = re.compile(r"cls\.predictions\.decoder\.\w+|lm_head\.decoder\.\w+|lm_head\.weight|vocab_projector\.weight")


def abstract_params(model: nn.Module) -> dict[str, Any]:
    """The parameter tree of a model as `jax.ShapeDtypeStruct`s; nothing is computed or allocated.

    >>> from jpeft.models import BertConfig, BertForMaskedLM
    >>> abstract_params(BertForMaskedLM(BertConfig.roberta_base(scan=True)))["lm_head"]["bias"].shape
    (50265,)
    """
    init = functools.partial(model.init, jax.random.key(0))
    return jax.eval_shape(init, jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter and the checkpoint tensors it is made of."""

    path: str  # "bert/pooler/dense/kernel"
    names: tuple[str, ...]  # ("bert.pooler.dense.weight",); one for each layer where layers are stacked
    transposed: bool
    stacked: bool
    shape: tuple[int, ...]  # of the parameter
    dtype: Any

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the checkpoint."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    def within(self, part: tuple[slice, ...]) -> tuple[tuple[str, ...], tuple[slice, ...]]:
        """The tensors that a part of the parameter is made of, and which part of each."""
        names, inner = (self.names[part[0]], part[1:]) if self.stacked else (self.names, part)
        return names, inner[::-1] if self.transposed else inner

    def join(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """The parameter made of these tensors, or a part of it made of their parts."""
        parts = [tensor.T if self.transposed else tensor for tensor in tensors]
        return (np.stack(parts) if self.stacked else parts[0]).astype(self.dtype)

    def split(self, leaf: jax.Array | np.ndarray) -> dict[str, np.ndarray]:
        """The tensors this parameter is made of, by name; inverse of `join`."""
        parts = np.asarray(leaf) if self.stacked else np.asarray(leaf)[None]
        # safetensors writes the underlying buffer whatever the strides: a transposed view would be stored untransposed.
        return {name: np.ascontiguousarray(part.T if self.transposed else part) for name, part in zip(self.names, parts)}


def checkpoint_layout(model: nn.Module) -> list[Entry]:
    """Every parameter of a model with the names of its tensors in a Hugging Face checkpoint.

    >>> from jpeft.models import BertConfig, BertModel
    >>> entry = checkpoint_layout(BertModel(BertConfig(scan=True, num_hidden_layers=2)))[-1]
    >>> entry.path, entry.names
    ('pooler/dense/kernel', ('pooler.dense.weight',))
    """
    entries, family, config = [], families.of(model.config.model_type), model.config
    for path, leaf in flatten(abstract_params(model)).items():
        *modules, last = path.split("/")
        transposed = last == "kernel" and not family.untransposed.fullmatch(path)
        stacked = config.scan and family.blocks in modules
        at = modules.index(family.blocks) + 1 if stacked else 0
        owners = [[*modules[:at], str(i), *modules[at:]] for i in range(config.num_hidden_layers)] if stacked else [modules]
        names = tuple(".".join([*owner, _LEAVES[last]]) for owner in owners)
        entries.append(Entry(path, names, transposed, stacked, leaf.shape, leaf.dtype))
    return entries


def read_json(file: Path, missing: str) -> dict[str, Any]:
    """A JSON object; ValueError with the message `missing` if there is no such file."""
    if not file.is_file():
        raise ValueError(missing)
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


class Tensors:
    """The tensors in a folder's safetensors files, found by name whatever the checkpoint's age or head.

    A bare body is saved without the prefix ("bert.", "transformer.", ...), a model with a head with it; LayerNorm's weight and bias were
    once called gamma and beta.
    """

    def __init__(self, folder: Path, model_type: str):
        self._prefix = f"{families.of(model_type).prefix or model_type}."
        self._files: dict[Path, Any] = {}
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            names: Iterable[tuple[str, Path]] = [(name, single) for name in self._names(single)]
        else:
            missing = f"{folder} has neither model.safetensors nor model.safetensors.index.json"
            shards = read_json(index, missing).get("weight_map", {})
            names = [(name, folder / shard) for name, shard in shards.items()]
        # The name we look for -> the name in the file, and the file.
        self._where = {self._canonical(name): (name, file) for name, file in names}
        self._done: set[str] = set()

    def _canonical(self, name: str) -> str:
        name = name.removeprefix(self._prefix)
        return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))

    def _find(self, name: str) -> str | None:
        name = self._canonical(name)
        # The decoder's bias has two names, of which a file need hold only one.
        second = re.sub(r"^(cls\.predictions|lm_head)\.bias$", r"\1.decoder.bias", name)
        return next((n for n in (name, second) if n in self._where), None)

    def _open(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._files:
            if not file.is_file():
                raise ValueError(f"{file} is missing, though the index beside it names it")
            try:
                self._files[file] = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
        return self._files[file]

    def _names(self, file: Path) -> list[str]:
        return list(self._open(file).keys())

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] | None = None) -> np.ndarray:
        """One tensor, which must have this shape, or a part of it; no more than that is read."""
        canonical = self._find(name)
        assert canonical is not None, f"{name} was not asked for with `in` first"
        stored, file = self._where[canonical]
        opened = self._open(file)
        if stored not in self._names(file):
            raise ValueError(f"{file} does not hold {stored}, though the index beside it says so")
        tensor = opened.get_slice(stored)
        found = tuple(tensor.get_shape())
        if found != shape:
            hint = "; fresh_head=True leaves the checkpoint's head out" if HEAD.fullmatch(name.replace(".", "/")) else ""
            raise ValueError(f"{file}: {stored} has shape {found}, the model needs {shape}{hint}")
        self._done.add(canonical)
        return opened.get_tensor(stored) if part is None else tensor[part]

    def unused(self, *, tied: bool) -> frozenset[str]:
        """Names, as in the files, that nothing has read; without buffers, and without copies where weights are tied."""
        left = self._where.keys() - self._done
        left = {name for name in left if not _BUFFER.fullmatch(name) and not (tied and _TIED.fullmatch(name))}
        return frozenset(self._where[name][0] for name in left)

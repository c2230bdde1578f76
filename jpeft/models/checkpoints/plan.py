"""What will be read of a checkpoint and what will be newly initialised, decided from configuration and headers, before a tensor is read."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jpeft.models import families
from jpeft.models.checkpoints.foreign import check_adapted, check_quantised, find_prefix
from jpeft.models.checkpoints.heads import Choice, Stored, choose_head, read_labels
from jpeft.models.checkpoints.layout import Entry, checkpoint_layout
from jpeft.models.checkpoints.sizes import check_blocks, check_tensors, has_blocks
from jpeft.models.checkpoints.tensors import Tensors
from jpeft.models.common.config import ModelConfig
from jpeft.models.common.family import Family, TaskModel

_DEEP = 12  # blocks of an encoder that are scanned by default


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder whose configuration and headers have been read.

    Attributes:
      folder: the local folder.
      content: of config.json.
      hf_config: the same as a configuration of `transformers`.
      family: the family of its model type.
      config: our configuration.
      tensors: its tensors.
      keeps_dtypes: each parameter has the type of its tensors, whatever the configuration's `param_dtype`, which is that of most of them.
    """

    folder: Path
    content: Mapping[str, Any]
    hf_config: Any
    family: Family
    config: ModelConfig
    tensors: Tensors
    keeps_dtypes: bool = False

    @property
    def config_file(self) -> Path:
        """The path of config.json."""
        return self.folder / "config.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `load` does with a checkpoint.

    Attributes:
      model: the model.
      layout: its parameters, and the tensors that make them up.
      labels: names of its outputs; () for a model without labels.
      fresh: paths of the parameters that are newly initialised.
      rows: of a head with labels: for each label the row of the checkpoint's head; None if the rows stand in the right order.
      remarks: what the user is told.
    """

    model: nn.Module
    layout: Sequence[Entry]
    labels: tuple[str, ...]
    fresh: frozenset[str]
    rows: tuple[int, ...] | None = None
    remarks: tuple[str, ...] = ()

    def rows_of(self, entry: Entry) -> tuple[int, ...] | None:
        """Return the order of the outputs of a parameter, where it is not the checkpoint's."""
        roles = families.family_of(self.model.config.model_type).roles  # pyright: ignore[reportAttributeAccessIssue]
        return self.rows if self.labels and roles.matches("label_head", entry.path) else None


def open_checkpoint(
    folder: Path, content: Mapping[str, Any], hf_config: Any, *, param_dtype: Any, dtype: Any, scan: bool | None, **options: Any
) -> Checkpoint:
    """Read the headers of a checkpoint and check them against its configuration.

    Args:
      folder: the local folder.
      content: of config.json.
      hf_config: the same as a configuration of `transformers`.
      param_dtype: of the parameters; None for the checkpoint's own.
      dtype: of the computation; None for `default_dtype`.
      scan: whether blocks are stacked; None for `scans_by_default`.
      **options: further fields of our configuration that config.json does not have.

    Raises:
      ValueError: if the checkpoint is quantised or damaged, holds an adapter, or has fewer blocks than config.json says.
    """
    family = families.family_of(hf_config.model_type)
    check_quantised(folder, content, ())
    try:
        config = family.config.from_hf(hf_config, **options)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'}: {str(error) or type(error).__name__}") from error
    tensors = Tensors(folder, config.model_type)
    check_quantised(folder, content, tensors.stored)
    check_adapted(folder, tensors.stored)
    if not has_blocks(family, tensors.stored):
        shown = ", ".join(sorted(tensors.stored)[:3])
        raise ValueError(
            f"{folder}: its config.json is that of a {config.model_type} model, and the checkpoint lacks the tensors of such a body; "
            f"it holds {shown or 'none at all'}."
        )
    check_blocks(folder, family, config, tensors.stored)
    stored = tensors.most_common_dtype() or np.dtype(np.float32)
    params = _without_doubles(stored if param_dtype is None else _float("param_dtype", param_dtype))
    config = dataclasses.replace(
        config,
        param_dtype=params,
        dtype=default_dtype(params, jax.default_backend()) if dtype is None else _float("dtype", dtype),
        scan=scans_by_default(family, config) if scan is None else scan,
    )
    return Checkpoint(folder, content, hf_config, family, config, tensors, keeps_dtypes=param_dtype is None)


def default_dtype(param_dtype: Any, platform: str) -> np.dtype[Any]:
    """Return the type of computation that fits parameters and device: bfloat16 for such parameters on an accelerator, else float32.

    A CPU is no faster in bfloat16, and float16 would overflow.

    >>> default_dtype("bfloat16", "gpu"), default_dtype("bfloat16", "cpu")
    (dtype(bfloat16), dtype('float32'))
    """
    return jnp.dtype(jnp.bfloat16 if platform != "cpu" and jnp.dtype(param_dtype) == jnp.bfloat16 else jnp.float32)


def scans_by_default(family: Family, config: ModelConfig) -> bool:
    """Return whether blocks are stacked and scanned where nobody says it: in decoders, and in encoders of 12 blocks or more.

    The program of unrolled blocks, and the time to compile it, grows with their number. A decoder is compiled several times (for training,
    for a prompt, for one more token). An encoder of a few blocks compiles in seconds, and its paths by number are those of the literature.

    >>> from jpeft.models import BertConfig, families
    >>> bert = families.family_of("bert")
    >>> scans_by_default(bert, BertConfig(num_hidden_layers=6)), scans_by_default(bert, BertConfig(num_hidden_layers=12))
    (False, True)
    """
    return family.is_decoder or max(getattr(config, stack.num_layers) for stack in family.stacks) >= _DEEP


def _float(name: str, dtype: Any) -> np.dtype[Any]:
    """Return a type of floats that the caller asked for.

    Raises:
      ValueError: naming the argument, for anything else.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{name}={dtype!r} is no type of floats: give 'float32', 'bfloat16' or 'float16', or None.")
    return found


def _without_doubles(dtype: Any) -> np.dtype[Any]:
    """Return a type as JAX has it: float32 for float64, unless 64 bits are enabled."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def plan_with_labels(
    checkpoint: Checkpoint, described: TaskModel, labels: Sequence[str] | None, num_labels: int | None, *, fresh: bool, keep: bool
) -> Plan:
    """Plan a model whose head has labels.

    Args:
      checkpoint: the folder.
      described: the model of its family.
      labels: names of the classes; None for the checkpoint's own.
      num_labels: their number, if they have no names.
      fresh: initialise a new head in any case.
      keep: keep the checkpoint's head in any case.

    Raises:
      ValueError: if the labels are not known, the head is to be kept and cannot be, or the checkpoint does not fit its configuration.
    """
    stored = read_labels(checkpoint.content, checkpoint.config_file, checkpoint.hf_config.id2label)
    names = _choose_labels(labels, num_labels, stored)
    # `transformers` writes the default, two unnamed labels, by leaving them out.
    module: Any = described.module
    model = module(checkpoint.config, len(names) or checkpoint.hf_config.num_labels)
    layout = _layout(checkpoint, model)
    head = _find_head(checkpoint, described, layout, stored)
    if not names and head.outputs is None:
        raise ValueError(f"{checkpoint.folder} names no labels and has no {_task_of(described)} head: pass labels=(...) or num_labels=.")
    names = names or tuple(f"LABEL_{i}" for i in range(model.num_labels))
    counted = labels is None and num_labels is not None
    choice = choose_head(head, names, given=labels is not None, counted=counted, fresh=fresh, keep=keep)
    return _finish(checkpoint, model, layout, names, choice)


def plan_without_labels(checkpoint: Checkpoint, described: TaskModel, *, untie: bool = False) -> Plan:
    """Plan a model without labels: a body, or a language model.

    config.json may say that the head of a language model is the word embedding, while the file holds two different tensors. The file is
    right then, as in torch.

    Args:
      checkpoint: the folder.
      described: the model of its family.
      untie: read the word embedding a second time, as the head, if the two are one.

    Raises:
      ValueError: if the checkpoint lacks the head, or does not fit its configuration, or the model's head is always tied.
    """
    module: Any = described.module
    config, tensors = checkpoint.config, checkpoint.tensors
    if described.requires_tied_head and not getattr(checkpoint.hf_config, "tie_word_embeddings", True):
        raise ValueError(f"{checkpoint.config_file} has tie_word_embeddings=false; only a tied decoder is supported.")
    model = module(config)
    layout = _layout(checkpoint, model)
    choice = Choice(kept=True)
    if untie and described.requires_tied_head:
        raise ValueError(f"untie=True: the head of a {config.model_type} model is always its word embedding.")
    if described.scores_words and getattr(config, "tie_word_embeddings", False) and (untie or tensors.has_tied_copies()):
        untied: Any = module(dataclasses.replace(config, tie_word_embeddings=False))  # pyright: ignore[reportCallIssue]
        whole = _layout(checkpoint, untied)
        head = [entry for entry in whole if entry.path not in {entry.path for entry in layout}]
        embedding = next(entry for entry in layout if checkpoint.family.roles.matches("embedding", entry.path))
        table = embedding.names[0]
        copies = [name for entry in head for name in entry.names if name in tensors] if table in tensors else []
        if differ := [name for name in copies if not tensors.equal(table, name)]:
            model, layout = untied, whole
            remark = f"config.json ties {differ[0]} to the word embedding, but the file holds another tensor, which is used, as torch does"
            choice = Choice(kept=True, remark=remark)
        elif untie:
            lacking = {entry.path for entry in head if entry.names[0] not in tensors and entry.tensor_shape == embedding.tensor_shape}
            model = untied
            layout = [dataclasses.replace(entry, names=(table,)) if entry.path in lacking else entry for entry in whole]
    return _finish(checkpoint, model, layout, (), choice)


def _layout(checkpoint: Checkpoint, model: nn.Module) -> list[Entry]:
    """Return the layout of a model; it is traced for that, with a short text, which a configuration may have no room for."""
    try:
        return checkpoint_layout(model)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{checkpoint.config_file} makes no model: {' '.join(str(error).split())}") from error


def _finish(checkpoint: Checkpoint, model: Any, layout: Sequence[Entry], labels: tuple[str, ...], choice: Choice) -> Plan:
    """Return the plan, after checking that what it reads is in the checkpoint and has the model's sizes."""
    roles, tensors = checkpoint.family.roles, checkpoint.tensors
    fresh, missing, headless = [], [], []
    for entry in layout:
        in_head, in_pooler = roles.matches("head", entry.path), roles.matches("pooler", entry.path)
        absent = [name for name in entry.names if name not in tensors]
        # Every task has its own head, and not every task needs the pooler, so a checkpoint may lack both. It may not lack the body.
        if (in_head and not choice.kept) or (in_pooler and absent):
            fresh.append(entry.path)
        elif absent:
            (headless if in_head else missing).extend(absent)
    if missing:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        hint = find_prefix(missing, {name: tensors.bare(name) for name in missing}, tensors.stored)
        lacks = f"The checkpoint lacks {len(missing)} tensors of the {model.config.model_type} body: {shown}."
        raise ValueError(f"{checkpoint.folder}: {lacks} {hint}".rstrip())
    if headless:
        raise ValueError(
            f"{checkpoint.folder} is not a language model: it lacks {', '.join(sorted(headless)[:3])}, which predicts words, and a random "
            "one predicts nothing. Give a checkpoint with its language modelling head; or, if its head is the word embedding, write "
            '"tie_word_embeddings": true in its config.json.'
        )
    check_tensors([entry for entry in layout if entry.path not in fresh], tensors)
    remarks = (choice.remark,) if choice.remark else ()
    if checkpoint.keeps_dtypes:
        layout = [entry if entry.path in fresh else dataclasses.replace(entry, dtype=_stored_dtype(entry, tensors)) for entry in layout]
    return Plan(model, layout, labels, frozenset(fresh), choice.rows, remarks)


def _stored_dtype(entry: Entry, tensors: Tensors) -> Any:
    """Return the type of a parameter's tensors; of several types, the one that holds all of their numbers."""
    return _without_doubles(jnp.result_type(*{dtype for name in entry.names if (dtype := tensors.dtype(name)) is not None}))


def _find_head(checkpoint: Checkpoint, described: TaskModel, layout: Sequence[Entry], labels: tuple[str, ...]) -> Stored:
    """Return what the checkpoint has of a head with labels."""
    roles, tensors = checkpoint.family.roles, checkpoint.tensors
    names = [name for entry in layout if roles.matches("head", entry.path) for name in entry.names]
    last = [name for entry in layout if roles.matches("label_head", entry.path) for name in entry.names]
    whole = bool(last) and all(name in tensors for name in names)
    return Stored(tensors.shape(last[0])[0] if whole and tensors.shape(last[0]) else None, labels, _other_task(checkpoint, described))


def _other_task(checkpoint: Checkpoint, described: TaskModel) -> str:
    """Return the class that config.json says the checkpoint was trained as, if that is another one of the family's with labels."""
    classes = checkpoint.content.get("architectures")
    trained = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else ""
    suffixes = [model.hf_suffix for model in checkpoint.family.models.values() if model.has_labels]
    suffix = next((suffix for suffix in suffixes if trained.endswith(suffix)), described.hf_suffix)
    return trained if suffix != described.hf_suffix else ""


def _task_of(described: TaskModel) -> str:
    """Return the name of a task."""
    return next(task for family in families.FAMILIES for task, model in family.models.items() if model is described)


def _choose_labels(labels: Sequence[str] | None, num_labels: int | None, stored: tuple[str, ...]) -> tuple[str, ...]:
    """Return the caller's labels, else the checkpoint's if they are as many as asked for, else numbered ones; () if none are known."""
    if labels is not None:
        if isinstance(labels, str) or len(set(labels)) != len(labels) or not labels:
            raise ValueError(f"labels must be distinct names, at least one, not {labels!r}.")
        if num_labels not in (None, len(labels)):
            raise ValueError(f"num_labels={num_labels}, but there are {len(labels)} labels: {', '.join(labels)}.")
        return tuple(labels)
    if num_labels is not None and num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, not {num_labels}.")
    if stored and num_labels in (None, len(stored)):
        if len(set(stored)) != len(stored):
            raise ValueError(f"The checkpoint's config.json gives two labels one name ({', '.join(stored)}): pass labels=(...).")
        return stored
    return tuple(f"LABEL_{i}" for i in range(num_labels or 0))

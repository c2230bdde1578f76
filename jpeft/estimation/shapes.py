"""Models, adapters and batches as shapes: what a run is made of, without a weight read or an array allocated."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import models
from jpeft.core.method import Method
from jpeft.core.peft import Peft
from jpeft.extras import explained
from jpeft.models import families
from jpeft.models.checkpoints.folder import read_config, read_json
from jpeft.models.checkpoints.plan import default_dtype, scans_by_default
from jpeft.models.common.config import ModelConfig
from jpeft.models.common.family import Family
from jpeft.tasks.registry import TASKS
from jpeft.tasks.task import Batch, Task, find_task


def find_config(model: Any, revision: str | None = None) -> tuple[ModelConfig, Path]:
    """Return the configuration of a model, and the folder that it was read from. Of a model on the hub, config.json alone is downloaded.

    Args:
      model: A folder with a config.json, the file itself, a hub id, or a configuration such as `jpeft.models.LlamaConfig`.
      revision: Branch, tag or commit of the model on the hub.

    Raises:
      ValueError: if there is no such model, or it is of no family that `jpeft.models` has.
    """
    if isinstance(model, ModelConfig):
        return model, Path()
    if not isinstance(model, (str, os.PathLike)):
        kind = type(model).__name__
        raise ValueError(f"model must be a folder, a hub id or a configuration such as jpeft.models.LlamaConfig, not a {kind}.")
    folder = _find_folder(Path(model).expanduser(), str(model), revision)
    # Any task will do that some model of this type has: the fields of the configuration are the same for all.
    task = next((task for task in families.tasks() if _type_of(folder) in families.model_types(task)), families.tasks()[0])
    _, hf_config = read_config(folder, task)
    try:
        return families.family_of(hf_config.model_type).config.from_hf(hf_config), folder
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'}: {str(error) or type(error).__name__}") from error


def find_task_of(config: ModelConfig, name: str | None) -> Task:
    """Return a task that the model can be trained for; by default the first in the list of tasks.

    Raises:
      ValueError: if the family has no model for the task.
    """
    family = families.family_of(config.model_type)
    possible = [each for each in TASKS if families.resolve_task(family, find_task(each).model)]
    chosen = find_task(name or possible[0])
    if families.resolve_task(family, chosen.model) is None:
        raise ValueError(f"A {config.model_type} model has no use for the task {name!r}: it can be trained for {', '.join(possible)}.")
    return chosen


def make_loaded(config: ModelConfig, folder: Path, task: Task, labels: int) -> models.Loaded:
    """Return a model as `jpeft.models.load` does, whose parameters are shapes. Its head with labels counts as newly initialised."""
    family: Family = families.family_of(config.model_type)
    described = family.models[families.resolve_task(family, task.model) or task.model]
    module: Any = described.module
    names = tuple(f"LABEL_{i}" for i in range(labels)) if described.has_labels else ()
    model = module(config, labels) if described.has_labels else module(config)
    try:
        params = models.abstract_params(model)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"The configuration makes no model: {' '.join(str(error).split())}") from error
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    named = ["/".join(str(key.key) for key in keys) for keys, _ in paths]
    fresh = frozenset(path for path in named if described.has_labels and family.roles.matches("head", path))
    return models.Loaded(model, params, names, fresh, frozenset(), folder)


def make_peft(loaded: models.Loaded, method: Method) -> Peft:
    """Return a base with an adapter, as shapes. Where statistics choose the entries that are trained, they are spread evenly."""
    method.check_base(loaded.params)
    return Peft(loaded.params, jax.eval_shape(lambda: method.expected(loaded.params, {})), method)


def later_methods(method: Method) -> list[tuple[str, Method]]:
    """Return the methods of the stages still to come, by the name of the stage; without stages in which nothing but the choice changes."""
    if method.parts:
        parts = dict(method.parts)
        replaced = [(name, stage, later) for name, part in parts.items() for stage, later in later_methods(part)]
        return [(stage, method.replace(methods=tuple((parts | {name: later}).items()))) for name, stage, later in replaced]
    known = {each.stage for each in method.later_stages}
    return [(stage.name, method.replace(stage=stage.name)) for stage in method.stages if stage.name in known]


def make_batch(task: Task, config: ModelConfig, rows: int, max_length: int) -> Batch:
    """Return the shapes of a batch."""
    shapes = task.row_shapes(max_length)
    if "token_type_ids" in task.inputs and getattr(config, "type_vocab_size", 0) > 1:
        shapes |= {"token_type_ids": (max_length,)}
    return {name: jax.ShapeDtypeStruct((rows, *shape), jnp.int32) for name, shape in shapes.items()}


def with_numerics(config: ModelConfig, **given: Any) -> ModelConfig:
    """Return the configuration with the fields that are given, that is, not None."""
    return dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})


def with_usual_numerics(config: ModelConfig, folder: Path, param_dtype: str | None) -> ModelConfig:
    """Return the configuration of a checkpoint as the trainer takes it by default.

    Args:
      config: Of the model.
      folder: With its config.json, which names the dtype of the checkpoint.
      param_dtype: Of the parameters, if another one is asked for.
    """
    content = read_json(folder / "config.json", "")
    stored = content.get("dtype") or content.get("torch_dtype")
    params = param_dtype or (stored if stored in ("bfloat16", "float16") else "float32")
    scan = scans_by_default(families.family_of(config.model_type), config)
    return with_numerics(config, param_dtype=params, dtype=default_dtype(params, jax.default_backend()), scan=scan)


def _find_folder(path: Path, name: str, revision: str | None) -> Path:
    if path.is_dir() or (path.name == "config.json" and path.is_file()):
        if revision is not None:
            raise ValueError(f"{path} is a local folder, which has no revision {revision!r}: revision= is for hub ids.")
        return path if path.is_dir() else path.parent
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"There is no folder {name}, and it does not look like a hub id ('name' or 'owner/name').")
    with explained():
        from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except (OSError, ValueError) as error:  # the errors of huggingface_hub are subclasses of these
        asked = f" (revision {revision})" if revision else ""
        raise ValueError(f"There is no folder {name}, and the hub did not give its config.json{asked} either: {error}") from error


def _type_of(folder: Path) -> str:
    """Return the model type that config.json names; nothing where it cannot be read, which `read_config` says."""
    try:
        return str(read_json(folder / "config.json", "").get("model_type"))
    except ValueError:
        return ""

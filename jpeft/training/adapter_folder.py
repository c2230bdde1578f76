"""Adapters in folders: HF PEFT's, those of the library adapters, jpeft's, and those of runs; to train on, or to predict with."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jpeft
from jpeft import models, registry
from jpeft.checkpoint.adapter import read_record, replaced_paths
from jpeft.checkpoint.files import write_json
from jpeft.core.method import Method
from jpeft.core.peft import Peft
from jpeft.hf_peft.folder import find_adapter
from jpeft.models.checkpoints.folder import read_json
from jpeft.models.checkpoints.notes import unsaid
from jpeft.tasks.task import task_of
from jpeft.training.build import load_base
from jpeft.training.config import TrainConfig
from jpeft.training.evaluate import Evaluator
from jpeft.training.run import Run
from jpeft.training.run_folder import RunFolder
from jpeft.tree.head import HEAD
from jpeft.tree.paths import first_few, flatten, trained_copy, unflatten

CONFIG, RECORD = "adapter_config.json", "jpeft.json"
# The names of the labels: where the library adapters has them. HF PEFT has no place for them, and does not read the file.
HEAD_CONFIG = "head_config.json"

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
_DEFAULT_METHOD, _MAX_LENGTH = _DEFAULTS["method"], _DEFAULTS["max_length"]

# The last layer of a head with labels, as HF PEFT's files and jpeft's name it; its size is the number of labels.
_HEAD_TENSOR = re.compile(r"(^|.*\.)(classifier|score)(\.out_proj)?(\.modules_to_save)?\.weight")
_HEAD_LEAF = re.compile(r"(^|.*/)(classifier|score)(/out_proj)?/kernel")


def open_adapter(path: str | os.PathLike[str], loaded: models.Loaded) -> Peft:
    """Return a model's base with an adapter from a folder, or from the hub in HF PEFT's format.

    Args:
      path: A folder that HF PEFT, the library adapters, `jpeft.save` or `jpeft train` wrote; or a hub id.
      loaded: The base.

    Raises:
      ValueError: if there is none, or it does not fit the base.
    """
    folder = find(path)
    folder = _of_run(folder) or folder
    if (folder / RECORD).is_file():
        return jpeft.load(folder, loaded.params)
    if _is_of_adapters(folder):
        return jpeft.load_adapterhub(folder, loaded.params, model=loaded.model)
    return jpeft.load_hf(folder, loaded.params, model=loaded.model)


def find(path: str | os.PathLike[str]) -> Path:
    """Return the local folder of an adapter or a run, with a download from the hub if there is none.

    Raises:
      ValueError: if there is neither.
    """
    folder = Path(path).expanduser()
    return folder if folder.is_dir() and (folder / "config.json").is_file() else find_adapter(path)


def method_name(peft: Peft) -> str:
    """The name of the method of an adapter in the table of methods: of a chain, its first part's there."""
    parts = [part for _, part in peft.method.parts] or [peft.method]
    return next((part.name for part in parts if part.name in registry.methods()), "lora")


def attach_adapter(config: TrainConfig, loaded: models.Loaded, steps: int) -> Peft:
    """Return the base with the adapter that training begins with.

    What the checkpoint of the base lacks and the adapter does not hold, such as a new head, is trained along.

    Args:
      config: Names the adapter.
      loaded: The base.
      steps: Number of updates of the run, for a method that spreads something over them.

    Raises:
      ValueError: if the adapter is of another method than the configuration asks for, or cannot take what is to be trained along.
    """
    assert config.adapter is not None
    peft = open_adapter(config.adapter, loaded)
    name = method_name(peft)
    if config.method not in (name, _DEFAULT_METHOD):
        raise ValueError(f"The adapter in {config.adapter} is one of {name}, and method={config.method}: leave out `method`.")
    method = peft.method.for_steps(steps)
    if left := loaded.initialised - replaced_paths(peft.params, peft.adapter, peft.method):
        method, adapter = _with_new(method, peft, sorted(left), config)
        return Peft(peft.params, adapter, method)
    return Peft(peft.params, peft.adapter, method)


def held_by(path: str | os.PathLike[str], loaded: models.Loaded) -> frozenset[str]:
    """The parameters of a base that an adapter replaces whole, such as a head that was trained with it."""
    peft = open_adapter(path, loaded)
    return replaced_paths(peft.params, peft.adapter, peft.method)


def _with_new(method: Method, peft: Peft, left: Sequence[str], config: TrainConfig) -> tuple[Method, Any]:
    """The method and the adapter with parameters that the checkpoint lacks, trained whole as a head is."""
    own: Any = method
    if method.parts or not hasattr(own, "head"):
        raise ValueError(
            f"The checkpoint {config.model} lacks {first_few(left, 3)}, and the adapter in {config.adapter} neither holds them nor can "
            "train them along: take a base that has them."
        )
    others = [path for path in left if not re.fullmatch(HEAD, path)]
    begins = HEAD if own.head == "auto" or own.head is None else f"{own.head}|{HEAD}"
    method = own.replace(head="auto" if not others and own.head in ("auto", None) else "|".join([begins, *map(re.escape, others)]))
    base, leaves = flatten(peft.params), flatten(peft.adapter)
    return method, unflatten(leaves | {path: trained_copy(base[path]) for path in flatten(base) if path in left})


# --- labels ----------------------------------------------------------------------------------------------------------------------------


def order_labels(config: TrainConfig, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the labels of data in the order of the adapter's head, where adapter or base name them; else as they are."""
    assert config.adapter is not None
    known = adapter_labels(config.adapter) or _labels_of_base(config)
    return known if set(known) == set(labels) and len(known) == len(labels) else labels


def adapter_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the outputs of an adapter's head; empty if nothing beside the adapter tells them."""
    folder = find(path)
    if (run := _of_run(folder)) is not None:
        return tuple(RunFolder(run.parent).read_config()["labels"])
    file = folder / HEAD_CONFIG
    if not file.is_file():
        return ()
    about = read_json(file, "")
    inner = about.get("config")
    numbered = (inner.get("label2id") if isinstance(inner, dict) else None) or about.get("label2id")
    if not isinstance(numbered, dict) or sorted(map(str, numbered.values())) != sorted(map(str, range(len(numbered)))):
        return ()
    return tuple(sorted(numbered, key=lambda label: int(numbered[label])))


def write_labels(folder: Path, labels: Sequence[str]) -> None:
    """Write the names of the outputs of a head beside its adapter, where `adapter_labels` finds them."""
    if labels:
        write_json(folder / HEAD_CONFIG, {"label2id": {label: i for i, label in enumerate(labels)}, "num_labels": len(labels)})


def _labels_of_base(config: TrainConfig) -> tuple[str, ...]:
    """The names of the labels in the base's config.json."""
    file = Path(config.model).expanduser() / "config.json"
    names = read_json(file, "").get("id2label") if file.is_file() else None
    if not isinstance(names, dict) or not all(str(i) in names for i in range(len(names))):
        return ()
    return tuple(str(names[str(i)]) for i in range(len(names)))


def count_labels(path: str | os.PathLike[str]) -> int | None:
    """The number of outputs of an adapter's head; None for an adapter without one."""
    folder = find(path)
    folder = _of_run(folder) or folder
    if (folder / RECORD).is_file():
        leaves = read_record(folder)["leaves"]
        return next((shape[-1] for name, (shape, _) in leaves.items() if _HEAD_LEAF.fullmatch(name)), None)
    file = folder / "adapter_model.safetensors"
    shapes = _shapes(file) if file.is_file() else {}
    return next((shape[0] for name, shape in shapes.items() if _HEAD_TENSOR.fullmatch(name) and len(shape) == 2), None)


def _shapes(file: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file; none if it is damaged, which is said where it is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        return {}


# --- to predict with -------------------------------------------------------------------------------------------------------------------


def load_adapter(
    path: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    labels: Sequence[str] = (),
    batch_size: int = 64,
    **settings: Any,
) -> Run:
    """Load a model with an adapter from a folder, to predict as a finished run does.

    Args:
      path: As for `open_adapter`.
      model: Folder or hub id of the base.
      labels: Names of the outputs of the head, in their order; by default those that stand beside the adapter, or of the base.
      batch_size: Most texts that the model answers at once.
      **settings: Fields of `TrainConfig`, such as `task` and the columns of the data.

    Returns:
      A `Run`, whose folder is the adapter's and holds no run.

    Raises:
      ValueError: if base or adapter are not there or do not fit, or the model has a head that nobody has trained.
    """
    about: dict[str, Any] = {"max_length": 1, **settings}
    config = TrainConfig(model=os.fspath(model), data="", output="", adapter=os.fspath(path), **about)
    task, found = task_of(config), find(path)
    names = tuple(labels)
    if "label" in task.columns or "tags" in task.columns:
        names = names or adapter_labels(found) or _labels_for(config, count_labels(found))
    elif names:
        raise ValueError(f"The task {task.name} has no labels: leave out labels={', '.join(names)}.")
    with unsaid():  # what the base lacks is the adapter's, or an error
        loaded = load_base(config, names)
    if "max_length" not in settings:
        config = dataclasses.replace(config, max_length=min(_MAX_LENGTH, loaded.config.max_length))
    peft = jpeft.fold(open_adapter(found, loaded))
    if left := loaded.initialised - replaced_paths(peft.params, peft.adapter, peft.method):
        raise ValueError(
            f"Neither the adapter in {path} nor the checkpoint {model} holds {first_few(sorted(left), 3)}, so nobody has trained it: take "
            "the base that the adapter was trained on."
        )
    evaluator = Evaluator(jpeft.wrap(loaded.model.apply, peft.method), task, batch_size, names)
    return Run(RunFolder(found), config, task, names, loaded, peft, evaluator)


def _labels_for(config: TrainConfig, count: int | None) -> tuple[str, ...]:
    """The names of the labels in the base, if they are as many as the adapter's head has outputs; else numbers."""
    known = _labels_of_base(config)
    if count is None or len(known) == count:
        if not known:
            raise ValueError(f"Neither the adapter in {config.adapter} nor {config.model} names labels: give them with labels=.")
        return known
    return tuple(f"LABEL_{i}" for i in range(count))


# --- folders ---------------------------------------------------------------------------------------------------------------------------


def _of_run(folder: Path) -> Path | None:
    """The folder of a run's adapter, if this is a run."""
    if (folder / CONFIG).is_file() or (folder / RECORD).is_file() or not (folder / "config.json").is_file():
        return None
    RunFolder(folder).read_config()  # says what else it may be
    if not (folder / "adapter").is_dir():
        raise ValueError(f"The run in {folder} is not finished: continue it with --resume.")
    return folder / "adapter"


def _is_of_adapters(folder: Path) -> bool:
    """Whether the library adapters wrote the folder: its configuration names no type of HF PEFT's."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "peft_type" not in content and "config" in content and "model_type" in content

"""The folder of a model: local or from the hub, and its config.json."""

import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from jpeft.extras import explained
from jpeft.models import families

_WEIGHTS = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
_DOWNLOADED = [*_WEIGHTS, "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]


def find_folder(path: str | os.PathLike[str]) -> Path:
    """Return the local folder: `path` itself, or a download of the files that a model needs from the hub.

    Raises:
      ValueError: if there is neither such a folder nor such a repository.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file; give the folder that holds config.json and model.safetensors.")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
        raise ValueError(f"There is no folder {path}, and it does not look like a hub id ('name' or 'owner/name').")
    with explained():
        from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=_DOWNLOADED))
    except (OSError, ValueError) as error:  # the errors of huggingface_hub are subclasses of these
        raise ValueError(f"There is no folder {path}, and the hub did not give it either: {error}") from error


def read_json(file: Path, missing: str) -> dict[str, Any]:
    """Return the JSON object in a file; raise a ValueError with the message `missing` if there is no such file."""
    if not file.is_file():
        raise ValueError(missing)
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object.")
    return content


def read_config(folder: Path, task: str) -> tuple[dict[str, Any], Any]:
    """Return the content of config.json, and the same as a configuration of `transformers`, which has defaults for what it lacks.

    Raises:
      ValueError: if there is no config.json, it is not valid, or no family has its model type and the task.
    """
    file = folder / "config.json"
    content = read_json(file, f"{folder} has no config.json: not a Hugging Face model folder.")
    model_type, supported = content.get("model_type"), families.model_types(task)
    if model_type not in supported:
        raise ValueError(f"{file}: model_type {model_type!r}; supported: {', '.join(supported)}, for the task {task!r}.")
    config = config_class(model_type)
    try:
        return content, config.from_pretrained(folder)
    except Exception as error:  # `transformers` raises errors of many types when it checks a configuration
        raise ValueError(f"{file}: {error}") from error


def config_class(model_type: str) -> Any:
    """Return the configuration class of `transformers` for a model type; a plain one for a type that it does not know."""
    transformers = import_transformers()
    if model_type in transformers.CONFIG_MAPPING:
        return transformers.CONFIG_MAPPING[model_type]
    return type("PlainConfig", (transformers.PretrainedConfig,), {"model_type": model_type})


def import_transformers() -> ModuleType:
    """Return the package `transformers`, without its advice to install torch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # read when the package is imported
    with explained():
        import transformers

    return transformers

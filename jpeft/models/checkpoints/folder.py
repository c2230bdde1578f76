"""The folder of a model: local or from the hub, and its config.json."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jpeft.extras import explained
from jpeft.models import families
from jpeft.models.checkpoints.foreign import check_folder
from jpeft.models.common.checks import LARGEST

_WEIGHTS = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
_TOKENIZER = [
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "spiece.model",
]
# Small files that show that a repository holds something else.
_SIGNS = ["adapter_config.json", "modules.json", "quantize_config.json", "quant_config.json"]
_LARGEST_JSON = 200_000_000  # bytes
_MOST_LABELS = 1_000_000
_MOST_BLOCKS = 10_000
_NEEDED = "config.json and model.safetensors"


def find_folder(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the local folder of a model: `path` itself, or a download of the files that a model needs from the hub.

    Args:
      path: The folder, or a hub id.
      revision: Branch, tag or commit of the repository on the hub; None for its main branch.

    Raises:
      ValueError: if there is neither such a folder nor such a repository, or a revision of a local folder is asked for.
    """
    if Path(path).suffix == ".gguf" and Path(path).expanduser().is_file():
        kind = "a GGUF file (quantised weights of llama.cpp), which jpeft does not read"
        raise ValueError(f"{path} is {kind}; give the folder that holds {_NEEDED}.")
    return fetch_folder(path, revision, files=[*_WEIGHTS, *_TOKENIZER, *_SIGNS], needed=_NEEDED)


def fetch_folder(path: str | os.PathLike[str], revision: str | None, *, files: Sequence[str], needed: str) -> Path:
    """Return a local folder: `path` itself, or a download from the hub.

    Args:
      path: The folder, or a hub id.
      revision: As in `find_folder`.
      files: Names of the files that are downloaded, with ``*`` for any letters.
      needed: What a folder must hold, for the message.

    Raises:
      ValueError: as `find_folder`.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{path} is a local folder, which has no revision {revision!r}: revision= is for hub ids.")
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file; give the folder that holds {needed}.")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
        raise ValueError(f"There is no folder {path}, and it does not look like a hub id ('name' or 'owner/name').")
    if revision is not None and (not isinstance(revision, str) or not revision.strip()):
        raise ValueError(f"revision must be the name of a branch or tag, or a commit, not {revision!r}.")
    with explained():
        from huggingface_hub import snapshot_download

    # Only what was asked for: the hub's main branch is its own default.
    which: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(files), **which))
    except (OSError, ValueError) as error:  # the errors of huggingface_hub are subclasses of these
        asked = f" (revision {revision})" if revision else ""
        raise ValueError(f"There is no folder {path}, and the hub did not give it{asked} either: {error}") from error


def read_json(file: Path, missing: str) -> dict[str, Any]:
    """Return the JSON object in a file; raise a ValueError with the message `missing` if there is no such file."""
    if not file.is_file():
        raise ValueError(missing)
    if (size := file.stat().st_size) > _LARGEST_JSON:
        raise ValueError(f"{file} has {size:,} bytes: no such file of a model is that large.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{file} is not valid JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object.")
    return content


def check_content(file: Path, content: Mapping[str, Any]) -> None:
    """Refuse numbers for which `transformers` would make huge lists when it reads the configuration.

    Raises:
      ValueError: naming the file, the field and its value.
    """
    for name, value in content.items():
        labels, blocks = name in ("num_labels", "_num_labels"), "layer" in name
        if labels and value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_LABELS):
            raise ValueError(f"{file}: {name} must be a whole number from 1 to {_MOST_LABELS}, not {str(value)[:40]}.")
        most = _MOST_BLOCKS if blocks else LARGEST
        if isinstance(value, int) and not -LARGEST <= value <= most:
            shown = str(value) if abs(value) < 10**30 else "a number of more than 30 digits"
            raise ValueError(f"{file}: {name}={shown} is out of range: at most {most}.")
    names = content.get("id2label")
    if names is not None and not isinstance(names, dict):
        raise ValueError(f"{file}: id2label must be an object of numbers and names, not {type(names).__name__}.")


def read_config(folder: Path, task: str) -> tuple[dict[str, Any], Any]:
    """Return the content of config.json, and the same as a configuration of `transformers`, which has defaults for what it lacks.

    Raises:
      ValueError: if there is no config.json, it is not valid, no family has its model type and the task, or the folder is no plain model.
    """
    file = folder / "config.json"
    content = read_json(file, "") if file.is_file() else None
    check_folder(folder, content)
    assert content is not None, "check_folder refuses a folder without a configuration"
    model_type, supported = content.get("model_type"), families.model_types(task)
    if model_type not in supported:
        raise ValueError(f"{file}: model_type {model_type!r:.100}; supported: {', '.join(supported)}, for the task {task!r}.")
    check_content(file, content)
    config = config_class(model_type)
    try:
        return content, config.from_pretrained(folder)
    except Exception as error:  # `transformers` raises errors of many types when it checks a configuration
        # It quotes the value, however long that is.
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file}: {said if len(said) < 400 else said[:400] + '...'}") from error


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

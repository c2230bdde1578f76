"""The folder of an adapter: local, a folder inside it, or from the hub."""

import os
import re
from pathlib import Path
from typing import Any

from jpeft.extras import explained
from jpeft.hf_peft.config import CONFIG

_FILES = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model.bin", "jpeft_training.safetensors")


def find_adapter(path: str | os.PathLike[str], *, name: str | None = None, revision: str | None = None) -> Path:
    """Return the local folder with an adapter's files, downloading them from the hub if there is no such folder.

    HF PEFT writes an adapter with another name than "default" into a folder of that name. It is found if it is the only one.

    Args:
      path: A folder, or a hub id.
      name: The name of the adapter, to choose between several.
      revision: Branch, tag or commit of the repository on the hub.

    Raises:
      ValueError: if there is none, or there are several.
    """
    if name is not None and (not name or Path(name).name != name or name in (".", "..")):
        raise ValueError(f"name={name!r} is no name of an adapter: it must be the name of a folder inside {path}.")
    folder = _local(path, name, revision)
    if name is not None:
        if not (folder / name / CONFIG).is_file():
            raise ValueError(f"{folder} holds no adapter {name!r}: there is no {name}/{CONFIG}.{_there_are(folder)}")
        return folder / name
    if (folder / CONFIG).is_file():
        return folder
    inside = sorted(below.parent for below in folder.glob(f"*/{CONFIG}"))
    if len(inside) > 1:
        raise ValueError(f"{folder} holds several adapters: choose one by name=.{_there_are(folder)}")
    return inside[0] if inside else folder


def _there_are(folder: Path) -> str:
    names = sorted(below.parent.name for below in folder.glob(f"*/{CONFIG}"))
    return f" There are {', '.join(names)}." if names else ""


def _local(path: str | os.PathLike[str], name: str | None, revision: str | None) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{path} is a local folder, which has no revision {revision!r}: revision= is for hub ids.")
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file; give the folder that holds {CONFIG}.")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
        raise ValueError(f"There is no folder {path}, and it does not look like a hub id ('name' or 'owner/name').")
    if revision is not None and (not isinstance(revision, str) or not revision.strip()):
        raise ValueError(f"revision must be the name of a branch or tag, or a commit, not {revision!r}.")
    with explained():
        from huggingface_hub import snapshot_download
    which: dict[str, Any] = {} if revision is None else {"revision": revision}
    files = [*_FILES, *(f"{name or '*'}/{file}" for file in _FILES)]
    try:
        return Path(snapshot_download(str(path), allow_patterns=files, **which))
    except (OSError, ValueError) as error:  # the errors of huggingface_hub are subclasses of these
        asked = f" (revision {revision})" if revision else ""
        raise ValueError(f"There is no folder {path}, and the hub did not give it{asked} either: {error}") from error

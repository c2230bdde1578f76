"""The folder of an adapter: local, a folder inside it, or from the hub."""

import os
from pathlib import Path

from jpeft.hf_peft.config import CONFIG
from jpeft.models.checkpoints.folder import fetch_folder

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
    folder = fetch_folder(path, revision, files=[*_FILES, *(f"{name or '*'}/{file}" for file in _FILES)], needed=CONFIG)
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

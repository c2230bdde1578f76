"""Any path as one that Orbax can use.

Orbax takes brackets, stars and question marks in a path for a pattern and a name that ends in `gs:` for an address, and the library below
it takes only UTF-8. On Linux the folder is
opened and reached by the number of its descriptor, whatever it is called.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import jax

_DESCRIPTORS = Path("/proc/self/fd")


def is_plain(path: str | os.PathLike[str]) -> bool:
    r"""Return whether Orbax can use a path as it is.

    >>> is_plain("/runs/lora rank=4"), is_plain("/runs/lora[1]")
    (True, False)
    """
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return not re.search(r"[][*?\\]|gs:(/|$)", text)


def check_path(path: str | os.PathLike[str]) -> None:
    """Check that checkpoints can be written under a path.

    Raises:
      ValueError: if they cannot.
    """
    if not is_plain(path) and not (_DESCRIPTORS.is_dir() and jax.process_count() == 1):
        raise ValueError(
            f'Checkpoints cannot be written to {os.fspath(path)!r} here: choose a path without any of []*?\\ and "gs:" in it, '
            "whose names are UTF-8."
        )


class PlainPath:
    """A folder under a path that Orbax can use, until it is closed.

    Attributes:
      path: The same folder under a plain path.

    Args:
      folder: A folder that exists.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = os.path.abspath(folder)
        self._descriptor: int | None = None
        self.path = Path(self._folder)
        if not is_plain(self._folder):
            check_path(self._folder)
            self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            self.path = _DESCRIPTORS / str(self._descriptor)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def own_words(self, message: str) -> str:
        """Return a message with the folder's own path instead of the plain one."""
        return message.replace(str(self.path), self._folder)

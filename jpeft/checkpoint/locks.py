"""Locks of open files and folders. They end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import os
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder for this process, without waiting.

    Returns:
      True if it is locked now, False if another process has locked it, None if the system has no such locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None


def is_at(descriptor: int, path: str | os.PathLike[str]) -> bool:
    """Return whether an open file or folder is still the one at `path`."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)

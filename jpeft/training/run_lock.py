"""One writer for a run: its process holds a lock for the run's life.

The lock is on the file `lock` in the run's folder, which names its process. The system ends it with the process, however that ends; the
file may then stay, and the next process takes it over. A run that ends removes it.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from jpeft.checkpoint.locks import is_at, try_lock

LOCK = "lock"


class RunInUseError(ValueError):
    """Another process trains this run."""


class RunLock:
    """The lock of a run's folder; nothing is locked before `acquire`.

    Args:
      folder: The folder of the run. It and the folders above it are created with the lock, and removed with it if they are still empty.

    >>> import tempfile
    >>> lock = RunLock(tempfile.mkdtemp())
    >>> lock.acquire()
    >>> RunLock(lock.folder).acquire()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    jpeft.training.run_lock.RunInUseError: The run in ... is in use by process ... on ...: wait until it ends, or stop it.
    >>> lock.release()
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._descriptor: int | None = None
        self._created: list[Path] = []

    def acquire(self) -> None:
        """Lock the folder for this process, without waiting.

        Raises:
          RunInUseError: if another process has locked it, which is named.
          ValueError: if the folder cannot be created or written.
        """
        try:
            self._create_folders()
            while self._descriptor is None:
                self._descriptor = self._open()
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
        except OSError as error:
            self.release()
            reason = f"{error.strerror or error}: {error.filename or self.folder}"
            raise ValueError(f"The output folder {self.folder} cannot be written: {reason}.") from error

    def move_to(self, folder: Path) -> None:
        """Hold the lock in a new folder instead, which is about to take the place of the old one; the old one's file stays with it."""
        new = RunLock(folder)
        new.acquire()
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._created = new._descriptor, []

    def release(self) -> None:
        """End the lock and remove its file; do nothing if it is not held."""
        if self._descriptor is not None:
            path = self.folder / LOCK
            if is_at(self._descriptor, path):
                path.unlink()
            os.close(self._descriptor)
            self._descriptor = None
        for folder in reversed(self._created):
            try:
                folder.rmdir()
            except OSError:  # it is used by now
                break
        self._created = []

    def _create_folders(self) -> None:
        missing = [folder for folder in (self.folder, *self.folder.parents) if not os.path.lexists(folder)]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._created.append(folder)

    def _open(self) -> int | None:
        """Return the descriptor of the locked file; None if another process has removed the file in between."""
        path = self.folder / LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        if try_lock(descriptor) is False:
            holder = os.read(descriptor, 300).decode(errors="replace").split()
            os.close(descriptor)
            process, host = (*holder, "?", "?")[:2]
            self.release()
            raise RunInUseError(f"The run in {self.folder} is in use by process {process} on {host}: wait until it ends, or stop it.")
        if is_at(descriptor, path):
            return descriptor
        os.close(descriptor)
        return None

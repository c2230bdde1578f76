"""Hidden files and folders beside a target, in which it is written before it takes its place.

Each is made exclusively, with the permissions of the umask, and locked by the process that makes it. So what a killed process left behind
is told from what another process is writing now, and the next one that opens the target removes it.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from jpeft.checkpoint.locks import is_at, try_lock

# The names of temporary files and folders, whatever they are to become. Pictures keep their suffix, by which their format is told.
LEFTOVER = re.compile(r"\..+\.(partial|old)(\.png)?")

# Neither follows a link that somebody has put in the place of a temporary file.
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)


class Temporary:
    """A temporary file or folder beside a target; nothing is made before `make_file` or `make_folder`.

    Attributes:
      target: What it is to become.
      path: Where it is. Meaningless before it is made.
      descriptor: The open file or folder.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp(), "file")
    >>> temporary = Temporary(target)
    >>> os.write(temporary.make_file(), b"text")
    4
    >>> os.replace(temporary.path, target)
    >>> temporary.remove()
    >>> os.listdir(target.parent)
    ['file']
    """

    def __init__(self, target: str | os.PathLike[str]):
        self.target = Path(target)
        self.path = self.target
        self.descriptor: int | None = None

    def make_file(self) -> int:
        """Create an empty file, and return its descriptor, open for writing."""
        return self._make(folder=False)

    def make_folder(self) -> Path:
        """Create an empty folder, and the folders above it."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._make(folder=True)
        return self.path

    def remove(self) -> None:
        """Delete what is still there under the temporary name, and end the lock."""
        if self.descriptor is None:
            return
        delete(self.path)
        os.close(self.descriptor)
        self.descriptor = None

    def _make(self, *, folder: bool) -> int:
        remove_leftovers(self.target)
        while True:
            self.path = self.target.with_name(f".{_stem(self.target)}.{secrets.token_hex(4)}.partial")
            try:
                if folder:
                    os.mkdir(self.path)
                descriptor = os.open(self.path, _READ if folder else _CREATE, 0o666)
            except FileExistsError:
                continue
            # A process that removes leftovers may have met this one before it was locked.
            if try_lock(descriptor) is not False and is_at(descriptor, self.path):
                self.descriptor = descriptor
                return descriptor
            os.close(descriptor)


def moved_aside(target: Path) -> Path:
    """Return a hidden name beside `target` for what it was until now."""
    return target.with_name(f".{_stem(target)}.{secrets.token_hex(4)}.old")


def remove_leftovers(target: str | os.PathLike[str]) -> None:
    """Remove what killed processes left beside `target`; put back a folder that one of them had moved aside.

    What cannot be removed, such as on a disk that is read-only, stays.
    """
    target = Path(target)
    for path in sorted(_temporaries(target), key=lambda path: path.suffix != ".old"):
        try:
            descriptor = os.open(path, _READ)
        except OSError:
            if path.is_symlink():
                delete(path)
            continue
        try:
            if try_lock(descriptor) is True and is_at(descriptor, path):
                if path.suffix == ".old" and not os.path.lexists(target):
                    os.rename(path, target)
                else:
                    delete(path)
        except OSError:
            continue
        finally:
            os.close(descriptor)


def delete(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there. What a link points to stays."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)
    except OSError:
        return


def _temporaries(target: Path) -> Iterator[Path]:
    """Find everything beside `target` that has one of its temporary names."""
    name = re.compile(rf"\.{re.escape(_stem(target))}\.[0-9a-f]{{8}}\.(partial|old)")
    try:
        names = os.listdir(target.parent)
    except OSError:
        return
    yield from (target.with_name(found) for found in names if name.fullmatch(found))


def _stem(target: Path) -> str:
    """Return the part of the temporary names that says whose they are; short, because a system allows only so many bytes."""
    name = os.fsencode(target.name)
    return target.name if len(name) <= 100 else f"jpeft-{hashlib.sha256(name).hexdigest()[:16]}"

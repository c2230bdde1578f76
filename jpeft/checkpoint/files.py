"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jpeft.checkpoint.locks import try_lock
from jpeft.checkpoint.temporary import Temporary, delete, moved_aside

T = TypeVar("T")

# Of Linux's renameat2: fail if the new name is taken; exchange two names in one step.
_NOREPLACE, _EXCHANGE = 1, 2


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a file.

    Raises:
      OSError: if it cannot be read, or is a pipe or a device, which may never end.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "It is a pipe or a device and no file", str(path))
    return path.read_bytes()


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write beside `path`, sync, and rename: a reader, or a kill at any moment, sees the old file or the new one.

    A link at `path` is replaced; what it points to stays as it is.
    """
    temporary = Temporary(path)
    try:
        with open(temporary.make_file(), "wb", closefd=False) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary.path, path)
    finally:
        temporary.remove()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def replace_folder(partial: Path, target: Path, *, overwrite: bool = True) -> None:
    """Put a finished folder in the place of `target`, or where there is none, and delete what was there.

    At any moment one of the two is there, whole: where the system can exchange two names, at `target`; elsewhere a kill may leave the old
    one under a hidden name, and `remove_leftovers` puts it back.

    Args:
      partial: The finished folder, beside `target`.
      target: Its place.
      overwrite: Whether something may be there.

    Raises:
      FileExistsError: if something is there and may not be.
    """
    if not os.path.lexists(target) or not overwrite:
        try:
            _rename_to_free_name(partial, target)
            return
        except OSError as error:
            if not overwrite or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    if _renameat2(partial, target, _EXCHANGE):
        delete(partial)
        return
    old = moved_aside(target)
    with contextlib.ExitStack() as stack:
        # Locked, so that no other process takes it for what a killed one left behind.
        descriptor = os.open(target, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        try_lock(descriptor)
        os.rename(target, old)
        try:
            os.rename(partial, target)
        except OSError:
            os.rename(old, target)
            raise
        delete(old)


def read_steadily(folder: Path, read: Callable[[], T]) -> T:
    """Return what `read` makes of a folder; where another process replaces the folder meanwhile, read the new one.

    Args:
      folder: A folder that `replace_folder` may replace.
      read: Reads it. What it reads in two folders is not used, and an error that it meets in between is not raised.
    """
    while True:
        before = _identity(folder)
        try:
            found = read()
        except (ValueError, OSError):
            if _identity(folder) == before:
                raise
            continue
        if _identity(folder) == before:
            return found


def _identity(folder: Path) -> tuple[int, ...] | None:
    """What tells a folder from another one of its name; None if there is none."""
    try:
        about = folder.stat()
    except OSError:
        return None
    # The number of a deleted folder is given to a new one; but a folder that is renamed takes the time of that.
    return about.st_dev, about.st_ino, about.st_ctime_ns


def use_umask(folder: Path) -> None:
    """Give all files of a folder the permissions that a new file has by the umask; some libraries write files for their owner alone.

    Args:
      folder: A folder that this process made, so that its own permissions show the umask.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def check_output(path: str | os.PathLike[str], *, folder: bool) -> None:
    """Check that a file or folder can be written, before hours of work: write beside it, or in the nearest folder above that exists.

    Args:
      path: The output.
      folder: Whether it is a folder; the folders above it are then made when it is.

    Raises:
      ValueError: saying what is in the way.
    """
    target = Path(path).absolute()
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # a name that is too long, a file for a folder above
        if folder:  # the first of the folders that will be made
            target = next(path for path in (target, *target.parents) if os.path.lexists(path.parent))
        elif target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        elif os.path.lexists(target) and (target.is_symlink() or not target.is_file()):
            raise ValueError(f"The output file {path} is a link or a device: give the path of a plain file.")
        temporary = Temporary(target)
        try:
            temporary.make_file()
        finally:
            temporary.remove()
    except OSError as error:
        raise ValueError(f"The output {path} cannot be written: {error.strerror or error}: {error.filename or target}.") from error


def size_on_disk(folder: str | os.PathLike[str]) -> int:
    """Return the bytes of all files in a folder and below."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _rename_to_free_name(old: Path, new: Path) -> None:
    """Rename; fail with a FileExistsError if the new name is taken, as far as the system can tell in one step."""
    if _renameat2(old, new, _NOREPLACE):
        return
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    os.rename(old, new)


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    """Rename by Linux's `renameat2`; return False if the system, or this file system, does not have it.

    Raises:
      OSError: if it has it and the call failed.
    """
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # an older C library
        return False
    here = -100  # AT_FDCWD: paths are relative to the working directory
    if rename(here, os.fsencode(old), here, os.fsencode(new), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(old), None, str(new))

"""What Orbax wrote, looked at without Orbax.

Orbax first writes each process's arrays into a folder of its own, and then an index of all of them. Without the index nothing can be read,
and Orbax writes none, without an error, if it does not find those folders.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_INDEX, _PARTS = "manifest.ocdbt", "ocdbt.process_*"


def check_arrays(folder: Path, count: int) -> None:
    """Check that a folder which Orbax has written holds as many arrays as it should, each where Orbax will look for it.

    Raises:
      OSError: if it does not.
    """
    found = sum(key.endswith(b"/.zarray") for key in _open(folder).list().result()) if (folder / _INDEX).is_file() else 0
    if found != count:
        raise OSError(f"Orbax wrote {found} of {count} arrays into {folder}.")


@contextlib.contextmanager
def indexed(folder: Path) -> Iterator[Path]:
    """Yield a folder of arrays, or of checkpoints with `arrays` in it, as it is; if its index is missing, a copy with one.

    Earlier versions left the index out under a path with brackets. All values are there.
    """
    without = [part for part in (Path(), Path("arrays")) if any((folder / part).glob(_PARTS)) and not (folder / part / _INDEX).exists()]
    if not without:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, "copy")
        shutil.copytree(folder, copy)
        for part in without:
            whole = _open(copy / part)
            for values in map(_open, sorted((copy / part).glob(_PARTS))):
                for key in values.list().result():
                    whole.write(key, values.read(key).result().value).result()
        yield copy


def _open(folder: Path) -> Any:
    import tensorstore

    # A folder's path ends in a slash there.
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}).result()

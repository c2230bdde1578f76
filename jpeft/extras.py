"""Packages that only some of jpeft needs: what to install where one is missing."""

import contextlib
import re
from collections.abc import Iterator

# Package -> the extra of jpeft that installs it.
# Package -> the extra of jpeft that installs it.
EXTRAS = {
    **dict.fromkeys(
        ("transformers", "tokenizers", "safetensors", "huggingface_hub", "tyro", "rich", "grain", "pyarrow", "matplotlib"), "hf"
    ),
    "datasets": "hub",
    "scipy": "demo",
}


def how_to_install(error: ImportError) -> str | None:
    """What to say of a package that could not be imported; None for one that is no extra of jpeft.

    >>> how_to_install(ModuleNotFoundError("No module named 'rich.table'", name="rich.table"))
    'This needs rich, which is not installed: pip install "jpeft[hf]"'
    """
    named = error.name or next(iter(re.findall(r"'([\w.]+)'", str(error))), "")
    package = named.partition(".")[0]
    return f'This needs {package}, which is not installed: pip install "jpeft[{EXTRAS[package]}]"' if package in EXTRAS else None


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Import packages that may be missing: the error then says what to install.

    Raises:
      ModuleNotFoundError: with the command that installs the package.
    """
    try:
        yield
    except ImportError as error:
        said = how_to_install(error)
        if said is None:
            raise
        raise ModuleNotFoundError(said, name=error.name) from None

"""Built-in texts for generation that need no download: documentation of the installed Python packages.

* `builtin:docs`, plain text: the docstrings of NumPy, SciPy, JAX, Flax and Optax. `jpeft.training.small_decoder` is pretrained on them.
* `builtin:reference`, plain text: the Python language reference, as `help("with")` shows it.
* `builtin:summaries`, pairs: the head of a function of Python's standard library, and the first line of its docstring.

Sources are parsed, not imported. The texts depend on the installed versions, so compare results of equal versions only.
"""

import ast
import functools
import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jpeft.data import Table, fingerprint, split_table

PACKAGES = ("numpy", "scipy", "jax", "flax", "optax")
MIN_CHARACTERS = 80  # shorter docstrings hardly say more than the name of their function
SECTION = 1500  # longest document of the reference in characters, unless a single paragraph is longer
MAX_HEAD = 160  # characters of a function's head
SUMMARY = (10, 100)  # fewest and most characters of a summary

_SKIPPED = {"tests", "test", "testing", "site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "turtledemo", "vendor"}
# Typographic characters become those of a keyboard, so that a small tokenizer needs no tokens for them.
_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "\u00a0": " "})


@functools.cache
def docs(packages: tuple[str, ...] = PACKAGES) -> dict[str, Table]:
    """Return docstrings of modules, classes and functions, split 98 / 1 / 1 %.

    Each docstring ends before its first example, because examples are not prose. Of docstrings that differ only in case, spaces and
    punctuation, one is kept.

    Args:
      packages: Installed packages.

    Returns:
      `{"train": ..., "validation": ..., "test": ...}`, plain texts, in the order of a hash, so that neighbours are unrelated. With the
      default packages more than 5 million characters.

    Raises:
      ValueError: if a package is not installed.
    """
    texts = (_prose(doc) for package in packages for _, tree in _modules(_folder(package)) for doc in _docstrings(tree))
    return split_table(Table(text=_distinct(text for text in texts if len(text) >= MIN_CHARACTERS)), validation=0.01, test=0.01)


@functools.cache
def reference() -> dict[str, Table]:
    """Return the Python language reference in documents of a few paragraphs, split 75 / 10 / 15 %.

    Its topics overlap ("specialnames" contains a dozen others), so only the first occurrence of a paragraph is kept. No test paragraph
    occurs in training.

    Raises:
      ValueError: if this Python lacks `pydoc_data`.

    >>> from jpeft.data.python_docs import reference
    >>> sorted(reference())
    ['test', 'train', 'validation']
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "The data set builtin:reference is made of pydoc_data, which this Python does not have: install its full standard library."
        ) from error
    documents, seen = [], set()
    for name in sorted(topics):
        parts: list[str] = []
        for paragraph in re.split(r"\n\s*\n", topics[name].translate(_PLAIN).strip("\n")):
            key = fingerprint(paragraph)
            if key in seen:
                continue
            seen.add(key)
            if parts and sum(map(len, parts)) + len(paragraph) > SECTION:
                documents.append("\n\n".join(parts))
                parts = []
            parts.append(paragraph.strip("\n"))
        if parts:
            documents.append("\n\n".join(parts))
    return split_table(Table(text=_distinct(documents)), validation=0.1, test=0.15)


@functools.cache
def summaries() -> dict[str, Table]:
    '''Return pairs of a function's head and the first line of its docstring, from Python's standard library, split 85 / 5 / 10 %.

    A head names the module (and class), the function and its arguments, and ends at the beginning of the docstring:

        # textwrap
        def dedent(text):
            """

    The target is `Remove any common leading whitespace from every line in `text`.` A head that occurs with two summaries is dropped.
    '''
    pairs: dict[str, set[str]] = {}
    for module, tree in _modules(Path(sysconfig.get_path("stdlib"))):
        for owner, function in _functions(tree, module):
            summary = (ast.get_docstring(function) or "").partition("\n")[0].translate(_PLAIN).strip()
            head = f'# {owner}\ndef {function.name}({ast.unparse(function.args)}):\n    """'.translate(_PLAIN)
            if len(head) <= MAX_HEAD and SUMMARY[0] <= len(summary) <= SUMMARY[1]:
                pairs.setdefault(head, set()).add(summary)
    single = {head: min(found) for head, found in pairs.items() if len(found) == 1}
    heads = _distinct(single)
    return split_table(Table(text=heads, target=[single[head] for head in heads]), validation=0.05, test=0.1)


# --- sources --------------------------------------------------------------------------------------------------------


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f'The built-in texts are docstrings of {package}, which is not installed: pip install "jpeft[demo]".')
    return Path(spec.submodule_search_locations[0])


def _modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Iterate over name and syntax tree of each module below a folder, without tests and vendored projects."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and not any(part.startswith("_vendor") for part in parts):
            try:
                yield ".".join(part for part in parts if part != "__init__"), ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # a template, or a file that tests a parser
                continue


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _functions(body: Any, owner: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Iterate over the functions of a module and of its classes, each with the dotted name of its owner."""
    for node in body.body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{owner}.{node.name}")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, node


def _prose(doc: str) -> str:
    """Return a docstring up to its first example."""
    text = re.split(r"^\s*(?:>>>|Examples?\s*\n\s*-{3,}|Examples?::?\s*$)", inspect.cleandoc(doc), maxsplit=1, flags=re.M)[0]
    return text.translate(_PLAIN).strip()


def _distinct(texts: Iterable[str]) -> list[str]:
    """Return the texts in the order of a hash, one of those that differ only in case, spaces and punctuation."""
    found: dict[str, str] = {}
    for text in texts:
        key = fingerprint(text)
        found[key] = min(text, found.get(key, text))  # independent of the order of files
    return [found[key] for key in sorted(found)]

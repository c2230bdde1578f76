"""Built-in texts for generation that need no download: what the installed Python stack says about itself.

* `builtin:docs`, plain text: the docstrings of NumPy, SciPy, JAX, Flax and Optax. `jpeft.training.small_decoder` is pretrained on them.
* `builtin:reference`, plain text: the Python language reference, as `help("with")` shows it.
* `builtin:summaries`, pairs: the head of a function of Python's standard library, and the first line of its docstring.

Sources are parsed, not imported. The texts follow the installed versions, so compare results only where these are the same.
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
MIN_CHARACTERS = 80  # a docstring shorter than this says hardly more than its function's name
SECTION = 1500  # characters of a document of the reference, at most but for single longer paragraphs
MAX_HEAD = 160  # characters of a function's head
SUMMARY = (10, 100)  # fewest and most characters of a summary

_SKIPPED = {"tests", "test", "testing", "site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "turtledemo", "vendor"}
# As on a keyboard: a small tokenizer has better use for its words.
_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "\u00a0": " "})


@functools.cache
def docs(packages: tuple[str, ...] = PACKAGES) -> dict[str, Table]:
    """Docstrings of modules, classes and functions, split 98 / 1 / 1 %.

    Each docstring ends before its first example, whose numbers are no prose. Of docstrings that differ only in case, spaces and
    punctuation one is there.

    Args:
      packages: Installed packages.

    Returns:
      `{"train": ..., "validation": ..., "test": ...}`, plain texts, in the order of a hash so that neighbours have nothing to do with
      each other. With the default packages more than 5 million characters.

    Raises:
      ValueError: if a package is not installed.
    """
    texts = (_prose(doc) for package in packages for _, tree in _modules(_folder(package)) for doc in _docstrings(tree))
    return split_table(Table(text=_distinct(text for text in texts if len(text) >= MIN_CHARACTERS)), validation=0.01, test=0.01)


@functools.cache
def reference() -> dict[str, Table]:
    """The Python language reference in documents of a few paragraphs, split 75 / 10 / 15 %.

    Its topics overlap ("specialnames" holds a dozen others), so a paragraph is kept only where it is met first: no test paragraph has
    been seen in training.

    Raises:
      ValueError: if this Python comes without `pydoc_data`.

    >>> from jpeft.data.python_docs import reference
    >>> sorted(reference())
    ['test', 'train', 'validation']
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "builtin:reference is made of pydoc_data, which this Python does not have: install its full standard library"
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
    '''Pairs of a function's head and the first line of its docstring, from Python's standard library, split 85 / 5 / 10 %.

    A head names the module (and class), the function and its arguments, and ends where the docstring begins:

        # textwrap
        def dedent(text):
            """

    and the target is `Remove any common leading whitespace from every line in `text`.` A head that occurs with two summaries is dropped.
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
    spec = importlib.util.find_spec(package)  # looked up, not imported
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f'the built-in texts are docstrings of {package}, which is not installed: pip install "jpeft[demo]"')
    return Path(spec.submodule_search_locations[0])


def _modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Name and syntax tree of each module below a folder, tests and other projects' copies left out."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and not any(part.startswith("_vendor") for part in parts):
            try:
                yield ".".join(part for part in parts if part != "__init__"), ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # a template, or broken on purpose
                continue


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _functions(body: Any, owner: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """The public functions of a module and of its classes, each with the dotted name of where it is."""
    for node in body.body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{owner}.{node.name}")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, node


def _prose(doc: str) -> str:
    """A docstring up to its first example."""
    text = re.split(r"^\s*(?:>>>|Examples?\s*\n\s*-{3,}|Examples?::?\s*$)", inspect.cleandoc(doc), maxsplit=1, flags=re.M)[0]
    return text.translate(_PLAIN).strip()


def _distinct(texts: Iterable[str]) -> list[str]:
    """One of all texts that differ only in case, spaces and punctuation, in the order of a hash."""
    found: dict[str, str] = {}
    for text in texts:
        key = fingerprint(text)
        found[key] = min(text, found.get(key, text))  # the same one whatever order the files are listed in
    return [found[key] for key in sorted(found)]

"""A real English data set that needs no download: the documentation paragraphs of the installed SciPy.

The task is to tell from the opening paragraphs of a docstring which SciPy subpackage it documents (`signal`, `stats`,
`sparse`, ...). SciPy is installed wherever JAX is, so the data set is there on a machine without a network too. Its
texts follow the installed version, so compare results only on one version of SciPy.
"""

import functools
import importlib
import inspect
import pkgutil
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from jpeft.data import Table, fingerprint, split_table

MIN_TEXTS = 40  # a subpackage with fewer texts is no class
MIN_CHARACTERS = 20  # shorter texts are leftovers such as "See above."
MAX_CHARACTERS = 400  # about 100 word pieces: fits `max_length=128`
TEST = 0.20  # share of all texts
VALIDATION = 0.06  # share of all texts, taken from the other 80 %


@functools.cache
def builtin() -> dict[str, Table]:
    """The built-in data set, split 74 / 6 / 20 % by a hash of the text, each class in each split.

    Returns:
      `{"train": ..., "validation": ..., "test": ...}`; text is a documentation paragraph, label its subpackage. With
      SciPy 1.17 about 1,600 texts in a dozen classes. The same on every machine with the same SciPy.

    Raises:
      ValueError: if SciPy is not installed.

    >>> from jpeft.data.builtin import builtin
    >>> sorted(builtin())
    ['test', 'train', 'validation']
    """
    return split_table(paragraphs(), validation=VALIDATION, test=TEST)


def paragraphs() -> Table:
    """All texts of the built-in data set with their labels, in alphabetical order.

    One text appears once: texts that differ only in case, spaces and punctuation count as one. A text found under two
    subpackages is dropped, because no reader could tell which is meant.

    Raises:
      ValueError: if SciPy is not installed.

    >>> from jpeft.data.builtin import paragraphs
    >>> "signal" in paragraphs().label
    True
    """
    texts: dict[str, set[str]] = defaultdict(set)  # by fingerprint
    labels: dict[str, set[str]] = defaultdict(set)
    # Subpackages on their way out warn when they are imported or read; who reads the data set can do nothing about it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names, found = _docstrings()
    for label, doc in set(found):  # most names are found in several modules
        text = clean(doc, names)
        if len(text) >= MIN_CHARACTERS:
            texts[fingerprint(text)].add(text)
            labels[fingerprint(text)].add(label)
    # min(): of several spellings of one text always the same one, whatever order SciPy lists its names in.
    single = {min(texts[key]): min(labels[key]) for key in texts if len(labels[key]) == 1}
    counts = defaultdict(int)
    for label in single.values():
        counts[label] += 1
    rows = sorted((text, label) for text, label in single.items() if counts[label] >= MIN_TEXTS)
    return Table(text=[text for text, _ in rows], pair=None, label=[label for _, label in rows])


def clean(doc: str, names: frozenset[str]) -> str:
    """The opening paragraphs of a docstring as plain text, at most `MAX_CHARACTERS` long.

    ReStructuredText markup, footnotes and everything from the first section ("Parameters", ...) on go; so do import paths and the
    subpackage's name in references, which would give the label away. All other words stay, also the signatures at the top of compiled
    functions' docstrings and the paragraph on batches that a decorator puts into many functions of linear algebra.

    Args:
      doc: A docstring.
      names: The subpackages (`signal`, `linalg`, ...), removed wherever they are part of a path.

    >>> from jpeft.data.builtin import clean
    >>> clean("See :func:`scipy.signal.lfilter`.\\n\\nParameters\\n----------\\nx", frozenset({"signal"}))
    'See lfilter.'
    """
    lines = inspect.cleandoc(doc).splitlines()
    rule = re.compile(r"\s*([-=~])\1{2,}\s*")
    headings = (i for i in range(len(lines) - 1) if lines[i].strip() and rule.fullmatch(lines[i + 1]))
    end = next(headings, len(lines))
    end = next((i for i in range(end) if lines[i].lstrip().startswith(">>>")), end)
    text = "\n".join(lines[:end])
    text = re.sub(r"^\s*\.\. (?:version\w+|deprecated|legacy|index|currentmodule|plot|only)::.*$", " ", text, flags=re.M)
    text = re.sub(r"^\s*\.\.(?: [\w-]+::|(?=\s|$))", " ", text, flags=re.M)  # other directives: keep what they hold
    text = re.sub(rf":ref:`(?:tutorial-)?(?:{'|'.join(sorted(names))})_(\w+)`", r"\1", text)  # a chapter's anchor, `:ref:`linalg_batch``
    text = re.sub(r":[\w:.+-]+:`[~!]?([^`]*?)(?:\s+<[^`<>]+>)?`", r"\1", text)  # roles: `:ref:`title <target>``
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1", text)  # links
    text = re.sub(r"\s*\[[\w-]+\]_", "", text)  # footnotes
    text = " ".join(_without_paths(text.replace("`~", "").replace("`", "").replace("::", ":"), names).split())
    return _cut(text)


def _without_paths(text: str, names: frozenset[str]) -> str:
    """Replace import paths by their last part, or by "SciPy" where that is a module."""
    modules = "|".join(sorted(names))  # sorted: a set's order differs between processes
    text = re.sub(rf"\bfrom scipy(?:\.\w+)* import (?:{modules})\b", "from SciPy", text)
    text = re.sub(rf"\b(?:from|import) scipy\.(?:{modules})\b(?:\.\w+)*", "from SciPy", text)

    def last(match: re.Match[str]) -> str:
        name = match[0].rsplit(".", 1)[-1]
        return "SciPy" if name in names else name

    text = re.sub(r"\b(?:scipy|numpy|np|sp)(?:\.\w+)+", last, text)
    return re.sub(rf"(?<![\w.])(?:(?:{modules})\.)+(?=[A-Za-z_])", "", text)  # "linalg.solve"


def _cut(text: str) -> str:
    """Shorten to `MAX_CHARACTERS` at the end of a sentence, or of a word if the last whole sentence ends too early."""
    if len(text) <= MAX_CHARACTERS:
        return text
    ends = [match.end() for match in re.finditer(r"(?<!i\.e)(?<!e\.g)\.(?= )", text[: MAX_CHARACTERS + 1])]
    if ends and ends[-1] > MAX_CHARACTERS // 2:
        return text[: ends[-1]]
    word = text.rfind(" ", 0, MAX_CHARACTERS + 1)
    return text[: word if word > 0 else MAX_CHARACTERS]


def _docstrings() -> tuple[frozenset[str], list[tuple[str, str]]]:
    """Names of the subpackages, and (subpackage, docstring) of each public function, class and method."""
    try:
        scipy = importlib.import_module("scipy")
    except ImportError as error:
        raise ValueError('the built-in data set is made of SciPy\'s documentation: pip install "jpeft[demo]"') from error
    names = frozenset(info.name for info in pkgutil.iter_modules(scipy.__path__) if info.ispkg and _public(info.name))
    found = []
    for name in sorted(names):
        for module in _modules(f"scipy.{name}"):
            found += [(name, doc) for member in _members(module, name) if (doc := _doc(member))]
    return names, found


def _public(name: str) -> bool:
    # Cython interfaces only point to the Python function of the same name.
    return not name.startswith(("_", "cython_")) and name not in {"tests", "conftest", "setup"}


def _modules(path: str) -> Iterator[ModuleType]:
    """The module and, if it is a package, the public modules below it."""
    try:
        module = importlib.import_module(path)
    except ImportError:  # left over from an older version, or needs an optional package
        return
    yield module
    for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if _public(info.name):
            yield from _modules(f"{path}.{info.name}")


def _members(module: ModuleType, subpackage: str) -> Iterator[Any]:
    """Public functions, classes and methods that SciPy defines in this subpackage."""
    public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    for name in public:
        member = getattr(module, name, None)
        if not (inspect.isroutine(member) or inspect.isclass(member) or isinstance(member, np.ufunc)):
            continue
        # Re-exports (`scipy.special.logsumexp` elsewhere, NumPy's errors) belong to where they are defined. Compiled
        # functions name no module: they are where they are found.
        home = (getattr(member, "__module__", None) or "").split(".")
        if home[0] == "numpy" or (home[0] == "scipy" and len(home) > 1 and home[1] not in {subpackage, "_lib"}):
            continue
        yield member
        if inspect.isclass(member):
            yield from (value for key, value in vars(member).items() if not key.startswith("_") and _is_method(value))


def _is_method(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, (classmethod, staticmethod))


def _doc(member: Any) -> str:
    doc = getattr(member, "__doc__", None)
    return doc if isinstance(doc, str) else ""

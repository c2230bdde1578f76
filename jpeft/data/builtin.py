"""A real English data set that needs no download: the documentation paragraphs of the installed SciPy.

The text is the opening paragraphs of a docstring, the label the SciPy subpackage that it documents (`signal`, `stats`, `sparse`, ...). The
docstrings are those of all public names of a subpackage, and of the methods and properties of its classes. SciPy is installed with JAX, so
the data set exists on a machine without a network too. Its texts depend on the version of SciPy, so compare results of one version only.
"""

import functools
import importlib
import inspect
import pkgutil
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from jpeft.data import Table, fingerprint, split_table

MIN_TEXTS = 40  # a subpackage with fewer texts is left out
MIN_CHARACTERS = 20  # drops texts such as "See above."
MAX_CHARACTERS = 400  # about 100 word pieces: fits `max_length=128`
TEST = 0.20  # share of all texts
VALIDATION = 0.06  # share of all texts, taken from the other 80 %


@functools.cache
def builtin() -> dict[str, Table]:
    """Return the built-in data set, split 74 / 6 / 20 % by a hash of the text, with each class in each split.

    Returns:
      `{"train": ..., "validation": ..., "test": ...}`; text is a documentation paragraph, label its subpackage. With
      SciPy 1.17, 1,564 texts in 11 classes. The same on every machine with the same SciPy.

    Raises:
      ValueError: if SciPy is not installed.

    >>> from jpeft.data.builtin import builtin
    >>> sorted(builtin())
    ['test', 'train', 'validation']
    """
    return split_table(paragraphs(), validation=VALIDATION, test=TEST)


def paragraphs() -> Table:
    """Return all texts of the built-in data set with their labels, in alphabetical order.

    Of texts that differ only in case, spaces and punctuation, one is kept. A text that occurs in two classes is dropped, because its label
    is ambiguous.

    Raises:
      ValueError: if SciPy is not installed.

    >>> from jpeft.data.builtin import paragraphs
    >>> "signal" in paragraphs().label
    True
    """
    texts: dict[str, set[str]] = defaultdict(set)  # by fingerprint
    labels: dict[str, set[str]] = defaultdict(set)
    # Deprecated subpackages warn when they are imported or read; users of the data set need not know.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names, found = _docstrings()
    for label, doc in set(found):  # a set, because an inherited method is found in several classes
        text = clean(doc, names)
        if len(text) >= MIN_CHARACTERS:
            texts[fingerprint(text)].add(text)
            labels[fingerprint(text)].add(label)
    large = _frequent(label for owners in labels.values() for label in owners)
    # min(): the choice among several spellings must not depend on the order in which SciPy lists its names.
    single = {min(texts[key]): min(owners & large) for key, owners in labels.items() if len(owners & large) == 1}
    # Counted again, because ambiguous texts were dropped.
    large = _frequent(single.values())
    rows = sorted((text, label) for text, label in single.items() if label in large)
    return Table(text=[text for text, _ in rows], pair=None, label=[label for _, label in rows])


def _frequent(labels: Iterable[str]) -> set[str]:
    """Return the labels that have enough texts for a class."""
    return {label for label, count in Counter(labels).items() if count >= MIN_TEXTS}


def clean(doc: str, names: frozenset[str]) -> str:
    """Return the opening paragraphs of a docstring as plain text, at most `MAX_CHARACTERS` long.

    Removed are reStructuredText markup, fields, footnotes, everything from the first section ("Parameters", ...) on, import paths, and the
    subpackage's name in references, which would reveal the label. All other words are kept, including the signatures at the top of compiled
    functions' docstrings and the paragraph on batches that a decorator adds to many functions of linear algebra.

    Args:
      doc: A docstring.
      names: The subpackages (`signal`, `linalg`, ...), which are removed from paths.

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
    text = re.sub(r"^\s*:\w+: .*$", " ", text, flags=re.M)  # fields: `:type: *int*`
    text = re.sub(r"^\s*\.\.(?: [\w-]+::|(?=\s|$))", " ", text, flags=re.M)  # other directives: keep their content
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
    """Return the names of the subpackages, and (subpackage, docstring) of all public names."""
    try:
        scipy = importlib.import_module("scipy")
    except ImportError as error:
        raise ValueError('The built-in data set is made of SciPy\'s documentation: pip install "jpeft[demo]".') from error
    names = frozenset(info.name for info in pkgutil.iter_modules(scipy.__path__) if info.ispkg and not info.name.startswith("_"))
    found = []
    for name in sorted(names):
        try:
            module = importlib.import_module(f"scipy.{name}")
        except ImportError:  # a leftover of an older version, or one that needs an optional package
            continue
        found += [(name, doc) for member in _members(module, name) if (doc := _doc(member))]
    return names, found


def _members(module: ModuleType, subpackage: str) -> Iterator[Any]:
    """Iterate over the functions and classes in a subpackage's namespace, and over all methods and properties of the classes."""
    for name in _public(getattr(module, "__all__", None) or vars(module)):
        member = getattr(module, name, None)
        if inspect.ismodule(member) or _foreign(member, subpackage):
            continue
        yield member
        for base in inspect.getmro(member) if inspect.isclass(member) else ():
            if base.__module__.startswith("scipy.") and not _foreign(base, subpackage):
                yield from (vars(base)[key] for key in _public(vars(base)) if _is_attribute(vars(base)[key]))


def _public(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("_")]


def _foreign(member: Any, subpackage: str) -> bool:
    """Return whether a member is re-exported and belongs to another subpackage (`scipy.special.logsumexp`) or to NumPy."""
    # Compiled functions name no module and belong to the subpackage where they are found.
    home = (getattr(member, "__module__", None) or "").split(".")
    return home[0] == "numpy" or (home[0] == "scipy" and len(home) > 1 and home[1] not in {subpackage, "_lib"})


def _is_attribute(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, classmethod | staticmethod | property)


def _doc(member: Any) -> str:
    doc = getattr(member, "__doc__", None)
    # An instance without a docstring has its class's, which is not about the instance.
    return doc if isinstance(doc, str) and doc is not type(member).__doc__ else ""

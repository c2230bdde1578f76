"""A real English data set that needs no download: the documentation paragraphs of the installed SciPy.

The task is to tell from the opening paragraphs of a docstring which SciPy subpackage it documents (`signal`, `stats`,
`sparse`, ...). Documented is what a subpackage offers in its own namespace, with the methods and properties of its classes.
SciPy is installed wherever JAX is, so the data set is there on a machine without a network too. Its texts follow the
installed version, so compare results only on one version of SciPy.
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
      SciPy 1.17, 1,564 texts in 11 classes. The same on every machine with the same SciPy.

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
    of the classes is dropped, because no reader could tell which is meant.

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
    for label, doc in set(found):  # an inherited method is found in several classes
        text = clean(doc, names)
        if len(text) >= MIN_CHARACTERS:
            texts[fingerprint(text)].add(text)
            labels[fingerprint(text)].add(label)
    large = _frequent(label for owners in labels.values() for label in owners)
    # min(): of several spellings of one text always the same one, whatever order SciPy lists its names in.
    single = {min(texts[key]): min(owners & large) for key, owners in labels.items() if len(owners & large) == 1}
    # Once more: a class may have lost texts to another.
    large = _frequent(single.values())
    rows = sorted((text, label) for text, label in single.items() if label in large)
    return Table(text=[text for text, _ in rows], pair=None, label=[label for _, label in rows])


def _frequent(labels: Iterable[str]) -> set[str]:
    """The labels that have enough texts for a class."""
    return {label for label, count in Counter(labels).items() if count >= MIN_TEXTS}


def clean(doc: str, names: frozenset[str]) -> str:
    """The opening paragraphs of a docstring as plain text, at most `MAX_CHARACTERS` long.

    ReStructuredText markup, fields, footnotes and everything from the first section ("Parameters", ...) on go; so do import paths and the
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
    text = re.sub(r"^\s*:\w+: .*$", " ", text, flags=re.M)  # fields: `:type: *int*`
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
    """Names of the subpackages, and (subpackage, docstring) of all that each of them offers."""
    try:
        scipy = importlib.import_module("scipy")
    except ImportError as error:
        raise ValueError('the built-in data set is made of SciPy\'s documentation: pip install "jpeft[demo]"') from error
    names = frozenset(info.name for info in pkgutil.iter_modules(scipy.__path__) if info.ispkg and not info.name.startswith("_"))
    found = []
    for name in sorted(names):
        try:
            module = importlib.import_module(f"scipy.{name}")
        except ImportError:  # left over from an older version, or needs an optional package
            continue
        found += [(name, doc) for member in _members(module, name) if (doc := _doc(member))]
    return names, found


def _members(module: ModuleType, subpackage: str) -> Iterator[Any]:
    """The functions and classes in a subpackage's own namespace, and the classes' methods and properties, inherited ones too."""
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
    """Whether it is a re-export (`scipy.special.logsumexp` elsewhere, NumPy's errors), which belongs to where it is defined."""
    # Compiled functions name no module: they are where they are found.
    home = (getattr(member, "__module__", None) or "").split(".")
    return home[0] == "numpy" or (home[0] == "scipy" and len(home) > 1 and home[1] not in {subpackage, "_lib"})


def _is_attribute(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, classmethod | staticmethod | property)


def _doc(member: Any) -> str:
    doc = getattr(member, "__doc__", None)
    # An instance without a docstring of its own shows its class's.
    return doc if isinstance(doc, str) and doc is not type(member).__doc__ else ""

import hashlib
import os
import re
import subprocess
import sys
import warnings
from collections import Counter

import pytest

from jpeft.data import builtin as module
from jpeft.data import fingerprint, splits
from jpeft.data.builtin import builtin, clean, paragraphs

NAMES = frozenset({"linalg", "signal", "sparse", "stats"})


@pytest.fixture(scope="module")
def tables():
    before = list(warnings.filters)
    tables = builtin()
    assert list(warnings.filters) == before
    return tables


def rows(tables):
    return [row for table in tables.values() for row in zip(table.text, table.label, strict=True)]


def test_sizes_are_those_of_the_recipe(tables):
    total = len(rows(tables))
    assert 1400 < total < 1800
    assert len(tables["test"]) == pytest.approx(0.20 * total, abs=1)
    assert len(tables["validation"]) == pytest.approx(0.06 * total, abs=1)
    # Eleven with SciPy 1.17.
    assert {"interpolate", "linalg", "ndimage", "optimize", "signal", "sparse", "special", "stats"} <= set(tables["train"].label)
    assert min(Counter(label for _, label in rows(tables)).values()) >= module.MIN_TEXTS


def test_a_subpackage_is_what_its_own_namespace_offers(tables):
    label = dict(rows(tables))
    assert {label[text] for text in label if text.startswith("A normal continuous random variable.")} == {"stats"}  # an instance
    assert label["Number of stored values, including explicit zeros."] == "sparse"  # of a base class that is not public
    assert "io" not in label.values()  # the many functions of scipy.io.matlab are not its own


def test_every_class_keeps_its_share_in_every_split(tables):
    total = Counter(label for _, label in rows(tables))
    for name, share in (("train", 0.74), ("validation", 0.06), ("test", 0.20)):
        part = Counter(tables[name].label)
        assert part.keys() == total.keys()
        for label, count in total.items():
            assert part[label] == pytest.approx(share * count, abs=2)


def test_no_text_occurs_twice(tables):
    found = Counter(fingerprint(text) for text, _ in rows(tables))
    assert max(found.values()) == 1


def test_texts_are_plain_and_of_bounded_length(tables):
    for text, _ in rows(tables):
        assert module.MIN_CHARACTERS <= len(text) <= module.MAX_CHARACTERS
        assert text == " ".join(text.split())
        assert not re.search(r"`|::|:\w+:|\]_|>>>|^\.\. | \.\. ", text), text


def test_no_text_gives_its_label_away_by_an_import_path(tables):
    labels = "|".join(set(tables["train"].label))
    path = rf"scipy\.|\bnumpy\.|\bnp\.|(?<![\w.])(?:{labels})\.[A-Za-z_]|import (?:{labels})\b"
    for text, _ in rows(tables):
        assert not re.search(path, text), text


def test_same_in_every_process(tables):
    code = (
        "import hashlib, warnings; warnings.simplefilter('error')\n"
        "from jpeft.data.builtin import builtin\n"
        "print(hashlib.sha256(repr(builtin()).encode()).hexdigest())"
    )
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == hashlib.sha256(repr(tables).encode()).hexdigest()
        assert run.stderr == ""


def test_splits_know_it_by_name(tables, monkeypatch):
    monkeypatch.setattr(module, "builtin", lambda: tables)  # not to build it a second time
    assert splits("builtin") is tables


@pytest.mark.parametrize(
    ("doc", "text"),
    [
        ("gamma(x, out=None)\n\nThe gamma function.\n\nParameters\n----------\nx : array", "gamma(x, out=None) The gamma function."),
        ("Filter, see :func:`~scipy.signal.lfilter` and :mod:`scipy.signal`.", "Filter, see lfilter and SciPy."),
        ("Like `scipy.sparse.linalg.eigs` or linalg.eig(a).", "Like eigs or eig(a)."),
        ("Write ``from scipy import stats`` first.", "Write from SciPy first."),
        ("Write ``import scipy.stats as s`` first.", "Write from SciPy as s first."),
        ("Needs :math:`n << d` [1]_, see `the page <https://example.org>`_.", "Needs n << d, see the page."),
        ("Old.\n\n.. deprecated:: 1.2\n.. math:: x = y\n\nFor example:\n\n>>> f(1)", "Old. x = y For example:"),
        ("Neighbours.\n\n:type: *ndarray of ints*\n\n:math:`k` of them.", "Neighbours. k of them."),
        ("See :ref:`linalg_batch` for details.", "See batch for details."),
        ("The signal. Sparse stats", "The signal. Sparse stats"),
        ("f(x)", "f(x)"),
    ],
)
def test_clean(doc, text):
    assert clean(doc, NAMES) == text


def test_clean_cuts_at_a_sentence_or_else_at_a_word():
    sentence = "A sentence of thirty characters"
    cut = clean(". ".join([sentence] * 20), NAMES)
    assert len(cut) <= 400
    assert cut.endswith(sentence + ".")
    cut = clean(" ".join(["longword"] * 100), NAMES)
    assert 390 < len(cut) <= 400
    assert set(cut.split()) == {"longword"}
    assert clean("x" * 500, NAMES) == "x" * 400


def test_texts_of_two_subpackages_and_small_classes_are_dropped(monkeypatch):
    long = "Paragraph number {} of this module."
    docs = [("signal", long.format(i)) for i in range(40)] + [("stats", long.format(i)) for i in range(1, 60)]
    docs += [("stats", f"Other text {i} of this module.") for i in range(39)] + [("signal", "Too short.")]
    docs += [("stats", "Other, TEXT 3 of this module")]  # once more, but for case and punctuation
    monkeypatch.setattr(module, "_docstrings", lambda: (NAMES, docs))
    table = paragraphs()  # signal keeps number 0 only; stats keeps 40 ... 59 and 39 others
    assert Counter(table.label) == {"stats": 59}
    # Of two spellings the first by code point stays: " " comes before ",".
    assert "Other text 3 of this module." in table.text
    assert "Other, TEXT 3 of this module" not in table.text
    assert table.text == sorted(table.text)


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r'pip install "jpeft\[demo\]"'):
        paragraphs()

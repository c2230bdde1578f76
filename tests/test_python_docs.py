"""The built-in texts for generation, and the decoder that is made of them."""

import ast
import re

import numpy as np
import pytest

import jpeft.models
from jpeft.data import fingerprint, python_docs, splits
from jpeft.data.python_docs import docs, reference, summaries
from jpeft.training import small_decoder
from jpeft.training.config import TrainConfig
from jpeft.training.small_decoder import Recipe, decoder
from jpeft.training.train import train

TINY = Recipe(packages=("optax",), vocabulary=300, layers=1, width=16, heads=2, length=32, steps=3, batch_size=2)


def texts(tables):
    return [text for table in tables.values() for text in table.text]


def test_docs_are_prose_and_distinct():
    found = texts(docs(("optax",)))
    assert len(found) > 200
    assert len({fingerprint(text) for text in found}) == len(found)
    assert all(len(text) >= python_docs.MIN_CHARACTERS and ">>>" not in text for text in found)
    assert docs(("optax",))["train"].target is None
    with pytest.raises(ValueError, match="docstrings of no_such_package, which is not installed"):
        docs(("no_such_package",))


def test_no_test_paragraph_of_the_reference_is_in_training():
    tables = reference()
    assert all(len(table) > 10 for table in tables.values())
    assert max(map(len, texts(tables))) < 20 * python_docs.SECTION
    paragraphs = {name: {fingerprint(p) for text in table.text for p in re.split(r"\n\s*\n", text)} for name, table in tables.items()}
    assert paragraphs["train"].isdisjoint(paragraphs["test"] | paragraphs["validation"])
    assert any("context manager" in text for text in tables["train"].text)


def test_summaries_are_pairs_of_head_and_first_line():
    tables = summaries()
    rows = {text: target for table in tables.values() for text, target in zip(table.text, table.target, strict=True)}
    assert len(rows) == len(texts(tables)) > 2000
    assert rows['# textwrap\ndef dedent(text):\n    """'] == "Remove any common leading whitespace from every line in `text`."
    for text, target in list(rows.items())[::50]:
        assert text.startswith("# ")
        (function,) = ast.parse(text + '"""').body
        assert isinstance(function, ast.FunctionDef)
        assert "\n" not in target
        assert target == target.strip()


def test_builtin_names():
    assert splits("builtin:reference")["test"].text == reference()["test"].text
    with pytest.raises(
        ValueError, match=r"There is no built-in data 'builtin:refrence'; there are builtin, builtin:docs, .*builtin:summaries"
    ):
        splits("builtin:refrence")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache folder, and a decoder made there by a first call that crashed in training and a second one."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_decoder, "train", lambda config: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder(TINY, cache=cache, progress="none")
    return cache, decoder(TINY, cache=cache, progress="none")


def test_the_decoder_is_an_ordinary_folder(made):
    loaded = jpeft.models.load(made[1], task="causal-lm")
    assert not loaded.initialised
    assert not loaded.unused
    assert loaded.config.vocab_size == len(loaded.tokenizer) == 300
    text = "Any text, a naïve “one” too:\n    def f(x): ...\n"
    ids = loaded.tokenizer(text)["input_ids"]
    assert loaded.tokenizer.decode(ids) == text
    assert loaded.tokenizer.eos_token_id == loaded.config.eos_token_id
    # Trained: no longer what it started from.
    start = jpeft.models.load(made[1].parents[1] / "start", task="causal-lm")
    assert np.abs(loaded.params["transformer"]["wte"]["embedding"] - start.params["transformer"]["wte"]["embedding"]).max() > 1e-4


def test_the_decoder_is_made_once(made, monkeypatch):
    cache, folder = made
    monkeypatch.setattr(small_decoder, "train", lambda config: 1 / 0)
    monkeypatch.setenv("JPEFT_CACHE", str(cache))
    assert decoder(TINY) == folder
    with pytest.raises(ZeroDivisionError):
        decoder(Recipe(**{**vars(TINY), "seed": 1}), progress="none")


def test_the_decoder_can_be_adapted(made, tmp_path):
    same = {"task": "generation", "method": "bitfit", "max_length": 16, "batch_size": 4, "steps": 2, "progress": "none"}
    result = train(TrainConfig(model=str(made[1]), output=str(tmp_path / "run"), data="builtin:reference", **same))
    assert 1 < result.test["perplexity"] < 2000

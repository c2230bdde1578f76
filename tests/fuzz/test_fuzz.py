"""A small share of `make fuzz` with fixed seeds, and what it found."""

import csv
import json
import warnings

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tiny_text import make_model

import jpeft
from fuzz import rows, values
from fuzz.campaign import Campaign
from fuzz.folders import World
from fuzz.mutations import Unchanged
from fuzz.table import write
from fuzz.verdict import judge
from fuzz.watch import Seen, watch

SHARE = 12  # mutations of folders, data and options
# What failed once: the target, the operation, the file, the kind of damage and its seed.
FOUND = (
    ("tokenizer", "encode", "tokenizer.json", "cut", 0),
    ("tokenizer", "encode", "tokenizer.json", "folder", 0),
    ("tokenizer", "encode", "tokenizer_config.json", "JSON deep", 0),
    ("tokenizer, BPE", "encode", "tokenizer_config.json", "dangling", 0),
    ("tokenizer, BPE", "encode", "tokenizer.json", "JSON huge number", 0),
    ("tokenizer, vocab.txt", "encode", "vocab.txt", "empty", 0),
    ("model, shards", "load", "tokenizer_config.json", "loop", 0),
    ("model, Llama", "load", "config.json", "JSON deep", 0),
    ("model, Llama", "load", "config.json", "JSON number", 19),
    ("model, Llama", "load", "config.json", "JSON value", 5),
    ("model, Llama", "load", "model.safetensors", "swapped with another", 0),
    ("base of a run", "merge", "tokenizer.json", "JSON values exchanged", 3),
    ("base of a run", "predict", "config.json", "JSON number", 4),
    ("data of a run", "eval", "data.csv", "zeros", 3),
    ("run", "summary", "config.json", "JSON deep", 0),
    ("adapter", "load", "jpeft.json", "JSON value", 1),
    ("adapter", "load", "jpeft.json", "JSON key removed", 5),
    ("adapter of a prompt", "load", "jpeft.json", "swapped with another", 0),
    ("unfinished run", "resume", "checkpoints/2", "linked", 0),
    ("unfinished run", "resume", "config.json", "pipe", 0),
    ("unfinished run", "resume", "metrics.jsonl", "pipe", 0),
    ("unfinished run", "resume", "metrics.jsonl", "missing", 0),
    ("unfinished run", "resume", "metrics.jsonl", "cut", 0),
    ("unfinished run", "resume", "checkpoints/2/checksums.json", "pipe", 0),
    ("run", "read back", "result.json", "pipe", 0),
    ("unfinished run", "resume", "checkpoints/2", "stranger", 0),
)

settings = hypothesis.settings(
    derandomize=True, deadline=None, database=None, max_examples=40, suppress_health_check=list(hypothesis.HealthCheck)
)


@pytest.mark.slow
def test_a_share_of_the_mutations(tmp_path):
    campaign = Campaign(World(tmp_path / "world"), seed=1)
    cases = [campaign.run(number) for number in range(SHARE)]
    failures = [f"{case.number}: {case.target}, {case.about}: {case.verdict}" for case in cases if not case.verdict.right]
    assert not failures
    assert campaign.run(3) == cases[3]
    found = [campaign.repeat(*one) for one in FOUND]
    assert not [f"{one}: {case.verdict}" for one, case in zip(FOUND, found) if not case.verdict.right]


# --- data -------------------------------------------------------------------------------------------------------------

# Everything that UTF-8 can hold, and often what has a meaning in some format.
texts = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20),
    st.text("ab \",;\t\n\r'\\|{}[]:#=", min_size=1, max_size=20),
).filter(str.strip)
labels = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=5).map(str.strip).filter(bool)


@pytest.mark.parametrize("suffix", [suffix for suffix in rows.WRITERS if suffix not in (".txt", ".tsv")])
def test_what_is_written_is_read(suffix, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / f"rows{suffix}"

    # Python's writer leaves a lone carriage return without quotation marks unless all fields have them.
    style = {"quoting": csv.QUOTE_ALL} if suffix == ".csv" else {}

    @settings
    @hypothesis.given(st.lists(st.tuples(texts, labels), min_size=1, max_size=6))
    def check(table):
        path.write_bytes(rows.WRITERS[suffix](table, **style))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert rows.read(path) == table

    check()


numbers = st.one_of(st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([1.0, 0.0, -1.0, 1e16]))


def test_every_format_reads_labels_alike(tmp_path_factory):
    """A column of numbers or truth values gives the same labels in every format, or is refused by all."""
    folder = tmp_path_factory.mktemp("typed")

    @settings
    @hypothesis.given(
        st.one_of(*(st.lists(kind, min_size=2, max_size=4) for kind in (st.integers(-(2**60), 2**60), st.booleans(), numbers)))
    )
    def check(column):
        column = [type(column[0])(value) for value in column]  # Parquet has one type a column
        found = rows.read_alike(folder, [(f"text {row}", value) for row, value in enumerate(column)])
        assert len({json.dumps(one) for one in found.values()}) == 1, found

    check()


def test_a_text_beside_lists_of_words_stays_as_it_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": ["a", "film"], "label": "x"}\n{"text": "two  spaces ", "label": "y"}\n')
    assert rows.read(path) == [("a film", "x"), ("two  spaces ", "y")]


@pytest.mark.parametrize("suffix", list(rows.WRITERS))
def test_damage_stays_where_it_is(suffix, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    failures = []
    for kind in rows.KINDS:
        for seed in range(4):
            try:
                about, verdict = rows.judge_damage(tmp_path, suffix, kind, np.random.default_rng([7, seed]), tmp_path)
            except Unchanged:
                continue
            failures += [] if verdict.right else [f"{kind}: {about}: {verdict}"]
    assert not failures


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return jpeft.models.load(make_model(tmp_path_factory.mktemp("options") / "model"), num_labels=2)


@pytest.mark.parametrize("method", list(jpeft.methods()))
def test_every_option_takes_what_it_should(method, loaded, tmp_path):
    """Every kind of value for every option of every method."""
    failures = []
    rng = np.random.default_rng(0)
    for option in jpeft.methods()[method].factory.__signature__.parameters:
        for kind, named in values.VALUES.items():
            name = list(named)[rng.integers(len(named))]
            verdict = values.judge_option(method, option, named[name], loaded.params, loaded.model.apply, tmp_path)
            failures += [] if verdict.right else [f"{option} is {kind}, {name}: {verdict}"]
    assert not failures


# --- the oracle -------------------------------------------------------------------------------------------------------


def test_the_oracle_tells_failures(tmp_path):
    failed = Seen(kind="ValueError", error="x.json is damaged.")
    for seen, expected, outcome in (
        (Seen(value=1), 1, "same"),
        (Seen(value=2), 1, "silent"),
        (Seen(value=2, output="warning: x.json has changed\n"), 1, "said"),
        (Seen(value=2, output="warning: something has changed\n"), 1, "silent"),
        (failed, 1, "refused"),
        (Seen(kind="ValueError", error="A file is damaged."), 1, "unnamed"),
        (Seen(kind="ValueError", error="x.json:\nis damaged."), 1, "many lines"),
        (Seen(kind="KeyError", error="x.json"), 1, "traceback"),
        (Seen(value=1, output="Traceback (most recent call last):\n"), 1, "traceback"),
        (Seen(kind="CommandFailed", error="error: x.json is damaged.\n"), 1, "refused"),
        (Seen(kind="CommandFailed", error="error: x.json is damaged.\nsorry\n"), 1, "many lines"),
        (Seen(value=1, changed=("run/new",)), 1, "left over"),
        (Seen(value=1, changed=("out/.new",), appeared=("out/.new",)), 1, "left over"),
        (Seen(value=1, changed=("out/new",)), 1, "same"),
    ):
        assert judge(seen, expected, [r"x\.json"], writes="out/.*").outcome == outcome, seen
    said = Seen(value=2, output="note: x.json is read\n")
    assert judge(said, 1, ["x.json"]).outcome == "said"
    assert judge(said, 1, ["x.json"], usual=said.output).outcome == "silent"
    assert judge(failed, 1, [r"x\.json"], needless=True).outcome == "blocked"
    assert judge(Seen(value=2), 1, [], explain=lambda value: "the file says so").outcome == "as it says"


def test_what_is_watched(tmp_path):
    def operation():
        print("printed")
        (tmp_path / "new").write_text("")
        warnings.warn("careful", stacklevel=2)
        raise KeyError("x")

    seen = watch(operation, tmp_path)
    assert (seen.kind, seen.changed) == ("KeyError", ("new",))
    assert "printed" in seen.output
    assert "warning: careful" in seen.output

    def hang():
        while True:
            pass

    assert watch(hang, tmp_path, seconds=0.1).kind == "TooLong"


def test_the_table(tmp_path):
    case = {"number": 1, "target": "run", "group": "config.json", "kind": "bit", "operation": "eval", "about": "bit 3", "why": ""}
    assert write(tmp_path / "table.md", [case | {"outcome": "same"}, case | {"outcome": "silent", "number": 2}], seed=5) == 1
    text = (tmp_path / "table.md").read_text()
    assert "2 mutations with seed 5" in text
    assert "| run: config.json | 2 | 1 | 0 | 0 | 0 | 1 |" in text
    assert "* 2: run, bit 3: silent" in text

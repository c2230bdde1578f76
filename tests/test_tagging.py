"""Token classification as a task: the first token of each word, spans and their F1, and the command line."""

import json
import random

import datasets
import numpy as np
import pytest
from test_data import hub  # noqa: F401  (a fixture)
from tiny_text import WORDS, make_model, make_rows
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jpeft.cli import main
from jpeft.data import Table, read, splits
from jpeft.tasks import tagging
from jpeft.tasks.cross_entropy import IGNORE
from jpeft.tasks.tagging import spans
from jpeft.training.run import load_run

KIND = {word: f"B-{kind}" for kind, words in WORDS.items() for word in words}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny encoder, and words with a tag for each kind of thing; a run of LoRA."""
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model", dropout=0.0)
    rows = [{"tokens": text.split(), "tags": [KIND.get(word, "O") for word in text.split()]} for text, _ in make_rows(90)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*flags(folder, folder / "run"), "--steps", "120"]) == 0
    return folder


def flags(world, output):
    where = ["--model", str(world / "model"), "--data", str(world / "data.jsonl"), "--output", str(output), "--text", "tokens"]
    learning = ["--learning-rate", "0.02", "--batch-size", "16", "--method", "lora", "rank=4"]
    return ["train", *where, "--task", "token-classification", "--max-length", "10", "--progress", "none", *learning]


def pieces():
    """Words of one token, but "ab" of two."""
    core = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(("[PAD]", "[CLS]", "[SEP]", "a", "##b", "c", "[UNK]"))}, unk_token="[UNK]")
    )
    core.normalizer = normalizers.BertNormalizer(lowercase=False)  # drops characters without width
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def test_the_first_token_of_a_word_stands_for_it():
    table = Table(text=["ab c a", "c"], words=[["ab", "c", "a"], ["c"]], tags=[["X", "O", "X"], ["O"]])
    arrays = tagging.encode(table, pieces(), labels=("O", "X"), max_length=6)
    assert arrays["input_ids"].tolist() == [[1, 3, 4, 5, 3, 2], [1, 5, 2, 0, 0, 0]]
    i = IGNORE
    assert arrays["label"].tolist() == [[i, 1, i, 0, 1, i], [i, 0, i, i, i, i]]
    assert arrays["first"].tolist() == [[1, 3, 4, -2, -2, -2], [1, -2, -2, -2, -2, -2]]
    assert arrays["tags"].tolist() == [[1, 0, 1, i, i, i], [0, i, i, i, i, i]]
    cut = tagging.encode(table, pieces(), labels=("O", "X"), max_length=5)
    assert cut["label"].tolist() == [[i, 1, i, 0, i], [i, 0, i, i, i]]  # the third word did not fit
    plain = tagging.encode(Table(text=["ab c"]), pieces(), labels=None, max_length=5)
    assert "label" not in plain
    assert tagging.tags_of(np.array([[0, 1, 0, 0, 1]]), plain["first"], ("O", "X")) == [["X", "O"]]
    with pytest.raises(ValueError, match="Unknown tag 'X': the model knows 'O'"):
        tagging.encode(table, pieces(), labels=("O",), max_length=6)
    with pytest.raises(ValueError, match="The table has no tags"):
        tagging.encode(Table(text=["a"]), pieces(), labels=("O",), max_length=6)


def test_spans_follow_conlls_script():
    assert spans(["O", "B-A", "I-A", "I-A", "O", "I-B", "I-A", "B-A"]) == [(1, 4, "A"), (5, 6, "B"), (6, 7, "A"), (7, 8, "A")]
    assert spans(["NOUN", "NOUN", "O", "VERB"]) == [(0, 1, "NOUN"), (1, 2, "NOUN"), (3, 4, "VERB")]
    assert spans(["B-A", "O", "I-A"]) == [(0, 1, "A"), (2, 3, "A")]


def test_metrics_by_hand():
    labels = ("O", "B-A", "I-A")
    i = IGNORE
    truth = np.array([[i, 1, 2, 0, 1], [i, 0, 1, i, i]])
    guess = np.array([[0, 1, 2, 1, 0], [2, 0, 1, 1, 1]])  # what is guessed where nothing is asked does not count
    scores = {"loss": np.array([3.0, 1.0], np.float32), "count": np.array([4.0, 2.0], np.float32), "predicted": guess}
    found = tagging.metrics(scores, {"label": truth}, labels)
    # Right: two of three spans predicted, and of three there are.
    assert found == {"loss": pytest.approx(4 / 6), "accuracy": pytest.approx(4 / 6), "f1": pytest.approx(2 / 3)}


# --- schemes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("I-A I-A B-A O I-B", [(0, 2, "A"), (2, 3, "A"), (4, 5, "B")]),  # IOB1
        ("B-A I-A B-A O B-B", [(0, 2, "A"), (2, 3, "A"), (4, 5, "B")]),  # IOB2
        ("B-A I-A E-A S-A S-B O", [(0, 3, "A"), (3, 4, "A"), (4, 5, "B")]),  # IOBES
        ("B-A I-A L-A U-A U-B O", [(0, 3, "A"), (3, 4, "A"), (4, 5, "B")]),  # BILOU
        ("B-A M-A E-A S-A O", [(0, 3, "A"), (3, 4, "A")]),  # BMES
        ("B-A E-A E-A I-A S-A I-A O", [(0, 2, "A"), (2, 3, "A"), (3, 4, "A"), (4, 5, "A"), (5, 6, "A")]),  # against the rules
        ("B-A E-B I-B O E-A", [(0, 1, "A"), (1, 2, "B"), (2, 3, "B"), (4, 5, "A")]),
        ("B I O B B I", [(0, 2, ""), (3, 4, ""), (4, 6, "")]),
        ("B_A I_A O", [(0, 2, "A")]),
        ("NOUN NOUN X", [(0, 1, "NOUN"), (1, 2, "NOUN"), (2, 3, "X")]),
        ("0 1 2 0", [(1, 2, "1"), (2, 3, "2")]),
    ],
)  # fmt: skip
def test_spans_of_every_scheme(tags, expected):
    assert spans(tags.split()) == expected
    cut = [*tags.split()[:1], None]  # a word without a tag is outside
    assert spans(cut, tags.split()) == ([(0, 1, expected[0][2])] if expected[0][0] == 0 else [])


@pytest.mark.parametrize(("letters", "expected"), [("BI", 0.7082990961380443), ("BIES", 0.7264086897488119)])
def test_f1_is_that_of_seqeval(letters, expected):
    """Of random tags, most of them against the rules of the scheme; the numbers are those of seqeval 1.2.2, `f1_score(true, predicted)`."""
    names = ["O", *(f"{letter}-{kind}" for letter in letters for kind in "XY")]
    draw, change = random.Random(1), random.Random(2)
    true = [[draw.choice(names) for _ in range(draw.randint(1, 8))] for _ in range(200)]
    guessed = [[tag if change.random() < 0.7 else change.choice(names) for tag in row] for row in true]
    number = lambda rows: np.array([[names.index(tag) for tag in row] + [IGNORE] * (8 - len(row)) for row in rows])
    scores = {"loss": np.zeros(1), "count": np.ones(1), "predicted": number(guessed)}
    assert tagging.metrics(scores, {"label": number(true)}, names)["f1"] == pytest.approx(expected, rel=1e-12)


def test_tags_of_which_none_is_outside_are_refused():
    table = lambda *tags: Table(text=["x"], words=[["x"] * len(tags)], tags=[list(tags)])
    with pytest.raises(ValueError, match=r"The tags 0, 1 are numbers and none is 'O'.*with `tag_names`, such as O B-PER I-PER"):
        tagging.tag_names(table("0", "1"))
    with pytest.raises(ValueError, match=r"Tags such as 'B-X' mark spans of words, others such as '_' do not, and none is 'O'"):
        tagging.tag_names(table("B-X", "_", "I-X"))
    assert tagging.tag_names(table("NOUN", "VERB")) == ("NOUN", "VERB")
    assert tagging.tag_names(table("S-X", "S-Y")) == ("S-X", "S-Y")
    assert tagging.tag_names(table("1", "O")) == ("O", "1")


# --- words without a token --------------------------------------------------------------------------------------------


def test_every_word_has_a_tag_or_none_and_counts(tmp_path):
    """A zero-width space gives no token; the last two words do not fit."""
    words, names = ["a", "\u200b", "ab", "c", "c"], ("O", "B-X", "I-X")
    table = Table(text=["x"], words=[words], tags=[["B-X", "I-X", "O", "B-X", "I-X"]]).named("test")
    with pytest.warns(UserWarning) as said:
        arrays = tagging.encode(table, pieces(), labels=names, max_length=5)
    assert [str(warning.message) for warning in said] == [
        "test: 1 of 1 texts are longer than max_length=5 tokens and were cut; words without a tag, which count as wrong in metrics: 2.",
        "test: words that give no token and get no tag, which count as wrong in metrics: 1, in row 1.",
    ]
    assert arrays["input_ids"].tolist() == [[1, 3, 3, 4, 2]]
    assert arrays["first"].tolist() == [[1, -1, 2, -1, -1]]
    perfect = np.where(arrays["label"] == IGNORE, 0, arrays["label"])
    assert tagging.tags_of(perfect, arrays["first"], names) == [["B-X", None, "O", None, None]]
    scores = {"loss": np.zeros(1), "count": np.full(1, 2.0), "predicted": perfect}
    # One span predicted, of one word instead of two; two spans are there.
    assert tagging.metrics(scores, arrays, names) == {"loss": 0.0, "accuracy": pytest.approx(2 / 5), "f1": 0.0}
    with pytest.warns(UserWarning, match="give no token"):
        nothing = tagging.encode(Table(text=["x"], words=[["\u200b"]], tags=[["O"]]), pieces(), labels=names, max_length=5)
    assert nothing["first"][0].tolist() == [-1, -2, -2, -2, -2]
    empty = {"loss": np.zeros(1), "count": np.zeros(1), "predicted": np.zeros((1, 5), int)}
    assert tagging.metrics(empty, nothing, names)["accuracy"] == 0


def test_more_words_than_tokens():
    table = Table(text=["x", "y"], words=[["a"] * 13, ["c"]], tags=[["O"] * 12 + ["B-X"], ["O"]])
    with pytest.warns(UserWarning, match=r"were cut; words without a tag, which count as wrong in metrics: 10\."):
        arrays = tagging.encode(table, pieces(), labels=("O", "B-X"), max_length=5)
    assert arrays["first"].shape == arrays["tags"].shape == (2, 15)
    assert [len(row) for row in tagging.tags_of(arrays["input_ids"] * 0, arrays["first"], ("O", "B-X"))] == [13, 1]


def test_earlier_runs_know_their_data():
    """The columns that are fingerprinted are those of versions that marked the first token of each word by a 1."""
    task = tagging.TokenClassification()
    arrays = task.encode(Table(text=["x"], words=[["ab", "c"]], tags=[["O", "X"]]), pieces(), labels=("O", "X"), max_length=6)
    identity = task.identity(arrays)
    assert identity.keys() == arrays.keys() - {"tags"}
    assert identity["first"].tolist() == [[0, 1, 0, 1, 0, 0]]
    assert identity["first"].dtype == np.int32


# --- reading ----------------------------------------------------------------------------------------------------------


def test_tags_that_are_numbers_have_names(tmp_path):
    names = ("O", "B-P")
    (tmp_path / "a.jsonl").write_text('{"text": ["Ada", "sings"], "tags": [1, 0.0]}\n{"text": ["Ada"], "tags": ["B-P"]}\n')
    assert read(tmp_path / "a.jsonl", label=None, tags="tags", tag_names=names).tags == [["B-P", "O"], ["B-P"]]
    (tmp_path / "a.csv").write_text("text,tags\nAda sings,1 0\nAda,2\n")
    with pytest.raises(ValueError, match=r"a\.csv: the tag '2' in column 'tags' of row 2 \(line 3\) is neither .* O, B-P nor .* 0 to 1"):
        read(tmp_path / "a.csv", label=None, tags="tags", tag_names=names)
    (tmp_path / "a.csv").write_text("""text,tags\nAda sings,"['B-P', 'O']"\n""")
    with pytest.raises(ValueError, match=r"column 'tags' holds a list that is written as text in row 1 \(line 2\): save lists as JSONL"):
        read(tmp_path / "a.csv", label=None, tags="tags")
    for tags, message in (([0.5], "each a name or a whole number"), (None, "none of them empty"), ({"a": 1}, "holds dict instead of")):
        (tmp_path / "b.jsonl").write_text(json.dumps({"text": ["Ada"], "tags": tags}) + "\n")
        with pytest.raises(ValueError, match=message + r".* in row 1 \(line 1\)"):
            read(tmp_path / "b.jsonl", label=None, tags="tags")


def test_tags_of_the_hub_have_the_names_of_their_features(hub):  # noqa: F811
    def split(tags):
        features = datasets.Features(
            {"w": datasets.List(datasets.Value("string")), "t": datasets.List(datasets.ClassLabel(names=["O", "B"]))}
        )
        return datasets.Dataset.from_dict({"w": [[f"a{i}", "b"] for i in range(len(tags))], "t": tags}, features=features)

    hub["x"] = datasets.DatasetDict(train=split([[0, 1]] * 20), validation=split([[1, 0]]), test=split([[-1, -1]]))
    tables = splits("hub:x", text="w", label=None, tags="t")
    assert tables["validation"].tags == [["B", "O"]]
    assert len(tables["test"]) == 2  # hidden tags: the split comes out of the training rows
    assert splits("hub:x", text="w", label=None, tags="t", tag_names=("O", "B-X"))["validation"].tags == [["B-X", "O"]]


def test_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tokens": ["Ada", "sings"], "ner": ["B-P", 0]}\n')
    assert read(tmp_path / "a.jsonl", text="tokens", label=None, tags="ner") == Table(
        text=["Ada sings"], words=[["Ada", "sings"]], tags=[["B-P", "0"]]
    )
    (tmp_path / "a.csv").write_text("text,tags\nAda sings,B-P O\n")
    assert read(tmp_path / "a.csv", label=None, tags="tags").tags == [["B-P", "O"]]
    (tmp_path / "b.csv").write_text("text,tags\nAda,O\nAda sings,B-P\n")
    with pytest.raises(ValueError, match="as many tags in column 'tags' as words in column 'text' are needed; not so in row 2"):
        read(tmp_path / "b.csv", label=None, tags="tags")
    (tmp_path / "c.jsonl").write_text('{"text": ["Ada", null], "tags": ["O", "O"]}\n')
    with pytest.raises(ValueError, match="column 'text' must hold lists of words, none of them empty; not so in row 1"):
        read(tmp_path / "c.jsonl", label=None, tags="tags")


@pytest.mark.filterwarnings("always:.* of [0-9]+ texts:UserWarning")
def test_train_eval_predict(world, tmp_path, capfd):
    run = load_run(world / "run")
    assert run.labels == ("O", "B-fruit", "B-metal", "B-water")
    result = json.loads((world / "run" / "result.json").read_text())
    assert result["best"] > 0.6  # chance is nothing: spans must be found and told apart
    capfd.readouterr()
    assert main(["eval", str(world / "run")]) == 0
    head, row = capfd.readouterr().out.splitlines()
    assert head.split() == ["split", "loss", "accuracy", "f1"]
    assert float(row.split()[-1]) == pytest.approx(result["test"]["f1"], abs=1e-4)

    texts = ["the apple here", "old iron seen by some lake"]
    assert main(["predict", str(world / "run"), "--text", *texts]) == 0
    shown = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [len(line["tags"]) for line in shown] == [3, 6]
    long = ["the " * 9 + "apple"]
    assert main(["predict", str(world / "run"), "--text", *long]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["tags"][-2:] == [None, None]
    assert "warning: --text: 1 of 1 texts are longer than max_length=10 tokens and were cut; words without a tag" in said.err
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"tokens": text.split()}) + "\n" for text in texts))
    assert main(["predict", str(world / "run"), "--input", str(tmp_path / "in.jsonl")]) == 0
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == shown


def test_errors(world, tmp_path, fails):
    run = flags(world, tmp_path / "run")
    assert "no column 'ner'" in fails(*run, "--tags", "ner")
    (tmp_path / "one.jsonl").write_text('{"tokens": ["a"], "tags": ["O"]}\n' * 3 + '{"tokens": ["b"], "tags": ["O"]}\n' * 3)
    assert "different texts" in fails(*run, "--data", tmp_path / "one.jsonl")
    rows = [{"tokens": ["the", f"w{i}"], "tags": [0, 1]} for i in range(40)]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "none is 'O'" in fails(*run, "--data", tmp_path / "numbers.jsonl")
    assert "--tag-names must be different names" in fails(
        *run, "--data", tmp_path / "numbers.jsonl", "--tag-names", "O", "O", "--epochs", "1"
    )
    assert "no use for --tag-names" in fails(*run, "--task", "sequence-classification", "--tag-names", "O", "B", "--epochs", "1")
    assert "The table has no tags to train on" in fails(*run, "--data", "builtin")
    assert "--max-new-tokens: only for a model that generates text" in fails(
        "predict", world / "run", "--text", "a", "--max-new-tokens", "3"
    )

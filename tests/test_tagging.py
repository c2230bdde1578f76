"""Token classification as a task: the first token of each word, spans and their F1, and the command line."""

import json

import numpy as np
import pytest
from test_cli import fails  # noqa: F401  (a fixture)
from tiny_text import WORDS, make_model, make_rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jpeft.cli import main
from jpeft.data import Table, read
from jpeft.tasks import tagging
from jpeft.tasks.cross_entropy import IGNORE
from jpeft.tasks.tagging import spans
from jpeft.training.run import open_run

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
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def test_the_first_token_of_a_word_stands_for_it():
    table = Table(text=["ab c a", "c"], words=[["ab", "c", "a"], ["c"]], tags=[["X", "O", "X"], ["O"]])
    arrays = tagging.encode(table, pieces(), labels=("O", "X"), max_length=6)
    assert arrays["input_ids"].tolist() == [[1, 3, 4, 5, 3, 2], [1, 5, 2, 0, 0, 0]]
    i = IGNORE
    assert arrays["label"].tolist() == [[i, 1, i, 0, 1, i], [i, 0, i, i, i, i]]
    assert arrays["first"].tolist() == [[0, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0]]
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


def test_train_eval_predict(world, tmp_path, capfd):
    run = open_run(world / "run")
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
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"tokens": text.split()}) + "\n" for text in texts))
    assert main(["predict", str(world / "run"), "--input", str(tmp_path / "in.jsonl")]) == 0
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == shown


def test_errors(world, tmp_path, fails):  # noqa: F811
    run = flags(world, tmp_path / "run")
    assert "no column 'ner'" in fails(*run, "--tags", "ner")
    (tmp_path / "one.jsonl").write_text('{"tokens": ["a"], "tags": ["O"]}\n' * 3 + '{"tokens": ["b"], "tags": ["O"]}\n' * 3)
    assert "different texts" in fails(*run, "--data", tmp_path / "one.jsonl")
    assert "The table has no tags to train on" in fails(*run, "--data", "builtin")
    assert "max_new_tokens: only for a model that generates text" in fails("predict", world / "run", "--text", "a", "--max-new-tokens", "3")

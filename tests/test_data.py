import json
import pickle
import re
import sys
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jpeft.data import (
    Table,
    batches,
    encode,
    eval_batches,
    fingerprint,
    label_names,
    read,
    split_table,
    splits,
    steps_per_epoch,
)

TEXTS = ["good, really", 'he said "no"', "NA", "null", "007"]
LABELS = ["1", "0", "1", "0", "NA"]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def write_rows(path, columns):
    """The columns as a file of the suffix of `path`."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        sep = {".csv": ",", ".tsv": "\t"}[path.suffix]
        quoted = [sep.join('"' + str(v).replace('"', '""') + '"' for v in row.values()) for row in rows]
        write(path, "\n".join([sep.join(columns), *quoted, ""]))
    return path


def numbered(count, classes=("a", "b")):
    return Table(text=[f"text {i}" for i in range(count)], label=[classes[i % len(classes)] for i in range(count)])


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_read_gives_the_same_from_every_format(tmp_path, suffix):
    path = write_rows(tmp_path / f"x{suffix}", {"a": TEXTS, "b": TEXTS[::-1], "c": LABELS, "more": TEXTS})
    assert read(path, text="a", pair="b", label="c") == Table(TEXTS, TEXTS[::-1], LABELS)
    assert read(path, text="b", label=None) == Table(TEXTS[::-1], None, None)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_whole_numbers_become_strings(tmp_path, suffix):
    path = write_rows(tmp_path / f"x{suffix}", {"text": ["x", "y"], "label": [10, -2]})
    assert read(path).label == ["10", "-2"]


def test_read_skips_byte_order_marks_and_blank_lines_and_takes_any_case_of_suffix(tmp_path):
    assert read(write(tmp_path / "x.CSV", "\ufefftext,label\n\nä,b\n\n")) == Table(["ä"], None, ["b"])
    assert read(write(tmp_path / "x.jsonl", '\ufeff\n{"text": "ä", "label": true}\n\n')) == Table(["ä"], None, ["true"])


def test_a_quoted_text_may_hold_separators_and_line_ends(tmp_path):
    with pytest.warns(UserWarning, match=r"x\.csv: 1 quoted field holds both line ends and separators \(lines 2-3\)"):
        assert read(write(tmp_path / "x.csv", 'text,label\n"a,\nb",c\n')).text == ["a,\nb"]
    assert read(write(tmp_path / "y.csv", 'text,label\n"a\nb",c\n"a, b",c\n')).text == ["a\nb", "a, b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", None, "x.csv: no such file; data files in that folder: beside.csv"),
        ("x.xlsx", "", "x.xlsx: cannot read files ending in '.xlsx'; give one of .csv, .tsv, .jsonl, .json, .parquet"),
        ("x.csv", "", "x.csv: no rows"),
        ("x.csv", "text,label\n", "x.csv: no rows"),
        ("x.jsonl", "\n", "x.jsonl: no rows"),
        ("x.csv", "review,label\na,b\n", "no column 'text'; it has 'review', 'label'. Name the right one with `text`"),
        ("x.csv", "text,stars\na,b\n", "no column 'label'; it has 'text', 'stars'. Name the right one with `label`"),
        ("x.csv", "text,label\na,b\nc,\nd, \n", "no label in column 'label' of rows 2, 3 (lines 3, 4)"),
        ("x.csv", "text,label\na,b\n ,c\n", "no text in column 'text' of row 2 (line 3);"),
        ("x.csv", "text,label\na,b\nc, d,e\n", "x.csv, line 3: 3 fields under a header of 2 (text, label)"),
        ("x.csv", "text,label\na\n", "x.csv, line 2: 1 fields under a header of 2"),
        ("x.csv", 'text,label\n"a" b,c\n', "x.csv, line 2: ',' expected after '\"'"),
        ("x.csv", 'text,label\n"a,c\n', "x.csv, line 2: unexpected end of data"),
        ("x.csv", "text,text\na,b\n", "two columns of the same name in text, text"),
        ("x.jsonl", '{"text": "a", "label": "b"}\n\n{"text": \n', "x.jsonl, line 3: not JSON"),
        ("x.jsonl", '["a"]\n', "x.jsonl, line 1: expected an object"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "no label in column 'label' of row 2 (line 2);"),
        ("x.jsonl", '{"text": "a", "label": 0.5}\n', "must be a string or a whole number, got 0.5 in row 1"),
        ("x.jsonl", '{"text": "a", "label": Infinity}\n', "must be a string or a whole number, got inf in row 1"),
        ("x.jsonl", '{"text": {"a": 3}, "label": 1}\n', "column 'text' holds dict instead of text in row 1 (line 1)"),
        ("x.parquet", "text", "x.parquet: not a readable .parquet file"),
    ],
)
def test_read_errors_say_what_is_wrong_where(tmp_path, name, content, message):
    write(tmp_path / "beside.csv", "text,label\na,b\n")
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path / name)


def test_many_bad_rows_are_counted(tmp_path):
    path = write(tmp_path / "x.csv", "text,label\n" + "a,\n" * 13)
    with pytest.raises(ValueError, match="rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 3 more"):
        read(path)


def test_other_encodings_are_named(tmp_path):
    (tmp_path / "x.csv").write_bytes("text,label\nä,b\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.csv: not UTF-8"):
        read(tmp_path / "x.csv")


def test_parquet_labels_with_a_gap_are_unlabelled_not_floats(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"], "label": pa.array([1, None])}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no label in column 'label' of row 2"):
        read(tmp_path / "x.parquet")


def test_table_refuses_columns_of_different_lengths():
    with pytest.raises(ValueError, match=r"same length, got .*'text': 2, 'label': 1"):
        Table(text=["a", "b"], label=["c"])


# --- splitting ------------------------------------------------------------------------------------------------------


def test_split_keeps_shares_by_class():
    table = numbered(1000, "aaaaaaabbc")
    parts = split_table(table, validation=0.1, test=0.2)
    assert {name: len(part) for name, part in parts.items()} == {"train": 700, "validation": 100, "test": 200}
    assert Counter(parts["test"].label) == {"a": 140, "b": 40, "c": 20}
    assert Counter(parts["validation"].label) == {"a": 70, "b": 20, "c": 10}
    assert sorted(text for part in parts.values() for text in part.text) == sorted(table.text)


def test_split_does_not_depend_on_the_order_of_rows():
    table = numbered(200)
    there = split_table(table, validation=0.1, test=0.2)
    back = split_table(table.take(range(199, -1, -1)), validation=0.1, test=0.2)
    for name in there:
        assert back[name].text == there[name].text[::-1]
    assert there["test"].text != table.text[:40]  # a hash decides, not the place in the file


def test_equal_texts_stay_together():
    spellings = [f"Text {i}." for i in range(50)] + [f"text  {i}" for i in range(50)] + [f"text {i}" for i in range(50)]
    table = Table(text=spellings, label=["a"] * 50 + ["b"] * 50 + ["a"] * 50)
    parts = split_table(table, validation=0.2, test=0.2)
    where = {}
    for name, part in parts.items():
        assert len(part) > 0
        for text in part.text:
            where.setdefault(fingerprint(text), set()).add(name)
    assert len(where) == 50
    assert all(len(names) == 1 for names in where.values())


def test_a_pair_counts_as_one_text():
    table = Table(text=["same"] * 40, pair=[f"other {i}" for i in range(40)], label=["a", "b"] * 20)
    assert len(split_table(table, validation=0.1, test=0.1)["test"]) == 4


def test_every_class_keeps_a_training_text_and_a_large_one_does_not_pay_for_small_ones():
    table = Table(text=[f"text {i}" for i in range(130)], label=[f"rare {i}" for i in range(110)] + ["z"] * 20)
    parts = split_table(table, validation=0.1, test=0.1)
    assert set(parts["train"].label) == set(table.label)
    assert Counter(parts["test"].label) == {"z": 2}
    assert Counter(parts["validation"].label) == {"z": 2}


def test_small_classes_share_a_split():
    parts = split_table(numbered(20, "abcde"), validation=0.1, test=0.1)
    assert {name: len(part) for name, part in parts.items()} == {"train": 16, "validation": 2, "test": 2}


def test_split_without_labels():
    parts = split_table(Table(text=[f"text {i}" for i in range(10)]), validation=0.0, test=0.5)
    assert {name: len(part) for name, part in parts.items()} == {"train": 5, "validation": 0, "test": 5}
    assert parts["test"].label is None


def test_an_empty_split_is_an_error():
    with pytest.raises(ValueError, match="The test split would be empty: 4 different texts, test=0.1"):
        split_table(numbered(4), validation=0.25, test=0.1)


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.1), (0.5, 0.5), (0.0, 1.0)])
def test_split_refuses_impossible_shares(validation, test):
    with pytest.raises(ValueError, match="together less than 1"):
        split_table(numbered(10), validation=validation, test=test)


def test_splits_of_one_file(tmp_path):
    table = numbered(50)
    path = write_rows(tmp_path / "x.csv", {"text": table.text, "label": table.label})
    parts = splits(path, validation=0.2, test=0.1)
    assert parts == split_table(table, validation=0.2, test=0.1)
    assert splits(str(path), validation=0.2, test=0.1) == parts


def test_splits_of_a_folder(tmp_path):
    for name, start in (("train.jsonl", 0), ("dev.csv", 10), ("test.parquet", 20), ("notes.csv", 30)):
        write_rows(tmp_path / name, {"t": [f"text {start + i}" for i in range(10)], "l": list("ab") * 5})
    parts = splits(tmp_path, text="t", label="l")
    assert list(parts) == ["train", "validation", "test"]
    assert {name: part.text[0] for name, part in parts.items()} == {
        "train": "text 0",
        "validation": "text 10",
        "test": "text 20",
    }


def test_what_a_folder_lacks_comes_out_of_its_training_rows(tmp_path):
    train, test = numbered(50), numbered(4)
    write_rows(tmp_path / "train.csv", {"text": train.text, "label": train.label})
    write_rows(tmp_path / "test.csv", {"text": test.text, "label": test.label})
    parts = splits(tmp_path, validation=0.2, test=0.9)  # the share of the test is not needed
    assert parts["test"] == test
    assert (len(parts["train"]), len(parts["validation"])) == (40, 10)
    assert not set(parts["train"].text) & set(parts["validation"].text)


def test_splits_errors(tmp_path):
    with pytest.raises(ValueError, match=r'imdb: no such file or folder; .* "hub:name" or "builtin"'):
        splits("imdb")
    with pytest.raises(ValueError, match="no train file; it holds nothing"):
        splits(tmp_path)
    write(tmp_path / "test.csv", "text,label\na,b\n")
    with pytest.raises(ValueError, match=r"no train file; it holds test\.csv"):
        splits(tmp_path)
    rows = "text,label\n" + "".join(f"text {i},b\n" for i in range(20))
    write(tmp_path / "train.csv", rows)
    with pytest.raises(ValueError, match=r"at least two classes, got \['b'\] in 18 rows"):
        splits(tmp_path)
    write(tmp_path / "dev.csv", rows)
    write(tmp_path / "valid.csv", rows)
    with pytest.raises(ValueError, match=r"several validation files, dev\.csv, valid\.csv"):
        splits(tmp_path)


def test_label_names():
    assert label_names(Table(list("xyz"), None, ["b", "a", "b"])) == ("a", "b")
    assert label_names(Table(list("xyz"), None, ["10", "9", "-1"])) == ("-1", "9", "10")
    with pytest.raises(ValueError, match="no labels"):
        label_names(Table(["x"]))


# --- hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Puts data sets "on the hub": hub[name] or hub[name, config] = DatasetDict."""
    shelf = {}

    def load_dataset(path, name=None):
        key = path if name is None else (path, name)
        if key not in shelf:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset {key!r} doesn't exist")
        return shelf[key]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return shelf


def on_hub(splits_, names=("neg", "pos")):
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(names)),
            "idx": datasets.Value("int32"),
        }
    )
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"sentence": [f"{name} {i}" for i in range(len(labels))], "label": labels, "idx": range(len(labels))},
                features=features,
            )
            for name, labels in splits_.items()
        }
    )


def test_hub_labels_become_names_and_splits_get_their_own_names(hub):
    hub["nyu-mll/glue", "mnli"] = on_hub(
        {"train": [0, 1] * 10, "validation_matched": [1, 0], "validation_mismatched": [0, 0], "test": [1, 1]}
    )
    parts = splits("hub:nyu-mll/glue/mnli", text="sentence")
    assert parts["train"] == Table([f"train {i}" for i in range(20)], None, ["neg", "pos"] * 10)
    assert parts["validation"] == Table(["validation_matched 0", "validation_matched 1"], None, ["pos", "neg"])
    assert parts["test"].label == ["pos", "pos"]


def test_a_hub_test_split_with_hidden_labels_is_carved_instead(hub):
    hub["sst2"] = on_hub({"train": [0, 1] * 10, "dev": [1, 0], "test": [-1, -1]})
    parts = splits("hub:sst2", text="sentence", test=0.2)
    assert {name: len(part) for name, part in parts.items()} == {"train": 16, "validation": 2, "test": 4}
    assert all(text.startswith("train") for text in parts["test"].text)
    assert parts == splits("hub:sst2", text="sentence", test=0.2)


def test_two_parts_of_a_hub_name_are_owner_and_name_or_name_and_config(hub):
    data = on_hub({"train": [0, 1] * 20})
    hub["glue", "sst2"] = data
    hub["stanfordnlp/imdb"] = data
    first, second = (splits(f"hub:{name}", text="sentence") for name in ("glue/sst2", "stanfordnlp/imdb"))
    assert first == second
    with pytest.raises(ValueError, match=r"hub:a/b: the hub gave no such data set \(.*'a/b'.*; .*"):
        splits("hub:a/b")


def test_hub_errors(hub, monkeypatch):
    hub["x"] = on_hub({"validation": [0, 1]})
    with pytest.raises(ValueError, match="hub:x: no train split; it has validation"):
        splits("hub:x")
    hub["y"] = on_hub({"train": [0, 1, -1] * 10})
    with pytest.raises(ValueError, match=r"hub:y \(train\): no column 'text'; it has 'sentence', 'label', 'idx'"):
        splits("hub:y")
    with pytest.raises(ValueError, match=r"hub:y \(train\): no label in column 'label' of rows 3, 6"):
        splits("hub:y", text="sentence")
    for spec in ("hub:", "hub:a//b", "hub:a/b/c/d"):
        with pytest.raises(ValueError, match="expected hub:name"):
            splits(spec)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "jpeft\[hub\]"'):
        splits("hub:x")


# --- arrays ---------------------------------------------------------------------------------------------------------

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very")


def make_tokenizer(names=("input_ids", "token_type_ids", "attention_mask"), **options):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_input_names=list(names), **{"pad_token": "[PAD]", "unk_token": "[UNK]", **options}
    )


def test_encode_pads_and_cuts_to_one_length():
    table = Table(["good film", "very very very bad film", "new"], None, ["pos", "neg", "pos"])
    arrays = encode(table, make_tokenizer(), labels=("neg", "pos"), max_length=5)
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
        "input_ids": (np.int32, (3, 5)),
        "attention_mask": (np.int32, (3, 5)),
        "token_type_ids": (np.int32, (3, 5)),
        "label": (np.int32, (3,)),
    }
    assert arrays["input_ids"].tolist() == [[2, 4, 6, 3, 0], [2, 7, 7, 7, 3], [2, 1, 3, 0, 0]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert arrays["label"].tolist() == [1, 0, 1]


def test_encode_pairs():
    arrays = encode(Table(["good"], ["bad film"]), make_tokenizer(), labels=None, max_length=8)
    assert arrays["input_ids"].tolist() == [[2, 4, 3, 5, 6, 3, 0, 0]]
    assert arrays["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0]]
    assert "label" not in arrays


def test_token_type_ids_only_where_the_tokenizer_makes_them():
    arrays = encode(Table(["good"]), make_tokenizer(("input_ids", "attention_mask")), labels=None, max_length=4)
    assert arrays.keys() == {"input_ids", "attention_mask"}


def test_encode_in_pieces_is_encode_at_once():
    texts = [("good", "bad film", "very")[i % 3] for i in range(9000)]  # more than two pieces
    arrays = encode(Table(texts), make_tokenizer(), labels=None, max_length=4)
    assert arrays["input_ids"].shape == (9000, 4)
    np.testing.assert_array_equal(arrays["input_ids"], np.tile([[2, 4, 3, 0], [2, 5, 6, 3], [2, 7, 3, 0]], (3000, 1)))


def test_encode_of_no_rows():
    arrays = encode(Table([], None, []), make_tokenizer(), labels=("a", "b"), max_length=4)
    assert arrays["input_ids"].shape == (0, 4)
    assert arrays["label"].shape == (0,)


def test_encode_errors():
    table = Table(["good", "bad"], None, ["pos", "mixed"])
    with pytest.raises(ValueError, match="Unknown label 'mixed': the model knows 'neg', 'pos'"):
        encode(table, make_tokenizer(), labels=("neg", "pos"), max_length=4)
    with pytest.raises(ValueError, match="The table has no labels"):
        encode(Table(["good"]), make_tokenizer(), labels=("neg", "pos"), max_length=4)
    with pytest.raises(ValueError, match="max_length=2 must be more than the 2 special tokens"):
        encode(table, make_tokenizer(), labels=None, max_length=2)
    with pytest.raises(ValueError, match="max_length=17 .* at most 16"):
        encode(table, make_tokenizer(model_max_length=16), labels=None, max_length=17)
    with pytest.raises(ValueError, match=r"no padding token: .*tokenizer\.eos_token"):
        encode(table, make_tokenizer(pad_token=None), labels=None, max_length=4)


# --- batches --------------------------------------------------------------------------------------------------------


def columns(size):
    return {"x": np.arange(size * 3, dtype=np.int32).reshape(size, 3), "label": np.arange(size, dtype=np.int32)}


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 4), (3, 8), (1, 2), (7, 1)])
def test_every_example_once_an_epoch_in_batches_of_one_shape(size, batch_size):
    ds = batches(columns(size), batch_size, seed=0)
    drawn = [ds[step] for step in range(4 * size)]
    for batch in drawn:
        assert batch["x"].shape == (batch_size, 3)
        assert batch["label"].shape == (batch_size,)
        assert batch["x"].dtype == batch["label"].dtype == np.int32
    assert all((b["x"][:, 0] == 3 * b["label"]).all() for b in drawn)  # rows stay whole
    stream = np.concatenate([b["label"] for b in drawn])
    for epoch in stream.reshape(-1, size):
        assert sorted(epoch.tolist()) == list(range(size))


def test_epochs_and_seeds_differ():
    def epoch(seed, number):
        ds = batches(columns(100), 100, seed=seed)
        return tuple(ds[number]["label"].tolist())

    orders = [epoch(seed, number) for seed in (0, 1, 2**32 - 1) for number in (0, 1, 2)]
    assert len(set(orders)) == 9
    assert tuple(range(100)) not in orders


def test_the_order_never_changes():
    # Literal, so that a change of the shuffling, which would break resuming older runs, is noticed.
    ds = batches({"x": np.arange(6)}, 4, seed=7)
    assert [ds[step]["x"].tolist() for step in range(3)] == [[4, 3, 2, 1], [0, 5, 1, 4], [3, 2, 5, 0]]


def test_resuming_at_a_step_gives_what_an_unbroken_run_gives():
    unbroken = [batch["label"] for _, batch in zip(range(12), batches(columns(10), 4, seed=3))]
    resumed = batches(columns(10), 4, seed=3)
    for step in (11, 5, 8, 0):  # in any order: there is no state
        np.testing.assert_array_equal(resumed[step]["label"], unbroken[step])
    np.testing.assert_array_equal(next(iter(resumed[7:]))["label"], unbroken[7])
    assert resumed[10**9]["label"].shape == (4,)


def test_batches_are_copies_and_can_be_sent_to_workers():
    arrays = columns(4)
    ds = batches(arrays, 4, seed=0)
    ds[0]["x"][:] = -1
    assert (arrays["x"] >= 0).all()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(ds))[3]["label"], ds[3]["label"])


def test_batch_errors():
    with pytest.raises(ValueError, match="no rows to train on"):
        batches(columns(0), 2, seed=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        batches(columns(3), 0, seed=0)
    with pytest.raises(ValueError, match="seed=-1 must"):
        batches(columns(3), 2, seed=-1)
    with pytest.raises(ValueError, match=r"same number of rows, got \{'a': 2, 'b': 3\}"):
        list(eval_batches({"a": np.arange(2), "b": np.arange(3)}, 2))
    with pytest.raises(ValueError, match="got no columns"):
        steps_per_epoch({}, 2)


@pytest.mark.parametrize(("size", "batch_size", "steps"), [(12, 4, 3), (10, 4, 3), (3, 8, 1), (0, 4, 0)])
def test_eval_batches_give_every_row_once_by_weight(size, batch_size, steps):
    drawn = list(eval_batches(columns(size), batch_size))
    assert len(drawn) == steps == steps_per_epoch(columns(size), batch_size)
    assert all(b["x"].shape == (batch_size, 3) and b["weight"].dtype == np.float32 for b in drawn)
    assert [int(i) for b in drawn for i in b["label"][b["weight"] == 1]] == list(range(size))
    assert sum(float(b["weight"].sum()) for b in drawn) == size

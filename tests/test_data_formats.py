"""One rule for every format: types, missing values, odd characters and encodings, quotation marks, and where a bad row is."""

import datetime
import json
import re
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data import hub, make_tokenizer, on_hub, write  # noqa: F401  (`hub` is a fixture)

from jpeft.data import Table, encode, read, splits
from jpeft.data.texts import texts_table
from jpeft.data.values import as_label, as_text

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def write_values(path, columns):
    """Values as a program writes them in the format of `path`: those of a CSV file are the strings that pandas writes."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        sep = {".csv": ",", ".tsv": "\t"}[path.suffix]
        lines = [sep.join("" if value is None else str(value) for value in row.values()) for row in rows]
        path.write_text("\n".join([sep.join(columns), *lines, ""]))
    return path


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 0], ["1", "0"]),
        ([1.0, 0.0], ["1", "0"]),
        (["1.0", "-2"], ["1", "-2"]),
        ([True, False], ["true", "false"]),
        (["True", "false"], ["true", "false"]),
        (["007", "1.2.3"], ["007", "1.2.3"]),
        (["NA", "nan"], ["NA", "nan"]),
        ([" pos", "neg "], ["pos", "neg"]),
        ([1e20, -0.0], ["100000000000000000000", "0"]),
    ],
)
def test_a_label_is_the_same_in_every_format(tmp_path, suffix, values, expected):
    assert read(write_values(tmp_path / f"x{suffix}", {"text": ["a", "b"], "label": values})).label == expected


@pytest.mark.parametrize("suffix", FORMATS)
def test_real_numbers_are_no_labels_and_numbers_are_texts_in_every_format(tmp_path, suffix):
    path = write_values(tmp_path / f"x{suffix}", {"text": [3, 4], "label": [1.0, 0.5]})
    with pytest.raises(
        ValueError, match=r"must be a string or a whole number, got '?0.5'? in row 2.*turn numbers into classes first, such"
    ):
        read(path)
    assert read(path, label=None).text == ["3", "4"]
    bools = write_values(tmp_path / f"y{suffix}", {"text": ["a", "b"], "label": [None, "a"]})
    with pytest.raises(ValueError, match=r"no label in column 'label' of row 1"):
        read(bools)
    with pytest.raises(ValueError, match=r"no text in column 'label' of row 1"):
        read(bools, text="label", label=None)


def test_values_that_are_neither_text_nor_label():
    for value in ({"a": 1}, ["a"], b"a", datetime.date(2020, 1, 1), float("inf")):
        assert as_text(value) is None
        assert as_label(value) is None


def test_splits_in_different_formats_have_the_same_labels(tmp_path):
    rows = {"text": [f"text {i}" for i in range(10)]}
    write_values(tmp_path / "train.csv", rows | {"label": ["1.0", "0.0"] * 5})
    write_values(tmp_path / "validation.jsonl", rows | {"label": [1, 0] * 5})
    write_values(tmp_path / "test.parquet", rows | {"label": [1.0, 0.0] * 5})
    tables = splits(tmp_path)
    assert {name: table.label for name, table in tables.items()} == dict.fromkeys(tables, ["1", "0"] * 5)
    assert [table.title for table in tables.values()] == ["train: ", "validation: ", "test: "]


def test_labels_of_the_hub_follow_the_rule(hub):  # noqa: F811
    hub["x"] = on_hub({"train": [0, 1] * 10, "test": [0, 1]}, names=("True", "1.0"))
    assert set(splits("hub:x", text="sentence")["test"].label) == {"true", "1"}


# --- where a bad row is -----------------------------------------------------------------------------------------------

TWO_LINES = 'text,label\n"a\nb",x\n\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", TWO_LINES + "c,\n", "no label in column 'label' of row 2 (line 5)"),
        ("x.csv", TWO_LINES + "c\n", "x.csv, line 5: 1 fields under a header of 2"),
        ("x.csv", TWO_LINES + 'c,"d\n\n', "x.csv, line 5: unexpected end of data"),
        ("x.csv", "text,label\ra,x\rb,\r", "no label in column 'label' of row 2 (line 3)"),
        ("x.tsv", "text\tlabel\r\na\tx\r\n\r\nb\t\r\n", "no label in column 'label' of row 2 (line 4)"),
        ("x.tsv", 'text\tlabel\n"a\tx\nb\n"c\ty\n', "x.tsv, line 3: 1 fields under a header of 2 (text, label)"),
        ("x.tsv", 'text\tlabel\n"a\tx\nb\tx\nc"\ty\td\n', "x.tsv, line 4: 3 fields under a header of 2"),
        ("x.jsonl", '\n{"text": "a", "label": 1}\n\n{"text": "b", "label": 0.5}\n', "got 0.5 in row 2 (line 4)"),
        ("x.jsonl", '{"text": "a", "text": "b"}\n', "x.jsonl, line 1: not JSON (Two values of the same name in text, text)"),
        ("x.jsonl", '{"text": "a"} {"text": "b"}\n', "x.jsonl, line 1: not JSON (more than one value)"),
        ("x.jsonl", '[{"text": "a"}]\n', "a file with one list of objects ends in .json"),
        ("x.jsonl", '{"text": ' + "[" * 100000 + "\n", "x.jsonl, line 1: values are nested too deep"),
        ("x.jsonl", '{"text": ' + "9" * 5000 + "}\n", "x.jsonl, line 1: not JSON"),
        ("x.json", '[{"text": "a"},\n {"text": }]', "x.json, line 2: not JSON (Expecting value at column 11)"),
        ("x.json", '[\n{"text": "a"},\n\n"b"]', "x.json, line 4: expected an object"),
        ("x.json", '[{"text": "a"}\n{"text": "b"}]', "x.json, line 2: not JSON: ',' or ']' is missing behind row 1"),
        ("x.json", '[{"text": "a"}] 3', "x.json, line 1: there is more behind the list"),
        ("x.json", '{"text":\n ["a"]}', "a .json file is a list of objects, or has an object in each line"),
        ("x.json", "[]", "x.json: no rows"),
        ("x.json", '[{"text": "a",\n "label": 1},\n {"text": "", "label": 1}]', "no text in column 'text' of row 2 (line 3)"),
        ("x.csv", "text,label\na,b\nä,c\n".encode("latin-1"), "x.csv: not UTF-8 text: byte 0xe4 in line 3"),
        ("x.csv", "text,label\na,b\n".encode("utf-16"), "x.csv: not UTF-8 text but UTF-16"),
        ("x.csv", "text,label\na,b\n".encode("utf-16-le"), "x.csv: not UTF-8 text but a NUL byte in line 1"),
        ("x.jsonl", b'{"text": "a"}\n\0\0\0', "x.jsonl: not UTF-8 text but a NUL byte in line 2"),
        ("x.txt", b"a\n\n\xff", "x.txt: not UTF-8 text: byte 0xff in line 3"),
        ("x.jsonl", r'{"text": "a", "label": 1}' + "\n" + r'{"text": "b\ud83d", "label": 0}', "x.jsonl, row 2 (line 2): correct or"),
        ("x.json", r'[{"text": "a\u0000", "label": 1}]', "The text holds a NUL character, which is not text, in "),
        ("x.jsonl", r'{"text": "a", "label": "\udc00"}', "The label holds half of a surrogate pair ('\\udc00'), which is not text, in"),
    ],
)  # fmt: skip
def test_a_bad_row_names_itself_and_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(tmp_path / name, label="label" if b"label" in (tmp_path / name).read_bytes() else None)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_parquet_files_and_folders_are_named(tmp_path):
    whole = write_values(tmp_path / "x.parquet", {"text": ["a" * 50] * 100, "label": list(range(100))}).read_bytes()
    for size in (0, 3, 100, len(whole) - 10):
        (tmp_path / "cut.parquet").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.parquet: not a readable \.parquet file: [^\n]*\.$"):
            read(tmp_path / "cut.parquet")
    pq.write_table(pa.table({"text": ["a" * 50], "label": [1]}), tmp_path / "x.parquet", compression="none")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "bytes.parquet").write_bytes(whole.replace(b"a" * 50, b"\xff" * 50))
    with pytest.raises(ValueError, match=r"bytes\.parquet: "):
        read(tmp_path / "bytes.parquet")
    folder = tmp_path / "label=pos"
    folder.mkdir()
    write_values(folder / "y.parquet", {"text": ["a"]})
    with pytest.raises(ValueError, match="no column 'label'; it has 'text'"):  # the folder's name is no column
        read(folder / "y.parquet")
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(ValueError, match=r"x\.csv: this is a folder"):
        read(tmp_path / "x.csv")


def test_a_column_may_have_any_name(tmp_path):
    table = read(write_values(tmp_path / "x.csv", {"class": ["a"], "lambda": ["b"]}), text="class", label="lambda")
    assert table == Table(["a"], label=["b"])


def test_an_unknown_label_names_its_row(tmp_path):
    rows = {"text": [f"text {i}" for i in range(20)], "label": ["a", "b"] * 10}
    write_values(tmp_path / "train.csv", rows)
    table = read(write_values(tmp_path / "test.csv", {"text": ["x", "y"], "label": ["a", "c"]}))
    with pytest.raises(ValueError, match=r"Unknown label 'c': the model knows 'a', 'b'\. See .*test\.csv, row 2 \(line 3\)"):
        encode(table, make_tokenizer(), labels=("a", "b"), max_length=8)
    # A model of an earlier version may have labels in another spelling of the same value.
    assert encode(Table(["x"], label=["true"]), make_tokenizer(), labels=("False", "True"), max_length=8)["label"].tolist() == [1]


# --- quotation marks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('"a\tx\nb\ty\n"c\tx\nd"\ty\n', ['"a', "b", '"c', 'd"']),  # lone marks swallow nothing
        ('5" disk\tx\n"Yes" and "no"\ty\n', ['5" disk', '"Yes" and "no"']),
        ('"said ""no"""\tx\nplain\ty\n', ['said "no"', "plain"]),  # as programs quote
        ('"a\nb"\tx\nc\ty\n', ["a\nb", "c"]),
    ],
)
def test_tsv_fields_are_quoted_only_where_the_file_needs_it(tmp_path, content, expected):
    assert read(write(tmp_path / "x.tsv", "text\tlabel\n" + content)).text == expected


def test_an_open_quotation_mark_that_swallows_rows_is_said(tmp_path):
    rows = 'text,label\nfine,1\n"open,0\nlost,1\nend"",0\nsaid no",1\nlast,0\n'
    with pytest.warns(UserWarning, match=r"x\.csv: 1 quoted field holds both .*\(lines 3-6\)\. If a quotation mark is not closed"):
        assert read(write(tmp_path / "x.csv", rows)).text[2:] == ["last"]


def test_long_fields(tmp_path):
    long = "a " * 100_000
    for suffix, sep in ((".csv", ","), (".tsv", "\t")):
        path = write(tmp_path / f"x{suffix}", f'text{sep}label\n"{long}\n"{sep}1\n')
        with warnings.catch_warnings():
            assert read(path).text == [long + "\n"]


def test_json_files_hold_a_list_or_lines(tmp_path):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": None}]
    for content in (json.dumps(rows), json.dumps(rows, indent=2) + "\n", "\n".join(map(json.dumps, rows))):
        assert read(write(tmp_path / "x.json", "\ufeff" + content), label=None).text == ["a", "b"]
    write(tmp_path / "x.json", json.dumps({"text": "a", "label": 1}))
    assert read(tmp_path / "x.json") == Table(["a"], label=["1"])


def test_texts_of_a_txt_file_know_their_lines(tmp_path):
    table = read(write(tmp_path / "x.txt", "\n\na\nb\n \nc\r\n"), label=None)
    assert table.text == ["a\nb", "c"]
    assert table.origin.lines == [3, 6]


def test_cut_texts_are_counted():
    table = Table(["good film", "very very very", "very very very bad film"])
    with pytest.warns(UserWarning, match=r"^2 of 3 texts are longer than max_length=4 tokens and were cut\.$"):
        encode(table, make_tokenizer(), labels=None, max_length=4)
    with pytest.warns(UserWarning, match=r"^test: 1 of 3 texts"):
        encode(table.named("test"), make_tokenizer(), labels=None, max_length=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(table, make_tokenizer(), labels=None, max_length=7)


def test_texts_of_the_command_line():
    arguments = {"names": ("--text", "--pair")}
    with pytest.raises(ValueError, match=r"The text holds half of a surrogate pair \('\\udce4'\), which is not text, in --text, row 2"):
        texts_table(["a", "\udce4"], (), **arguments)
    with pytest.raises(ValueError, match="No text in --text number 2 of 2"):
        texts_table(["a", " "], (), **arguments)
    with pytest.raises(ValueError, match="The pair holds a NUL character, which is not text, in row 1:"):
        Table(["a"], ["b\0"])

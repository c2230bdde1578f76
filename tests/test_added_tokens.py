"""Tokens added to a model: their rows, the tokenizer, training, merging, the exported folder in transformers, the command line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_text import make_base, make_decoder, make_model, make_rows, write_csv

import jpeft
from jpeft.cli import main
from jpeft.models import load
from jpeft.sharding import make_mesh
from jpeft.training.added_tokens import warn_of_absent
from jpeft.training.config import TrainConfig
from jpeft.training.run import load_run
from jpeft.training.train import train

LABELS = ("fruit", "metal", "water")
TABLE = "bert/embeddings/word_embeddings/embedding"
ROWS = 23  # of the tiny BERT


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny BERT, and texts in which an unknown word says the class."""
    folder = tmp_path_factory.mktemp("base")
    base = make_base(folder, train=16, validation=4)
    for name, count in (("train", 16), ("test", 4)):
        rows = [(f"{text} <{label}>", label) for text, label in make_rows(count)]
        write_csv(folder / "data" / f"{name}.csv", rows)
    return base | {"max_length": 10, "batch_size": 8, "add_tokens": ("<fruit>", "<metal>")}


def table(params):
    return np.asarray(jpeft.flatten(params)[TABLE])


# --- load ------------------------------------------------------------------------------------------------------------------------------


def test_rows_begin_as_the_mean_and_all_others_stay(tmp_path):
    folder = make_model(tmp_path / "model")
    plain, grown = load(folder, labels=LABELS), load(folder, labels=LABELS, add_tokens=["<a>", "<b>"])
    assert grown.config.vocab_size == ROWS + 2
    assert grown.added == {"<a>": ROWS, "<b>": ROWS + 1}
    assert grown.tokenizer("the <b> one", add_special_tokens=False)["input_ids"][1] == ROWS + 1
    np.testing.assert_array_equal(table(grown.params)[:ROWS], table(plain.params))
    np.testing.assert_allclose(table(grown.params)[ROWS:], np.broadcast_to(table(plain.params).mean(0), (2, 16)), atol=1e-6)
    others = lambda params: {path: leaf for path, leaf in jpeft.flatten(params).items() if path != TABLE}
    assert jax.tree.all(jax.tree.map(np.array_equal, others(plain.params), others(grown.params)))
    assert (plain.added, len(plain.tokenizer)) == ({}, ROWS)
    # On a mesh the very same values, split where they can be.
    sharded = load(folder, labels=LABELS, add_tokens=["<a>"], mesh=make_mesh(fsdp=2, devices=jax.devices()[:2]))
    np.testing.assert_array_equal(table(sharded.params), table(grown.params)[: ROWS + 1])


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_has_a_score_for_each(tmp_path, tied):
    """Untied heads and biases grow too, as `transformers` grows them; old scores stay."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    LlamaForCausalLM(LlamaConfig(vocab_size=18, **sizes, tie_word_embeddings=tied)).save_pretrained(tmp_path)
    load(make_decoder(tmp_path / "words"), task="causal-lm").tokenizer.save_pretrained(tmp_path)
    plain, grown = load(tmp_path, task="causal-lm"), load(tmp_path, task="causal-lm", add_tokens=["<a>"])
    new = grown.added["<a>"]
    ids = np.array([[1, 2, 3]])
    before, after = (np.asarray(each.model.apply({"params": each.params}, ids)) for each in (plain, grown))
    assert after.shape[-1] == grown.config.vocab_size == max(18, new + 1)
    old = [i for i in range(before.shape[-1]) if i != new]
    np.testing.assert_allclose(after[..., old], before[..., old], atol=1e-6)
    np.testing.assert_allclose(after[..., new], before.mean(-1), atol=1e-5)


def test_a_masked_model_has_a_bias_for_each(tmp_path):
    grown = load(make_model(tmp_path / "model"), task="sequence-classification", labels=LABELS, add_tokens=["<a>"])
    del grown
    from jpeft.models import BertConfig, BertForMaskedLM, save

    config = BertConfig(vocab_size=ROWS, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = BertForMaskedLM(config)
    params = model.init(jax.random.key(0), np.ones((1, 2), int))["params"]
    save(tmp_path / "masked", model, params, tokenizer=load(tmp_path / "model", labels=LABELS).tokenizer)
    masked = load(tmp_path / "masked", task="masked-lm", add_tokens=["<a>"])
    assert masked.params["cls"]["predictions"]["bias"].shape == (ROWS + 1,)


def test_a_token_of_the_tokenizer_without_a_row_gets_one(tmp_path):
    folder = make_model(tmp_path / "model")
    tokenizer = load(folder, labels=LABELS).tokenizer
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(folder)
    grown = load(folder, labels=LABELS, add_tokens=["<b>"])
    assert grown.added == {"<a>": ROWS, "<b>": ROWS + 1}  # the row in front of it is needed, too, and trained


def test_a_token_that_is_there_is_said_and_left_alone(tmp_path):
    folder = make_model(tmp_path / "model")
    with pytest.warns(UserWarning, match="has 'apple' \\(id 14\\) already"):
        loaded = load(folder, labels=LABELS, add_tokens=["apple"])
    assert (loaded.added, loaded.config.vocab_size) == ({}, ROWS)
    with pytest.warns(UserWarning, match="apple"):
        assert load(folder, labels=LABELS, add_tokens=["apple", "<a>"]).added == {"<a>": ROWS}


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        (["<a>", "<a>"], "has '<a>' more than once"),
        ([""], "has '': a token needs"),
        (["  "], "has '  ': a token needs"),
        ("<a>", "must be a list of texts"),
        (["\ud83d"], "no text"),
    ],
)
def test_tokens_that_cannot_be_added(tmp_path, tokens, error):
    with pytest.raises(ValueError, match=error):
        load(make_model(tmp_path / "model"), labels=LABELS, add_tokens=tokens)


# --- training --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "trainable_tokens", "freeze"])
def test_only_the_new_rows_move(base, tmp_path, method):
    """With a method beside it, with itself as the method, and with full fine-tuning, which trains every row."""
    options = {"lora": ("rank=1",), "prompt_tuning": ("length=2",), "freeze": ("target=.*",)}.get(method, ())
    config = TrainConfig(**base, output=str(tmp_path / "run"), method=method, options=options, steps=2)
    result = train(config)
    run = load_run(result.path)
    assert run.loaded.added == {"<fruit>": ROWS, "<metal>": ROWS + 1}
    before = table(run.loaded.params)
    if method == "freeze":
        assert run.peft.method.name == "freeze"
        after = table(jpeft.merge(run.peft))
    else:
        assert [name for name, _ in run.peft.method.parts] == ([] if method == "trainable_tokens" else [method, "tokens"])
        part = run.peft.adapter if method == "trainable_tokens" else run.peft.adapter["tokens"]
        rows = np.asarray(jpeft.flatten(part)[f"{TABLE}/rows"])
        assert (np.abs(rows).max(-1) > 0).all()
        after = table(jpeft.trainable_tokens(tokens=(ROWS, ROWS + 1), head=None).merge(run.loaded.params, {**_nested(rows)}))
        np.testing.assert_array_equal(after[:ROWS], before[:ROWS])
    assert (np.abs(after[ROWS:] - before[ROWS:]).max(-1) > 0).all()


def _nested(rows):
    return jpeft.unflatten({f"{TABLE}/rows": jnp.asarray(rows)})


def test_the_command_line(base, tmp_path, capsys):
    """Trains, resumes, evaluates, predicts and merges; transformers opens the result, with equal ids and logits."""
    torch = pytest.importorskip("torch")
    run, out = str(tmp_path / "run"), str(tmp_path / "merged")
    flags = [
        "--model", base["model"], "--data", base["data"], "--output", run, "--max-length", "10", "--batch-size", "8", "--steps", "2",
        "--progress", "none", "--method", "lora", "rank=1",
    ]  # fmt: skip
    assert main(["train", *flags, "--add-tokens", "<fruit>", "<metal>", "<water>"]) == 0
    assert main(["train", *flags, "--add-tokens", "<fruit>", "<metal>", "<water>", "--resume"]) == 0
    assert main(["train", *flags, "--resume"]) == 2
    assert "--add-tokens (" in capsys.readouterr().err
    assert main(["eval", run]) == 0
    assert main(["merge", run, out]) == 0
    capsys.readouterr()
    assert main(["predict", run, "--text", "one <metal> here"]) == 0
    ours = json.loads(capsys.readouterr().out)["probabilities"]
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, theirs = AutoTokenizer.from_pretrained(out), AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert theirs.config.vocab_size == theirs.get_input_embeddings().weight.shape[0] == ROWS + 3
    loaded = load_run(run).loaded
    ids = tokenizer("one <metal> here", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == loaded.tokenizer("one <metal> here")["input_ids"]
    assert ROWS + 1 in ids[0].tolist()
    probabilities = torch.softmax(theirs(ids).logits, -1)[0].tolist()
    np.testing.assert_allclose(list(ours.values()), probabilities, atol=1e-4)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["add_tokens"] == ["<fruit>", "<metal>", "<water>"]


def test_a_token_that_no_text_has_is_said(base):
    loaded = load(base["model"], labels=LABELS, fresh_head=True, add_tokens=["<fruit>", "<other>"])
    with pytest.warns(UserWarning, match="never have the added tokens '<other>'"):
        warn_of_absent(loaded, {"input_ids": np.array([[1, ROWS]])})


def test_a_decoder_without_other_leaves(tmp_path):
    """Words put into the text train nothing of a decoder, so the new rows are all that is trained."""
    model = make_decoder(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"the <a> {text}"}) + "\n" for text, _ in make_rows(24)))
    common = {"model": str(model), "data": str(tmp_path / "texts.jsonl"), "task": "generation", "max_length": 8, "progress": "none"}
    config = TrainConfig(
        **common, output=str(tmp_path / "run"), method="hard_prompt", options=("tokens='the'",), steps=1, add_tokens=("<a>",)
    )
    result = train(config)
    assert result.trained == 16
    run = load_run(result.path)
    assert set(run.peft.adapter) == {"hard_prompt", "tokens"}
    assert np.isfinite(jpeft.wrap(run.loaded.model.apply)(run.peft, np.array([[run.loaded.added["<a>"], 1]]))).all()


def test_a_token_without_a_row_is_named_before_training(tmp_path, capsys):
    model = make_model(tmp_path / "model")
    tokenizer = load(model, labels=LABELS).tokenizer
    tokenizer.add_tokens(["<ENT>"])
    tokenizer.save_pretrained(model)
    write_csv(tmp_path / "x.csv", [(f"<ENT> {text}", label) for text, label in make_rows(24)])
    flags = [
        "--model",
        str(model),
        "--data",
        str(tmp_path / "x.csv"),
        "--output",
        str(tmp_path / "run"),
        "--steps",
        "1",
        "--max-length",
        "8",
    ]
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert "the token '<ENT>' has the id 23, and the model's embedding has 23 rows" in error
    assert "--add-tokens '<ENT>'" in error
    assert not (tmp_path / "run").exists()
    for bad in (["<ENT>", "<ENT>"], [""]):
        assert main(["train", *flags, "--add-tokens", *bad]) == 2
        assert capsys.readouterr().err.startswith("error: --add-tokens has ")
    assert load(model, labels=LABELS, add_tokens=["<ENT>"]).added == {"<ENT>": ROWS}

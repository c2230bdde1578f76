"""Verbalisers: texts in a pattern, gaps, words as tokens, scores of masked and causal language models."""

import json

import jax
import numpy as np
import pytest
from tiny_text import make_model, write_csv

import jpeft
from jpeft.cli import main
from jpeft.models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from jpeft.tasks.cloze import Cloze, label_scores

TEXTS = ["the food was hot", "rain rain rain rain rain rain rain rain", "a"]
ENGLISH = "the food was hot rain a It is . great fine terrible so and"
MOODS = {"good": ("great", "fine"), "bad": ("terrible",)}


@pytest.fixture(scope="module")
def masked():
    """A word-level tokenizer in BERT's way."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ENGLISH.split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def causal():
    """A byte-level BPE in GPT-2's way: a word behind a space is another token than one in front; no padding, no mask."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"])
    tokenizer.train_from_iterator([" It is great fine terrible the food was hot rain"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>")


def decoded(tokenizer, arrays):
    return [tokenizer.decode(row[mask == 1]) for row, mask in zip(arrays["input_ids"], arrays["attention_mask"])]


def test_encodes_around_a_mask(masked):
    """The text is cut, the pattern is not."""
    cloze = Cloze("so {text} . It is {mask} .", MOODS)
    arrays = cloze.encode(masked, TEXTS, max_length=12)
    assert decoded(masked, arrays) == [
        "[CLS] so the food was hot . It is [MASK] . [SEP]",
        "[CLS] so rain rain rain rain . It is [MASK] . [SEP]",
        "[CLS] so a . It is [MASK] . [SEP]",
    ]
    assert {name: array.shape for name, array in arrays.items() if name != "token_type_ids"} == {
        "input_ids": (3, 12), "attention_mask": (3, 12), "gap": (3,),
    }  # fmt: skip
    assert all(array.dtype == np.int32 for array in arrays.values())
    assert (arrays["input_ids"][np.arange(3), arrays["gap"]] == masked.mask_token_id).all()
    assert cloze.word_ids(masked) == (tuple(masked.convert_tokens_to_ids(["great", "fine"])), (masked.convert_tokens_to_ids("terrible"),))
    assert masked.decode(cloze.tokens(masked)) == "so . It is ."


def test_encodes_pairs(masked):
    """Of two texts the longer is cut."""
    cloze = Cloze("{text} ? {mask} , {pair}", MOODS)
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than max_length=10 tokens with the template and were cut"):
        arrays = cloze.encode(masked, ["rain rain rain rain"], ["hot hot hot hot hot hot"], max_length=10)
    assert decoded(masked, arrays) == ["[CLS] rain rain [UNK] [MASK] [UNK] hot hot hot [SEP]"]


def test_encodes_up_to_the_gap(causal):
    """Without a mask: the text ends where the word belongs, without a space that the word's own token has."""
    cloze = Cloze("{text} It is {mask}", MOODS)
    arrays = cloze.encode(causal, TEXTS, max_length=12)
    assert [row.endswith(" It is") for row in decoded(causal, arrays)] == [True] * 3
    assert decoded(causal, arrays)[0] == "the food was hot It is"
    np.testing.assert_array_equal(arrays["gap"], arrays["attention_mask"].sum(1) - 1)
    assert causal.convert_ids_to_tokens([ids[0] for ids in cloze.word_ids(causal)]) == ["Ġgreat", "Ġterrible"]


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_classifies_by_a_language_model(kind, request):
    """log p(word | text), each text by itself and unpadded, averaged over a label's words; the same through a prompt of no effect."""
    tokenizer = request.getfixturevalue(kind)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)
    model = BertForMaskedLM(BertConfig(**sizes, intermediate_size=16)) if kind == "masked" else GPT2LMHeadModel(GPT2Config(**sizes))
    cloze = Cloze("{text} . It is {mask} ." if kind == "masked" else "{text} It is {mask}", MOODS)
    arrays = cloze.encode(tokenizer, TEXTS, max_length=14)
    params = jax.jit(model.init)(jax.random.key(0), arrays["input_ids"])["params"]
    got = cloze.classify(model.apply, {"params": params}, tokenizer, arrays, batch_size=2)
    assert got.shape == (3, 2)
    for row, (ids, mask, gap) in enumerate(zip(arrays["input_ids"], arrays["attention_mask"], arrays["gap"])):
        logits = np.asarray(model.apply({"params": params}, ids[None, : mask.sum()]), np.float64)[0, gap]
        known = logits - np.log(np.exp(logits).sum())
        want = [known[list(words)].mean() for words in cloze.word_ids(tokenizer)]
        np.testing.assert_allclose(got[row], want, atol=1e-4)
    peft = jpeft.apply(params, method="hard_prompt", tokens=[7, 8])
    words = cloze.classify(jpeft.wrap(model.apply, peft.method), peft.variables, tokenizer, arrays)
    assert words.shape == got.shape
    assert np.abs(words - got).max() > 1e-3


def test_scores_by_hand():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    got = label_scores(jax.numpy.asarray(logits), np.array([2, 0]), ((1,), (0, 4)))
    for row, gap in enumerate((2, 0)):
        p = np.exp(logits[row, gap]) / np.exp(logits[row, gap]).sum()
        np.testing.assert_allclose(got[row], [np.log(p[1]), np.log(p[[0, 4]]).mean()], rtol=1e-5)


def test_a_cloze_can_be_hashed():
    assert hash(Cloze("{text} {mask}", {"a": ["b"]})) == hash(Cloze("{text} {mask}", {"a": "b"}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: Cloze("It was {mask}.", MOODS), r"must have \{text\} and \{mask\} once each"),
        (lambda t: Cloze("{text} {mask} {mask}", MOODS), r"must have \{text\} and \{mask\} once each"),
        (lambda t: Cloze("{text} {mask}", {"good": []}), "Each label needs at least one word"),
        (lambda t: Cloze("{text} {mask}", {"good": ["great fine"]}).word_ids(t), "'great fine' of label 'good' is 2 tokens"),
        (lambda t: Cloze("{text} {mask}", {"good": ["splendid"]}).word_ids(t), "'splendid' of label 'good' is unknown"),
        (lambda t: Cloze("{text} {mask}", {"a": ["hot"], "b": ["hot"]}).word_ids(t), "stands for two labels, 'a' and 'b'"),
        (lambda t: Cloze("{text} {mask}", MOODS).encode(t, ["a [MASK]"], max_length=9), "there would be two gaps"),
        (lambda t: Cloze("{text} {mask}", MOODS).encode(t, ["a"], ["b"], max_length=9), "must both have pairs, or neither"),
        (lambda t: Cloze("It is {mask} {text}", MOODS).encode(t, ["a"], max_length=4), "less than the 5 tokens of the pattern alone"),
    ],
)
def test_errors(masked, make, message):
    with pytest.raises(ValueError, match=message):
        make(masked)


def test_a_causal_gap_must_be_last(causal):
    with pytest.raises(ValueError, match="must end with"):
        Cloze("{text} {mask} .", MOODS).encode(causal, ["a"], max_length=9)


# --- the command line -----------------------------------------------------------------------------------------------------------------

WORDS = ["--words", "good=great,fine", "bad=terrible"]


@pytest.fixture(scope="module", params=["masked", "causal"])
def model(request, tmp_path_factory):
    """A folder with a random language model, the template it is asked with, and what the classes above say of TEXTS."""
    tokenizer, folder = request.getfixturevalue(request.param), tmp_path_factory.mktemp(request.param)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)
    sizes["max_position_embeddings"] = 32
    if request.param == "masked":
        module, template = BertForMaskedLM(BertConfig(**sizes, intermediate_size=16)), "{text} . It is {mask} ."
    else:
        module, template = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)), "{text} It is {mask}"
    params = jax.jit(module.init)(jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    jpeft.models.save(folder / "model", module, params, tokenizer=tokenizer)
    cloze = Cloze(template, MOODS)
    scores = cloze.classify(module.apply, {"params": params}, tokenizer, cloze.encode(tokenizer, TEXTS, max_length=14))
    return folder, template, scores


def flags(model, *more):
    folder, template, _ = model
    return ["cloze", "--model", str(folder / "model"), "--template", template, *WORDS, "--max-length", "14", *map(str, more)]


def test_command_line(model, tmp_path, capfd):
    """Metrics where there are labels, predictions where there are none or a file is asked for: those of the Python side."""
    *_, scores = model
    said = [("good", "bad")[i] for i in scores.argmax(1)]
    wrong = {"good": "bad", "bad": "good"}
    path = write_csv(tmp_path / "data.csv", [*zip(TEXTS[:2], said[:2]), (TEXTS[2], wrong[said[2]])])
    output = tmp_path / "out.jsonl"
    capfd.readouterr()
    assert main(flags(model, "--data", path, "--output", output)) == 0
    head, row, done = capfd.readouterr().out.splitlines()
    assert head.split() == ["split", "loss", "accuracy", "macro_f1"]
    assert row.split()[0] == str(path)
    assert row.split()[2] == "0.6667"
    assert done == f"3 predictions in {output}"
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["text"], line["label"]) for line in lines] == list(zip(TEXTS, said))
    want = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose([[line["probabilities"][label] for label in MOODS] for line in lines], want, atol=1e-5)
    # Texts alone, from a file and given right here.
    for more in (["--data", path, "--label-column", "none"], ["--text", *TEXTS]):
        assert main(flags(model, *more)) == 0
        assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == lines


def test_command_line_of_pairs(model, tmp_path, capfd):
    folder, _, _ = model
    columns = ["--text-column", "premise", "--pair-column", "claim", "--label-column", "none"]
    path = write_csv(tmp_path / "data.csv", [("the food", "rain")], header=("premise", "claim"))
    arguments = ["cloze", "--model", str(folder / "model"), "--template", "{text} so {pair} It is {mask}", *WORDS, "--max-length", "14"]
    capfd.readouterr()
    assert main([*arguments, "--data", str(path), *columns]) == 0
    from_file = capfd.readouterr().out
    assert main([*arguments, "--text", "the food", "--pair", "rain"]) == 0
    assert capfd.readouterr().out == from_file
    assert json.loads(from_file)["pair"] == "rain"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "Give either texts with --text or data with --data"),
        (["--text", "a", "--pair", "b"], "This template takes single texts"),
        (["--text", "a", "--max-length", "64"], "more than the model's 32 positions"),
        (["--text", "a", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--text", "a", "--template", "It is {mask}"], "must have {text} and {mask} once each"),
        (["--text", "a", "--words", "good"], "'good' in --words is not of the form LABEL=WORD,WORD"),
        (["--text", "a", "--words", "good=great"], "at least two of them, got good"),
        (["--text", "a", "--words", "good=great", "good=fine"], "The label 'good' is given twice"),
        (["--text", "a", "--words", "good=great", "bad="], "Each label needs at least one word"),
        (["--text", "a", "--words", "good=great", "bad=abysmally"], "choose one that is a single token"),
        (["--data", "DATA"], "--words has none for the label 'so' of the data; it has words for good, bad"),
        (["--data", "DATA", "--label-column", "class"], "no column 'class'"),
        (["--data", "DATA", "--pair", "b"], "--pair holds the second texts of --text"),
        (["--text", "a", "--output", "DATA"], "is there already"),
        (["--text", "a", "--model", "HEADLESS"], "is not a language model: it lacks"),
    ],
)
def test_command_line_errors(model, tmp_path, capfd, more, message):
    data, headless = write_csv(tmp_path / "data.csv", [("a", "so")]), tmp_path / "headless"
    if "HEADLESS" in more:
        make_model(headless)
    capfd.readouterr()
    assert main(flags(model, *({"DATA": data, "HEADLESS": headless}.get(one, one) for one in more))) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1

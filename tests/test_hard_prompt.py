"""Hard prompts: words in every text, by hand and by the method; nothing to train or to store."""

import dataclasses

import jax
import numpy as np
import pytest
from test_prompt_tuning import LENGTHS, MASK, by_hand, language_model, text, texts
from tiny_text import make_model, make_rows, write_csv

import jpeft
from jpeft.training.config import TrainConfig
from jpeft.training.train import prepare

WTE = {"wte": {"embedding": np.ones((20, 6), np.float32)}, "classifier": {"kernel": np.ones((6, 2), np.float32)}}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_words_stand_in_the_text(family):
    """At the start, or around an anchor and at the end: as if the text had had them from the beginning."""
    model, (ids, mask) = language_model(family), texts(encoder=family == "bert")
    ids[0, 3] = MASK
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    e = 1 if family == "bert" else 0
    new = lambda *tokens: [(token, True) for token in tokens]
    at = lambda tokens: tokens.index(MASK) if MASK in tokens else len(tokens) - e
    cases = [
        (jpeft.hard_prompt(tokens=(3, 5)), lambda t: text(t[:e]) + new(3, 5) + text(t[e:])),
        (
            jpeft.hard_prompt(template=((("before", MASK), (3,)), ("end", (4, 5)))),
            lambda t: text(t[: at(t)]) + new(3) + text(t[at(t) : len(t) - e]) + new(4, 5) + text(t[len(t) - e :]),
        ),
    ]
    for method, put in cases:
        peft = jpeft.apply(params, method=method)
        got = jax.jit(jpeft.wrap(model.apply, method))(peft.variables, ids, mask)
        longer, longer_mask, places = by_hand(ids, mask, put, causal=family == "gpt2")
        want = jax.jit(model.apply)({"params": params}, longer, longer_mask)
        for row, place in enumerate(places):
            np.testing.assert_allclose(got[row, : LENGTHS[row]], want[row, np.array(place)], atol=1e-4)


def test_there_is_nothing_to_train(tmp_path):
    """No scalar without a head; the head's with one. An empty adapter is saved and loaded, and the words are in the method."""
    peft = jpeft.apply(WTE, method="hard_prompt", tokens=[3, 5], head=None)
    assert (peft.adapter, jpeft.summary(peft).trained, jpeft.summary(peft).stored) == ({}, 0, 0)
    jpeft.save(tmp_path / "out", peft)
    loaded = jpeft.load(tmp_path / "out", WTE)
    assert (loaded.method, loaded.adapter) == (peft.method, {})
    assert jpeft.summary(jpeft.apply(WTE, method="hard_prompt", tokens=[3, 5])).trained == 12
    with pytest.raises(ValueError, match="lengthens the text"):
        jpeft.merge(peft)
    assert jpeft.merge(jpeft.apply(WTE, method="hard_prompt"))["wte"]["embedding"] is WTE["wte"]["embedding"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": [20]}, "There is no token 20: the vocabulary has 20"),
        ({"template": [["end", 2]]}, "has pseudo tokens.*use jpeft.prompt_tuning or jpeft.p_tuning"),
        ({"tokens": [1], "template": [["end", [2]]]}, "give one of them"),
        ({"template": [["end", [-2]]]}, "at 'end' a number of pseudo tokens or a tuple of token ids"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.apply(WTE, method="hard_prompt", **options)


# --- in the trainer -------------------------------------------------------------------------------------------------------------------


def test_text_becomes_tokens_in_the_trainer(tmp_path):
    """`tokens` as text, for hard prompts and for soft ones that start from it; and the labels' own names, which the trainer knows."""
    model = make_model(tmp_path / "model")
    write_csv(tmp_path / "data" / "train.csv", make_rows(60))
    config = TrainConfig(model=str(model), data=str(tmp_path / "data"), output=str(tmp_path / "run"), max_length=8)

    def made(method, *options):
        peft = prepare(dataclasses.replace(config, method=method, options=options)).peft
        return peft.method, jpeft.flatten(peft.adapter).get("bert/embeddings/word_embeddings/+/prompt"), peft.params

    hard, _, params = made("hard_prompt", "tokens=some old rain")
    table = params["bert"]["embeddings"]["word_embeddings"]["embedding"]
    ids = dict(hard.options)["tokens"]
    assert len(ids) == 3
    soft, prompt, _ = made("prompt_tuning", "init=tokens", "tokens=some old rain", "length=4")
    assert dict(soft.options)["tokens"] == ids
    np.testing.assert_array_equal(prompt, table[np.array([*ids, ids[0]])])
    _, prompt, _ = made("prompt_tuning", "init=labels", "length=4")
    assert prompt.shape == (4, 16)
    # "fruit", "metal" and "water" are unknown words to this tokenizer.
    np.testing.assert_array_equal(prompt[:3], np.stack([table[1]] * 3))

"""Token ids without a row: NaN inside jit and an error outside, in every model, also behind prompts; never another id's row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import VOCAB, base, encoder, gpt2, llama

import jpeft
from jpeft.models import BertConfig, BertForSequenceClassification, GPT2LMHeadModel

MODELS = {"bert": encoder(), "gpt2": gpt2(), "llama": llama()}
CELLS = [("bert", method) for method in ("none", "words", "lora")] + [("gpt2", "prompt"), ("gpt2", "two"), ("llama", "none")]
METHODS = {
    "none": None,
    "prompt": jpeft.prompt_tuning(length=3),
    "words": jpeft.hard_prompt(tokens=(3, 7)),
    "two": jpeft.chain(inner=jpeft.prompt_tuning(length=2, head=None), outer=jpeft.prompt_tuning(length=3)),
    "lora": jpeft.lora(rank=2, target=r".*(kernel|embedding)"),
}
IDS = np.array([[4, 5, 6, 7], [8, 9, 10, 11]], np.int32)


def outside(token):
    return np.where(np.arange(4) == 2, token, IDS)


@pytest.mark.parametrize(("model", "method"), CELLS)
def test_an_id_without_a_row_is_nan_inside_jit_and_an_error_outside(model, method):
    params, peft = base(model), None
    apply = MODELS[model].apply
    if (chosen := METHODS[method]) is None:
        run = lambda ids: apply({"params": params}, ids)
    else:
        peft = jpeft.apply(params, method=chosen)
        run = lambda ids: jpeft.wrap(apply, chosen)(peft.variables, ids)
    jitted = jax.jit(run)
    assert np.isfinite(jitted(IDS)).all()
    # The first ids beyond the vocabulary are those that the rows of prompts have inside.
    for token in (-1, -5, VOCAB, VOCAB + 1, VOCAB + 4, VOCAB + 5, VOCAB + 1000, np.iinfo(np.int32).max):
        assert np.isnan(jitted(np.where(np.arange(2)[:, None] == 1, outside(token), IDS))[1]).all(), token
        if token in (-1, VOCAB + 1):
            with pytest.raises(ValueError, match=f"{token}, and .* has {VOCAB} rows"):
                run(outside(token))


def test_the_error_is_raised_inside_grad_too():
    loss = lambda params: encoder().apply({"params": params}, outside(VOCAB)).sum()
    with pytest.raises(ValueError, match=f"input_ids holds {VOCAB}"):
        jax.grad(loss)(base("bert"))


@pytest.mark.parametrize("types", [1, 2])
def test_token_types_have_rows_too(types):
    """A table of one row, which RoBERTa has, is no exception."""
    config = BertConfig(
        vocab_size=16, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4, type_vocab_size=types
    )
    model = BertForSequenceClassification(config, 2)
    params = model.init(jax.random.key(0), IDS[:, :2])
    with pytest.raises(ValueError, match=f"token_type_ids holds {types}, and .* has {types} rows"):
        model.apply(params, IDS[:, :2], None, np.full((2, 2), types))
    assert jnp.isnan(jax.jit(model.apply)(params, IDS[:, :2], None, np.full((2, 2), types))).all()


def test_a_token_behind_the_cache_has_a_row_too():
    model = GPT2LMHeadModel(MODELS["gpt2"].config)
    peft = jpeft.apply(model.init(jax.random.key(0), IDS)["params"], method="prompt_tuning", length=3)
    forward = jpeft.wrap(model.apply, peft.method)
    _, cache = forward(peft.variables, IDS, cache_length=6, mutable=["cache"])
    run = jax.jit(lambda cache, ids: forward({**peft.variables, **cache}, ids, mutable=["cache"])[0])
    assert jnp.isfinite(run(cache, IDS[:, :1])).all()
    assert jnp.isnan(run(cache, np.full((2, 1), VOCAB))).all()
    with pytest.raises(ValueError, match=f"token id {VOCAB}"):
        forward({**peft.variables, **cache}, np.full((2, 1), VOCAB), mutable=["cache"])

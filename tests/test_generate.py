"""Generation: the same tokens as torch, padding, stop tokens, wrapped models, one program."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import noised
from test_bert import run
from test_decoders import language_model

import jpeft
from jpeft.models import abstract_params, generate, save
from jpeft.models.generation.sampling import filter_logits

NEW = 12
SIDES = ("left", "right")
LENGTHS = (9, 5, 7, 1)  # of the prompts


def batch(side="left"):
    """Ids and mask of prompts of LENGTHS, padded on one side."""
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int32)
    ids = np.random.default_rng(0).integers(3, 50, mask.shape).astype(np.int32) * mask
    if side == "right":
        return ids, mask
    return np.stack([np.roll(row, max(LENGTHS) - n) for row, n in zip(ids, LENGTHS)]), mask[:, ::-1].copy()


@functools.cache
def decoder(case, **changes):
    """A tiny decoder with weights so large and biases so small that it does not repeat one word."""
    model, rng = language_model(case, **changes), np.random.default_rng(1)

    def draw(path, leaf):
        kind = path[-1].key
        return jnp.asarray(rng.normal(size=leaf.shape) * (0.1 if kind == "bias" else 1.0) + (kind == "scale"), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, abstract_params(model))


@pytest.fixture(scope="module")
def torch_model(tmp_path_factory):
    """case -> the torch model with the weights of `decoder(case)`."""
    import transformers

    @functools.cache
    def make(case):
        folder = tmp_path_factory.mktemp(case) / "model"
        save(folder, *decoder(case))
        return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    return make


def torch_generate(model, ids, mask, **options):
    import torch

    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    with torch.no_grad():
        out = model.generate(torch.tensor(ids).long(), attention_mask=torch.tensor(mask), **settings)
    new = out[:, ids.shape[1] :].numpy()
    return np.pad(new, [(0, 0), (0, NEW - new.shape[1])])


def slowly(forward, variables, ids, mask):
    """Greedy text without a cache: run the whole sequence again for every token, each row alone and without padding."""
    rows = []
    step = jax.jit(lambda variables, ids, last: forward(variables, ids, logits_at=last))
    for row, real in zip(ids, mask.astype(bool)):
        text = list(row[real])
        for _ in range(NEW):
            whole = np.zeros((1, 24), np.int32)
            whole[0, : len(text)] = text
            text.append(int(step(variables, whole, np.array([len(text) - 1]))[0, 0].argmax()))
        rows.append(text[-NEW:])
    return np.array(rows)


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen2", "qwen3"])
def test_greedy_equals_torch(torch_model, case):
    model, params = decoder(case)
    expected = torch_generate(torch_model(case), *batch("left"))
    assert len(np.unique(expected)) > 9  # texts that repeat one word would prove little
    for side in SIDES:
        got = generate(model.apply, {"params": params}, *batch(side), max_new_tokens=NEW)
        np.testing.assert_array_equal(got.tokens, expected)
        np.testing.assert_array_equal(got.lengths, [NEW] * 4)


def test_stop_tokens_end_a_text(torch_model):
    (model, params), torch = decoder("gpt2"), torch_model("gpt2")
    free = torch_generate(torch, *batch("left"))
    stops = [int(free[2, 6]), int(free[1, 3])]
    expected = torch_generate(torch, *batch("left"), eos_token_id=stops)
    assert 0 in expected
    got = generate(model.apply, {"params": params}, *batch("left"), max_new_tokens=NEW, stop=stops)
    np.testing.assert_array_equal(got.tokens, expected)
    for tokens, length, whole in zip(got.tokens, got.lengths, free):
        assert tokens[length - 1] in stops
        assert not set(np.asarray(tokens[: length - 1])) & set(stops)
        np.testing.assert_array_equal(tokens[:length], whole[:length])
    one = generate(model.apply, {"params": params}, *batch("left"), max_new_tokens=NEW, stop=stops[0], pad=49)
    assert one.tokens[0, one.lengths[0] :].tolist() == [49] * (NEW - int(one.lengths[0]))


def test_scores_are_log_likelihoods():
    model, params = decoder("gpt2")
    ids, mask = batch("left")
    got = generate(model.apply, {"params": params}, ids, mask, max_new_tokens=NEW)
    whole, real = np.concatenate([ids, got.tokens], 1), np.concatenate([mask, np.ones_like(got.tokens)], 1)
    log_p = jax.nn.log_softmax(run(model, params, whole, real)[:, -NEW - 1 : -1])
    want = np.take_along_axis(np.asarray(log_p), np.asarray(got.tokens)[..., None], -1).sum((1, 2))
    np.testing.assert_allclose(got.scores, want, rtol=1e-4)


METHODS = {
    "lora": jpeft.lora(rank=2),
    "bitfit": jpeft.bitfit(),
    "adapter": jpeft.adapter(size=3),
    "prefix_tuning": jpeft.prefix_tuning(length=3, mlp=5),
    "prompt_tuning": jpeft.prompt_tuning(length=3),
    "chain": jpeft.chain(lora=jpeft.lora(rank=2), prefix=jpeft.prefix_tuning(length=2, mlp=None)),
}


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *(("gpt2", method) for method in METHODS),
        ("llama", "lora"),
        ("llama", "prefix_tuning"),
        ("qwen2", "prompt_tuning"),
        ("qwen3", "chain"),
    ],
)
def test_methods_are_active(case, method):
    """A wrapped model generates the same text with a cache as without one."""
    model, params = decoder(case)
    peft = jpeft.apply(params, method=METHODS[method])
    peft = peft.replace(adapter=noised(peft.adapter, 0.5))
    forward = jpeft.wrap(model.apply, peft.method)
    expected = slowly(forward, peft.variables, *batch("left"))
    for side in SIDES:
        np.testing.assert_array_equal(generate(forward, peft.variables, *batch(side), max_new_tokens=NEW).tokens, expected)
    assert not np.array_equal(expected, generate(model.apply, {"params": params}, *batch(), max_new_tokens=NEW).tokens)


@pytest.mark.parametrize("scan", [False, True])
def test_one_program_for_prompts_of_one_shape(scan):
    (model, params), traces = decoder("gpt2", scan=scan), []

    def forward(*args, **kwargs):
        traces.append(None)
        return model.apply(*args, **kwargs)

    ids, mask = batch("left")
    key = jax.random.key(0)
    first = generate(forward, {"params": params}, ids, mask, max_new_tokens=NEW, key=key, temperature=0.7, top_p=0.9)
    count = len(traces)
    params = jax.tree.map(lambda leaf: leaf * 1.1, params)
    other = generate(forward, {"params": params}, ids[:, ::-1].copy(), mask, max_new_tokens=NEW, key=key, temperature=0.8, top_p=0.5)
    assert len(traces) == count
    assert not np.array_equal(first.tokens, other.tokens)


# --- sampling ---


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 1.7, "top_k": 9, "top_p": 0.6}, {"top_p": 1e-6}, {"top_k": 99}],
    ids=str,
)
def test_warped_logits_equal_those_of_transformers(options):
    import torch
    from transformers.generation import logits_process as process

    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32) * 2
    want = torch.tensor(logits)
    for name, cls in {"temperature": "TemperatureLogitsWarper", "top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper"}.items():
        if name in options:
            want = getattr(process, cls)(options[name])(torch.zeros(6, 1).long(), want)
    np.testing.assert_allclose(jax.jit(lambda x: filter_logits(x, **options))(logits), want.numpy(), rtol=1e-5)


def test_samples_follow_the_distribution():
    model, params = decoder("gpt2")
    prompt, options = np.array([[7, 8, 9]], np.int32), {"temperature": 1.5, "top_k": 6}
    n = 4000
    drawn = generate(model.apply, {"params": params}, np.repeat(prompt, n, 0), max_new_tokens=2, key=jax.random.key(3), **options).tokens
    share = jax.nn.softmax(filter_logits(run(model, params, prompt)[:, -1], **options))[0]
    counts = np.bincount(np.asarray(drawn[:, 0]), minlength=50)
    assert counts[share == 0].sum() == 0
    chi2 = ((counts - n * share) ** 2 / (n * share))[share > 0].sum()
    assert chi2 < 25  # 99.98 % quantile for 5 degrees of freedom
    likely = int(counts.argmax())  # the second word, given the first
    share = jax.nn.softmax(filter_logits(run(model, params, np.append(prompt, [[likely]], 1))[:, -1], **options))[0]
    second = np.asarray(drawn[drawn[:, 0] == likely, 1])
    expected = len(second) * share
    chi2 = ((np.bincount(second, minlength=50) - expected) ** 2 / expected)[expected > 0].sum()
    assert chi2 < 25


def test_a_key_is_a_text():
    model, params = decoder("gpt2")
    draw = lambda seed: generate(model.apply, {"params": params}, *batch(), max_new_tokens=NEW, key=jax.random.key(seed)).tokens
    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))
    sharp = generate(model.apply, {"params": params}, *batch(), max_new_tokens=NEW, key=jax.random.key(0), top_k=1)
    np.testing.assert_array_equal(sharp.tokens, generate(model.apply, {"params": params}, *batch(), max_new_tokens=NEW).tokens)


# --- beam search ---


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": 0.0, "early_stopping": True},
        {"num_beams": 2, "length_penalty": -1.0},
        {"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never"},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["gpt2", "qwen3"])
def test_beam_search_equals_torch(torch_model, case, options):
    import torch

    (model, params), (ids, mask) = decoder(case), batch("left")
    stops = [9, 21, 39]
    own = {"beams": options["num_beams"]} | {name: value for name, value in options.items() if name != "num_beams"}
    got = generate(model.apply, {"params": params}, ids, mask, max_new_tokens=NEW, stop=stops, **own)
    with torch.no_grad():
        want = torch_model(case).generate(
            torch.tensor(ids).long(), attention_mask=torch.tensor(mask), max_new_tokens=NEW, do_sample=False, pad_token_id=1,
            eos_token_id=stops, output_scores=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
    assert (np.asarray(got.lengths) < NEW).any() or options.get("early_stopping") == "never"
    new = want.sequences[:, ids.shape[1] :].numpy()
    for tokens, length, expected in zip(got.tokens, got.lengths, new):
        np.testing.assert_array_equal(tokens[:length], expected[:length])
        assert (tokens[length:] == 0).all()
        assert (expected[length:] == 1).all()
    np.testing.assert_allclose(got.scores, want.sequences_scores.numpy(), rtol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_a_wide_beam_finds_the_best_of_all_texts(scan):
    model, params = decoder("gpt2", vocab_size=5, scan=scan)
    prompt, variables = np.array([[3, 4], [1, 2]], np.int32), {"params": params}
    texts = np.array(np.meshgrid(*[np.arange(5)] * 3, indexing="ij")).reshape(3, -1).T.astype(np.int32)
    best = []
    for row in prompt:
        whole = np.concatenate([np.repeat(row[None], len(texts), 0), texts], 1)
        log_p = jax.nn.log_softmax(run(model, params, whole)[:, 1:-1])
        best.append(texts[np.take_along_axis(np.asarray(log_p), texts[..., None], -1).sum((1, 2)).argmax()])
    got = generate(model.apply, variables, prompt, max_new_tokens=3, beams=25)
    np.testing.assert_array_equal(got.tokens, best)


def test_beam_search_with_a_method():
    model, params = decoder("qwen3", scan=True)
    peft = jpeft.apply(params, method=METHODS["chain"])
    peft = peft.replace(adapter=noised(peft.adapter, 0.5))
    forward = jpeft.wrap(model.apply, peft.method)
    left, right = (generate(forward, peft.variables, *batch(side), max_new_tokens=NEW, beams=3) for side in SIDES)
    np.testing.assert_array_equal(left.tokens, right.tokens)
    whole = np.concatenate([batch("left")[0], left.tokens], 1)
    real = np.concatenate([batch("left")[1], np.ones_like(left.tokens)], 1)
    log_p = jax.nn.log_softmax(jax.jit(forward)(peft.variables, whole, real)[:, -NEW - 1 : -1])
    scores = np.take_along_axis(np.asarray(log_p), np.asarray(left.tokens)[..., None], -1).sum((1, 2)) / NEW
    np.testing.assert_allclose(left.scores, scores, rtol=1e-4)
    plain = generate(forward, peft.variables, *batch("left"), max_new_tokens=NEW)
    assert (left.scores >= plain.scores / NEW - 1e-5).all()


def test_errors():
    model, params = decoder("gpt2")
    go: Any = lambda **options: generate(model.apply, {"params": params}, *batch(), **({"max_new_tokens": 3} | options))
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        go(max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature=0.5, top_k=3 without a key="):
        go(temperature=0.5, top_k=3)
    with pytest.raises(ValueError, match="temperature=0.0 must be above 0"):
        go(temperature=0.0, key=key)
    with pytest.raises(ValueError, match="top_k=0"):
        go(top_k=0, key=key)
    with pytest.raises(ValueError, match="top_p=1.5"):
        go(top_p=1.5, key=key)
    for options in (
        *({"max_new_tokens": value} for value in (True, -1, 10**30)),
        *({"temperature": value} for value in (math.nan, math.inf, -1.0)),
        *({"top_k": value} for value in (True, 10**30)),
        *({"top_p": value} for value in (0.0, math.nan)),
        *({"length_penalty": value, "beams": 2, "key": None} for value in (math.nan, math.inf)),
        *({"beams": value, "key": None} for value in (True, 0, -1)),
        *({"stop": value} for value in (-1, [1, -1])),
        *({"pad": value} for value in (-1, True)),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            go(**{"key": key} | options)
    with pytest.raises(ValueError, match="beams=1, length_penalty=0.5"):
        go(length_penalty=0.5)
    with pytest.raises(ValueError, match="beams=2 searches for the most likely"):
        go(beams=2, key=key)
    with pytest.raises(ValueError, match="early_stopping='always'"):
        go(beams=2, early_stopping="always")
    with pytest.raises(ValueError, match="33 positions, but the position table holds 32"):
        go(max_new_tokens=25)
    assert go(max_new_tokens=24).tokens.shape == (4, 24)

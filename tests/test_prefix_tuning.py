"""Prefix-tuning and P-tuning v2: attention over longer keys, counts, folding, starting points, what they refuse."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import Classifier, batch, fit, noised
from tiny_text import make_model, make_rows, write_csv

import jpeft
from jpeft.additive.prefixes.attention_sites import find_attention_sites
from jpeft.models import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    abstract_params,
    load,
)
from jpeft.models.bert.encoder import SelfAttention
from jpeft.stats import key_values
from jpeft.training.config import TrainConfig
from jpeft.training.train import prepare

KEY = jax.random.key(0)
IDS = jax.random.randint(KEY, (3, 6), 2, 17)
MASK = jnp.arange(6)[None] < jnp.array([6, 4, 1])[:, None]
FAMILIES = ["bert", "roberta", "distilbert"]


def tiny(model_type="bert", **changes) -> BertConfig:
    options = dict(
        model_type=model_type, vocab_size=17, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=40, pad_token_id=1 if model_type == "roberta" else 0, initializer_range=0.5,
        type_vocab_size=0 if model_type == "distilbert" else 2,
    )  # fmt: skip
    return BertConfig(**(options | changes))


def tiny_gpt2(**changes) -> GPT2Config:
    sizes = dict(vocab_size=17, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=40)
    return GPT2Config(**sizes, initializer_range=0.5, **changes)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_equation():
    """softmax(Q [P_K; K]ᵀ / √d) [P_V; V], head by head, with padding among the keys and none in the prefix."""
    attention, x = SelfAttention(tiny()), jax.random.normal(KEY, (3, 6, 8))
    params = attention.init(KEY, x, MASK[:, None, None], True)["params"]
    peft = jpeft.apply(params, method="prefix_tuning", length=5, mlp=None, std=1.0)
    got = jpeft.wrap(attention.apply, peft.method)(peft.variables, x, MASK[:, None, None], True)
    q, k, v = (
        np.asarray(x) @ np.asarray(params[n]["kernel"]) + np.asarray(params[n]["bias"])[None, None] for n in ("query", "key", "value")
    )
    prefix = peft.adapter["core"]["+"]
    for b in range(3):
        keys = np.concatenate([prefix["key"], k[b][np.asarray(MASK[b])]])
        values = np.concatenate([prefix["value"], v[b][np.asarray(MASK[b])]])
        for h in (slice(0, 4), slice(4, 8)):
            want = softmax(q[b][:, h] @ keys[:, h].T / 2) @ values[:, h]
            np.testing.assert_allclose(got[b][:, h], want, atol=1e-5)


def test_network():
    """P = W_2 tanh(W_1 P' + b_1) + b_2, viewed as (l, layers, key and value, width): HF PEFT's order."""
    params = abstract_params(BertModel(tiny()))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    peft = jpeft.apply(params, method="prefix_tuning", length=5, mlp=7)
    leaves = jax.tree.map(np.array, peft.adapter["+"])
    hidden = np.tanh(leaves["embedding"] @ leaves["down"]["kernel"] + leaves["down"]["bias"])
    want = (hidden @ leaves["up"]["kernel"] + leaves["up"]["bias"]).reshape(5, 3, 2, 8)
    for i in range(3):
        prefix = jpeft.fold(peft).adapter["encoder"]["layer"][str(i)]["attention"]["self"]["core"]["+"]
        np.testing.assert_allclose(prefix["key"], want[:, i, 0], atol=1e-6)
        np.testing.assert_allclose(prefix["value"], want[:, i, 1], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_remat_and_scan_agree(family):
    """The network's output goes to the same layers however they are run; gradients reach every leaf."""
    results = []
    for changes in ({}, {"remat": True}, {"scan": True}):
        model = BertForSequenceClassification(tiny(family, **changes), num_labels=2)
        plain = BertForSequenceClassification(tiny(family), num_labels=2).init(KEY, IDS)["params"]
        body = plain[family]["transformer" if family == "distilbert" else "encoder"]
        if changes.get("scan"):
            body["layer"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(body["layer"][str(i)] for i in range(3)))
        peft = jpeft.apply(plain, method="prefix_tuning", length=5, mlp=7, key=KEY)
        forward = jpeft.wrap(model.apply, peft.method)
        loss = lambda a, f=forward, p=peft: jnp.sin(3 * f(p.replace(adapter=a).variables, IDS, MASK)).sum()
        results.append(jax.jit(jax.value_and_grad(loss))(peft.adapter))
        folded = jpeft.fold(peft)
        chex.assert_trees_all_close(jpeft.wrap(model.apply, folded.method)(folded.variables, IDS, MASK), forward(peft.variables, IDS, MASK))
    for other in results[1:]:
        chex.assert_trees_all_close(other, results[0], atol=1e-4)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(results[0][1]))


def test_layers_are_in_the_order_of_their_numbers():
    found = find_attention_sites(abstract_params(BertModel(tiny(num_hidden_layers=12))))
    assert [site.core.split("/")[2] for site in found] == [str(i) for i in range(12)]


def test_padding_and_other_examples_do_not_matter():
    model = BertForTokenClassification(tiny(), num_labels=2)
    params = model.init(KEY, IDS)["params"]
    peft = jpeft.apply(params, method="p_tuning_v2", std=1.0)
    forward = jax.jit(jpeft.wrap(model.apply, peft.method))
    alone = forward(peft.variables, IDS[1:2, :4])
    chex.assert_trees_all_close(forward(peft.variables, IDS, MASK)[1:2, :4], alone, atol=1e-5)


def test_dropout_only_where_the_model_drops():
    model = BertForSequenceClassification(tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), num_labels=2)
    peft = jpeft.apply(model.init(KEY, IDS)["params"], method="p_tuning_v2", dropout=0.5, std=1.0)
    forward = jpeft.wrap(model.apply, peft.method)
    run = lambda seed: forward(peft.variables, IDS, deterministic=False, rngs={"dropout": jax.random.key(seed)})
    assert jnp.abs(run(1) - run(2)).max() > 1e-3
    chex.assert_trees_all_equal(run(1), run(1))
    chex.assert_trees_all_equal(forward(peft.variables, IDS), forward(peft.variables, IDS))


# --- counts -----------------------------------------------------------------------------------------------------------------------------


def counted(params, method) -> tuple[int, int]:
    """Scalars in training, and stored after it."""
    peft = jax.eval_shape(lambda p: jpeft.apply(p, method=method), params)
    return jpeft.summary(peft).trained, jpeft.summary(jax.eval_shape(jpeft.fold, peft)).stored


def gpt2(layers: int, width: int):
    kernel = jax.ShapeDtypeStruct((width, 3 * width), jnp.float32)
    return {"h": {str(i): {"attn": {"c_attn": {"kernel": kernel}}} for i in range(layers)}}


def test_counts_on_gpt2():
    """Li and Liang's GPT-2 medium and large."""
    for scan in (False, True):
        medium = abstract_params(GPT2Model(GPT2Config.gpt2_medium(scan=scan)))
        assert counted(medium, jpeft.prefix_tuning(length=5)) == (25_744_896, 245_760)
        assert counted(medium, jpeft.prefix_tuning(length=10, mlp=None)) == (491_520, 491_520)
    assert counted(gpt2(36, 1280), jpeft.prefix_tuning(length=5, mlp=None)) == (460_800, 460_800)


def test_counts_on_encoders():
    """P-tuning v2: the repository's own number for BERT-base, and the direct prompts of RoBERTa-large and BERT-large."""
    base = abstract_params(BertForTokenClassification(BertConfig.bert_base_cased(), num_labels=9))
    assert counted(base, jpeft.p_tuning_v2(length=5, mlp=512))[0] == 9_860_105
    large = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    for scan in (False, True):
        roberta = abstract_params(BertModel(BertConfig.roberta_base(scan=scan, **large)))
        assert counted(roberta, jpeft.p_tuning_v2(length=128))[0] == 6_291_456
    assert counted(abstract_params(BertModel(BertConfig.bert_large_cased())), jpeft.p_tuning_v2(length=20))[0] == 983_040


def test_fewer_heads_for_keys_than_for_queries():
    """2 L n_kv d_head l: the width is that of the key kernel; a fused one has to be told."""
    attn = {"q_proj": {"kernel": jnp.ones((32, 32))}, "k_proj": {"kernel": jnp.ones((32, 8))}, "v_proj": {"kernel": jnp.ones((32, 8))}}
    params = {"layers": {str(i): {"self_attn": attn} for i in range(2)}}
    assert counted(params, jpeft.prefix_tuning(length=3, mlp=None)) == (2 * 2 * 8 * 3,) * 2
    assert counted(gpt2(2, 32), jpeft.prefix_tuning(length=3, mlp=None, width=8)) == (2 * 2 * 8 * 3,) * 2


# --- positions ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")  # HF PEFT calls transformers by names that those are to lose
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_equals_hf_peft(family, tmp_path):
    """The same prefix in torch, where HF PEFT hands it to the model as a cache of l tokens and the others so begin at position l."""
    import peft as hf
    import torch
    import transformers

    ours = tiny_gpt2(bos_token_id=1, eos_token_id=1) if family == "gpt2" else tiny(family)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **ours.to_hf())
    model = (transformers.AutoModelForCausalLM if family == "gpt2" else transformers.AutoModel).from_config(config).eval()
    model.save_pretrained(tmp_path)
    kind = "CAUSAL_LM" if family == "gpt2" else "FEATURE_EXTRACTION"
    wrapped = hf.get_peft_model(model, hf.PrefixTuningConfig(task_type=kind, num_virtual_tokens=5)).eval()
    weight = wrapped.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.normal_(std=2.0)
        inputs = torch.tensor(np.asarray(IDS)).long(), torch.tensor(np.asarray(MASK)).long()
        want = wrapped(input_ids=inputs[0], attention_mask=inputs[1])[0].numpy()

    loaded = load(tmp_path, task="causal-lm" if family == "gpt2" else "encoder", scan=False)
    prefix = weight.detach().numpy().reshape(5, 3, 2, 8)
    places = [f"{site.core}/+/{name}" for site in find_attention_sites(loaded.params) for name in ("key", "value")]
    given = jpeft.unflatten({path: prefix[:, i // 2, i % 2] for i, path in enumerate(places)})
    peft = jpeft.apply(loaded.params, method="prefix_tuning", length=5, mlp=None, stats=given)
    got = jax.jit(jpeft.wrap(loaded.model.apply, peft.method))(peft.variables, IDS, MASK)
    real = np.asarray(MASK)
    got = np.asarray(got if family == "gpt2" else got.last_hidden_state)
    np.testing.assert_allclose(got[real], want[real], atol=1e-4)
    unmoved = jpeft.apply(loaded.params, method="prefix_tuning", length=5, mlp=None, stats=given, shift=False)
    other = jax.jit(jpeft.wrap(loaded.model.apply, unmoved.method))(unmoved.variables, IDS, MASK)
    other = np.asarray(other if family == "gpt2" else other.last_hidden_state)
    assert np.abs(other[real] - want[real]).max() > 1e-3


def test_the_position_table_bounds_text_and_prefix_together():
    model = BertModel(tiny())
    params, ids = model.init(KEY, IDS)["params"], jnp.full((1, 38), 5)
    for length, shift in ((2, True), (9, False)):
        peft = jpeft.apply(params, method="prefix_tuning", length=length, shift=shift)
        assert jnp.isfinite(jax.jit(jpeft.wrap(model.apply, peft.method))(peft.variables, ids).last_hidden_state).all()
    for body in (model, GPT2Model(tiny_gpt2())):
        peft = jax.eval_shape(lambda p: jpeft.apply(p, method="prefix_tuning", length=3), abstract_params(body))
        with pytest.raises(ValueError, match="41 positions, but the position table holds 40"):
            jax.eval_shape(jpeft.wrap(body.apply, peft.method), peft.variables, ids)


@pytest.mark.parametrize(
    ("table", "module"),
    [
        ("bert/embeddings/word_embeddings/embedding", "bert/positions"),
        ("wte/embedding", "positions"),
        ("model/embed_tokens/embedding", "model/positions"),
        ("shared/embedding", "positions"),
        ("embedder/embedding", "positions"),
        ("wpe/embedding", None),
        ("bert/embeddings/position_embeddings/embedding", None),
    ],
)
def test_positions_move_beside_every_word_embedding(table, module):
    """The same names embed words for a prefix and for a prompt. Without one of them no module is known, and nothing is added."""
    params = jpeft.unflatten({table: jnp.zeros((17, 8)), "key/kernel": jnp.zeros((8, 8))})
    peft = jpeft.apply(params, method="prefix_tuning", mlp=None, length=3)
    shifts = {path: int(leaf) for path, leaf in jpeft.flatten(peft.method.bind(params, peft.adapter)).items() if path.endswith("shift")}
    assert shifts == ({f"{module}/jpeft/+/shift": 3} if module else {})


# --- starting points --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("mlp", [None, 7])
def test_starts_from_words(scan, mlp):
    """Under a causal mask the model answers as if the words stood in front; the network reproduces them."""
    model = GPT2LMHeadModel(tiny_gpt2(scan=scan))
    params, words = model.init(KEY, IDS)["params"], jnp.array([[3, 9, 4, 2, 16]])
    peft = jpeft.apply(params, method="prefix_tuning", length=5, mlp=mlp, stats=key_values(model, params, words))
    forward = jax.jit(jpeft.wrap(model.apply, peft.method), static_argnames=("cache_length", "mutable"))
    want = jax.jit(model.apply)({"params": params}, jnp.concatenate([jnp.repeat(words, 3, 0), IDS], 1))[:, 5:]
    chex.assert_trees_all_close(forward(peft.variables, IDS), want, atol=1e-4 if mlp is None else 1e-2)
    # So it does with a cache, where the prefix is no part of it.
    first, cache = forward(peft.variables, IDS[:, :4], cache_length=8, mutable="cache")
    last, _ = forward(peft.variables | cache, IDS[:, 4:], mutable="cache")
    chex.assert_trees_all_close(jnp.concatenate([first, last], 1), forward(peft.variables, IDS), atol=1e-4)


@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning_v2"])
def test_words_as_an_option(method, tmp_path):
    """The trainer makes the keys and values that `init="tokens"` starts from; to be loaded, the method needs none."""
    make_model(tmp_path / "model")
    write_csv(tmp_path / "data.csv", make_rows(30))
    options = ("init=tokens", "tokens=the old apple", "mlp=none")
    sources = {"model": str(tmp_path / "model"), "data": str(tmp_path / "data.csv"), "output": "unused", "max_length": 8}
    setup = prepare(TrainConfig(**sources, method=method, options=options))
    words = setup.loaded.tokenizer("the old apple", add_special_tokens=False, return_tensors="np")["input_ids"]
    assert words.shape == (1, 3)
    want = key_values(setup.loaded.model, setup.loaded.params, words).values
    got = jpeft.flatten(setup.peft.adapter)
    assert len(jpeft.flatten(want)) == 4
    for path, leaf in jpeft.flatten(want).items():
        chex.assert_trees_all_close(got[path], leaf, atol=1e-5)
    assert dict(setup.peft.method.options)["tokens"] == tuple(words[0].tolist())
    jpeft.save(tmp_path / "out", setup.peft)
    chex.assert_trees_all_equal(jpeft.load(tmp_path / "out", setup.loaded.params).adapter, setup.peft.adapter)


def test_folded_it_no_longer_starts_from_words():
    model = BertModel(tiny())
    params, words = model.init(KEY, IDS)["params"], IDS[:1, :5]
    peft = jpeft.apply(
        params, method="prefix_tuning", init="tokens", tokens=words[0].tolist(), mlp=7, stats=key_values(model, params, words)
    )
    folded = jpeft.fold(peft)
    assert folded.method == jpeft.prefix_tuning(length=5, mlp=None)
    chex.assert_trees_all_close(folded.adapter, key_values(model, params, words).values, atol=1e-2)


@pytest.mark.parametrize("remat", [False, True])
def test_keys_and_values_of_words(remat):
    """Those of the first layer by hand."""
    model = BertModel(tiny(remat=remat))
    params, words = model.init(KEY, IDS)["params"], IDS[:1, :5]
    given = jpeft.flatten(key_values(model, params, words).values)
    hidden = model.apply({"params": params}, words, output_hidden_states=True).hidden_states[0][0]
    own = params["encoder"]["layer"]["0"]["attention"]["self"]
    for name in ("key", "value"):
        want = hidden @ own[name]["kernel"] + own[name]["bias"][None]
        chex.assert_trees_all_close(given[f"encoder/layer/0/attention/self/core/+/{name}"], want, atol=1e-5)
    assert len(given) == 2 * 3


def test_words_are_one_text_for_a_model_with_a_core():
    model = BertModel(tiny())
    with pytest.raises(ValueError, match=r"one text.*\(3, 6\)"):
        key_values(model, model.init(KEY, IDS)["params"], IDS)
    with pytest.raises(ValueError, match="no module called 'core' ran"):
        key_values(Classifier(), Classifier().init(KEY, batch()["x"])["params"], batch()["x"][:1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", [BertForSequenceClassification, BertForTokenClassification])
def test_p_tuning_v2_classifies_texts_and_tokens(family, task):
    """The prefix of every layer and the whole head of every encoder are trained, nothing else; the loss falls."""
    model, tokens = task(tiny(family), num_labels=3), task is BertForTokenClassification
    params = model.init(KEY, IDS)["params"]
    peft = jpeft.apply(params, method="p_tuning_v2", length=4)
    heads = {path for path in jpeft.flatten(params) if path.split("/")[0] in ("classifier", "pre_classifier")}
    prefixes = {f"{site.core}/+/{name}" for site in find_attention_sites(params) for name in ("key", "value")}
    assert jpeft.flatten(peft.adapter).keys() == heads | prefixes
    labels = IDS % 3 if tokens else IDS[:, 0] % 3
    losses = fit(model, peft, IDS, labels, steps=15, rate=jpeft.methods()["p_tuning_v2"].learning_rate)
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("name", ["prefix_tuning", "p_tuning_v2"])
def test_learns_with_the_defaults(name):
    """Which of two words is in a text, read off by the frozen encoder's first position: prefix alone, the head frozen."""
    config = tiny(hidden_size=16, initializer_range=0.3)
    model = BertForSequenceClassification(config, num_labels=2)
    ids = jax.random.randint(KEY, (32, 6), 4, 17)
    labels = jnp.arange(32) % 2
    ids = ids.at[:, 3].set(2 + labels)
    peft = jpeft.apply(model.init(KEY, ids)["params"], method=name, head=None)
    losses = fit(model, peft, ids, labels, steps=60, rate=jpeft.methods()[name].learning_rate * 3)
    assert losses[-1] < 0.8 * losses[0], losses[::10]


# --- together with others, and what is refused ------------------------------------------------------------------------------------------


def test_chains_and_folds_in_a_chain():
    model = BertForSequenceClassification(tiny(), num_labels=2)
    params = model.init(KEY, IDS)["params"]
    method = jpeft.chain(prefix=jpeft.prefix_tuning(length=3, mlp=5), lora=jpeft.lora(rank=2), deep=jpeft.p_tuning_v2(length=2))
    peft = jpeft.apply(params, method=method)
    peft = peft.replace(adapter=noised(peft.adapter))
    folded = jpeft.fold(peft)
    want = jpeft.wrap(model.apply, method)(peft.variables, IDS)
    chex.assert_trees_all_close(jpeft.wrap(model.apply, folded.method)(folded.variables, IDS), want, atol=1e-5)
    assert folded.method == jpeft.chain(
        prefix=jpeft.prefix_tuning(length=3, mlp=None), lora=jpeft.lora(rank=2), deep=jpeft.p_tuning_v2(length=2)
    )
    assert jpeft.fold(folded) is folded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "prefix_tuning: length=0 must be a whole number of at least 1"),
        ({"mlp": 0}, "mlp=0 must be a whole number of at least 1, or None"),
        ({"dropout": 1.0}, "dropout=1.0 must be a number of at least 0 and below 1"),
        ({"init": "words"}, "init='words' must be one of 'random', 'tokens'"),
        ({"init": "tokens"}, "init='tokens' needs tokens="),
        ({"tokens": [3]}, "tokens are what init='tokens' starts from, but init is 'random'"),
        ({"init": "tokens", "tokens": [3, 1], "length": 3}, "length=3, but there are 2 tokens to start from"),
        ({"init": "tokens", "tokens": [3, 1]}, r"they were not given: stats=jpeft.stats.key_values\(model, params, \[tokens\]\)"),
        ({"target": ".*/keys/kernel"}, "target='.*/keys/kernel' matches none"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.apply(gpt2(1, 8), method="prefix_tuning", **options)


def test_a_model_without_a_core_is_refused():
    model = Classifier()
    peft = jpeft.apply(model.init(KEY, batch()["x"])["params"], method="prefix_tuning")
    with pytest.raises(ValueError, match="adds to the module 'layer_0/attn/core', but no such module ran"):
        jpeft.wrap(model.apply, peft.method)(peft.variables, batch()["x"])


def test_another_width_is_refused():
    model = BertModel(tiny())
    peft = jpeft.apply(model.init(KEY, IDS)["params"], method="prefix_tuning", width=4)
    with pytest.raises(ValueError, match=r"2 heads of 4, 8 in all, but its prefix is 4 wide.*width=8"):
        jpeft.wrap(model.apply, peft.method)(peft.variables, IDS)


def test_a_given_prefix_must_fit():
    params = BertModel(tiny()).init(KEY, IDS)["params"]
    other = jpeft.apply(params, method="p_tuning_v2", length=4).adapter
    with pytest.raises(ValueError, match=r"has the shape \(4, 8\) where \(5, 8\) is needed"):
        jpeft.apply(params, method="p_tuning_v2", length=5, stats=other)
    chex.assert_trees_all_equal(jpeft.apply(params, method="p_tuning_v2", length=4, stats=other).adapter, other)


def test_merge_says_why_not():
    params = BertModel(tiny()).init(KEY, IDS)["params"]
    for method in (jpeft.prefix_tuning(), jpeft.p_tuning_v2()):
        with pytest.raises(ValueError, match="lengthens the keys and values"):
            jpeft.merge(jpeft.apply(params, method=method))
    assert dataclasses.replace(jpeft.prefix_tuning()) == jpeft.prefix_tuning()


def test_the_network_of_p_tuning_v2_begins_as_in_the_authors_code():
    """transformers draws missing weights again, N(0, 0.02²) with biases of zero; the network of prefix-tuning begins as torch's layers."""
    params = BertForSequenceClassification(tiny(), num_labels=2).init(KEY, IDS)["params"]
    begun = {}
    for name in ("p_tuning_v2", "prefix_tuning"):
        peft = jpeft.apply(params, method=name, length=40, mlp=64, key=KEY)
        begun[name] = {path: np.asarray(leaf) for path, leaf in jpeft.flatten(peft.adapter["+"]).items()}
    for path, leaf in begun["p_tuning_v2"].items():
        assert np.all(leaf == 0) if path.endswith("bias") else abs(leaf.std() - 0.02) < 0.002, path
    assert abs(begun["prefix_tuning"]["embedding"].std() - 1) < 0.1
    assert np.abs(begun["prefix_tuning"]["up/kernel"]).max() <= 1 / 8
    assert begun["prefix_tuning"]["up/bias"].std() > 0.05

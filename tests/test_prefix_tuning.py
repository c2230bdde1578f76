"""Prefix-tuning and P-tuning v2: attention over longer keys, counts, folding, starting points, what they refuse."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import Classifier, batch, noised

import jpeft
from jpeft.additive.prefix_tuning import key_values, sites
from jpeft.models import abstract_params
from jpeft.models.bert import BertForSequenceClassification, BertForTokenClassification, BertModel
from jpeft.models.bert_config import BertConfig
from jpeft.models.bert_encoder import SelfAttention

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
    found = sites(abstract_params(BertModel(tiny(num_hidden_layers=12))))
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
    assert counted(gpt2(24, 1024), jpeft.prefix_tuning(length=5)) == (25_744_896, 245_760)
    assert counted(gpt2(24, 1024), jpeft.prefix_tuning(length=10, mlp=None)) == (491_520, 491_520)
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


# --- starting points --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("mlp", [None, 7])
def test_starts_from_words(scan, mlp):
    """With the keys and values of words, each layer attends to them as if they stood in the text; the network reproduces them exactly."""
    model = BertModel(tiny(scan=scan))
    params = model.init(KEY, IDS)["params"]
    words = IDS[:1, :5]
    _, state = model.apply({"params": params}, words, capture_intermediates=True, mutable="intermediates")
    given = key_values(params, state["intermediates"])
    peft = jpeft.apply(params, method="prefix_tuning", length=5, mlp=mlp, stats=given)
    folded = jpeft.flatten(jpeft.fold(peft).adapter)
    chex.assert_trees_all_close(folded, jpeft.flatten(given), atol=1e-3)
    if mlp is None and not scan:
        hidden = model.apply({"params": params}, words, output_hidden_states=True).hidden_states[0][0]
        kernel = params["encoder"]["layer"]["0"]["attention"]["self"]["key"]
        chex.assert_trees_all_close(
            folded["encoder/layer/0/attention/self/core/+/key"], hidden @ kernel["kernel"] + kernel["bias"][None], atol=1e-5
        )


@pytest.mark.parametrize("name", ["prefix_tuning", "p_tuning_v2"])
def test_learns_with_the_defaults(name):
    """Which of two words is in a text, read off by the frozen encoder's first position: prefix alone, the head frozen."""
    config = tiny(hidden_size=16, initializer_range=0.3)
    model = BertForSequenceClassification(config, num_labels=2)
    ids = jax.random.randint(KEY, (32, 6), 4, 17)
    labels = jnp.arange(32) % 2
    ids = ids.at[:, 3].set(2 + labels)
    peft = jpeft.apply(model.init(KEY, ids)["params"], method=name, head=None)
    losses = train(model, peft, ids, labels, steps=60, rate=jpeft.methods()[name].learning_rate * 3)
    assert losses[-1] < 0.8 * losses[0], losses[::10]


def train(model, peft, ids, labels, steps, rate):
    forward, tx = jpeft.wrap(model.apply, peft.method), jpeft.optimizer(optax.adamw(rate), peft)

    @jax.jit
    def step(adapter, state, peft):
        def loss_fn(adapter):
            logits = forward(peft.replace(adapter=adapter).variables, ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    adapter, state, losses = peft.adapter, tx.init(peft.adapter), []
    for _ in range(steps):
        adapter, state, loss = step(adapter, state, peft)
        losses.append(float(loss))
    return losses


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
        ({"length": 0}, "length=0 must be at least 1"),
        ({"mlp": 0}, "mlp=0 must be None or at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 is not in"),
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

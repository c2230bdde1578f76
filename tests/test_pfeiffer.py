"""Pfeiffer and parallel adapters: the equations in post-norm and pre-norm blocks, places, starting points, what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import Classifier, batch, noised

import jpeft
from jpeft.additive.bottlenecks.sites import BottleneckSite, SiteKind, find_sites
from jpeft.models import BertConfig, BertModel, GPT2Config, GPT2Model, abstract_params
from jpeft.models.bert.encoder import FeedForward, ResidualOutput
from jpeft.models.common.cache import View
from jpeft.models.common.visible import Visible
from jpeft.models.gpt2.model import GPT2MLP, GPT2Block

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 4, 8))
BERT = BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12, vocab_size=17, initializer_range=0.5)
GPT2 = GPT2Config(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12, vocab_size=17, initializer_range=0.5)


def dense(leaves, x):
    return x @ np.asarray(leaves["kernel"]) + np.asarray(leaves["bias"])


def normed(leaves, x, epsilon=1e-12):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * np.asarray(leaves["scale"]) + np.asarray(leaves["bias"])


def branch(leaves, x):
    return dense(leaves["up"], np.maximum(dense(leaves["down"], x), 0))


def adapted(module, name, method, *inputs):
    """Base and adapter, both with noise, of a module that stands under `name` in its model; and what it gives with the two."""
    params = noised(module.init(KEY, *inputs)["params"], 0.3)
    peft = jpeft.apply({name: params}, method=method)
    adapter = noised(peft.adapter, 0.5)[name]
    return params, adapter, jpeft.wrap(module.apply, method)({"params": params, method.name: adapter}, *inputs)


def test_pfeiffer_in_a_post_norm_block():
    """u = LN(o + x), a = W_up relu(W_down u) + o, y = LN(a + x)."""
    inner = jax.random.normal(jax.random.key(1), (2, 4, 12))
    params, adapter, got = adapted(ResidualOutput(BERT), "output", jpeft.pfeiffer(size=3), inner, X, True)
    o, x = dense(params["dense"], np.asarray(inner)), np.asarray(X)
    u = normed(params["LayerNorm"], o + x)
    a = branch(adapter["LayerNorm"]["+"], u) + o
    np.testing.assert_allclose(got, normed(params["LayerNorm"], a + x), atol=1e-5)


@pytest.mark.parametrize("own_norm", [False, True])
def test_pfeiffer_in_a_pre_norm_block(own_norm):
    """h + W_up relu(W_down h) on what the block gives, or with a new LayerNorm: h + W_up relu(W_down LN(h))."""
    block = GPT2Block(GPT2)
    inputs = (X, View(jnp.arange(4)[None], Visible(causal=True), None, None), True)
    params, adapter, got = adapted(block, "0", jpeft.pfeiffer(size=3, own_norm=own_norm), *inputs)
    h, leaves = np.asarray(block.apply({"params": params}, *inputs)), adapter["+"]
    np.testing.assert_allclose(got, h + branch(leaves, normed(leaves["norm"], h, 1e-5) if own_norm else h), atol=1e-5)


def test_parallel_in_a_post_norm_block():
    """LN(x + FFN(x) + s (W_up relu(W_down x) + b_up)): BERT's `output` gets x as the residual."""
    inner = jax.random.normal(jax.random.key(1), (2, 4, 12))
    params, adapter, got = adapted(ResidualOutput(BERT), "output", jpeft.parallel_adapter(size=3, scale=2.5), inner, X, True)
    x = np.asarray(X)
    want = normed(params["LayerNorm"], x + dense(params["dense"], np.asarray(inner)) + 2.5 * branch(adapter["+"]["residual"], x))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "name", "more"), [(GPT2MLP(GPT2), "mlp", ()), (FeedForward(BERT), "ffn", (True,))], ids=["gpt2", "distilbert"]
)
def test_parallel_beside_a_feed_forward_module(module, name, more):
    """FFN(x) + s (W_up relu(W_down x) + b_up)."""
    params, adapter, got = adapted(module, name, jpeft.parallel_adapter(size=3), X, *more)
    want = np.asarray(module.apply({"params": params}, X, *more)) + 4 * branch(adapter["+"], np.asarray(X))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", ["pfeiffer", "parallel_adapter"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_one_in_every_block(family, name):
    """And every leaf of it gets a gradient, through the blocks above."""
    changes = dict(model_type=family, pad_token_id=1 if family == "roberta" else 0, type_vocab_size=0 if family == "distilbert" else 2)
    model = GPT2Model(GPT2) if family == "gpt2" else BertModel(BertConfig(**{**vars(BERT), **changes}))
    ids = jnp.array([[5, 7, 2, 9]])
    params = model.init(KEY, ids)["params"]
    peft = jpeft.apply(params, method=name, size=2, activation="tanh")
    paths = list(jpeft.flatten(peft.adapter))
    assert len(paths) == 4 * 3
    assert sum(path.endswith("/down/kernel") for path in paths) == 3
    noisy = noised(peft.adapter, 0.5)
    forward = jpeft.wrap(model.apply, peft.method)
    loss = lambda a: jnp.sin(forward(peft.replace(adapter=a).variables, ids).last_hidden_state).sum()
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(noisy)))


@pytest.mark.parametrize(
    ("leaf", "around", "beside"),
    [
        ("model/layers/0/mlp/down_proj/kernel", "model/layers/0", "model/layers/0/mlp"),  # Llama
        ("model/layers/mlp/down_proj/kernel", "model/layers", "model/layers/mlp"),  # scanned
        ("h/11/mlp/c_proj/kernel", "h/11", "h/11/mlp"),
        ("encoder/block/0/layer/1/DenseReluDense/wo/kernel", "encoder/block/0/layer/1", "encoder/block/0/layer/1/DenseReluDense"),  # T5
        ("vit/encoder/layer/0/output/dense/kernel", "vit/encoder/layer/0", None),
        ("bert/encoder/layer/0/output/LayerNorm/scale", "bert/encoder/layer/0/output/LayerNorm", "bert/encoder/layer/0/output/+/residual"),
        ("bert/encoder/layer/0/attention/output/LayerNorm/scale", None, None),
        ("bert/encoder/layer/0/attention/output/dense/kernel", None, None),
        ("h/0/attn/c_proj/kernel", None, None),
        ("bert/embeddings/LayerNorm/scale", None, None),
    ],
)
def test_places_by_name(leaf, around, beside):
    """What the default targets find in common families, and what they leave alone."""
    shape = (8,) if leaf.endswith("scale") else (3, 12, 8) if "layers/mlp" in leaf else (12, 8)
    params = jpeft.unflatten({leaf: jnp.zeros(shape)})
    for method, place in ((jpeft.pfeiffer(size=2), around), (jpeft.parallel_adapter(size=2), beside)):
        if place is None:
            with pytest.raises(ValueError, match="has this role"):
                jpeft.apply(params, method=method)
            continue
        leaves = jpeft.flatten(jpeft.apply(params, method=method).adapter)
        assert {path.rpartition("/down/")[0].removesuffix("/+") for path in leaves if "/down/" in path} == {place}
        assert all(leaf.shape[:-2] == shape[:-2] for path, leaf in leaves.items() if path.endswith("kernel"))


def test_only_a_group_called_residual_makes_a_site_a_residual():
    """In the site the kind is a value of its own, whatever the group of the regex is called otherwise."""
    params = {"0": {"output": {"dense": {"kernel": jnp.zeros((12, 8))}}}}
    for group, kind in (("residual", SiteKind.RESIDUAL), ("layer", SiteKind.MODULE), ("x", SiteKind.MODULE)):
        (site,) = find_sites(params, rf"(?P<{group}>.*output)/dense/kernel")
        assert site == BottleneckSite("0/output", "0/output/dense/kernel", 8, (), kind)
    (site,) = find_sites(params, ["dense"])
    assert site == BottleneckSite("0/output/dense", "0/output/dense/kernel", 8, (), SiteKind.MODULE)


def test_starting_points():
    """Pfeiffer: N(0, 0.02²) and a sixteenth of the width. Parallel: torch's uniform for linear layers, and nothing added."""
    params = {"output": {"LayerNorm": {"scale": jnp.ones(256), "bias": jnp.zeros(256)}}}
    leaves = jpeft.apply(params, method="pfeiffer").adapter["output"]["LayerNorm"]["+"]
    assert leaves["down"]["kernel"].shape == (256, 16)
    for side in ("down", "up"):
        assert np.std(leaves[side]["kernel"]) == pytest.approx(0.02, rel=0.05)
        assert not np.any(leaves[side]["bias"])
    leaves = jpeft.apply(params, method="parallel_adapter").adapter["output"]["+"]["residual"]
    down = np.asarray(leaves["down"]["kernel"])
    assert np.abs(down).max() <= 1 / 16
    assert np.std(down) == pytest.approx(1 / 16 / 3**0.5, rel=0.05)
    assert not any(np.any(leaf) for leaf in (leaves["up"]["kernel"], leaves["up"]["bias"], leaves["down"]["bias"]))


@pytest.mark.parametrize("name", ["pfeiffer", "parallel_adapter"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0 must be a whole number of at least 1"),
        ({"activation": "swish"}, "activation='swish' must be one of 'gelu', 'gelu_new', 'relu', 'silu', 'tanh'"),
        ({"target": ["up"]}, "target='up' matches none"),
        (
            {"target": r"(?P<layer>.*mlp)/.*/kernel"},
            "several leaves of 'net/mlp', 'net/mlp/c_fc/kernel' with 12 features and 'net/mlp/c_proj/kernel' with 4",
        ),
        ({"target": ["query"]}, "'net/query/kernel' .* has 2 output axes"),
    ],
)
def test_errors(name, options, message):
    params = {
        "net": {
            "mlp": {"c_fc": {"kernel": jnp.zeros((4, 12))}, "c_proj": {"kernel": jnp.zeros((12, 4))}},
            "query": {"kernel": jnp.zeros((8, 2, 4))},
        }
    }
    with pytest.raises(ValueError, match=message):
        jpeft.apply(params, method=name, **options)


def test_reduction_must_be_positive():
    with pytest.raises(ValueError, match="pfeiffer: reduction=0 must be a whole number of at least 1"):
        jpeft.pfeiffer(reduction=0)


def test_parallel_needs_the_input_as_wide_as_the_output():
    model = Classifier()
    peft = jpeft.apply(model.init(KEY, batch()["x"])["params"], method="parallel_adapter", target=["up"])
    message = (
        r"'layer_0/up' was called with arguments of the shapes \[\(5, 6, 16\)\], "
        "where the argument with the index 0 should be x, 32 wide"
    )
    with pytest.raises(ValueError, match=message):
        jpeft.wrap(model.apply, peft.method)(peft.variables, batch()["x"])


def test_in_a_chain_with_a_prefix():
    """Mix and match: both parts are there, and neither disturbs the other's leaves."""
    model = BertModel(BERT)
    ids = jnp.array([[5, 7, 2, 9]])
    method = jpeft.chain(prefix=jpeft.prefix_tuning(length=2, mlp=None), ffn=jpeft.parallel_adapter(size=3), seq=jpeft.pfeiffer(size=2))
    peft = jpeft.apply(model.init(KEY, ids)["params"], method=method)
    noisy = noised(peft.adapter, 0.5)
    outputs = [
        jpeft.wrap(model.apply, method)(peft.replace(adapter=peft.adapter | {name: noisy[name] for name in names}).variables, ids).pooled
        for names in ((), ("prefix",), ("ffn",), ("seq",), ("prefix", "ffn", "seq"))
    ]
    assert all(jnp.abs(a - b).max() > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])


def test_abstract_parameters_suffice():
    params = abstract_params(GPT2Model(GPT2))
    for method in (jpeft.pfeiffer(), jpeft.parallel_adapter()):
        assert jax.eval_shape(lambda p, m=method: jpeft.apply(p, method=m), params).adapter.keys() == {"h"}

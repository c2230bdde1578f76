"""The BERT family as linen modules: parity with torch, parameter trees, dtypes, dropout, and modules that methods wrap."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jpeft.models import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    abstract_params,
    load,
)

FAMILIES = ("bert", "roberta", "distilbert")
# The same modules under other names: compared with torch once for each task.
TWINS = ("xlm-roberta", "camembert", "electra")
PREFIXES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
PREFIXES |= {"xlm-roberta": "XLMRoberta", "camembert": "Camembert", "electra": "Electra"}
TORCH = {
    "encoder": "Model",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "masked-lm": "ForMaskedLM",
}
VARIANTS = {
    "plain": {},
    "scan": {"scan": True},
    "remat": {"remat": True},
    "scan-remat": {"scan": True, "remat": True},
}
LENGTHS = (7, 4)  # real tokens of the two sequences; the rest is padding


def tiny(family, **overrides):
    own = {
        "bert": {"type_vocab_size": 2, "pad_token_id": 0},
        "roberta": {"type_vocab_size": 1, "pad_token_id": 1},
        "distilbert": {"type_vocab_size": 0, "pad_token_id": 0},
        "xlm-roberta": {"type_vocab_size": 1, "pad_token_id": 1},
        "camembert": {"type_vocab_size": 1, "pad_token_id": 1},
        "electra": {"type_vocab_size": 2, "pad_token_id": 0, "embedding_size": 12},
    }
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 20}
    return BertConfig(**({"model_type": family} | sizes | own[family] | overrides))


def batch(config):
    """Ids, mask and token types of LENGTHS, padded with the padding id."""
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int32)
    ids = np.random.default_rng(0).integers(5, config.vocab_size, mask.shape).astype(np.int32)
    types = ((np.arange(max(LENGTHS)) > 2) * mask).astype(np.int32) if config.type_vocab_size > 1 else None
    return np.where(mask, ids, config.pad_token_id).astype(np.int32), mask, types


def random_params(model):
    """Random parameters. A fresh model has many zeros and ones, which would hide parameters that are mixed up."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape) + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(model))


def run(model, params, *inputs, **options):
    return jax.jit(lambda params: model.apply({"params": params}, *inputs, **options))(params)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(family, task) -> folder of a tiny random torch model, and its outputs for `batch`."""
    import torch
    import transformers

    done = {}

    def make(family, task):
        if (family, task) not in done:
            prefix = PREFIXES[family]
            config = tiny(family)
            hf = transformers.AutoConfig.for_model(family, **config.to_hf(), num_labels=3)
            torch.manual_seed(0)
            model = getattr(transformers, prefix + TORCH[task])(hf).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
                ids, mask, types = batch(config)
                inputs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask)}
                if types is not None:
                    inputs["token_type_ids"] = torch.tensor(types).long()
                output = model(**inputs, output_hidden_states=True)
            folder = tmp_path_factory.mktemp(f"{family}-{task}")
            model.save_pretrained(folder)
            states = [state.numpy() for state in output.hidden_states]
            main = output.last_hidden_state if task == "encoder" else output.logits
            pooled = getattr(output, "pooler_output", None)
            done[family, task] = folder, main.numpy(), states, None if pooled is None else pooled.numpy()
        return done[family, task]

    return make


# Heads do not know of scan and remat: every variant of the encoder, and heads on the plainest and the most lifted.
CELLS = [("encoder", variant) for variant in VARIANTS]
CELLS += [(task, variant) for task in TORCH if task != "encoder" for variant in ("plain", "scan-remat")]


@pytest.mark.parametrize(
    ("family", "task", "variant"),
    [(family, *cell) for family in FAMILIES for cell in CELLS]
    + [(family, task, "plain") for family in TWINS for task in TORCH]
    + [("electra", "sequence-classification", "scan-remat")],
)
def test_equals_torch(checkpoint, family, task, variant):
    folder, expected, expected_states, expected_pooled = checkpoint(family, task)
    loaded = load(folder, task=task, **VARIANTS[variant])
    assert loaded.initialised == frozenset()
    assert loaded.unused == frozenset()
    inputs = batch(loaded.config)
    options = {"output_hidden_states": True} if task == "encoder" else {}
    output = run(loaded.model, loaded.params, *inputs, **options)
    real = inputs[1].astype(bool)
    if task == "sequence-classification":
        np.testing.assert_allclose(output, expected, atol=1e-4)
    elif task == "encoder":
        assert len(output.hidden_states) == loaded.config.num_hidden_layers + 1
        for got, want in zip((*output.hidden_states, output.last_hidden_state), (*expected_states, expected)):
            np.testing.assert_allclose(got[real], want[real], atol=1e-4)
        if family in ("distilbert", "electra"):
            assert output.pooled is None
        else:
            np.testing.assert_allclose(output.pooled, expected_pooled, atol=1e-4)
    else:
        np.testing.assert_allclose(output[real], expected[real], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_matter(family):
    config = tiny(family)
    model = BertForTokenClassification(config, 3)
    params = random_params(model)
    ids, mask, types = batch(config)
    logits = run(model, params, ids, mask, types)
    short = LENGTHS[1]
    alone = run(model, params, ids[1:, :short], None, None if types is None else types[1:, :short])
    np.testing.assert_allclose(logits[1:, :short], alone, atol=1e-5)


def stacked(params, layers):
    """Stack the parameters of the unrolled model, layer/0, layer/1, ..., as the scanned model has them in layer."""
    flat = flatten_dict(params, sep="/")
    result = {path: leaf for path, leaf in flat.items() if "/layer/" not in path}
    for path in [path for path in flat if "/layer/0/" in path]:
        leaves = [flat[path.replace("/layer/0/", f"/layer/{i}/")] for i in range(layers)]
        result[path.replace("/layer/0/", "/layer/")] = jnp.stack(leaves)
    return unflatten_dict(result, sep="/")


@pytest.mark.parametrize("family", ["bert", "distilbert"])  # RoBERTa has the blocks of BERT
def test_gradients_do_not_depend_on_scan_and_remat(family):
    params = random_params(BertForSequenceClassification(tiny(family), 3))
    grads = {}
    for variant, options in (VARIANTS | {"remat-dots": {"remat": "dots"}}).items():
        config = tiny(family, **options)
        model, inputs = BertForSequenceClassification(config, 3), batch(config)
        loss = lambda p, model=model, inputs=inputs: (model.apply({"params": p}, *inputs) ** 2).sum()
        layers = config.num_hidden_layers
        grad = jax.jit(jax.grad(loss))(stacked(params, layers) if config.scan else params)
        grads[variant] = flatten_dict(grad if config.scan else stacked(grad, layers), sep="/")
    for path, expected in grads.pop("plain").items():
        for variant, grad in grads.items():
            np.testing.assert_allclose(grad[path], expected, rtol=1e-3, atol=1e-3, err_msg=f"{variant} {path}")


def test_remat_of_all_but_the_products_computes_none_of_them_again():
    def products(remat):
        config = tiny("bert", remat=remat)
        model, inputs = BertModel(config), batch(config)
        loss = lambda p, *inputs: (model.apply({"params": p}, *inputs).last_hidden_state ** 2).sum()
        return jax.jit(jax.grad(loss)).lower(abstract_params(model), *inputs).as_text().count("stablehlo.dot_general")

    assert products(True) > products("dots") == products(False)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("config", "total"),
    [
        (BertConfig.bert_base_cased(), 108_310_272),
        (BertConfig.bert_large_cased(), 333_579_264),
        (BertConfig.roberta_base(), 124_645_632),
        (BertConfig.distilbert_base(), 66_362_880),
    ],
    ids=["bert-base-cased", "bert-large-cased", "roberta-base", "distilbert-base"],
)
def test_parameter_totals(config, total, scan):
    params = abstract_params(BertModel(dataclasses.replace(config, scan=scan)))
    leaves = jax.tree.leaves(params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == total


def test_parameter_paths():
    layer = {
        "bert": ["attention/self/query", "attention/self/key", "attention/self/value", "attention/output/dense"]
        + ["attention/output/LayerNorm", "intermediate/dense", "output/dense", "output/LayerNorm"],
        "distilbert": ["attention/q_lin", "attention/k_lin", "attention/v_lin", "attention/out_lin", "sa_layer_norm"]
        + ["ffn/lin1", "ffn/lin2", "output_layer_norm"],
    }
    layer["roberta"] = layer["bert"]
    heads = {
        "bert": {"bert/pooler/dense/kernel", "classifier/kernel"},
        "roberta": {"classifier/dense/kernel", "classifier/out_proj/kernel"},
        "distilbert": {"pre_classifier/kernel", "classifier/kernel"},
    }
    for family, scan in itertools.product(FAMILIES, (False, True)):
        config = tiny(family, scan=scan)
        shapes = flatten_dict(abstract_params(BertForSequenceClassification(config, 3)), sep="/")
        stack = f"{family}/{'transformer' if family == 'distilbert' else 'encoder'}/layer/"
        prefixes = [stack] if scan else [f"{stack}{i}/" for i in range(config.num_hidden_layers)]
        inside = {path.rsplit("/", 1)[0] for path in shapes if path.startswith(stack)}
        assert inside == {prefix + name for prefix in prefixes for name in layer[family]}
        outside = {p for p in shapes if p.endswith("/kernel") and not p.startswith(stack)}
        assert outside == heads[family]
        assert f"{family}/embeddings/word_embeddings/embedding" in shapes
        assert f"{family}/embeddings/LayerNorm/scale" in shapes
        query = shapes[f"{prefixes[0]}{layer[family][0]}/kernel"]
        assert query.shape == ((2, 16, 16) if scan else (16, 16))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_float32(family, scan):
    config = tiny(family, scan=scan)
    exact = BertForSequenceClassification(config, 3)
    half = BertForSequenceClassification(dataclasses.replace(config, dtype=jnp.bfloat16), 3)
    params = random_params(exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(half))} == {jnp.dtype("float32")}
    body = run(BertModel(half.config, pooling=False), params[family], *batch(config))
    assert body.last_hidden_state.dtype == jnp.bfloat16
    got, want = (run(m, params, *batch(config)) for m in (half, exact))
    assert got.dtype == jnp.float32
    assert not np.array_equal(got, want)
    np.testing.assert_allclose(got, want, atol=0.1 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("variant", ["plain", "scan-remat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_active_in_training_only(family, variant):
    config = tiny(family, **VARIANTS[variant])
    model = BertForSequenceClassification(config, 3)
    params, inputs = random_params(model), batch(config)
    train = jax.jit(lambda key: model.apply({"params": params}, *inputs, deterministic=False, rngs={"dropout": key}))
    plain = run(model, params, *inputs)
    first, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, plain)
    silent = dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"], 0.0)
    model = BertForSequenceClassification(dataclasses.replace(config, **silent), 3)
    got = run(model, params, *inputs, deterministic=False, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(got, plain, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_differs_between_layers(scan):
    """All blocks have the same parameters here, so equal dropout masks would give equal outputs."""
    config = tiny("bert", scan=scan, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    model = BertModel(config, pooling=False)
    params = jax.tree.map(jnp.zeros_like, random_params(model))
    params["embeddings"]["LayerNorm"]["bias"] += 1.0
    layers = [params["encoder"]["layer"]] if scan else params["encoder"]["layer"].values()
    for layer in layers:  # every block adds 1, half of it dropped, and normalises: the signs of its output are its mask
        layer["output"]["dense"]["bias"] += 1.0
        layer["output"]["LayerNorm"]["scale"] += 1.0
    options = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}, "output_hidden_states": True}
    output = run(model, params, *batch(config), **options)
    masks = [np.asarray(state > 0) for state in output.hidden_states[1:]]
    for one, other in itertools.combinations(masks, 2):
        assert not np.array_equal(one, other)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_and_core_can_be_widened(family, scan):
    """Prompts and prefixes lengthen the inputs of the two parameterless modules and of the embedding."""
    extra, before = 2, (2, 0)
    model = BertModel(tiny(family, scan=scan), pooling=False)
    params, inputs = random_params(model), batch(model.config)

    def lengthen(*, core, visible):
        def interceptor(next_fun, args, kwargs, context):
            name = context.module.name if context.method_name == "__call__" else None
            if core and name == "core":
                query, key, value, mask = args
                key, value = (jnp.pad(x, [(0, 0), before, (0, 0), (0, 0)], constant_values=1.0) for x in (key, value))
                return next_fun(query, key, value, pad_mask(mask.dense(query.shape[1], key.shape[1] - extra)), **kwargs)
            if not core and name == "positions":
                layout = next_fun(*args, **kwargs)
                ids, types = (jnp.pad(x, [(0, 0), before]) for x in (layout.position_ids, layout.token_type_ids))
                return layout._replace(position_ids=ids, token_type_ids=types, mask=pad_mask(layout.mask))
            if not core and name == "word_embeddings":
                return jnp.pad(next_fun(*args, **kwargs), [(0, 0), before, (0, 0)], constant_values=0.5)
            return next_fun(*args, **kwargs)

        def pad_mask(mask):
            return jnp.pad(mask, [(0, 0), (0, 0), (0, 0), before], constant_values=visible)

        with nn.intercept_methods(interceptor):
            return run(model, params, *inputs).last_hidden_state[:, 0 if core else extra :]

    plain = run(model, params, *inputs).last_hidden_state
    for core in (False, True):
        np.testing.assert_allclose(lengthen(core=core, visible=False), plain, atol=1e-5)
        assert not np.allclose(lengthen(core=core, visible=True), plain, atol=1e-2)


def test_roberta_counts_positions_over_tokens_only():
    config = tiny("roberta")
    layout = BertModel(config).bind({"params": random_params(BertModel(config))}).positions(jnp.array([[5, 6, 7], [1, 8, 1]]), None, None)
    np.testing.assert_array_equal(layout.position_ids, [[2, 3, 4], [1, 2, 1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_too_long_input_is_refused(family):
    config = tiny(family)
    longest = 18 if family == "roberta" else 20
    assert config.max_length == longest
    model = BertModel(config)
    params = abstract_params(model)
    jax.eval_shape(model.apply, {"params": params}, jnp.full((1, longest), 5))
    with pytest.raises(ValueError, match=f"{longest + 1} positions, but the position table holds {longest}"):
        jax.eval_shape(model.apply, {"params": params}, jnp.full((1, longest + 1), 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "gpt2"}, "Unknown model_type 'gpt2'; supported: bert, roberta, distilbert"),
        ({"hidden_act": "mish"}, "Unknown hidden_act 'mish'"),
        ({"num_attention_heads": 5}, "hidden_size 768 is not a multiple of num_attention_heads 5"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**options)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_from_and_to_hf(family):
    import transformers

    config = tiny(family, hidden_act="gelu_new", classifier_dropout=0.25, initializer_range=0.5)
    hf = transformers.AutoConfig.for_model(family, **config.to_hf())
    assert BertConfig.from_hf(hf) == config
    assert BertConfig.from_hf(hf, scan=True, dtype=jnp.bfloat16) == dataclasses.replace(config, scan=True, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="Unsupported model_type 'gpt2'"):
        BertConfig.from_hf(transformers.GPT2Config())
    if family == "bert":
        with pytest.raises(ValueError, match="is_decoder"):
            BertConfig.from_hf(transformers.BertConfig(is_decoder=True))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_activations_equal_torch(activation):
    import torch
    from transformers import activations

    from jpeft.models.common.activations import ACTIVATIONS

    x = np.linspace(-4, 4, 41, dtype=np.float32)
    expected = activations.ACT2FN[activation](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[activation](x), expected, atol=1e-6)

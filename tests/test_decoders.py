"""Decoders as linen modules: parity with torch, folders in and out, caches, padding, dtypes, and modules that methods wrap."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_bert import VARIANTS, random_params, run
from test_hf import assert_equal, edit, edit_config

import jpeft
from jpeft.models import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Rope,
    abstract_params,
    load,
    save,
)

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = GPT2Config(**SIZES, **SPECIAL)
LLAMA = LlamaConfig(**SIZES, **SPECIAL, intermediate_size=24, num_key_value_heads=2, rope=Rope(100.0))
LLAMA3 = Rope(100.0, "llama3", factor=4.0, original_max_position_embeddings=16)
YARN = Rope(100.0, "yarn", factor=4.0, original_max_position_embeddings=16)
MSCALE = dataclasses.replace(YARN, mscale=0.7, mscale_all_dim=1.3, beta_fast=8.0, beta_slow=0.5, truncate=False)
SLIDES = ("full_attention", "sliding_attention")
# Name of a case -> configuration, language model, body, and what the names of torch's classes begin and end with.
CASES: dict[str, tuple[Any, Any, Any, str, str]] = {"gpt2": (GPT2, GPT2LMHeadModel, GPT2Model, "GPT2", "LMHeadModel")} | {
    config.model_type: (config, LlamaForCausalLM, LlamaModel, prefix, "ForCausalLM")
    for prefix, config in {
        "Llama": dataclasses.replace(LLAMA, rope=LLAMA3),
        "Mistral": dataclasses.replace(LLAMA, model_type="mistral", sliding_window=3),
        "Qwen2": dataclasses.replace(LLAMA, model_type="qwen2", sliding_window=3, layer_types=SLIDES, tie_word_embeddings=True),
        "Qwen3": dataclasses.replace(LLAMA, model_type="qwen3", head_dim=6, num_key_value_heads=1),
    }.items()
}
FAMILIES = list(CASES)
# What else their configurations may say.
CASES |= {
    f"{family}-{twin}": (dataclasses.replace(CASES[family][0], **changes), *CASES[family][1:])
    for family, twin, changes in [
        ("gpt2", "untied", {"intermediate_size": 24, "tie_word_embeddings": False}),
        ("llama", "biased", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 6}),
        ("llama", "linear", {"rope": Rope(100.0, "linear", factor=3.0), "num_key_value_heads": None, "hidden_act": "gelu_pytorch_tanh"}),
        ("llama", "dynamic", {"rope": Rope(100.0, "dynamic", factor=3.0), "max_position_embeddings": 6}),
        ("mistral", "unwindowed", {"sliding_window": None}),
        ("qwen2", "unwindowed", {"sliding_window": None, "layer_types": None, "tie_word_embeddings": False}),
        ("qwen3", "yarn", {"rope": YARN, "attention_bias": True}),
        ("qwen3", "mscale", {"rope": MSCALE}),
        ("qwen3", "windowed", {"sliding_window": 4, "layer_types": SLIDES, "eos_token_id": (2, 3)}),
    ]
}
# Compilation is what takes time: all variants for a family with a table of positions and one with layers of two kinds.
CELLS = [(case, variant) for case in FAMILIES for variant in (VARIANTS if case in ("gpt2", "qwen2") else ("plain", "scan-remat"))]
PAIRED = [(case, scan) for case in FAMILIES for scan in (False, True) if scan or case in ("gpt2", "qwen3")]
TWINS = [case for case in CASES if case not in FAMILIES]
LENGTHS = (9, 5)  # real tokens of the two sequences; the rest is padding


def language_model(case, **overrides):
    config, cls, *_ = CASES[case]
    return cls(dataclasses.replace(config, **overrides))


def batch(side="right"):
    """Ids and mask of LENGTHS, padded on one side."""
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int32)
    mask = mask if side == "right" else mask[:, ::-1].copy()
    ids = np.random.default_rng(0).integers(3, 50, mask.shape).astype(np.int32)
    return np.where(mask, ids, 0).astype(np.int32), mask


def transformers_config(config):
    import transformers

    return transformers.AutoConfig.for_model(config.model_type, **config.to_hf())


def torch_model(case, body=False):
    import torch
    import transformers

    config, _, _, prefix, suffix = CASES[case]
    hf = transformers_config(config)
    hf._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, prefix + ("Model" if body else suffix))(hf).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def torch_run(model, ids, mask, **options):
    import torch

    with torch.no_grad():
        positions = torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
        return model(torch.tensor(ids).long(), attention_mask=torch.tensor(mask), position_ids=positions, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(case, body) -> folder of a tiny random torch model, and its outputs for `batch` with padding on either side."""
    done = {}

    def make(case, body=False):
        if (case, body) not in done:
            model = torch_model(case, body)
            outputs = {side: torch_run(model, *batch(side), output_hidden_states=True) for side in ("right", "left")}
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            done[case, body] = folder, outputs
        return done[case, body]

    return make


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        *CELLS,
        *((case, "plain") for case in TWINS),
        ("qwen3-windowed", "scan-remat"),
    ],
)
def test_equals_torch(checkpoint, case, variant):
    folder, expected = checkpoint(case)
    loaded = load(folder, task="causal-lm", **{"scan": False} | VARIANTS[variant])
    assert loaded.initialised == loaded.unused == frozenset()
    assert loaded.config == dataclasses.replace(CASES[case][0], **VARIANTS[variant])
    for side in ("right", "left"):
        ids, mask = batch(side)
        logits = run(loaded.model, loaded.params, ids, mask)
        assert logits.dtype == jnp.float32
        real = mask.astype(bool)
        np.testing.assert_allclose(logits[real], expected[side].logits.numpy()[real], atol=1e-4)


@pytest.mark.parametrize(
    ("case", "variant"), [("gpt2", "plain"), ("gpt2", "scan-remat"), ("llama", "plain"), ("mistral", "scan-remat"), ("qwen2", "scan-remat")]
)
def test_body_equals_torch(checkpoint, case, variant):
    folder, expected = checkpoint(case, body=True)
    loaded = load(folder, task="decoder", **VARIANTS[variant])
    assert loaded.initialised == loaded.unused == frozenset()
    ids, mask = batch()
    output, real = run(loaded.model, loaded.params, ids, mask, output_hidden_states=True), mask.astype(bool)
    assert len(output.hidden_states) == 3
    for got, want in zip((output.last_hidden_state, *output.hidden_states), (expected["right"][0], *expected["right"].hidden_states)):
        np.testing.assert_allclose(got[real], want.numpy()[real], atol=1e-4)


@pytest.mark.parametrize(("case", "scan"), [*PAIRED, *((case, False) for case in TWINS)])
def test_round_trip_and_torch_opens_it(tmp_path, case, scan):
    import transformers

    config, *_, prefix, suffix = CASES[case]
    model = language_model(case, scan=scan)
    params = random_params(model)
    save(tmp_path / "out", model, params)
    loaded = load(tmp_path / "out", task="causal-lm", scan=scan)
    assert_equal(loaded.params, params)
    assert loaded.initialised == loaded.unused == frozenset()
    assert loaded.config == dataclasses.replace(config, scan=scan)
    hf, info = getattr(transformers, prefix + suffix).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert hf.config.architectures == [prefix + suffix]
    ids, mask = batch()
    got, real = run(model, params, ids, mask), mask.astype(bool)
    np.testing.assert_allclose(got[real], torch_run(hf.eval(), ids, mask).logits.numpy()[real], atol=2e-4)


def test_scan_is_the_plain_parameters_stacked(checkpoint):
    folder, _ = checkpoint("gpt2")
    plain, scanned = (flatten_dict(load(folder, task="causal-lm", scan=scan).params, sep="/") for scan in (False, True))
    assert scanned["transformer/h/attn/c_attn/kernel"].shape == (2, 16, 48)
    for path, leaf in scanned.items():
        parts = [plain[path.replace("/h/", f"/h/{i}/")] for i in range(2)] if "/h/" in path else plain[path]
        np.testing.assert_array_equal(leaf, np.stack(parts) if isinstance(parts, list) else parts)


def test_shards_and_bfloat16_of_llama(tmp_path):
    """Checkpoints of the hub are sharded bfloat16. Old ones have rope_theta outside the scaling, and rotary buffers."""
    torch = torch_model("llama").bfloat16()
    torch.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    changes = {"rope_parameters": None, "rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": None}
    edit_config(tmp_path, **changes)
    loaded = load(tmp_path, task="causal-lm")
    assert loaded.initialised == loaded.unused == frozenset()
    assert loaded.config.rope == Rope(100.0, "linear", factor=2.0)
    assert loaded.config.head_size == 4
    weight = torch.model.layers[1].mlp.down_proj.weight
    kernel = loaded.params["model"]["layers"]["mlp"]["down_proj"]["kernel"][1]  # scanned and in bfloat16, unless told otherwise
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel.astype(jnp.float32), weight.detach().float().numpy().T)


def test_gpt2_checkpoints_of_other_makes(checkpoint, tmp_path):
    """The hub's gpt2 has causal masks and lacks the prefix and the head. Other checkpoints hold a copy of the tied head."""
    expected = load(checkpoint("gpt2")[0], task="causal-lm")
    save(tmp_path / "out", expected.model, expected.params)

    def rename(tensors):
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        masks = {f"h.{i}.attn.{name}": np.ones((1, 1, 4, 4), np.float32) for i in range(2) for name in ("bias", "masked_bias")}
        return bare | masks | {"lm_head.weight": bare["wte.weight"].copy()}

    edit(tmp_path / "out", rename)
    loaded = load(tmp_path / "out", task="causal-lm")
    assert_equal(loaded.params, expected.params)
    assert loaded.initialised == loaded.unused == frozenset()
    body = load(tmp_path / "out", task="decoder")
    assert_equal(body.params, expected.params["transformer"])
    assert body.unused == {"lm_head.weight"}


def test_tasks_of_other_families_are_refused(checkpoint, tmp_path):
    folder, _ = checkpoint("gpt2")
    encoders = "bert, roberta, distilbert, xlm-roberta, camembert, electra"
    with pytest.raises(ValueError, match=f"model_type 'gpt2'; supported: {encoders}, for the task 'masked-lm'"):
        load(folder, task="masked-lm")


@pytest.mark.parametrize(
    ("make", "total"),
    [
        (GPT2Config.gpt2, 124_439_808),
        (GPT2Config.gpt2_medium, 354_823_168),
        (LlamaConfig.llama_3_1_8b, 8_030_261_248),
        (LlamaConfig.llama_3_2_1b, 1_235_814_400),
        (LlamaConfig.mistral_7b, 7_241_732_096),
        (LlamaConfig.qwen2_0_5b, 494_032_768),
        (LlamaConfig.qwen3_8b, 8_190_735_360),
        (LlamaConfig.qwen3_4b, 4_022_468_096),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_parameter_totals(make, total):
    for scan in (False, True):
        config = make(scan=scan)
        params = abstract_params((GPT2LMHeadModel if isinstance(config, GPT2Config) else LlamaForCausalLM)(config))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total
    assert type(config).from_hf(transformers_config(config), scan=True) == config


def test_gpt2_errors():
    import transformers

    with pytest.raises(ValueError, match="hidden_size 768 is not a multiple of num_attention_heads 5"):
        GPT2Config(num_attention_heads=5)
    with pytest.raises(ValueError, match="Unknown hidden_act 'mish'"):
        GPT2Config(hidden_act="mish")
    with pytest.raises(ValueError, match="Unknown model_type 'bert'; supported: gpt2"):
        GPT2Config(model_type="bert")
    with pytest.raises(ValueError, match="Unsupported model_type 'bert'"):
        GPT2Config.from_hf(transformers.BertConfig())
    for name in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        with pytest.raises(ValueError, match=f"{name}=True; only {name}=False is supported"):
            GPT2Config.from_hf(transformers.GPT2Config(**{name: True}))
    model = language_model("gpt2")
    params = abstract_params(model)
    with pytest.raises(ValueError, match="33 positions, but the position table holds 32"):
        jax.eval_shape(model.apply, {"params": params}, jnp.full((1, 33), 5))


def test_llama_errors():
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    for message, options in {
        "hidden_size 16 is not a multiple of num_attention_heads 3": {"num_attention_heads": 3},
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3": {"num_key_value_heads": 3},
        "Heads of width 5": {"head_dim": 5},
        "1 layer_types for num_hidden_layers=2": {"model_type": "qwen2", "layer_types": ("full_attention",)},
        "Unknown layer_types": {"model_type": "qwen2", "layer_types": ("full_attention", "chunked_attention")},
        "Unknown model_type 'gemma'; supported: llama, mistral, qwen2, qwen3": {"model_type": "gemma"},
        "sliding_window=4: the config.json of a llama cannot say so; that of mistral, qwen2, qwen3 can": {"sliding_window": 4},
        "layer_types=.*: the config.json of a llama cannot": {"layer_types": SLIDES},
        "layer_types=.*: the config.json of a mistral cannot": {"model_type": "mistral", "sliding_window": 4, "layer_types": SLIDES},
        "attention_bias=True: the config.json of a mistral cannot": {"model_type": "mistral", "attention_bias": True},
        "attention_bias=True: the config.json of a qwen2 cannot": {"model_type": "qwen2", "attention_bias": True},
        "mlp_bias=True: the config.json of a mistral cannot": {"model_type": "mistral", "mlp_bias": True},
        "mlp_bias=True: the config.json of a qwen2 cannot": {"model_type": "qwen2", "mlp_bias": True},
        "mlp_bias=True: the config.json of a qwen3 cannot say so; that of llama can": {"model_type": "qwen3", "mlp_bias": True},
    }.items():
        with pytest.raises(ValueError, match=message):
            LlamaConfig(**small | options)
    with pytest.raises(ValueError, match="Unknown rope_type 'longrope'; supported: default, linear, dynamic, llama3, yarn"):
        Rope.from_hf({"rope_theta": 1e4, "rope_type": "longrope", "factor": 2.0})
    with pytest.raises(ValueError, match="needs a factor"):
        Rope.from_hf({"rope_theta": 1e4, "rope_type": "linear"})
    with pytest.raises(ValueError, match="needs original_max_position_embeddings"):
        Rope(rope_type="yarn", factor=2.0)
    with pytest.raises(ValueError, match="partial_rotary_factor=0.5"):
        LlamaConfig.from_hf(
            transformers.LlamaConfig(rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5})
        )


# --- padding, caches, numerics ---


@pytest.mark.parametrize("case", FAMILIES)
def test_padding_does_not_matter(case):
    model = language_model(case)
    params, short = random_params(model), LENGTHS[1]
    for side, cut in (("right", slice(None, short)), ("left", slice(-short, None))):
        ids, mask = batch(side)
        alone = run(model, params, ids[1:, cut])
        np.testing.assert_allclose(run(model, params, ids, mask)[1:, cut], alone, atol=1e-4)
        np.testing.assert_allclose(run(model, params, ids[1:, cut], mask[1:, cut]), alone, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("case", "variant"), [("gpt2", "plain"), ("llama", "plain"), ("mistral", "plain"), ("qwen2", "scan-remat"), ("qwen3", "scan-remat")]
)
def test_a_cache_changes_nothing(case, variant, side):
    """A padded prompt, three more tokens in one call and two in a call each give the logits of the whole text at once."""
    model = language_model(case, **VARIANTS[variant])
    params, (ids, mask) = random_params(model), batch(side)
    more = np.random.default_rng(1).integers(3, 50, (2, 5)).astype(np.int32)
    step = jax.jit(lambda variables, ids: model.apply(variables, ids, mutable=["cache"]))
    prefill = jax.jit(lambda params: model.apply({"params": params}, ids, mask, cache_length=20, mutable=["cache"]))
    prompt, cache = prefill(params)
    real = mask.astype(bool)
    np.testing.assert_allclose(prompt[real], run(model, params, ids, mask)[real], atol=1e-4)
    logits = []
    for part in (more[:, :3], more[:, 3:4], more[:, 4:]):
        out, cache = step({"params": params} | cache, part)
        logits.append(out)
    logits = np.concatenate(logits, 1)
    for row, length in enumerate(LENGTHS):
        whole = np.concatenate([ids[row][mask[row].astype(bool)], more[row]])[None]
        np.testing.assert_allclose(logits[row], run(model, params, whole)[0, length:], atol=1e-4)


def test_a_prompt_longer_than_its_cache_is_refused():
    model = language_model("gpt2")
    with pytest.raises(ValueError, match="9 positions do not fit into a cache of 8"):
        model.apply({"params": random_params(model)}, *batch(), cache_length=8, mutable=["cache"])


@pytest.mark.parametrize(("case", "variant"), [("gpt2", "plain"), ("qwen2", "scan-remat")])
def test_a_full_cache_is_no_place_for_more(case, variant):
    """Of eight slots the last one can be used. A ninth token is an error, or NaN in a compiled step, which cannot check."""
    model = language_model(case, **VARIANTS[variant])
    variables, ids = {"params": random_params(model)}, batch()[0]
    _, cache = model.apply(variables, ids[:, :7], cache_length=8, mutable=["cache"])
    step = jax.jit(lambda variables, ids: model.apply(variables, ids, mutable=["cache"]))
    last, full = step(variables | cache, ids[:, 7:8])
    assert np.isfinite(last).all()
    beyond, _ = step(variables | full, ids[:, 8:])
    assert np.isnan(beyond).all()
    with pytest.raises(ValueError, match="1 positions behind 8 do not fit into a cache of 8"):
        model.apply(variables | full, ids[:, 8:], mutable=["cache"])


def test_a_mask_of_other_tokens_is_refused():
    """Hugging Face takes the mask of all tokens so far. Here such a mask would be broadcast without an error."""
    model = language_model("gpt2")
    variables, (ids, mask) = {"params": random_params(model)}, batch()
    _, cache = model.apply(variables, ids[:, :8], mask[:, :8], cache_length=9, mutable=["cache"])
    jaxtyping.config.update("jaxtyping_disable", True)  # only tests check the annotated shapes, and users are to be told too
    try:
        with pytest.raises(ValueError, match=r"The mask has the shape \(2, 9\), but the ids \(2, 1\)"):
            model.apply(variables | cache, ids[:, 8:], mask, mutable=["cache"])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_logits_at_one_token():
    model = language_model("gpt2")
    params, (ids, mask) = random_params(model), batch()
    last = np.array(LENGTHS) - 1
    got = run(model, params, ids, mask, logits_at=last)
    np.testing.assert_allclose(got[:, 0], run(model, params, ids, mask)[np.arange(2), last], atol=1e-5)


@pytest.mark.parametrize("case", ["gpt2", "qwen3"])
def test_bfloat16_is_near_float32(case):
    exact, half = language_model(case), language_model(case, dtype=jnp.bfloat16)
    params = random_params(exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(half))} == {jnp.dtype("float32")}
    got, want = (run(model, params, *batch()) for model in (half, exact))
    assert got.dtype == jnp.float32
    assert not np.array_equal(got, want)
    np.testing.assert_allclose(got, want, atol=0.1 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("variant", ["plain", "scan-remat"])
def test_dropout_is_active_in_training_only(variant):
    model = language_model("gpt2", **VARIANTS[variant])
    params, inputs = random_params(model), batch()
    train = jax.jit(lambda key: model.apply({"params": params}, *inputs, deterministic=False, rngs={"dropout": key}))
    plain = run(model, params, *inputs)
    first, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, plain)


@pytest.mark.parametrize(("case", "scan"), PAIRED)
def test_keys_can_be_put_in_front(case, scan):
    """A prefix lengthens the keys, values and mask that the parameterless `core` is given."""
    config, _, body, *_ = CASES[case]
    model = body(dataclasses.replace(config, scan=scan))
    params, inputs = random_params(model), batch()
    front = (2, 0)

    def lengthen(*, visible):
        def interceptor(next_fun, args, kwargs, context):
            if context.module.name != "core" or context.method_name != "__call__":
                return next_fun(*args, **kwargs)
            query, key, value, mask = args
            key, value = (jnp.pad(x, [(0, 0), front, (0, 0), (0, 0)], constant_values=1.0) for x in (key, value))
            mask = mask.dense(query.shape[1], key.shape[1] - 2)
            return next_fun(query, key, value, jnp.pad(mask, [(0, 0), (0, 0), (0, 0), front], constant_values=visible), **kwargs)

        with nn.intercept_methods(interceptor):
            return run(model, params, *inputs).last_hidden_state

    plain = run(model, params, *inputs).last_hidden_state
    real = inputs[1].astype(bool)
    np.testing.assert_allclose(lengthen(visible=False)[real], plain[real], atol=1e-4)
    assert not np.allclose(lengthen(visible=True)[real], plain[real], atol=1e-2)


@pytest.mark.parametrize("method", ["lora", "bitfit", "adapter", "parallel_adapter"])
@pytest.mark.parametrize(("case", "scan"), [("gpt2", False), ("gpt2", True), ("llama", False), ("qwen2", True), ("qwen3", True)])
def test_methods_find_their_places(case, method, scan):
    """With default options the model is unchanged at first (nearly, for the adapter), and LoRA finds every kernel of a block."""
    model = language_model(case, scan=scan)
    params = random_params(model)
    if method == "bitfit" and not any(path.endswith("bias") for path in flatten_dict(params, sep="/")):
        with pytest.raises(ValueError, match="no bias parameters"):
            jpeft.apply(params, method=method)
        return
    peft = jpeft.apply(params, method=method)
    got = jax.jit(jpeft.wrap(model.apply, peft.method))(peft.variables, *batch())
    np.testing.assert_allclose(got, run(model, params, *batch()), atol=0.1 if method == "adapter" else 1e-5)
    if method == "lora":
        inside = {path for path in flatten_dict(params, sep="/") if path.endswith("kernel") and not path.startswith("lm_head")}
        assert inside <= {path.rpartition("/")[0] for path in flatten_dict(peft.adapter, sep="/")}

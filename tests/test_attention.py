"""Attention described by its structure, against the form with a dense mask: by XLA, in blocks, and by the code path of each kernel."""

import dataclasses
import functools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from tables import noised

import jpeft
from jpeft.models import LlamaConfig, LlamaForCausalLM
from jpeft.models.common import attention, attention_kernels
from jpeft.models.common.attention import AttentionCore, attend, attend_in_blocks, attend_in_parts
from jpeft.models.common.visible import Visible

BATCH, LENGTH, HEADS, GROUPS, SIZE = 2, 41, 4, 2, 8
RANDOM = np.random.default_rng(0)
RIGHT = jnp.arange(LENGTH)[None] < jnp.array([[LENGTH], [23]])
HOLES = jnp.array(RANDOM.random((BATCH, LENGTH)) < 0.7)
SEGMENTS = jnp.array(np.cumsum(RANDOM.random((BATCH, LENGTH)) < 0.1, axis=1), jnp.int32)
STRUCTURES = {
    "full": Visible(),
    "full-right": Visible(RIGHT),
    "causal": Visible(causal=True),
    "causal-right": Visible(RIGHT, causal=True),
    "causal-left": Visible(RIGHT[:, ::-1], causal=True),
    "window": Visible(causal=True, window=5),
    "window-holes": Visible(HOLES, causal=True, window=5),
    "window-in-some-layers": Visible(causal=True, window=5, uses_window=jnp.array(True)),
    "segments": Visible(causal=True, query_segments=SEGMENTS, key_segments=SEGMENTS),
    "full-right-prefix": Visible(RIGHT).with_prefix(3),
    "causal-prefix": Visible(causal=True).with_prefix(3),
    "causal-left-prefix": Visible(RIGHT[:, ::-1], causal=True).with_prefix(3),
    "window-prefix": Visible(causal=True, window=5).with_prefix(3),
    "segments-prefix": Visible(causal=True, query_segments=SEGMENTS, key_segments=SEGMENTS).with_prefix(3),
    "cache": Visible(RIGHT, causal=True, slot=jnp.array(7)),
    "cache-window": Visible(HOLES, causal=True, window=5, slot=jnp.array(7)),
}


def make_inputs(visible, queries=LENGTH, dtype=jnp.float32):
    keys = LENGTH + visible.prefix
    draw = lambda *shape: jnp.array(RANDOM.normal(size=shape), dtype)
    return draw(BATCH, queries, HEADS, SIZE), draw(BATCH, keys, GROUPS, SIZE), draw(BATCH, keys, GROUPS, SIZE)


def seen_by(visible, query, key):
    """The equation of each structure, in NumPy: whether a query of the first text sees a key."""
    if key < visible.prefix:
        return True
    key, place = key - visible.prefix, query + (0 if visible.slot is None else int(visible.slot))
    tokens = np.ones(LENGTH, bool) if visible.keys is None else np.asarray(visible.keys[1])
    apart = tokens[: place + 1].sum() - tokens[: key + 1].sum()
    return (
        tokens[key]
        and (not visible.causal or key <= place)
        and (visible.window is None or apart < visible.window)
        and (visible.query_segments is None or visible.query_segments[1, query] == visible.key_segments[1, key])
    )


@pytest.mark.parametrize("name", STRUCTURES)
def test_dense_masks(name):
    visible = STRUCTURES[name]
    queries, keys = 30 if visible.slot is not None else LENGTH, LENGTH + visible.prefix
    mask = np.broadcast_to(visible.dense(queries, keys), (BATCH, 1, queries, keys))[1, 0]
    expected = [[seen_by(visible, query, key) for key in range(keys)] for query in range(queries)]
    np.testing.assert_array_equal(mask, expected)


def check_against_dense(visible, run, queries=LENGTH):
    """Outputs and gradients of an attention, where the queries are tokens; finite elsewhere."""
    inputs = make_inputs(visible, queries)
    tokens = jnp.ones((BATCH, queries), bool) if visible.keys is None else visible.keys[:, :queries]
    weight = jnp.array(RANDOM.normal(size=inputs[0].shape)) * tokens[..., None, None]

    def outputs(run, *inputs):
        out = run(*inputs)
        return (out * weight).sum(), out

    both = [jax.jit(jax.grad(functools.partial(outputs, each), (0, 1, 2), has_aux=True))(*inputs) for each in (run, dense(visible))]
    (grads, out), (expected_grads, expected) = both
    chex.assert_trees_all_close(grads, expected_grads, atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_close(out[tokens], expected[tokens], atol=1e-5, rtol=1e-5)
    assert jnp.isfinite(out).all()


def dense(visible):
    return lambda query, key, value: attend(query, key, value, visible.dense(query.shape[1], key.shape[1]))


@pytest.mark.parametrize("name", STRUCTURES)
def test_blocks_of_queries(name, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)  # the last block is filled up
    visible = STRUCTURES[name]
    queries = 30 if visible.slot is not None else LENGTH
    check_against_dense(visible, lambda *inputs: attend_in_blocks(*inputs, visible), queries)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("name", [name for name in STRUCTURES if STRUCTURES[name].causal and STRUCTURES[name].slot is None])
def test_parts_of_queries(name, long, monkeypatch):
    """Parts of 11, 11, 11 and 8 queries, at once or in blocks."""
    monkeypatch.setattr(attention, "LONG", LENGTH if long else 2 * LENGTH)
    monkeypatch.setattr(attention, "BLOCK", 4)
    check_against_dense(STRUCTURES[name], lambda *inputs: attend_in_parts(*inputs, STRUCTURES[name]))


@pytest.mark.parametrize("name", ["full", "causal"])
def test_blocks_of_queries_with_a_mask_of_the_models_own(name, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)
    mask = STRUCTURES[name].dense(LENGTH, LENGTH)
    check_against_dense(STRUCTURES[name], lambda *inputs: attend_in_blocks(*inputs, mask))


def able(kernel, visible):
    query, key, _ = make_inputs(visible, dtype=jnp.bfloat16)
    return attention_kernels.why_not(kernel, query, key, visible, drops=False)


NO_KERNEL = {"window-prefix", "segments-prefix", "cache", "cache-window"}


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name not in NO_KERNEL | {"segments"}])
def test_the_path_of_cudnn(name):
    """The arguments that cuDNN is given, computed by XLA, which takes the same."""
    visible = STRUCTURES[name]
    assert able("cudnn", visible) is None
    # `lax.cond` chooses between layers with and without a window: `run_kernel`.
    visible = visible.replace(uses_window=None)
    check_against_dense(visible, lambda *inputs: attention_kernels._cudnn(*inputs, visible, implementation="xla"))


@pytest.mark.parametrize("name", ["full-right-prefix", "causal-left-prefix", "window-holes", "window-in-some-layers", "segments"])
def test_the_path_of_splash_attention(name):
    visible = STRUCTURES[name]
    assert able("splash", visible) is None
    check_against_dense(visible, lambda *inputs: attention_kernels.run_kernel("splash", *inputs, visible, interpret=True))


def test_a_row_without_tokens_is_finite():
    visible = Visible(jnp.array([[True] * LENGTH, [False] * LENGTH]), causal=True)
    inputs = make_inputs(visible)
    assert jnp.isfinite(attention_kernels._cudnn(*inputs, visible, implementation="xla")).all()
    assert jnp.isfinite(attend(*inputs, visible.dense(LENGTH, LENGTH))).all()


# --- the choice of a kernel -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "visible", "dtype", "drops", "reason"),
    [
        ("cudnn", Visible(), jnp.float32, False, "computes in bfloat16 or float16, and the model in float32"),
        ("cudnn", STRUCTURES["segments"], jnp.bfloat16, False, "knows no segments"),
        ("splash", STRUCTURES["window-prefix"], jnp.bfloat16, False, "lets the keys of a prefix through"),
        ("splash", STRUCTURES["segments-prefix"], jnp.bfloat16, False, "belong to every segment"),
        ("cudnn", Visible(), jnp.bfloat16, True, "attention_dropout"),
        ("cudnn", jnp.ones((1, 1, 1, LENGTH), bool), jnp.bfloat16, False, "boolean mask of the model's own"),
    ],
)
def test_a_kernel_that_is_asked_for_is_refused_with_the_reason(kernel, visible, dtype, drops, reason):
    query, key, _ = make_inputs(visible if isinstance(visible, Visible) else Visible(), dtype=dtype)
    with pytest.raises(ValueError, match=f"attention='{kernel}' cannot compute this attention: .*{reason}"):
        attention_kernels.choose(kernel, query, key, visible, drops=drops)
    assert attention_kernels.choose("auto", query, key, visible, drops=drops) == "xla"


H100 = {"platform": "gpu", "client": SimpleNamespace(platform_version="PJRT C API\ncuda 13000"), "compute_capability": "9.0"}
DEVICES = {
    "H100": (H100, "cudnn"),
    "T4": (H100 | {"compute_capability": "7.5"}, "xla"),
    "MI300": (H100 | {"client": SimpleNamespace(platform_version="rocm 60300")}, "xla"),
    "TPU": ({"platform": "tpu"}, "splash"),
    "CPU": ({"platform": "cpu"}, "xla"),
}


@pytest.mark.parametrize("name", DEVICES)
def test_the_device_decides(name, monkeypatch):
    about, kernel = DEVICES[name]
    monkeypatch.setattr(attention_kernels, "_device", lambda: SimpleNamespace(**about))
    query = jnp.zeros((1, 256, HEADS, SIZE), jnp.bfloat16)
    choose = lambda query, visible: attention_kernels.choose("auto", query, query, visible, drops=False)
    # A kernel of a TPU is not partitioned, and the tests have eight devices.
    assert choose(query, Visible(causal=True)) == ("xla" if name == "TPU" else kernel)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose(query, Visible(causal=True)) == kernel
    assert choose(query, Visible(causal=True, slot=jnp.array(1))) == "xla"  # a step of generation
    assert choose(query[:, :1], Visible(causal=True)) == "xla"


# --- programs for devices that are not here -----------------------------------------------------------------------------------------------

CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=64,
    sliding_window=None,
    dtype=jnp.bfloat16,
)
TOKENS = 384


def lowered(config, method, platform, *, padded=False, many=False):
    """The program of a training step's gradient, for another platform."""
    model = LlamaForCausalLM(config)
    ids = jax.ShapeDtypeStruct((2, TOKENS), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    peft = jax.eval_shape(lambda params: jpeft.apply(params, **method), params)
    forward = jpeft.wrap(model.apply)

    def loss(adapter, params, ids, mask):
        return forward(peft.replace(params=params, adapter=adapter), ids, mask if padded else None, labels=ids).loss.sum()

    grad, adapter = jax.grad(loss), peft.adapter
    if many:
        grad = jax.vmap(grad, in_axes=(0, None, None, None))
        adapter = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), adapter)
    return jax.jit(grad).trace(adapter, params, ids, ids).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ({"method": "lora", "target": ["q_proj"]}, {}),
        ({"method": "lora", "target": ["q_proj"]}, {"padded": True, "many": True}),
        ({"method": "prefix_tuning", "length": 5, "mlp": None}, {"padded": True}),
    ],
)
def test_a_program_for_a_gpu_has_no_array_of_queries_and_keys(method, options, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    program = lowered(config_with("cudnn"), method, "cuda", **options)
    assert "fmhaSoftmax" in program
    assert "fmhaSoftmaxBackward" in program
    assert f"{TOKENS}x{TOKENS}" not in program
    assert f"{TOKENS + 5}x{TOKENS + 5}" not in program
    assert f"{TOKENS}x{TOKENS}" in lowered(config_with("xla"), method, "cuda")


def test_a_program_for_a_tpu_has_no_array_of_queries_and_keys():
    program = lowered(config_with("splash"), {"method": "prefix_tuning", "length": 5, "mlp": None}, "tpu", padded=True)
    assert "tpu_custom_call" in program
    assert f"{TOKENS}x{TOKENS}" not in program
    assert f"{TOKENS}x{TOKENS + 5}" not in program


def config_with(kernel):
    return dataclasses.replace(CONFIG, attention=kernel, scan=True)


# --- memory -----------------------------------------------------------------------------------------------------------------------------


def test_memory_of_long_texts_does_not_grow_with_the_square():
    def temporary(length):
        core = AttentionCore(name="core")
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        loss = lambda q, k, v: core.apply({}, q, k, v, Visible(causal=True)).sum()
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(8192)
    assert long < 5 * short  # four times the length
    assert long < 4 * 2 * 8192**2 / 5  # the scores of two heads


def test_dropout_in_blocks(monkeypatch):
    """Weights of the value 1 show what is kept: a share of 1 - rate, times 1 / (1 - rate)."""
    monkeypatch.setattr(attention, "LONG", LENGTH)
    monkeypatch.setattr(attention, "BLOCK", 16)
    query, key, value = make_inputs(Visible())
    core, ones = AttentionCore(0.25, name="core"), jnp.ones_like(value)
    run = lambda seed: core.apply({}, query, key, ones, Visible(), deterministic=False, rngs={"dropout": jax.random.key(seed)})
    assert float(run(0).mean()) == pytest.approx(1, abs=0.05)
    assert float(run(0).std()) > 0.01
    assert not jnp.array_equal(run(0), run(1))
    chex.assert_trees_all_close(core.apply({}, query, key, ones, Visible()), jnp.ones_like(query), atol=1e-5)


# --- models -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_model_runs_alike_with_every_kernel(window, padding, monkeypatch):
    """A decoder of the library, whole: the code path of cuDNN and blocks of queries against attention at once."""
    config = LlamaConfig(
        model_type="mistral",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=20,
        sliding_window=window,
    )
    model = LlamaForCausalLM(config)
    ids = jnp.array(RANDOM.integers(0, 20, (BATCH, LENGTH)))
    mask = {"none": None, "right": RIGHT, "left": RIGHT[:, ::-1]}[padding]
    params = noised(model.init(jax.random.key(0), ids)["params"], 0.3)
    tokens = jnp.ones((BATCH, LENGTH), bool) if mask is None else mask
    expected = model.apply({"params": params}, ids, mask)[tokens]

    monkeypatch.setattr(attention, "LONG", LENGTH)
    monkeypatch.setattr(attention, "SPLIT", LENGTH)
    monkeypatch.setattr(attention, "BLOCK", 16)
    np.testing.assert_allclose(model.apply({"params": params}, ids, mask)[tokens], expected, atol=2e-4)
    monkeypatch.setattr(attention, "choose", lambda *args, **kwargs: "cudnn")
    by_xla = functools.partial(attention_kernels._cudnn, implementation="xla")
    monkeypatch.setattr(attention, "run_kernel", lambda kernel, *inputs: by_xla(*inputs))
    np.testing.assert_allclose(model.apply({"params": params}, ids, mask)[tokens], expected, atol=2e-4)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_packed_texts_run_as_if_alone(model_type):
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    window = 4 if model_type == "mistral" else None
    model = LlamaForCausalLM(LlamaConfig(model_type=model_type, sliding_window=window, vocab_size=20, **shape))
    texts = [jnp.array(RANDOM.integers(0, 20, (1, length))) for length in (5, 9, 3)]
    params = noised(model.init(jax.random.key(0), texts[0])["params"], 0.3)
    segments = jnp.concatenate([jnp.full(text.shape, index) for index, text in enumerate(texts)], 1)
    packed = model.apply({"params": params}, jnp.concatenate(texts, 1), segment_ids=segments)
    alone = jnp.concatenate([model.apply({"params": params}, text) for text in texts], 1)
    np.testing.assert_allclose(packed, alone, atol=2e-4)
    with pytest.raises(ValueError, match="segment_ids= are for packed rows, and a cache continues one text a row"):
        model.apply({"params": params}, texts[0], segment_ids=segments[:, :5], cache_length=8, mutable=["cache"])


def test_cores_keep_no_parameters():
    query, key, value = make_inputs(Visible())
    assert not AttentionCore(name="core").init(jax.random.key(0), query, key, value, Visible())

"""Meshes: where things are kept, equality with one device, and what is sent between devices."""

import functools
import math
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tables import CLASSES, HEADS, MERGES, METHODS, NEED_STATS, PROMPTS, WIDTH, noised

import jpeft
from jpeft import sharding
from jpeft.models import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    abstract_params,
    generate,
    partition_rules,
)

MESHES = {"data": (8, 1, 1), "fsdp": (2, 4, 1), "tensor": (2, 2, 2)}
LENGTH, EXAMPLES, VOCAB, STEPS = 6, 8, 24, 3
SIZES = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_attention_heads=HEADS, max_position_embeddings=32, initializer_range=0.3)
ENCODER = BertForSequenceClassification(BertConfig(**SIZES, num_hidden_layers=1, intermediate_size=2 * WIDTH), CLASSES)
DECODER = GPT2LMHeadModel(GPT2Config(**SIZES, num_hidden_layers=2, scan=True))
# The last one is no family of jpeft.models: heads as axes, layers stacked, sizes that do not divide, and no rules.
MODELS = {"encoder": ENCODER, "decoder": DECODER, "foreign": tables.MODELS["scan-mha"]}
RULES = {"encoder": partition_rules(ENCODER), "decoder": partition_rules(DECODER), "foreign": ()}
REGISTERED = [name for name in METHODS if name in jpeft.methods()]


def mesh_of(name: str) -> Any:
    data, fsdp, tensor = MESHES[name]
    return sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)


# --- meshes and batches ---


def test_a_mesh_has_the_devices_that_are_left():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(**sharding.parse_mesh("fsdp=4, tensor=2")).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert dict(sharding.make_mesh(data=2, fsdp=-1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(sharding.make_mesh(fsdp=2, devices=jax.devices()[:6]).shape) == {"data": 3, "fsdp": 2, "tensor": 1}
    assert sharding.abstract_mesh(256, tensor=8).size == 256


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3, "fsdp": 2}, r"data=3, fsdp=2, tensor=1 asks for 6 devices, and there are 8"),
        ({"fsdp": 3}, r"asks for a multiple of 3 devices, and there are 8"),
        ({"fsdp": 16}, r"asks for a multiple of 16 devices, and there are 8"),
        ({"fsdp": -1, "tensor": -1}, r"one of them may be -1"),
        ({"data": 8, "tensor": 0}, r"sizes are at least 1"),
        ({"data": 8, "tensor": True}, r"sizes are at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


@pytest.mark.parametrize("text", ["data", "model=2", "data=2,data=4", "fsdp=x", "data=²", "data=--2", "data=1.5", "data=" + "9" * 5000])
def test_a_mesh_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="is not AXIS=SIZE"):
        sharding.parse_mesh(text)


def test_a_mesh_has_an_axis():
    for text in ("", " , "):
        with pytest.raises(ValueError, match="names no axis: give sizes as in data=2,fsdp=4"):
            sharding.parse_mesh(text)


def test_a_batch_is_split_over_data_and_fsdp():
    batch = sharding.shard_batch({"x": np.arange(16).reshape(8, 2), "y": np.arange(8)}, mesh_of("tensor"))
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(batch["y"], np.arange(8))
    with pytest.raises(ValueError, match=r"\[6\] examples cannot be split into data \* fsdp = 4"):
        sharding.shard_batch({"x": np.zeros((6, 2))}, mesh_of("tensor"))


# --- the base ---

ABSTRACT = sharding.abstract_mesh(8, data=1, fsdp=4, tensor=2)


def test_rules_are_for_one_layer_and_leave_out_what_does_not_divide():
    rules = ((".*up/kernel", P("fsdp", "tensor")), (".*up/bias", P("tensor")), (".*down", P(("fsdp", "tensor"))))
    place = lambda path, *shape: tuple(sharding.place(path, shape, ABSTRACT, rules))
    assert place("h/0/up/kernel", 8, 6) == (P("fsdp", "tensor"), "")
    assert place("h/up/kernel", 3, 8, 6) == (P(None, "fsdp", "tensor"), "")
    assert place("h/up/bias", 3, 6) == (P(None, "tensor"), "")
    assert place("h/0/up/kernel", 6, 7) == (P(), "axis 0 (6) is not divisible by fsdp=4; axis 1 (7) is not divisible by tensor=2")
    assert place("down/kernel", 12, 3) == (P("fsdp"), "axis 0 (12) is not divisible by fsdp=4 * tensor=2")
    # No rule: the largest axis that can be split, and not the axis of stacked layers.
    assert place("other/kernel", 16, 64) == (P(None, ("fsdp", "tensor")), "")
    assert place("other/kernel", 12, 30) == (P("fsdp"), "")
    assert place("layers/other/kernel", 64, 16, 6) == (P(None, ("fsdp", "tensor")), "")
    assert place("layers/other/scale", 64, 16) == (P(), "")
    assert place("other/kernel", 3, 5) == (P(), "no axis of (3, 5) is divisible by fsdp=4 or tensor=2")
    with pytest.raises(ValueError, match=r"has 2 entries, and the parameter has the shape \(8,\)"):
        place("up/kernel", 8)
    with pytest.raises(ValueError, match="names the axis 'model'"):
        sharding.place("a", (8,), ABSTRACT, ((".*", P("model")),))


@pytest.mark.parametrize(
    "model",
    [
        BertForSequenceClassification(BertConfig(num_hidden_layers=2), 2),
        BertForSequenceClassification(BertConfig(num_hidden_layers=2, scan=True), 2),
        BertForSequenceClassification(BertConfig(num_hidden_layers=2, model_type="distilbert", type_vocab_size=0), 2),
        BertForSequenceClassification(BertConfig(num_hidden_layers=2, model_type="roberta", vocab_size=50266), 2),
        GPT2LMHeadModel(GPT2Config(num_hidden_layers=2, vocab_size=50258)),
        GPT2LMHeadModel(GPT2Config(num_hidden_layers=2, vocab_size=50258, scan=True)),
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_key_value_heads=8)),
        LlamaForCausalLM(LlamaConfig.qwen3_8b(num_hidden_layers=2, scan=True)),
    ],
    ids=["bert", "bert-scan", "distilbert", "roberta", "gpt2", "gpt2-scan", "llama", "qwen3-scan"],
)
def test_families_are_split_eightfold(model):
    """Their kernels and word embeddings are by both axes; vectors and position tables, which are not, weigh next to nothing."""
    params = abstract_params(model)
    made = sharding.plan(params, ABSTRACT, partition_rules(model))
    assert made.base == pytest.approx(sum(leaf.size * 4 for leaf in jax.tree.leaves(params)) / 8, rel=0.05)
    assert not any(row.why for row in made.rows)
    kernels = [row for row in made.rows if re.search("/(layers?|h)/.*kernel", row.path)]
    assert len(kernels) >= 4
    for row in kernels:
        first = re.search("(query|key|value|[qkv]_lin|intermediate/dense|lin1|c_attn|c_fc|[qkv]_proj|gate_proj|up_proj)/kernel", row.path)
        assert row.spec[-2:] == (("fsdp", "tensor") if first else ("tensor", "fsdp")), row


# --- the adapter and the optimizer's state ---


def specs(method: jpeft.Method, model: nn.Module = ENCODER, mesh: Any = ABSTRACT) -> dict[str, P]:
    peft = jax.eval_shape(lambda params: jpeft.apply(params, method=method), abstract_params(model))
    placed = sharding.placements(peft, mesh, partition_rules(model)).adapter
    return {path.removesuffix("/spec"): leaf for path, leaf in jpeft.flatten(placed).items() if not path.endswith("/why")}


def test_factors_keep_the_axes_of_their_kernel():
    layer = "bert/encoder/layer/0"
    found = specs(jpeft.lora(rank=2, target=["query", "attention/output/dense", "word_embeddings"]))
    assert found == {
        f"{layer}/attention/self/query/kernel/a": P("fsdp"),
        f"{layer}/attention/self/query/kernel/b": P(None, "tensor"),
        f"{layer}/attention/output/dense/kernel/a": P("tensor"),
        f"{layer}/attention/output/dense/kernel/b": P(None, "fsdp"),
        "bert/embeddings/word_embeddings/embedding/a": P("tensor"),
        "bert/embeddings/word_embeddings/embedding/b": P(None, "fsdp"),
        "classifier/kernel": P(),
        "classifier/bias": P(),
    }
    assert specs(jpeft.lora(rank=2, target=["c_attn"]), DECODER) == {
        "transformer/h/attn/c_attn/kernel/a": P(None, "fsdp"),
        "transformer/h/attn/c_attn/kernel/b": P(None, None, "tensor"),
    }


def test_factors_of_kernels_with_heads_and_of_given_geometry():
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {"query": {"kernel": leaf(8, 4, 2)}, "out": {"kernel": leaf(4, 2, 8)}, "mix": {"w": leaf(6, 8, 16)}}
    rules = (("query/kernel", P("fsdp", "tensor")), ("out/kernel", P("tensor", None, "fsdp")), ("mix/w", P(None, "fsdp", "tensor")))
    method = jpeft.lora(rank=2, target=".*", axes=(("mix/w", jpeft.KernelAxes((0,), (1,), (2,))),))
    placed = sharding.placements(jax.eval_shape(lambda p: jpeft.apply(p, method=method), params), ABSTRACT, rules).adapter
    assert jax.tree.map(lambda p: p.spec, placed, is_leaf=lambda x: isinstance(x, sharding.Placement)) == {
        "query": {"kernel": {"a": P("fsdp"), "b": P(None, "tensor")}},
        "out": {"kernel": {"a": P("tensor"), "b": P(None, "fsdp")}},
        "mix": {"w": {"a": P(None, "fsdp"), "b": P(None, None, "tensor")}},
    }


def test_leaves_of_every_kind_are_kept_like_their_weights():
    found = specs(jpeft.chain(bitfit=jpeft.bitfit(), adapter=jpeft.adapter(size=4)))
    layer = "bert/encoder/layer/0"
    assert found[f"bitfit/{layer}/attention/self/query/bias"] == P("tensor")
    assert found[f"bitfit/{layer}/output/dense/bias"] == P()
    assert found[f"adapter/{layer}/output/dense/+/up/kernel"] == P()
    # Upper layers of a stack: shaped unlike the weight that they are a part of.
    assert specs(jpeft.freeze(top=1), DECODER)["transformer/h/mlp/c_fc/kernel"] == P(None, "fsdp", "tensor")

    class EveryKind(jpeft.Method):
        def init(self, key, params, *, stats=None):
            shape = params["kernel"].shape
            ones = {"m": jnp.ones(shape[1:]), "l": jnp.ones(shape[:1]), "delta": jnp.ones(shape), "odd": jnp.ones(3)}
            return {"kernel": ones, "+": {"large": jnp.ones((2**20, 8)), "small": jnp.ones((64, 8))}}

    peft = jpeft.apply({"kernel": jnp.ones((8, 4))}, method=EveryKind())
    placed = sharding.placements(peft, ABSTRACT, ((".*", P("fsdp", "tensor")),)).adapter
    assert {name: p.spec for name, p in placed["kernel"].items()} == {
        "m": P("tensor"), "l": P("fsdp"), "delta": P("fsdp", "tensor"), "odd": P(),
    }  # fmt: skip
    assert {name: p.spec for name, p in placed["+"].items()} == {"large": P(("fsdp", "tensor")), "small": P()}


@pytest.mark.parametrize("over", ["adapter", "variables"])
def test_moments_follow_their_leaves(over):
    peft = sharding.shard(jpeft.apply(cell("lora").params, method=METHODS["lora"]), mesh_of("tensor"), partition_rules(ENCODER))
    tx = jpeft.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), peft, over=over)
    trees = peft.adapter if over == "adapter" else peft.variables
    where = jpeft.flatten(sharding.state_shardings(jax.eval_shape(tx.init, trees), trees))
    leaves = jpeft.flatten(peft.adapter)
    for moment in ("mu", "nu"):
        prefix = f"{moment}/" if over == "adapter" else f"{moment}/lora/"
        found = {path.split(prefix, 1)[1]: at for path, at in where.items() if prefix in path}
        assert found == {path: leaf.sharding for path, leaf in leaves.items()}
    (count,) = (at for path, at in where.items() if path.endswith("count"))
    assert count.is_fully_replicated
    with pytest.raises(ValueError, match="needs an adapter on one mesh"):
        sharding.state_shardings(jax.eval_shape(tx.init, trees), cell("lora").peft.adapter)


def test_a_donated_adapter_leaves_the_base_alone():
    peft = sharding.shard(cell("bitfit").peft, mesh_of("data"), partition_rules(ENCODER))
    again = sharding.shard(peft, mesh_of("data"), partition_rules(ENCODER))
    assert again.params["classifier"]["bias"] is peft.params["classifier"]["bias"]
    jax.jit(lambda adapter: jax.tree.map(lambda x: x + 1, adapter), donate_argnums=0)(again.adapter)
    for leaf in jax.tree.leaves(peft):
        assert np.isfinite(np.asarray(leaf)).all()


# --- every method on every mesh ---


class Cell(NamedTuple):
    """One method on one model; `peft` with noise, so that nothing is zero by accident."""

    params: Any
    peft: jpeft.Peft


class Run(NamedTuple):
    """Some steps: losses, adapter and optimizer state after them, and the compiled step."""

    losses: list[float]
    adapter: Any
    opt_state: Any
    compiled: Any
    peft: jpeft.Peft


@functools.cache
def base(model: str) -> Any:
    return jax.jit(MODELS[model].init)(jax.random.key(0), batch()["x"])["params"]


@functools.cache
def batch() -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).integers(0, tables.VOCAB, (EXAMPLES, LENGTH)).astype(np.int32)
    return {"x": x, "y": x[:, 0] % CLASSES}


@functools.cache
def cell(name: str, model: str = "encoder") -> Cell:
    params = base(model)
    scores = jax.tree.map(jnp.abs, params) if name in NEED_STATS else None
    peft = jpeft.apply(params, method=Probe() if name == "probe" else METHODS[name], key=jax.random.key(7), stats=scores)
    return Cell(params, peft.replace(adapter=noised(peft.adapter)))


class Probe(jpeft.Method):
    """A method that adds one vector to the embedding: its step is what the frozen base needs for itself, forward and back."""

    name = "probe"

    def init(self, key, params, *, stats=None):
        (path,) = (path for path in jpeft.flatten(params) if path.endswith(("word_embeddings/embedding", "wte/embedding")))
        return jpeft.unflatten({f"{path.rpartition('/')[0]}/+/shift": jnp.zeros(WIDTH)})

    def call(self, layer, inputs, leaves, rng):
        y = layer(*inputs)
        return y + leaves["+"]["shift"][None, None] if y.shape[-1] == WIDTH else y  # and not when the embedding is the head


@functools.cache
def run(name: str, mesh_name: str | None, model: str = "encoder") -> Run:
    peft, mesh = cell(name, model).peft, None if mesh_name is None else mesh_of(mesh_name)
    # A large epsilon: where a gradient is zero but for rounding (a key's bias), Adam must not make a step of its sign.
    tx = jpeft.optimizer(optax.adamw(1e-2, eps=1e-3, weight_decay=0.1), peft)
    forward, now, out = jpeft.wrap(MODELS[model].apply, peft.method), batch(), None
    if mesh is None:
        opt_state = tx.init(peft.adapter)
    else:
        peft = sharding.shard(peft, mesh, RULES[model])
        follow = sharding.state_shardings(jax.eval_shape(tx.init, peft.adapter), peft.adapter)
        opt_state = jax.device_put(tx.init(peft.adapter), follow)
        out = (jax.tree.map(lambda leaf: leaf.sharding, peft.adapter), follow, None)
        forward, now = sharding.by_example(forward, mesh), sharding.shard_batch(now, mesh)

    def step(adapter, opt_state, params, batch):
        def loss_fn(adapter):
            bound = peft.replace(params=params, adapter=adapter)
            logits = forward(bound.variables, batch["x"])
            labels = batch["y"] if logits.ndim == 2 else batch["x"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean() + jpeft.penalty(bound)

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    adapter, losses = peft.adapter, []
    compiled = jax.jit(step, out_shardings=out).lower(adapter, opt_state, peft.params, now).compile()
    for _ in range(STEPS):
        adapter, opt_state, loss = compiled(adapter, opt_state, peft.params, now)
        losses.append(float(loss))
    return Run(losses, adapter, opt_state, compiled, peft)


class Sent(NamedTuple):
    """One collective: what it is, and the bytes of its result on one device."""

    kind: str
    bytes: int


COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
WIDTHS = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1}


def sent(compiled: Any) -> list[Sent]:
    """The collectives of a program, read from its HLO; several arrays sent at once are one."""
    found = []
    for result, kind in COLLECTIVE.findall(compiled.as_text()):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        found.append(Sent(kind, sum(WIDTHS[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in shapes)))
    return found


def test_collectives_are_read_from_the_program():
    mesh = mesh_of("data")
    x = sharding.shard_batch(np.ones((8, 16), np.float32), mesh)
    total = jax.jit(lambda x: (x.sum(0), x.mean()), out_shardings=NamedSharding(mesh, P())).lower(x).compile()
    assert sum(part.bytes for part in sent(total) if part.kind == "all-reduce") == 4 * 16 + 4
    whole = jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh, P())).lower(x).compile()
    assert sent(whole) == [Sent("all-gather", 4 * 8 * 16)]


# The relatives of LoRA meet one mesh each in turn, the others all of them.
RELATIVES = [name for name in REGISTERED if METHODS[name].family == "reparameterized" and name != "lora"]
TRAINED = [(name, mesh) for name in REGISTERED if name not in RELATIVES for mesh in MESHES]
TRAINED += [(name, list(MESHES)[i % len(MESHES)]) for i, name in enumerate(RELATIVES)]


@pytest.mark.parametrize(("name", "mesh_name"), TRAINED)
def test_a_mesh_trains_like_one_device(name, mesh_name):
    check_same(run(name, None), run(name, mesh_name))
    check_sent(run(name, mesh_name), run("probe", mesh_name), MESHES[mesh_name])


def test_a_mesh_trains_a_stacked_decoder():
    check_same(run("lora", None, "decoder"), run("lora", "tensor", "decoder"))
    check_sent(run("lora", "tensor", "decoder"), run("probe", "tensor", "decoder"), MESHES["tensor"])


def test_a_mesh_trains_a_model_without_rules():
    check_same(run("lora", None, "foreign"), run("lora", "tensor", "foreign"))
    leaves = jpeft.flatten(run("lora", "tensor", "foreign").adapter)
    assert leaves["layers/attn/mha/query/kernel/a"].sharding.spec == P(None, ("fsdp", "tensor"))
    assert leaves["layers/attn/mha/query/kernel/b"].sharding.spec == P()


@pytest.mark.parametrize("mesh_name", ["data", "fsdp"])
def test_a_mesh_trains_scattered_entries_of_a_stacked_decoder(mesh_name):
    check_same(run("fish_mask", None, "decoder"), run("fish_mask", mesh_name, "decoder"))
    if mesh_name == "data":
        check_sent(run("fish_mask", "data", "decoder"), run("probe", "data", "decoder"), MESHES["data"])
    else:  # no stack is gathered, of which a kernel of the MLPs is the largest
        stack = 4 * DECODER.config.num_hidden_layers * WIDTH * 4 * WIDTH
        assert max(part.bytes for part in sent(run("fish_mask", "fsdp", "decoder").compiled) if part.kind == "all-gather") < stack


class Noisy(nn.Module):
    """A layer behind dropout, with arguments that are no examples."""

    @nn.compact
    def __call__(self, x: jax.Array, shift: jax.Array, *, times: int, deterministic: bool = True) -> dict[str, jax.Array]:
        x = nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(4)(x) + shift[None])
        return {"all": times * x, "first": x[:, 0]}


def test_each_part_of_a_batch_has_its_own_dropout():
    """Of a method that runs on each part by itself: the parts' masks differ, and nothing else does."""
    model, x, shift = Noisy(), jnp.ones((8, 4)), jnp.arange(4.0)
    params = model.init(jax.random.key(0), x, shift, times=1)["params"]
    peft = noised_peft(params, "fish_mask", sparsity=0.5, head=None, stats=jax.tree.map(jnp.abs, params))
    assert peft.method.reduce_grads_locally
    forward = jpeft.wrap(model.apply, peft.method)
    alone = forward(peft.variables, x, shift, times=3)
    for name in MESHES:
        mesh = mesh_of(name)
        there, many = sharding.shard(peft, mesh), jax.jit(sharding.by_example(forward, mesh), static_argnames=("times", "deterministic"))
        x_there = sharding.shard_batch(x, mesh)
        chex.assert_trees_all_close(many(there.variables, x_there, shift, times=3), alone, atol=1e-6)
        noisy = many(there.variables, x_there, shift, times=3, deterministic=False, rngs={"dropout": jax.random.key(1)})["all"]
        kept = np.asarray(noisy) != 0
        np.testing.assert_allclose(np.asarray(noisy)[kept], 2 * np.asarray(alone["all"])[kept], rtol=1e-5)
        parts = np.split(kept, MESHES[name][0] * MESHES[name][1])
        assert len({part.tobytes() for part in parts}) > 1


def noised_peft(params: Any, method: str, **options: Any) -> jpeft.Peft:
    peft = jpeft.apply(params, method=method, **options)
    return peft.replace(adapter=noised(peft.adapter))


def check_same(alone: Run, many: Run) -> None:
    np.testing.assert_allclose(many.losses, alone.losses, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(many.adapter, jax.device_get(alone.adapter), rtol=1e-5, atol=1e-5)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), jax.device_get(many.adapter), jax.device_get(many.peft.adapter))
    assert max(jax.tree.leaves(moved)) > 1e-3

    # Every leaf is where its rule says, and so are its moments.
    for leaf, first in zip(jax.tree.leaves(many.adapter), jax.tree.leaves(many.peft.adapter), strict=True):
        assert leaf.sharding.is_equivalent_to(first.sharding, leaf.ndim)
    state, leaves = jpeft.flatten(many.opt_state), jpeft.flatten(many.adapter)
    for path, leaf in leaves.items():
        moments = [moment for name, moment in state.items() if name.endswith(f"/{path}") and moment.shape == leaf.shape]
        assert sum(moment.dtype == leaf.dtype for moment in moments) % 2 == 0
        assert all(moment.sharding.is_equivalent_to(leaf.sharding, leaf.ndim) for moment in moments)


def check_sent(many: Run, needed: Run, sizes: tuple[int, int, int]) -> None:
    # What is sent beyond what the base needs for itself is no larger than the adapter, and sums are over adapters alone.
    summary = jpeft.summary(many.peft)
    name, adapter = many.peft.method.name, summary.bytes
    got, base_needs = sent(many.compiled), sent(needed.compiled)
    # Activations are longer by the table's three virtual tokens.
    largest = max(part.bytes for part in base_needs) * (1 + 3 / LENGTH if name in PROMPTS else 1)
    # A rotation is a square; of its leaf only the half above the diagonal is stored.
    assert max(part.bytes for part in got) <= adapter * (2 if name == "oft" else 1) + largest, got
    if sizes == (8, 1, 1):
        assert sum(part.bytes for part in got) <= adapter + 64, got
    if sizes[2] == 1:
        # Some are summed over one axis first, then over the other.
        reduced = [part for part in got if part.kind in ("all-reduce", "reduce-scatter")]
        assert sum(part.bytes for part in reduced) <= 2 * adapter + 64, reduced


def test_layers_outputs_are_held_by_example():
    """Without it XLA sums each layer's outputs over `fsdp`; with it, it gathers the kernels."""
    reduced = sum(part.bytes for part in sent(run("probe", "fsdp").compiled) if part.kind == "all-reduce")
    assert reduced == 4 * WIDTH + 4
    mesh, rules = mesh_of("fsdp"), partition_rules(ENCODER)
    params, x = sharding.shard(cell("lora").params, mesh, rules), sharding.shard_batch(batch()["x"], mesh)
    free = jax.jit(ENCODER.apply).lower({"params": params}, x).compile()
    held = jax.jit(sharding.by_example(ENCODER.apply, mesh)).lower({"params": params}, x).compile()
    assert any(part.kind == "all-reduce" for part in sent(free))
    assert not any(part.kind == "all-reduce" for part in sent(held))
    np.testing.assert_allclose(held({"params": params}, x), free({"params": params}, x), atol=1e-5)


# --- after training ---


@pytest.mark.parametrize("name", [name for name in REGISTERED if name not in MERGES])
def test_merging_keeps_the_shards(name):
    peft, rules = cell(name).peft, partition_rules(ENCODER)
    there = sharding.shard(peft, mesh_of("tensor"), rules)
    merge = jax.jit(jpeft.merge, out_shardings=sharding.shardings(there.params, mesh_of("tensor"), rules)).lower(there).compile()
    merged = merge(there)
    chex.assert_trees_all_close(merged, jax.device_get(jpeft.merge(peft)), atol=1e-6)
    for leaf, before in zip(jax.tree.leaves(merged), jax.tree.leaves(there.params), strict=True):
        assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)
    assert max([part.bytes for part in sent(merge)], default=0) <= jpeft.summary(peft).bytes


def test_folding_keeps_the_prefix():
    peft = cell("prefix_tuning").peft
    folded = jax.jit(jpeft.fold)(sharding.shard(peft, mesh_of("tensor"), partition_rules(ENCODER)))
    chex.assert_trees_all_close(folded.adapter, jax.device_get(jpeft.fold(peft).adapter), atol=1e-6)
    assert folded.method == jpeft.fold(peft).method


def test_generation_on_a_mesh():
    peft, mesh = cell("lora", "decoder").peft, mesh_of("tensor")
    forward = jpeft.wrap(DECODER.apply, peft.method)
    want = generate(forward, peft.variables, batch()["x"], max_new_tokens=4)
    there = sharding.shard(peft, mesh, partition_rules(DECODER))
    ids = sharding.shard_batch(batch()["x"], mesh)
    got = generate(sharding.by_example(forward, mesh), there.variables, ids, max_new_tokens=4)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-4)


# --- plans ---


@pytest.mark.parametrize("name", ["lora", "fish_mask"])
def test_a_plan_is_what_the_program_takes(name):
    """The bytes that XLA counts for the arguments of the compiled step on one device, less those of the batch."""
    ran = run(name, "tensor")
    made = sharding.plan(ran.peft, mesh_of("tensor"), partition_rules(ENCODER), tx=optax.adamw(1e-3))
    taken = ran.compiled.memory_analysis().argument_size_in_bytes
    # The program takes two examples, ids and labels, and not the base's own head, in whose place the adapter's stands.
    assert made.base + made.adapter + made.optimizer == taken - 4 * 2 * (LENGTH + 1) + 4 * CLASSES * (WIDTH + 1)
    assert made.gradients == (made.adapter if name == "lora" else 4 * (jpeft.summary(ran.peft).trained))


def test_a_plan_says_what_is_not_split():
    params = {"layer": {str(i): {"up": {"kernel": jax.ShapeDtypeStruct((15, 64), jnp.bfloat16)}} for i in range(3)}}
    text = str(sharding.plan(params, ABSTRACT, ((".*kernel", P("fsdp", "tensor")),)))
    assert "layer/*/up/kernel      3  (15, 64)  bfloat16  (·, tensor)     2.8 KiB  (axis 0 (15) is not divisible by fsdp=4)" in text
    assert "8 devices: data=1, fsdp=4, tensor=2" in text
    assert "optimizer" not in text

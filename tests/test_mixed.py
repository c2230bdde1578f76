"""Mixed batches: each example with an adapter of its own, in one program."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from nnx_models import linen_params, nnx_model
from tables import BATCH, MODELS, base, batch, noised
from test_decoders import language_model

import jpeft
from jpeft.models import BertConfig, BertForSequenceClassification, abstract_params, generate

INDEX = [2, -1, 0, 1, 3]
IA3 = {"target": ["key", "value"], "feedforward": ["down"]}


def adapter(params, method, seed=0, **options):
    """An adapter with noise on every leaf."""
    peft = jpeft.apply(params, method, key=jax.random.key(seed), **options)
    return peft.replace(adapter=noised(peft.adapter, seed=seed))


def adapters(params, **ia3):
    """LoRA with its options, (IA)³, and a chain that trains biases, of layers in a stack too."""
    target = r".*(kernel|embedding)"
    methods = [
        jpeft.lora(rank={"(.*/)?(query|down|q_proj|embed)/.*": 3, ".*": 2}, alpha={"(.*/)?(key|k_proj)/.*": 4.0, ".*": 8.0}, target=target),
        jpeft.lora(rank=4, rslora=True, alpha=2.0, dropout=0.1, view="two-view"),
        jpeft.ia3(**ia3),
        jpeft.chain(first=jpeft.lora(rank=1), second=jpeft.lora(rank=2, target="(.*/)?(down|down_proj)/kernel"), biases=jpeft.bitfit()),
    ]
    return [adapter(params, method, seed) for seed, method in enumerate(methods)]


@functools.cache
def pool(name):
    """The adapters of a model of the table, and a pool of them with two empty slots."""
    own = adapters(base(name), **({} if name == "llama-scan" else IA3))
    return own, jpeft.mix(base(name), own, slots=6)


def logits_of(apply, own, x):
    """The logits of each adapter written into the base, and last, which is index -1, those of the base."""
    plain = jax.jit(apply)
    logits = [plain({"params": tree}, x) for tree in (*map(jpeft.merge, own), own[0].params)]
    assert all(jnp.abs(one - logits[-1]).max() > 1e-2 for one in logits[:-1])
    return logits


def chosen(logits, index):
    return jnp.stack([logits[i][n] for n, i in enumerate(index)])


def counted(forward):
    """A wrapped model, compiled; a second trace is an error."""
    chex.clear_trace_counter()
    return jax.jit(chex.assert_max_traces(lambda peft, *inputs: forward(peft, *inputs), n=1))


@pytest.mark.parametrize("name", ["einsum", "scan-mha", "llama-scan"])
def test_equals_each_adapter_alone(name):
    """Any ranks, kinds and heads, the base among them; one program for any index and after a swap."""
    model, x = MODELS[name], batch()["x"]
    own, mixed = pool(name)
    forward, logits = counted(jpeft.wrap(model.apply)), logits_of(model.apply, own, x)
    chex.assert_trees_all_close(forward(jpeft.assign(mixed, INDEX), x), chosen(logits, INDEX), atol=1e-5)
    swapped = jpeft.swap(jpeft.swap(mixed, 5, own[1]), 0, own[2])
    chex.assert_trees_all_close(forward(jpeft.assign(swapped, [5, 0, 2, 3, 4]), x), chosen(logits, [1, 2, 2, 3, -1]), atol=1e-5)
    chex.assert_trees_all_close(forward(jpeft.assign(mixed, [-1] * BATCH), x), logits[-1], atol=1e-6)
    chex.assert_trees_all_close(forward(jpeft.assign(jpeft.swap(mixed, 0, None), [0] * BATCH), x), logits[-1], atol=1e-6)


def test_gradients_are_those_of_each_adapter():
    """Each slot has the gradient of the examples that chose it, heads included; what pads a rank, and the index, have none."""
    model, x = MODELS["scan-mha"], batch()["x"]
    own, mixed = pool("scan-mha")
    forward, index = jpeft.wrap(model.apply), jnp.array([0, 1, 0, -1, 1])
    assigned = jpeft.assign(mixed, index)
    grads = jax.jit(jax.grad(lambda leaves: (forward(assigned.replace(adapter=leaves), x) ** 2).sum()))(assigned.adapter)
    chex.assert_trees_all_equal(grads.pop("+"), {"index": jnp.zeros(5)})
    assert jpeft.flatten(assigned.labels["mixed"])["+/index"] == "freeze"
    for slot, peft in enumerate(own[:2]):
        rows = x[np.flatnonzero(np.asarray(index) == slot)]
        loss = lambda leaves, peft=peft, rows=rows: (model.apply({"params": jpeft.merge(peft.replace(adapter=leaves))}, rows) ** 2).sum()
        expected = jpeft.flatten(jax.jit(jax.grad(loss))(peft.adapter))
        got = jpeft.flatten(jax.tree.map(lambda leaf, slot=slot: leaf[slot] if leaf.shape[0] == 6 else leaf[:, slot], grads))
        for path, leaf in expected.items():
            kernel, _, name = path.rpartition("/")
            if kernel.startswith(("classifier", "ln_f")):
                np.testing.assert_allclose(got[f"{path}/value"].reshape(leaf.shape), leaf, rtol=1e-4, atol=1e-4)
                continue
            scale = peft.method.scale(kernel) if name == "a" else 1.0
            mine, axis = got[path], -1 if name == "a" else -2
            rank = leaf.shape[-1] if name == "a" else leaf.shape[1 if "layers" in path else 0]
            kept, padded = jnp.split(mine, [rank], axis)
            np.testing.assert_allclose(scale * kept.reshape(leaf.shape), leaf, rtol=1e-4, atol=1e-4, err_msg=path)
            assert not padded.any()
    others = jax.tree.map(lambda leaf: leaf[2:] if leaf.shape[0] == 6 else leaf[:, 2:], grads)
    assert not any(leaf.any() for leaf in jax.tree.leaves(others))


@pytest.mark.parametrize("name", ["scan", "einsum"])
def test_nnx(name):
    model, x = nnx_model(name), batch()["x"]
    params, twin = linen_params(name), MODELS[name]
    on_nnx = [adapter(model, peft.method, seed) for seed, peft in enumerate(adapters(params, **IA3))]
    own = [adapter(params, peft.method, seed) for seed, peft in enumerate(on_nnx)]
    mixed = jpeft.mix(model, on_nnx)
    out = counted(jpeft.wrap(model))(jpeft.assign(mixed, INDEX), x)
    chex.assert_trees_all_close(out, chosen(logits_of(twin.apply, own, x), INDEX), atol=1e-5)


class Own(nn.Module):
    """Layers of unknown classes, one of them with an argument by name, and positions that all examples share."""

    @nn.compact
    def __call__(self, x, *, gate):
        init = nn.initializers.normal(0.5)
        x = x + nn.Embed(4, 8, name="positions", embedding_init=init)(jnp.arange(x.shape[1])[None])
        x = x + Gated(name="gated")(x, gate=gate)
        x = Normed(name="normed")(x)
        return nn.Dense(3, name="head")(x.reshape(-1, 8)).reshape(*x.shape[:-1], 3)


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x, *, gate):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (8, 8))
        return jnp.tanh(x @ kernel + self.param("bias", nn.initializers.normal(), (8,))[None, None]) * gate


class Normed(nn.Module):
    """A kernel that is no plain product: each example takes a kernel of its own."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (8, 8))
        return x @ (kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True))


def test_layers_of_unknown_classes():
    model, keys = Own(), jax.random.split(jax.random.key(0), 3)
    x, gate = jax.random.normal(keys[0], (3, 4, 8)), jax.random.normal(keys[1], (3, 1, 8))
    params = model.init(keys[2], x, gate=gate)["params"]
    low = adapter(params, jpeft.lora(rank=2, target=".*(kernel|embedding)"), 1)
    scaled = adapter(params, jpeft.ia3(target=["gated"], feedforward=["normed"]), 2)
    mixed = jpeft.assign(jpeft.mix(params, [low, scaled]), [1, 0, -1])
    out = jpeft.wrap(model.apply)(mixed, x, gate=gate)
    plain = [model.apply({"params": tree}, x, gate=gate) for tree in (jpeft.merge(low), jpeft.merge(scaled), params)]
    chex.assert_trees_all_close(out, jnp.stack([plain[1][0], plain[0][1], plain[2][2]]), atol=1e-5)


class Experts(nn.Module):
    """A kernel for each expert, in a stack that no loop takes apart."""

    @nn.compact
    def __call__(self, x):
        h = jnp.einsum("btd,bte->bted", x, jax.nn.softmax(nn.Dense(3, name="router")(x)))
        h = nn.gelu(nn.Einsum((3, 8, 6), "bted,edf->btef", name="up")(h))
        return nn.Einsum((3, 6, 8), "btef,efd->bted", name="down")(h).sum(2)


def test_experts():
    model, x = Experts(), jax.random.normal(jax.random.key(0), (4, 5, 8))
    params = model.init(jax.random.key(1), x)["params"]
    axes = jpeft.kernel_axes(model, params, x)
    methods = (jpeft.lora(rank=2, axes=axes, head=None), jpeft.ia3(target=["up"], feedforward=["down"], axes=axes, head=None))
    own = [adapter(params, method, seed) for seed, method in enumerate(methods)]
    out = jpeft.wrap(model.apply)(jpeft.assign(jpeft.mix(params, own), [0, 1, -1, 0]), x)
    plain = [model.apply({"params": tree}, x) for tree in (*map(jpeft.merge, own), params)]
    chex.assert_trees_all_close(out, jnp.stack([plain[0][0], plain[1][1], plain[2][2], plain[0][3]]), atol=1e-5)


class Stacked(nn.Module):
    """Layers on any axis of their leaves: one after the other, or side by side."""

    axis: int
    side_by_side: bool = False

    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        if self.side_by_side:
            return nn.vmap(nn.Dense, in_axes=None, out_axes=0, axis_size=3, **options)(8, name="experts")(x).sum(0)
        return nn.scan(Layer, length=3, **options)(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="down")(jnp.tanh(nn.Dense(6, name="up")(x))), None


@pytest.mark.parametrize("model", [Stacked(1), Stacked(-1), Stacked(0, side_by_side=True)])
def test_stacks_on_any_axis(model):
    """With factors and with biases that each slot holds whole; of layers that no name shows, by a rule for their kernels."""
    x = jax.random.normal(jax.random.key(0), (3, 4, 8))
    params = noised(model.init(jax.random.key(1), x)["params"])
    axes = jpeft.kernel_axes(model, params, x) if model.side_by_side else None
    low = jpeft.lora(rank=2, axes=axes, head=None)
    own = [adapter(params, low, 1), adapter(params, jpeft.chain(low=low, biases=jpeft.bitfit(head=None)), 2)]
    mixed = jpeft.swap(jpeft.mix(params, own, slots=4), 3, own[1])
    out = jpeft.wrap(model.apply)(jpeft.assign(mixed, [0, 3, -1]), x)
    plain = [model.apply({"params": tree}, x) for tree in (*map(jpeft.merge, own), params)]
    chex.assert_trees_all_close(out, jnp.stack([plain[0][0], plain[1][1], plain[2][2]]), atol=1e-5)


@functools.cache
def decoder(dtype):
    """A scanned decoder, and three adapters of one method that change what it says."""
    model = language_model("qwen3", scan=True, dtype=dtype)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), abstract_params(model))
    return (
        model,
        params,
        [
            adapter(
                params,
                jpeft.lora(rank=2),
                seed,
            )
            for seed in range(3)
        ],
    )


@pytest.mark.parametrize(("dtype", "options"), [("float32", {"beams": 3}), ("bfloat16", {})])
def test_generates_what_each_adapter_says(dtype, options):
    """With a cache, under `nn.scan`, by beams, in half precision: the tokens of each adapter alone."""
    model, params, own = decoder(dtype)
    ids = jnp.array(np.random.default_rng(0).integers(3, 50, (4, 5)), jnp.int32)
    mixed, index = jpeft.mix(params, own, slots=4), [2, 0, 1, 2]
    forward = jpeft.wrap(model.apply, mixed.method)
    got = generate(forward, jpeft.assign(mixed, index).variables, ids, max_new_tokens=5, **options)
    single = jpeft.wrap(model.apply, own[0].method)
    texts = [generate(single, peft.variables, ids, max_new_tokens=5, **options) for peft in own]
    for row, slot in enumerate(index):
        assert got.tokens[row].tolist() == texts[slot].tokens[row].tolist()
        np.testing.assert_allclose(got.scores[row], texts[slot].scores[row], rtol=1e-5 if dtype == "float32" else 2e-2)
    assert len({tuple(text.tokens[0].tolist()) for text in texts}) > 1


def test_costs_what_one_adapter_costs():
    """32 rows over 16 adapters: the multiplications of one adapter, forward and with gradients."""
    config = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=256, max_position_embeddings=32
    )
    model, x = BertForSequenceClassification(config, num_labels=3), jnp.ones((32, 16), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    one = jpeft.apply(params, jpeft.lora(rank=8, view="factored"))
    mixed = jpeft.assign(jpeft.mix(params, [one] * 16), np.arange(32) % 16)
    forward = jpeft.wrap(model.apply)

    def flops(peft):
        loss = lambda leaves: forward(peft.replace(adapter=leaves), x).sum()
        return [jax.jit(fn).lower(peft.adapter).compile().cost_analysis()["flops"] for fn in (loss, jax.grad(loss))]

    for many, single in zip(flops(mixed), flops(one), strict=True):
        assert many <= 1.1 * single


def test_bfloat16_base():
    """The dtype of the outputs stays, and the numbers within 1e-2 of each adapter alone."""
    model, params, x = MODELS["scan-mha"], jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base("scan-mha")), batch()["x"]
    own = [adapter(params, jpeft.chain(lora=jpeft.lora(rank=2, view="factored"), biases=jpeft.bitfit()), seed) for seed in range(2)]
    forward = jax.jit(jpeft.wrap(model.apply))
    out = forward(jpeft.assign(jpeft.mix(params, own), [0, 1, 1, 0, -1]), x)
    logits = [forward(peft, x) for peft in own] + [jax.jit(model.apply)({"params": params}, x)]
    assert out.dtype == logits[0].dtype == jnp.bfloat16
    expected = chosen(logits, [0, 1, 1, 0, -1])
    error = (out - expected).astype(jnp.float32)
    assert jnp.linalg.norm(error) < 1e-2 * jnp.linalg.norm(expected.astype(jnp.float32))


def test_one_adapter_replaces_what_another_updates():
    """A kernel that one adapter holds whole and another has factors of takes a value in each slot."""
    model, x = nn.Dense(3), jnp.ones((3, 2))
    params = model.init(jax.random.key(0), x)["params"]
    whole = adapter(params, jpeft.freeze(top=0, head="kernel"), 1)
    low = adapter(params, jpeft.lora(rank=1, head=None), 2)
    out = jpeft.wrap(model.apply)(jpeft.assign(jpeft.mix(params, [whole, low]), [1, 0, -1]), x)
    plain = [model.apply({"params": tree}, x) for tree in (jpeft.merge(low), jpeft.merge(whole), params)]
    chex.assert_trees_all_close(out, jnp.stack([plain[0][0], plain[1][1], plain[2][2]]), atol=1e-6)


def test_other_starts_and_adalora():
    """What has factors of twice the rank, or triplets, stands in a pool with its whole change."""
    model, x = nn.Dense(3), jnp.ones((3, 4))
    params = model.init(jax.random.key(0), x)["params"]
    options = {"head": None, "rank": 2}
    methods = (jpeft.lora(init="pissa", **options), jpeft.adalora(target_rank=2, **options), jpeft.lora(init="olora", **options))
    own = [adapter(params, method, seed) for seed, method in enumerate(methods)]
    out = jpeft.wrap(model.apply)(jpeft.assign(jpeft.mix(params, own), [2, 0, 1]), x)
    plain = [model.apply({"params": jpeft.merge(peft)}, x) for peft in own]
    chex.assert_trees_all_close(out, jnp.stack([plain[2][0], plain[0][1], plain[1][2]]), atol=1e-5)
    both = jpeft.combine(own, [0.5, 1.0, -1.0])
    total = sum(w * (jpeft.merge(peft)["kernel"] - params["kernel"]) for w, peft in zip([0.5, 1.0, -1.0], own))
    chex.assert_trees_all_close(jpeft.merge(both)["kernel"] - params["kernel"], total, atol=1e-5)


def test_biases_of_loras_own():
    model, x = nn.Dense(3), jnp.ones((3, 4))
    params = model.init(jax.random.key(0), x)["params"]
    own = [adapter(params, jpeft.lora(rank=2, lora_bias=True, head=None), 1), adapter(params, jpeft.lora(rank=1, head=None), 2)]
    out = jpeft.wrap(model.apply)(jpeft.assign(jpeft.mix(params, own), [1, 0, -1]), x)
    plain = [model.apply({"params": tree}, x) for tree in (*map(jpeft.merge, own), params)]
    chex.assert_trees_all_close(out, jnp.stack([plain[1][0], plain[0][1], plain[2][2]]), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "shape", "axes", "message"),
    [
        (nn.DenseGeneral(5, batch_dims=(0,)), (3, 4, 6), ((0,), (1,), (2,)), "a kernel for each entry of the first axis of its inputs"),
        (nn.Einsum((3, 6, 5), "ebd,edf->ebf"), (3, 4, 6), ((0,), (1,), (2,)), "does not give every example its own outputs"),
        (nn.Einsum((5, 6), "btd,fd->btf"), (3, 4, 6), None, r"holds a \(5, 2\) and b \(2, 6\)\. .* let the model tell"),
    ],
)
def test_layers_whose_first_axis_is_no_batch_or_whose_geometry_is_another(model, shape, axes, message):
    """Also where a bias makes each example run by itself."""
    x = jnp.ones(shape)
    params = model.init(jax.random.key(0), x)["params"]
    rules = axes and (("kernel", jpeft.KernelAxes(*axes)),)
    low = jpeft.lora(rank=2, axes=rules, head=None)
    for method in (low, jpeft.chain(low=low, biases=jpeft.bitfit(head=None))):
        mixed = jpeft.mix(params, [jpeft.apply(params, method)])
        with refused(message):
            jax.eval_shape(lambda mixed=mixed: jpeft.wrap(model.apply)(jpeft.assign(mixed, [0] * len(x)), x))


def refused(message):
    return pytest.raises(ValueError, match=message)


def test_what_is_refused():
    params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}, "out": {"kernel": jnp.ones((3, 2))}}
    lora = lambda rank=2, target="dense", **options: jpeft.apply(params, jpeft.lora(rank=rank, target=[target], head=None, **options))
    mixed = jpeft.mix(params, [lora()], slots=2)
    with refused("at least one adapter"):
        jpeft.mix(params, [])
    with refused("slots=1 must be a whole number of at least 2"):
        jpeft.mix(params, [lora(), lora()], slots=1)
    with refused(r"The adapter has rank 3 at 'dense/kernel', and the pool's highest is 2.*rank=3.*to_lora\(adapter, rank=2\)"):
        jpeft.swap(mixed, 0, lora(3))
    with refused(r"Adapter 0 of mix\(\) has rank 2 at 'dense/kernel', and the pool's highest is 1"):
        jpeft.mix(params, [lora()], rank=1)
    with refused("slot=2: the pool has the slots 0 to 1"):
        jpeft.swap(mixed, 2, lora())
    with refused("slot=-1: the pool has the slots 0 to 1"):
        jpeft.swap(mixed, -1, lora())
    with refused("The adapter changes 'out/kernel', for which the pool has no leaves"):
        jpeft.swap(mixed, 0, lora(target="out"))
    with refused(r"swap\(\) takes a pool, as jpeft.mix makes it, and was given a Peft of lora"):
        jpeft.swap(lora(), 0, lora())
    other = jpeft.apply({**params, "dense": {**params["dense"], "bias": jnp.ones(3)}}, jpeft.lora(rank=2, target=["dense"], head=None))
    with refused("The adapter is for another base: 'dense/bias' has other values there"):
        jpeft.swap(mixed, 0, other)
    with refused("for another base: only one of the two has 'dense/bias', 'out/kernel'"):
        jpeft.swap(mixed, 0, jpeft.apply({"dense": {"kernel": jnp.ones((4, 3))}}, jpeft.lora(rank=2, head=None)))
    with refused("for another base: 'out/kernel' has the shape"):
        jpeft.swap(mixed, 0, jpeft.apply({**params, "out": {"kernel": jnp.ones((3, 5))}}, jpeft.lora(rank=2, target=["dense"], head=None)))
    with refused(r"takes adapters of LoRA and \(IA\)³, and was given dora. Turn it into LoRA first: jpeft.to_lora"):
        jpeft.mix(params, [jpeft.apply(params, jpeft.dora(head=None))])
    with refused("takes adapters that change weights, and adapter does more"):
        jpeft.mix(params, [jpeft.apply(params, jpeft.adapter(size=2, target=["dense"], head=None))])
    with refused("Cannot merge: each example has an adapter of its own"):
        jpeft.merge(jpeft.assign(mixed, [0]))
    for index, message in (
        ([2], "index of example 0 is 2. There are slots 0 to 1, or -1 for the base"),
        ([-2], "index of example 0 is -2"),
    ):
        with refused(message):
            jpeft.assign(mixed, index)
    model = nn.Dense(3)
    lone = jpeft.mix(params["dense"], [jpeft.apply(params["dense"], jpeft.lora(rank=1, head=None))])
    forward = jpeft.wrap(model.apply)
    with refused("The batch has 4 examples and the index 2"):
        forward(jpeft.assign(lone, [0, 0]), jnp.ones((4, 4)))
    with refused("mixed needs an index for each example of the batch"):
        forward(lone, jnp.ones((4, 4)))
    out = jax.jit(lambda index: forward(jpeft.assign(lone, index), jnp.ones((2, 4))))(jnp.array([0, 7]))
    assert jnp.isfinite(out[0]).all()
    assert jnp.isnan(out[1]).all()

"""LoRA: equations, options, its views, and HF PEFT as the judge."""

import importlib.util
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tables import batch, case, compiled_flops, noised

import jpeft

KEY = jax.random.key(0)


class Net(nn.Module):
    """One layer of any class, on any input."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.layer(x)


LAYERS = {
    "dense": (nn.Dense(24), (2, 5, 16)),
    "dense-without-bias": (nn.Dense(24, use_bias=False), (3, 16)),
    "heads": (nn.DenseGeneral((4, 6)), (2, 5, 16)),
    "from-heads": (nn.DenseGeneral(16, axis=(-2, -1)), (2, 5, 4, 6)),
    "batched": (nn.DenseGeneral(7, axis=-1, batch_dims=(0,)), (3, 5, 16)),
    "einsum": (nn.Einsum((16, 4, 6), "...d,dnh->...nh"), (2, 5, 16)),
    "einsum-to-model": (nn.Einsum((4, 6, 16), "btnh,nhd->btd"), (2, 5, 4, 6)),
    "einsum-experts": (nn.Einsum((3, 16, 8), "bed,edf->bef"), (2, 3, 16)),
    "einsum-transposed": (nn.Einsum((4, 16, 6), "btd,ndh->btnh"), (2, 5, 16)),
    "conv": (nn.Conv(24, (3,), strides=(2,)), (2, 9, 16)),
    "conv2d": (nn.Conv(8, (3, 3), kernel_dilation=(2, 2), padding="VALID"), (2, 9, 8, 5)),
    "conv-grouped": (nn.Conv(8, (3,), feature_group_count=2), (2, 9, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("view", ["auto", "two-view", "factored", "joined"])
def test_every_layer_class_in_every_view(name, view):
    """Outputs and gradients against the layer run on the merged kernel, differentiated as it stands."""
    layer, shape = LAYERS[name]
    model, x = Net(layer), jax.random.normal(KEY, shape)
    params = model.init(jax.random.key(1), x)["params"]
    axes = jpeft.kernel_axes(model, params, x) or ((".*", jpeft.KernelAxes((), (0, 1), (2,))),)
    peft = jpeft.apply(params, method=jpeft.lora(rank=3, alpha=4.0, axes=axes, view=view))
    peft = peft.replace(adapter=noised(peft.adapter, 0.5))
    forward = jpeft.wrap(model.apply, peft.method)

    def loss(run, adapter, x):
        y = run(peft.replace(adapter=adapter), x)
        return jnp.sum(jnp.sin(y)), y

    wrapped = lambda p, x: forward(p.variables, x)
    merged = lambda p, x: model.apply({"params": jpeft.merge(p)}, x)
    grad = jax.jit(jax.value_and_grad(loss, argnums=(1, 2), has_aux=True), static_argnums=0)
    chex.assert_trees_all_close(grad(wrapped, peft.adapter, x), grad(merged, peft.adapter, x), atol=2e-5, rtol=1e-5)
    assert jnp.abs(wrapped(peft, x) - model.apply({"params": params}, x)).max() > 0.1


def test_equation():
    """y = x W + c + (alpha / r) (x a) b."""
    model, x = nn.Dense(6), jax.random.normal(KEY, (4, 8))
    params = model.init(KEY, x)["params"]
    peft = jpeft.apply(params, method=jpeft.lora(rank=2, alpha=6.0))
    peft = peft.replace(adapter=noised(peft.adapter))
    a, b = (np.array(peft.adapter["kernel"][name]) for name in "ab")
    expected = np.array(x) @ np.array(params["kernel"]) + np.array(params["bias"]) + 3.0 * (np.array(x) @ a) @ b
    np.testing.assert_allclose(jpeft.wrap(model.apply, peft.method)(peft.variables, x), expected, atol=1e-5)


def test_rslora_scales_by_the_root_of_the_rank():
    params = {"kernel": jnp.zeros((8, 6))}
    for rslora, scale in ((False, 12 / 4), (True, 12 / math.sqrt(4))):
        peft = jpeft.apply(params, method=jpeft.lora(rank=4, alpha=12.0, rslora=rslora))
        peft = peft.replace(adapter=noised(peft.adapter))
        ab = peft.adapter["kernel"]["a"] @ peft.adapter["kernel"]["b"]
        chex.assert_trees_all_close(jpeft.merge(peft)["kernel"], scale * ab, rtol=1e-5)


def test_rank_and_alpha_by_target():
    params = {name: {"kernel": jnp.zeros((8, 6))} for name in ("query", "value", "up")}
    peft = jpeft.apply(params, method="lora", rank={r"query": 2, ".*": 5}, alpha={"up": 10.0, ".*": 5.0})
    assert [peft.adapter[name]["kernel"]["a"].shape for name in params] == [(8, 2), (8, 5), (8, 5)]
    peft = peft.replace(adapter=jax.tree.map(jnp.ones_like, peft.adapter))
    merged = jpeft.merge(peft)
    assert [float(merged[name]["kernel"][0, 0]) for name in params] == [2 * 5 / 2, 5 * 5 / 5, 5 * 10 / 5]


def test_init_bounds():
    """kaiming_uniform(a=sqrt 5) is U(+-1/sqrt(fan_in)); gaussian has deviation 1/r; embeddings are the other way round."""
    params = {"dense": {"kernel": jnp.zeros((400, 64))}, "embed": {"embedding": jnp.zeros((500, 64))}}
    method = jpeft.lora(rank=8, target=r".*/(kernel|embedding)")
    adapter = jpeft.apply(params, method=method).adapter
    a = np.array(adapter["dense"]["kernel"]["a"])
    assert 0.95 / 20 < np.abs(a).max() <= 1 / 20
    assert not np.any(adapter["dense"]["kernel"]["b"])
    assert not np.any(adapter["embed"]["embedding"]["a"])
    assert np.std(adapter["embed"]["embedding"]["b"]) == pytest.approx(1, rel=0.1)
    gaussian = jpeft.apply(params, method=jpeft.lora(rank=8, init="gaussian")).adapter["dense"]["kernel"]["a"]
    assert np.std(gaussian) == pytest.approx(1 / 8, rel=0.1)


def test_leaves_do_not_depend_on_each_other():
    """A leaf's random values come from its own path: another target list does not change them."""
    params = {name: {"kernel": jnp.zeros((8, 6))} for name in ("query", "value")}
    both = jpeft.apply(params, method=jpeft.lora()).adapter
    one = jpeft.apply(params, method=jpeft.lora(target=["value"])).adapter
    chex.assert_trees_all_equal(one["value"], both["value"])
    assert not np.array_equal(both["query"]["kernel"]["a"], both["value"]["kernel"]["a"])


def test_dropout_thins_the_branch_alone():
    model, x = nn.Dense(6), jnp.ones((2000, 8))
    params = model.init(KEY, x)["params"]
    peft = jpeft.apply(params, method=jpeft.lora(rank=2, dropout=0.5))
    forward = jpeft.wrap(model.apply, peft.method)
    chex.assert_trees_all_close(forward(peft.variables, x, rngs={"dropout": KEY}), model.apply({"params": params}, x), atol=1e-6)
    peft = peft.replace(adapter=noised(peft.adapter))
    dropped, whole = forward(peft.variables, x, rngs={"dropout": KEY}), forward(peft.variables, x)
    assert jnp.abs(dropped - whole).max() > 1e-2
    chex.assert_trees_all_close(dropped.mean(0), whole.mean(0), atol=3e-2)  # inverted dropout keeps the mean


def test_a_foreign_module_runs_on_its_merged_parameter():
    class Mixture(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.einsum("bd,edf->bf", x, self.param("w", nn.initializers.normal(), (3, 8, 6))) ** 2

    model, x = Mixture(), jax.random.normal(KEY, (4, 8))
    params = model.init(KEY, x)["params"]
    peft = jpeft.apply(params, method=jpeft.lora(rank=2, target="w", axes=((".*", jpeft.KernelAxes((0,), (1,), (2,))),)))
    peft = peft.replace(adapter=noised(peft.adapter))
    # This einsum sums the experts' kernels before it multiplies.
    with pytest.warns(UserWarning, match="also used by `reduce_sum`.*costs as much as full fine-tuning"):
        got = jpeft.wrap(model.apply, peft.method)(peft.variables, x)
    chex.assert_trees_all_close(got, model.apply({"params": jpeft.merge(peft)}, x), atol=1e-5)
    assert jnp.abs(got - model.apply({"params": params}, x)).max() > 1e-3


def test_tied_embedding_adapts_both_uses():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(11, 8, name="embed")
            return embed.attend(jnp.tanh(embed(ids)))

    model, ids = Tied(), jnp.arange(11)[None]
    params = model.init(KEY, ids)["params"]
    peft = jpeft.apply(params, method=jpeft.lora(rank=2, target=["embed"]))
    peft = peft.replace(adapter=noised(peft.adapter))
    got = jpeft.wrap(model.apply, peft.method)(peft.variables, ids)
    chex.assert_trees_all_close(got, model.apply({"params": jpeft.merge(peft)}, ids), atol=1e-5)


def test_nn_jit_does_not_share_traces_between_methods():
    """Two methods with equal leaves but another alpha, on one module whose blocks are cached by `nn.jit`."""

    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(nn.Dense)(6, name="dense")(x)

    model, x = Jitted(), jax.random.normal(KEY, (4, 8))
    params = model.init(KEY, x)["params"]
    for alpha in (1.0, 8.0):
        peft = jpeft.apply(params, method=jpeft.lora(rank=2, alpha=alpha))
        peft = peft.replace(adapter=noised(peft.adapter))
        got = jpeft.wrap(model.apply, peft.method)(peft.variables, x)
        chex.assert_trees_all_close(got, model.apply({"params": jpeft.merge(peft)}, x), atol=1e-5)


def test_wrong_geometry_is_refused_at_the_first_call():
    """`query` suggests (in, heads, head); this layer has (heads, head, out)."""

    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.DenseGeneral(8, axis=(-2, -1), name="query")(x)

    model, x = Odd(), jnp.ones((2, 4, 6))
    params = model.init(KEY, x)["params"]
    peft = jpeft.apply(params, method=jpeft.lora(rank=2))
    with pytest.raises(
        ValueError, match=r"'query/kernel'.*asks for leaves of shapes a \(4, 6, rank\) and b \(rank, 8\).*jpeft.kernel_axes"
    ):
        jpeft.wrap(model.apply, peft.method)(peft.variables, x)
    axes = jpeft.kernel_axes(model, params, x)
    peft = jpeft.apply(params, method=jpeft.lora(rank=2, axes=axes))
    assert jpeft.wrap(model.apply, peft.method)(peft.variables, x).shape == (2, 8)


def test_views_are_chosen_by_cost_and_precision():
    from jpeft.core.layer import Layer, Linear
    from jpeft.reparameterized.two_view import applies

    linear = Linear("kernel", jpeft.KernelAxes((), (0,), (1,)), lambda x, a, b: x @ a @ b)
    a = jnp.zeros((32, 2))

    def choice(tokens, stored, computed):
        kernel = jnp.zeros((32, 32), stored)
        layer = Layer(lambda p, x: x @ p["kernel"].astype(computed), {"kernel": kernel}, "dense", linear, jnp.dtype(computed))
        return applies(layer, linear, (jnp.zeros((tokens, 32), computed),), a)

    assert choice(17, jnp.float32, jnp.float32)  # D F / (D + F) = 16
    assert not choice(16, jnp.float32, jnp.float32)
    assert choice(17, jnp.float32, jnp.bfloat16)
    assert not choice(1000, jnp.bfloat16, jnp.bfloat16)  # W + s a b would round the update away


def test_small_updates_survive_a_computation_in_bfloat16():
    """On a kernel in float32, updates a hundred times below the grid of bfloat16 move the outputs as they should."""
    model = nn.Dense(512, use_bias=False, dtype=jnp.bfloat16)
    x = jax.random.normal(KEY, (1024, 512), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (512, 512)) / 512**0.5

    def slope(stored, view):
        """How much of the update the outputs show: least squares of their change against the exact change."""
        params = {"kernel": kernel.astype(stored)}
        a, b = jax.random.normal(KEY, (512, 4)), jax.random.normal(jax.random.key(2), (4, 512))
        small = 0.01 / 256 * jnp.abs(kernel).mean() / 2  # a b has the standard deviation 2; numbers of the grid are 1/256 apart
        peft = jpeft.apply(params, method=jpeft.lora(rank=4, alpha=4, view=view)).replace(adapter={"kernel": {"a": small * a, "b": b}})
        got = jpeft.wrap(model.apply)(peft, x).astype(jnp.float32) - model.apply({"params": params}, x).astype(jnp.float32)
        exact = x.astype(jnp.float32) @ a @ b * small
        return float((got * exact).sum() / (exact * exact).sum())

    assert slope(jnp.float32, "auto") == slope(jnp.float32, "two-view")
    assert slope(jnp.float32, "auto") == pytest.approx(1, abs=0.2)
    assert slope(jnp.bfloat16, "auto") == slope(jnp.bfloat16, "factored")
    assert slope(jnp.bfloat16, "factored") < 0.1  # lost: the sum goes back to the number of the grid that `y` was
    assert slope(jnp.bfloat16, "joined") == pytest.approx(1, abs=0.2)
    assert slope(jnp.bfloat16, "two-view") < 0.1  # lost: every entry goes back to the number that it was


def test_two_view_step_flops():
    """At 512 tokens on 4 x (256 -> 256) the step costs no more than 1.06 x two forward passes, and merging in the step far more."""

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(4):
                x = nn.relu(nn.Dense(256, name=f"layer_{i}")(x))
            return x

    model, x = Stack(), jax.ShapeDtypeStruct((512, 256), jnp.float32)
    params = jax.eval_shape(model.init, KEY, x)["params"]
    forward = compiled_flops(lambda p, x: model.apply({"params": p}, x).sum(), params, x)
    peft = jax.eval_shape(lambda p: jpeft.apply(p, method=jpeft.lora(rank=4)), params)
    run = jpeft.wrap(model.apply, peft.method)
    step = compiled_flops(lambda p, x: jax.value_and_grad(lambda a: run(p.replace(adapter=a).variables, x).sum())(p.adapter), peft, x)
    merged = compiled_flops(
        lambda p, x: jax.value_and_grad(lambda a: model.apply({"params": jpeft.merge(p.replace(adapter=a))}, x).sum())(p.adapter), peft, x
    )
    assert step < 1.06 * 2 * forward
    assert merged > 1.3 * 2 * forward


def test_views_agree_around_another_method():
    """A bottleneck between LoRA and the layer bends the layer's outputs, so the branch is added behind it, whichever view is asked for."""
    cell = case("lora", "plain")
    results = []
    for view in ("factored", "two-view"):
        method = jpeft.chain(adapter=jpeft.adapter(size=3, std=0.5), lora=jpeft.lora(rank=2, target=["out", "down"], view=view))
        peft = jpeft.apply(cell.params, method=method)
        peft = peft.replace(adapter=noised(peft.adapter, scale=0.3))
        forward = jpeft.wrap(cell.model.apply, method)
        loss = lambda a, peft=peft, forward=forward: jnp.sum(jnp.sin(forward(peft.replace(adapter=a).variables, batch()["x"])))
        results.append(jax.jit(jax.value_and_grad(loss))(peft.adapter))
    chex.assert_trees_all_close(*results, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "scan", "remat-dots", "scan+remat-dots"])
def test_a_step_costs_two_forward_passes(variant):
    """GPT-2 small cut to 4 layers, 1,024 tokens, LoRA on all kernels: within 2 % of two forward passes."""
    spec = importlib.util.spec_from_file_location("lora_views", Path(__file__).parents[1] / "benchmarks" / "lora_views.py")
    views = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(views)
    compared = views.steps(variant, rank=8)
    flops = {name: compiled_flops(compared[name][0], *compared[name][1]) for name in ("forward pass", "LoRA, auto")}
    assert flops["LoRA, auto"] <= 1.02 * 2 * flops["forward pass"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora: rank=0 must be a whole number of at least 1"),
        ({"rank": {"query": 2}}, "No rank rule matches 'up/kernel'"),
        ({"dropout": 1.0}, r"dropout=1.0 must be a number of at least 0 and below 1"),
        ({"init": "svd"}, "init='svd' must be one of 'kaiming', 'gaussian'"),
        ({"view": "dense"}, "view='dense' must be one of 'auto'"),
        ({"target": "qurey/kernel"}, r"target='qurey/kernel' matches none.*Did you mean 'query/kernel'"),
        ({"target": ["query", "vaule"]}, r"target='vaule' matches none"),
        ({"target": "(query"}, "is not a regular expression"),
        ({"head": "classifier/.*"}, r"head='classifier/.\*' matches none"),
        ({"rnak": 4}, "lora has no option 'rnak'"),
    ],
)
def test_errors(options, message):
    params = {"query": {"kernel": jnp.zeros((8, 6))}, "up": {"kernel": jnp.zeros((8, 6))}}
    with pytest.raises(ValueError, match=message):
        jpeft.apply(params, method="lora", **options)


def test_unknown_geometry_is_not_guessed():
    with pytest.raises(ValueError, match=r"geometry of 'mixer/kernel' with shape \(2, 3, 4\) is not known.*axes="):
        jpeft.apply({"mixer": {"kernel": jnp.zeros((2, 3, 4))}}, method="lora")


def test_equals_hf_peft(tmp_path):
    """HF PEFT's own LoRA on a torch model with our weights: same logits, same gradients of a and b."""
    import peft as hf
    import torch

    class Torch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 5)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="down")(jnp.tanh(nn.Dense(16, name="up")(x)))

    model, x = Flax(), jax.random.normal(KEY, (40, 8))
    params = model.init(KEY, x)["params"]
    peft = jpeft.apply(params, method=jpeft.lora(rank=3, alpha=6.0, rslora=True))
    peft = peft.replace(adapter=noised(peft.adapter))
    twin = Torch()
    for name in ("up", "down"):
        linear = getattr(twin, name)
        linear.weight.data = torch.tensor(np.array(params[name]["kernel"]).T.copy())
        linear.bias.data = torch.tensor(np.array(params[name]["bias"]))
    twin = hf.get_peft_model(twin, hf.LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=["up", "down"]))
    layers = {name: getattr(twin.base_model.model, name) for name in ("up", "down")}
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data = torch.tensor(np.array(peft.adapter[name]["kernel"]["a"]).T.copy())
        layer.lora_B["default"].weight.data = torch.tensor(np.array(peft.adapter[name]["kernel"]["b"]).T.copy())
    y = twin(torch.tensor(np.array(x)))
    torch.sin(y).sum().backward()
    run = jpeft.wrap(model.apply, peft.method)
    grads = jax.grad(lambda a: jnp.sin(run(peft.replace(adapter=a).variables, x)).sum())(peft.adapter)
    np.testing.assert_allclose(run(peft.variables, x), y.detach().numpy(), atol=1e-5)
    for name, layer in layers.items():
        np.testing.assert_allclose(grads[name]["kernel"]["a"], layer.lora_A["default"].weight.grad.numpy().T, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(grads[name]["kernel"]["b"], layer.lora_B["default"].weight.grad.numpy().T, atol=1e-4, rtol=1e-4)


# --- rules ---------------------------------------------------------------------------------------------------------------------------

BLOCKS = {f"h_{i}": {name: {"kernel": jnp.ones((8, 4))} for name in ("query", "value")} for i in range(2)}


def ranks(**options):
    adapter = jpeft.flatten(jpeft.apply(BLOCKS, method="lora", **options).adapter)
    return {path.removesuffix("/kernel/a"): leaf.shape[1] for path, leaf in adapter.items() if path.endswith("/a")}


@pytest.mark.parametrize(
    "rank", [{"query": 3, ".*": 2}, {".*/query": 3, ".*": 2}, [["query", 3], ["value", 2]], {"h_0/query": 3, "h_1/query": 3, ".*": 2}]
)
def test_a_rule_is_a_regex_or_a_name(rank):
    assert ranks(rank=rank) == {"h_0/query": 3, "h_0/value": 2, "h_1/query": 3, "h_1/value": 2}


def test_a_last_rule_for_all_others_may_be_left_with_nothing():
    assert ranks(target=["query"], rank={"query": 3, ".*": 2}) == {"h_0/query": 3, "h_1/query": 3}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"qurey": 3, ".*": 2}, "the rule 'qurey' matches none of the 4 layers that are adapted. Did you mean 'query'"),
        ({".*/qurey": 3, ".*": 2}, r"the rule '\.\*/qurey' matches none .* Did you mean 'query'"),
        ({".*": 2, "query": 3}, r"the rule 'query' never applies, because '\.\*' stands before it: .* swap them"),
        ([["query", 3], ["query", 2], [".*", 1]], "the rule 'query' never applies, .* leave one out"),
        ({"query": 3}, "rule matches 'h_0/value/kernel'"),
    ],
)
def test_a_rule_that_changes_nothing_is_refused(method, rules, message):
    for option in ("rank", "alpha"):
        with pytest.raises(ValueError, match=f"{option}: {message}|No {option} {message}"):
            jpeft.apply(BLOCKS, method=method, **{option: rules})
        chain = jpeft.chain(one=jpeft.make(method, **{option: rules}), head=jpeft.bitfit())
        with pytest.raises(ValueError, match=message):
            jpeft.apply(BLOCKS, method=chain)
    with pytest.raises(ValueError, match="the rule 'value' matches none of the 2 layers"):
        jpeft.apply(BLOCKS, method=method, target=["query"], rank={"value": 3, ".*": 2})


def test_a_bare_name_is_a_target():
    assert ranks(target="query").keys() == ranks(target=["query"]).keys() == {"h_0/query", "h_1/query"}
    for target in ("query,value", "query value", "query|value"):
        with pytest.raises(ValueError, match=r"For a list of names give target=\['query', 'value'\]"):
            ranks(target=target)
    with pytest.raises(ValueError, match=r"target='qurey' .* Did you mean 'query'\?"):
        ranks(target="qurey")


def test_an_adapter_beyond_the_memory_is_one_line(monkeypatch):
    def too_large(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 274877906816 bytes.")

    monkeypatch.setattr(jax.random, "uniform", too_large)
    with pytest.raises(ValueError, match="does not fit into the memory. Choose smaller sizes"):
        jpeft.apply(BLOCKS, method="lora", rank=2)

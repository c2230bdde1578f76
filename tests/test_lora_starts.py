"""Where LoRA's factors begin, and which of them are trained: against the equations in NumPy and HF PEFT."""

import dataclasses
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from nnx_models import linen, linen_params, nnx_model
from tables import base, batch, compiled_flops, noised
from test_weight_methods import KEY, MLP, _outputs_and_gradients, _torch_twin
from tiny_text import make_base

import jpeft
from jpeft.core.statistics import InputMoments, Moments
from jpeft.reparameterized import starts
from jpeft.stats import input_moments
from jpeft.training.config import TrainConfig
from jpeft.training.run import load_run
from jpeft.training.train import train


@pytest.fixture(scope="module")
def mlp():
    model, x = MLP(), jax.random.normal(KEY, (40, 8)) + 0.3
    return model, noised(model.init(KEY, x)["params"]), x


def inputs(params, x):
    """The inputs of the two layers."""
    x = np.asarray(x, np.float64)
    return {"up": x, "down": np.tanh(x @ np.asarray(params["up"]["kernel"]) + np.asarray(params["up"]["bias"]))}


def with_inputs(mlp, **options):
    model, params, x = mlp
    method = jpeft.lora(**options)
    stats = input_moments(model.apply, params, [x[:25], x[25:]], method=method)
    return jpeft.apply(params, method=method, stats=stats)


def start(peft, name):
    """The matrix ``s a0 b0``."""
    leaves = jax.tree.map(np.array, peft.adapter[name]["kernel"])
    return peft.method.scale(f"{name}/kernel") * leaves["a0"] @ leaves["b0"]


# --- directions of the kernel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_in_the_kernel_is_hf_pefts(mlp, init):
    """Their base loses what the start adds; ours stays, and the update is what has changed since the start."""
    hf = pytest.importorskip("peft")
    model, params, x = mlp
    peft = jpeft.apply(params, method=jpeft.lora(rank=3, alpha=6.0, init=init))
    chex.assert_trees_all_equal(jpeft.merge(peft), params)
    config = hf.LoraConfig(r=3, lora_alpha=6, init_lora_weights=init, target_modules=["up", "down"])
    torch, twin, layers = _torch_twin(params, config)
    for name, layer in layers.items():
        theirs = 2.0 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().numpy().T
        np.testing.assert_allclose(start(peft, name), theirs, atol=1e-5)
    trained = {path: leaf for path, leaf in jpeft.flatten(noised(peft.adapter)).items() if not path.endswith("0")}
    peft = peft.replace(adapter=jpeft.tree.replace(peft.adapter, trained))
    for name, layer in layers.items():
        leaves = jax.tree.map(np.array, peft.adapter[name]["kernel"])
        layer.lora_A["default"].weight.data = torch.tensor(leaves["a"].T.copy())
        layer.lora_B["default"].weight.data = torch.tensor(leaves["b"].T.copy())
    y = twin(torch.tensor(np.array(x)))
    torch.sin(y).sum().backward()
    got, grads = _outputs_and_gradients(model, peft, x)
    np.testing.assert_allclose(got, y.detach().numpy(), atol=1e-5)
    for name, layer in layers.items():
        for leaf, weight in (("a", layer.lora_A), ("b", layer.lora_B)):
            np.testing.assert_allclose(grads[name]["kernel"][leaf], weight["default"].weight.grad.numpy().T, atol=1e-4, rtol=1e-4)
        assert not any(grads[name]["kernel"][leaf].any() for leaf in ("a0", "b0"))
    # HF PEFT's own conversion: plain LoRA of twice the rank.
    a, b = peft.method.as_low_rank(peft.adapter["up"]["kernel"], "up/kernel")
    assert a.shape == (8, 6)
    np.testing.assert_allclose(params["up"]["kernel"] + a @ b, jpeft.merge(peft)["up"]["kernel"], atol=1e-5)


def test_starts_are_their_decompositions():
    w = np.asarray(jax.random.normal(KEY, (9, 6)), np.float64)
    a, b = starts.pissa(jnp.asarray(w, jnp.float32), 2, 0.5)
    u, s, v = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(0.5 * a @ b, u[:, :2] @ np.diag(s[:2]) @ v[:2], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-5)
    a, b = starts.olora(jnp.asarray(w, jnp.float32), 2)
    q, r = np.linalg.qr(w.T)
    np.testing.assert_allclose(a @ b, (q[:, :2] @ r[:2]).T, atol=1e-5)
    leaves = starts.orthogonal(KEY, (9, 6), "w", 4)
    assert np.abs(leaves["a"]).min() > 0
    np.testing.assert_allclose(leaves["a"] @ leaves["b"], np.zeros((9, 6)), atol=1e-7)
    wide = starts.orthogonal(KEY, (4000, 4000), "w", 4)  # a / 10 of a standard normal, rotated
    assert [round(float(jnp.std(wide[name]) * 2**0.5), 2) for name in "ab"] == [0.1, 0.1]


def test_gaussian_is_hf_pefts(mlp):
    hf = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    config = hf.LoraConfig(r=8, init_lora_weights="gaussian", target_modules=["0"])
    layer = hf.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4000, 8)), config)
    theirs = layer.base_model.model[0].lora_A["default"].weight.std().item()
    ours = jpeft.apply({"kernel": jnp.zeros((4000, 8))}, method="lora", rank=8, init="gaussian", head=None).adapter["kernel"]
    assert float(jnp.std(ours["a"])) == pytest.approx(theirs, rel=0.03) == pytest.approx(1 / 8, rel=0.03)
    assert not ours["b"].any()


def test_a_stack_starts_as_its_layers():
    """PiSSA on scanned layers with head axes, and on one of them alone."""
    params = base("scan-mha")
    peft = jpeft.apply(params, method="lora", rank=2, init="pissa", target=["query", "out"], head=None)
    mha = params["layers"]["attn"]["mha"]
    for name, leaves in peft.adapter["layers"]["attn"]["mha"].items():
        w = np.asarray(mha[name]["kernel"][1]).reshape(16, 16)
        u, s, v = np.linalg.svd(w)
        a, b = np.asarray(leaves["kernel"]["a"][1]).reshape(16, 2), np.asarray(leaves["kernel"]["b"][1]).reshape(2, 16)
        np.testing.assert_allclose(8.0 * a @ b, u[:, :2] @ np.diag(s[:2]) @ v[:2], atol=1e-5)
    shapes = jax.eval_shape(lambda p: jpeft.apply(p, method=peft.method), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes.adapter, peft.adapter)


# --- inputs -------------------------------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_inputs(mlp):
    model, params, x = mlp
    found = input_moments(model.apply, params, [{"x": x[:25]}, {"x": x[25:]}], method=jpeft.lora(init="eva")).values
    for name, seen in inputs(params, x).items():
        moments = found[f"{name}/kernel"]
        np.testing.assert_allclose(moments.gram, seen.T @ seen, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(moments.total, seen.sum(0), rtol=1e-4, atol=1e-4)
        assert float(moments.count) == 40


@pytest.mark.parametrize("twin", ["einsum", "scan-mha"])
def test_moments_on_every_host(twin):
    """Heads, a contraction over two axes, a convolution; scanned layers, which have a matrix each."""
    method, ids = jpeft.lora(init="eva"), batch()["x"]
    ours = input_moments(linen(twin).apply, linen_params(twin), [ids], method=method).values
    theirs = input_moments(nnx_model(twin), nnx_model(twin), [ids], method=method).values
    chex.assert_trees_all_close(dict(ours), dict(theirs), rtol=1e-4, atol=1e-3)
    assert all((np.asarray(moments.count) == ids.size).all() for moments in ours.values())
    first = ours["layer_0/attn/query/kernel"] if twin == "einsum" else ours["layers/attn/mha/query/kernel"]
    width = first.total.shape[-1]
    # The layers look at normalised vectors, whose squares sum to the width.
    np.testing.assert_allclose(np.trace(np.asarray(first.gram), axis1=-2, axis2=-1), ids.size * width, rtol=1e-3)
    if twin == "einsum":
        x = np.asarray(linen_params(twin)["embed"]["embedding"])[np.asarray(ids)]
        padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
        windows = np.concatenate([padded[:, i : i + x.shape[1]] for i in range(3)], -1).reshape(-1, 48)
        np.testing.assert_allclose(ours["conv/kernel"].gram, windows.T @ windows, rtol=1e-3, atol=1e-3)


def test_padding_does_not_count():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, attention_mask):
            return nn.Dense(3)(x)

    x = jax.random.normal(KEY, (2, 4, 3))
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    params = Masked().init(KEY, x, mask)["params"]
    batches = [{"x": x, "attention_mask": mask}]
    found = input_moments(Masked().apply, params, batches, method=jpeft.lora(init="eva", head=None)).values["Dense_0/kernel"]
    seen = np.asarray(x)[np.asarray(mask) == 1]
    np.testing.assert_allclose(found.gram, seen.T @ seen, rtol=1e-5)
    assert float(found.count) == 6
    whole = input_moments(Masked().apply, params, batches, method=jpeft.lora(init="eva", head=None), mask=None).values
    assert float(whole["Dense_0/kernel"].count) == 8


def test_eva_takes_the_directions_of_the_inputs(mlp):
    peft = with_inputs(mlp, rank=3, init="eva")
    for name, seen in inputs(*mlp[1:]).items():
        _, _, v = np.linalg.svd(seen - seen.mean(0), full_matrices=False)
        leaves = peft.adapter[name]["kernel"]
        assert not leaves["b"].any()
        np.testing.assert_allclose(np.abs(np.asarray(leaves["a"]).T @ v[:3].T), np.eye(3), atol=1e-3)


def test_eva_gives_ranks_to_the_largest_shares_of_variance(mlp, tmp_path):
    _, params, x = mlp
    peft = with_inputs(mlp, rank=3, init="eva", rho=2.0)
    shares = {}
    for name, seen in inputs(params, x).items():
        squares = np.linalg.svd(seen - seen.mean(0), compute_uv=False) ** 2
        shares[name] = (squares / squares.sum())[:6]
    best = sorted(((share, name) for name in shares for share in shares[name]), reverse=True)[:6]
    ranks = {name: sum(of == name for _, of in best) for name in shares}
    assert {name: leaves["kernel"]["a"].shape[1] for name, leaves in peft.adapter.items()} == {n: r for n, r in ranks.items() if r}
    jpeft.save(tmp_path / "out", peft)
    assert jpeft.load(tmp_path / "out", params).method == peft.method
    with pytest.raises(ValueError, match="the method's options allow 6"):
        peft.method.expected(params, jpeft.apply(params, method="lora", rank=7).adapter)


def test_eva_is_hf_pefts(mlp):
    """Their incremental decomposition, seeing the same batch again and again, goes to the same directions and ranks."""
    hf = pytest.importorskip("peft")
    _, params, x = mlp
    peft = with_inputs(mlp, rank=2, init="eva", rho=2.0)
    config = hf.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights="eva", eva_config=hf.EvaConfig(rho=2.0))
    torch, twin, _ = _torch_twin(params, hf.LoraConfig(r=2, target_modules=["up", "down"]))
    base_model = twin.unload()
    run = lambda model, inputs: model(inputs)
    batches = [torch.tensor(np.array(x))] * 3
    theirs = hf.get_eva_state_dict(
        base_model, batches, config, forward_fn=run, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
    )
    for name, directions in theirs.items():
        a = np.asarray(peft.adapter[name]["kernel"]["a"])
        assert a.shape[1] == len(directions)
        np.testing.assert_allclose(np.abs(np.diag(directions.numpy() @ a)), 1.0, atol=1e-2)


@pytest.mark.parametrize("init", ["corda", "corda-kpm"])
def test_corda_is_its_equation_and_hf_pefts(mlp, init, monkeypatch):
    hf = pytest.importorskip("peft")
    # HF PEFT takes its dataclass from a package that it does not require.
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    _, params, x = mlp
    peft = with_inputs(mlp, rank=2, alpha=4.0, init=init)
    chex.assert_trees_all_equal(jpeft.merge(peft), params)
    chosen = {"corda": slice(0, 2), "corda-kpm": slice(-2, None)}[init]
    corda = hf.tuners.lora.config.CordaConfig(corda_method={"corda": "ipm", "corda-kpm": "kpm"}[init])
    config = hf.LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"], init_lora_weights="corda", corda_config=corda)
    torch, twin, _ = _torch_twin(params, hf.LoraConfig(r=2, target_modules=["up", "down"]))
    base_model = twin.unload()
    preprocess_corda(base_model, config, run_model=lambda: base_model(torch.tensor(np.array(x))))
    layers = hf.get_peft_model(base_model, config).base_model.model
    for name, seen in inputs(params, x).items():
        gram = seen.T @ seen
        c = gram / np.diag(gram).mean() + 0.01 * np.eye(len(gram))
        u, s, v = np.linalg.svd(c @ np.asarray(params[name]["kernel"]), full_matrices=False)
        want = np.linalg.inv(c) @ u[:, chosen] @ np.diag(s[chosen]) @ v[chosen]
        np.testing.assert_allclose(start(peft, name), want, atol=2e-3)
        layer = getattr(layers, name)
        theirs = 2.0 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().numpy().T
        np.testing.assert_allclose(start(peft, name), theirs, atol=5e-3)


def test_the_trainer_makes_what_a_start_looks_at(tmp_path):
    fields = make_base(tmp_path, train=32, validation=8) | {"batch_size": 8, "steps": 2, "method": "lora", "output": str(tmp_path / "run")}
    result = train(TrainConfig(**fields, options=("init=eva", "rho=2", "rank=4", "b_lr_scale=16")))
    ranks = {leaf.shape[-1] for path, leaf in jpeft.flatten(result.peft.adapter).items() if path.endswith("/a")}
    assert len(ranks) > 1
    chex.assert_trees_all_equal(load_run(result.path).peft.adapter, result.peft.adapter)


def test_what_is_wrong_with_statistics_is_said(mlp):
    model, params, x = mlp
    with pytest.raises(ValueError, match=r"init='eva' takes the statistics stats=..., made by jpeft.stats.input_moments"):
        jpeft.apply(params, method="lora", init="eva")
    other = input_moments(model.apply, params, [x], method=jpeft.lora(init="eva", target=["up"]))
    with pytest.raises(ValueError, match="hold no inputs of 'down/kernel'"):
        jpeft.apply(params, method="lora", init="corda", stats=other)
    with pytest.raises(ValueError, match="there are no batches"):
        input_moments(model.apply, params, [], method=jpeft.lora(init="eva"))
    with pytest.raises(ValueError, match="is none that changes kernels"):
        input_moments(model.apply, params, [x], method=jpeft.bitfit())
    unseen = InputMoments({path: Moments(*(jnp.zeros_like(leaf) for leaf in each)) for path, each in other.values.items()})
    with pytest.warns(UserWarning, match="saw no inputs of 'up/kernel'"):
        peft = jpeft.apply(params, method="lora", init="eva", target=["up"], stats=unseen)
    assert peft.adapter["up"]["kernel"]["a"].shape == (8, 8)


def test_tables_among_the_targets_have_no_inputs():
    """They begin as with "kaiming"; alone there is nothing to look at."""
    model, ids = nn.Sequential([nn.Embed(5, 4), nn.Dense(3)]), jnp.array([[1, 2], [3, 4]])
    params = model.init(KEY, ids)["params"]
    method = jpeft.lora(init="eva", rank=2, target=["embedding", "kernel"], head=None)
    peft = jpeft.apply(params, method=method, stats=input_moments(model.apply, params, [ids], method=method))
    assert not peft.adapter["layers_0"]["embedding"]["a"].any()
    assert peft.adapter["layers_1"]["kernel"]["a"].any()
    with pytest.raises(ValueError, match="the target names 'layers_0/embedding' alone. A table of embeddings is given ids"):
        input_moments(model.apply, params, [ids], method=method.replace(target=["embedding"]))


# --- what is trained ----------------------------------------------------------------------------------------------------------------------


def test_lora_plus_and_lora_fa_are_labels(mlp):
    """The rate of ``b`` is a multiple of that of ``a``, in any loop; with `freeze_a` it alone moves."""
    _, params, _ = mlp
    params = {**params, "embed": {"embedding": jnp.ones((5, 4))}}
    cases: list[tuple[dict, tuple]] = [({"b_lr_scale": 16.0}, (1.0, 16.0)), ({"freeze_a": True}, (0.0, 1.0))]
    for options, want in [*cases, ({"init": "pissa", "b_lr_scale": 2.0}, (1.0, 2.0))]:
        peft = jpeft.apply(params, method=jpeft.lora(rank=2, target=".*(kernel|embedding)", **options))
        tx = jpeft.optimizer(optax.sgd(1.0), peft)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, peft.adapter), tx.init(peft.adapter), peft.adapter)
        moved = {path: -float(leaf.mean()) for path, leaf in jpeft.flatten(updates).items()}
        assert (moved["up/kernel/a"], moved["up/kernel/b"]) == want
        assert all(moved[path] == 0 for path in moved if path.endswith("0"))
        # The rows of an embedding: ``a`` is the factor that begins as zero.
        assert (moved["embed/embedding/a"], moved["embed/embedding/b"]) == ((1.0, 0.0) if "freeze_a" in options else (1.0, 1.0))


def test_lora_fa_neither_computes_nor_keeps_what_its_frozen_factor_would_need():
    """No product for da, and for db the backward pass keeps x a, which is thin."""
    model, x = nn.Dense(64), jnp.ones((512, 256))
    params = model.init(KEY, x)["params"]
    flops, kept = {}, {}
    for freeze_a in (False, True):
        peft = jpeft.apply(params, method=jpeft.lora(rank=4, view="factored", freeze_a=freeze_a, head=None))
        run = jpeft.wrap(model.apply, peft.method)
        loss = lambda adapter, x, peft=peft, run=run: jnp.sin(run(peft.replace(adapter=adapter).variables, jnp.cos(x))).sum()
        flops[freeze_a] = compiled_flops(jax.grad(loss), peft.adapter, x)
        kept[freeze_a] = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(lambda adapter, loss=loss: loss(adapter, x), peft.adapter)[1])]
    assert flops[False] - flops[True] > 0.9 * (2 * 512 * 256 * 4)
    assert (512, 256) in kept[False]
    assert (512, 256) not in kept[True]


def test_a_start_costs_one_more_product_in_the_factored_view_and_none_with_x_in_the_merged_one():
    model, x = nn.Dense(64), jnp.ones((512, 64))
    params = model.init(KEY, x)["params"]
    for view, more in (("factored", 2 * 512 * 2 * 64 * 4 * 2), ("two-view", 2 * 2 * 64 * 64 * 4)):
        flops = {}
        for init in ("kaiming", "pissa"):
            peft = jpeft.apply(params, method=jpeft.lora(rank=4, view=view, init=init, head=None))
            run = jpeft.wrap(model.apply, peft.method)
            loss = lambda adapter, x, peft=peft, run=run: jnp.sin(run(peft.replace(adapter=adapter).variables, x)).sum()
            flops[init] = compiled_flops(jax.grad(loss, (0, 1)), peft.adapter, x)
        assert flops["pissa"] - flops["kaiming"] < 1.3 * more + 4 * 64 * 64, view


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "pissa", "rank": 6}, "'down/kernel' with 16 inputs and 5 outputs has 5, fewer than rank=6"),
        ({"init": "orthogonal", "rank": 3}, "'up/kernel' has rank=3: give an even one|'down/kernel' has rank=3: give an even one"),
        ({"rho": 2.0}, "rho=2.0 moves ranks between kernels by the statistics of init='eva'"),
        ({"init": "eva", "rho": 0.5}, "rho=0.5 must be a number of at least 1"),
        ({"init": "svd"}, "init='svd' must be one of 'kaiming', 'gaussian'"),
        ({"b_lr_scale": 0}, "b_lr_scale=0 must be"),
        ({"loraplus_lr_ratio": 16}, "Here 'loraplus_lr_ratio' is called 'b_lr_scale'"),
    ],
)
def test_bad_options(mlp, options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.apply(mlp[1], method="lora", **options)

"""Weight methods: the matrix form of kernels, DoRA and (IA)3 against their equations and HF PEFT, layers of unknown classes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tables import MODELS, base, batch, noised, optimised

import jpeft
from jpeft.core.flops import count_flops
from jpeft.models import BertConfig, BertModel, abstract_params
from jpeft.reparameterized.matrix_form import INPUTS, OUTPUTS, MatrixForm

KEY = jax.random.key(0)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="down")(jnp.tanh(nn.Dense(16, name="up")(x)))


@pytest.fixture(scope="module")
def mlp():
    model, x = MLP(), jax.random.normal(KEY, (40, 8))
    params = model.init(KEY, x)["params"]
    return model, noised(params), x  # biases are not zero


# --- matrix form ------------------------------------------------------------------------------------------------------------------------

FORMS = {
    "dense": MatrixForm((6, 4), jpeft.KernelAxes((), (0,), (1,))),
    "query": MatrixForm((6, 2, 3), jpeft.KernelAxes((), (0,), (1, 2))),
    "out": MatrixForm((2, 3, 6), jpeft.KernelAxes((), (0, 1), (2,))),
    "transposed": MatrixForm((4, 6), jpeft.KernelAxes((), (1,), (0,))),
    "scanned": MatrixForm((5, 6, 4), jpeft.KernelAxes((0,), (1,), (2,))),
    "scanned on axis 1": MatrixForm((6, 5, 4), jpeft.KernelAxes((1,), (0,), (2,))),
    "experts of a stack": MatrixForm((5, 3, 6, 2, 2), jpeft.KernelAxes((0, 1), (2,), (3, 4))),
    "interleaved": MatrixForm((2, 6, 3, 5), jpeft.KernelAxes((3,), (0, 2), (1,))),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_matrix_form_goes_there_and_back(form):
    kernel = jnp.arange(np.prod(form.shape), dtype=jnp.float32).reshape(form.shape)
    matrix = form.to_matrix(kernel)
    assert matrix.shape == (*form.stack, *form.sizes)
    chex.assert_trees_all_equal(form.from_matrix(matrix), kernel)
    sizes = {INPUTS: form.sizes[0], OUTPUTS: form.sizes[1], "rank": 7, "other": 2}
    for leaf_axes in [(INPUTS, "rank"), ("rank", OUTPUTS), (OUTPUTS,), (INPUTS,), (INPUTS, OUTPUTS), ("rank", "other"), ("rank",)]:
        leaf = jax.random.normal(KEY, (*form.stack, *(sizes[name] for name in leaf_axes)))
        stored = form.leaf_from_matrix(leaf, leaf_axes)
        assert stored.shape == form.leaf_shape(leaf_axes, sizes)
        chex.assert_trees_all_equal(form.leaf_to_matrix(stored, leaf_axes), leaf)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_matrix_form_agrees_with_the_geometry(form):
    """Factors have the shapes that `KernelAxes` gives them, and a product of matrices is its product."""
    shape_a, shape_b = form.axes.factor_shapes(form.shape, 7)
    assert (form.leaf_shape((INPUTS, "rank"), {"rank": 7}), form.leaf_shape(("rank", OUTPUTS), {"rank": 7})) == (shape_a, shape_b)
    a, b = jax.random.normal(KEY, shape_a), jax.random.normal(jax.random.key(1), shape_b)
    product = form.leaf_to_matrix(a, (INPUTS, "rank")) @ form.leaf_to_matrix(b, ("rank", OUTPUTS))
    chex.assert_trees_all_close(form.from_matrix(product), form.axes.product(a, b), atol=1e-5)


# --- equations --------------------------------------------------------------------------------------------------------------------------


def test_dora_is_its_equation(mlp):
    model, params, x = mlp
    peft = jpeft.apply(params, method=jpeft.dora(rank=3, alpha=6.0))
    np.testing.assert_allclose(peft.adapter["up"]["kernel"]["m"], np.linalg.norm(params["up"]["kernel"], axis=0), rtol=1e-6)
    peft = peft.replace(adapter=noised(peft.adapter))
    hidden = np.array(x)
    for name in ("up", "down"):
        w, bias, leaves = params[name]["kernel"], params[name]["bias"], jax.tree.map(np.array, peft.adapter[name]["kernel"])
        v = np.array(w) + 2.0 * leaves["a"] @ leaves["b"]
        hidden = hidden @ (leaves["m"] * v / np.linalg.norm(v, axis=0)) + np.array(bias)
        hidden = np.tanh(hidden) if name == "up" else hidden
    np.testing.assert_allclose(jpeft.wrap(model.apply, peft.method)(peft.variables, x), hidden, atol=1e-5)


def test_outputs_without_weights_stay_zero_in_dora():
    """As in a layer that begins as zero: no number is divided by a norm of zero."""
    model, x = nn.Dense(4), jnp.ones((3, 6))
    params = model.init(KEY, x)["params"]
    params["kernel"] = params["kernel"].at[:, 1].set(0)
    peft = jpeft.apply(params, method=jpeft.dora(rank=2, head=None))
    run = jpeft.wrap(model.apply)
    chex.assert_trees_all_close(run(peft, x), model.apply({"params": params}, x), atol=1e-6)
    chex.assert_trees_all_close(jpeft.merge(peft), params, atol=1e-6)
    chex.assert_tree_all_finite(jax.grad(lambda adapter: run(peft.replace(adapter=adapter), x).sum())(peft.adapter))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (jnp.ones((3, 3), jnp.int8), "lora: 'up/kernel' holds numbers of int8, which cannot be changed a little"),
        (jnp.ones((0, 3)), r"lora: 'up/kernel' holds no numbers, in the shape \(0, 3\)"),
    ],
)
def test_kernels_without_real_numbers_are_refused(kernel, message):
    with pytest.raises(ValueError, match=message):
        jpeft.apply({"up": {"kernel": kernel}}, jpeft.lora(rank=1, head=None))


def test_ia3_is_its_equation(mlp):
    model, params, x = mlp
    peft = jpeft.apply(params, method=jpeft.ia3(target=["up"], feedforward=["down"]))
    peft = peft.replace(adapter=noised(peft.adapter))
    leaves, weights = jax.tree.map(np.array, (peft.adapter, params))
    hidden = np.tanh((np.array(x) @ weights["up"]["kernel"] + weights["up"]["bias"]) * leaves["up"]["kernel"]["l_out"])
    want = (hidden * leaves["down"]["kernel"]["l_in"]) @ weights["down"]["kernel"] + weights["down"]["bias"]
    np.testing.assert_allclose(jpeft.wrap(model.apply, peft.method)(peft.variables, x), want, atol=1e-5)
    np.testing.assert_allclose(model.apply({"params": jpeft.merge(peft)}, x), want, atol=1e-5)


def _torch_twin(params, config):
    """The MLP in torch, wrapped by HF PEFT, with the same weights."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("peft")

    class Torch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 5)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    twin = Torch()
    for name in ("up", "down"):
        getattr(twin, name).weight.data = torch.tensor(np.array(params[name]["kernel"]).T.copy())
        getattr(twin, name).bias.data = torch.tensor(np.array(params[name]["bias"]))
    twin = hf.get_peft_model(twin, config)
    return torch, twin, {name: getattr(twin.base_model.model, name) for name in ("up", "down")}


def _outputs_and_gradients(model, peft, x):
    run = jpeft.wrap(model.apply, peft.method)
    loss = lambda adapter: jnp.sin(run(peft.replace(adapter=adapter).variables, x)).sum()
    return run(peft.variables, x), jax.grad(loss)(peft.adapter)


def test_dora_equals_hf_peft(mlp):
    hf = pytest.importorskip("peft")
    model, params, x = mlp
    peft = jpeft.apply(params, method=jpeft.dora(rank=3, alpha=6.0))
    peft = peft.replace(adapter=noised(peft.adapter))
    torch, twin, layers = _torch_twin(params, hf.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["up", "down"]))
    for name, layer in layers.items():
        leaves = jax.tree.map(np.array, peft.adapter[name]["kernel"])
        layer.lora_A["default"].weight.data = torch.tensor(leaves["a"].T.copy())
        layer.lora_B["default"].weight.data = torch.tensor(leaves["b"].T.copy())
        layer.lora_magnitude_vector["default"].weight.data = torch.tensor(leaves["m"])
    y = twin(torch.tensor(np.array(x)))
    torch.sin(y).sum().backward()
    got, grads = _outputs_and_gradients(model, peft, x)
    np.testing.assert_allclose(got, y.detach().numpy(), atol=1e-5)
    for name, layer in layers.items():
        for leaf, weight in (("a", layer.lora_A), ("b", layer.lora_B)):
            np.testing.assert_allclose(grads[name]["kernel"][leaf], weight["default"].weight.grad.numpy().T, atol=1e-4, rtol=1e-4)
        magnitude = layer.lora_magnitude_vector["default"].weight.grad.numpy()
        np.testing.assert_allclose(grads[name]["kernel"]["m"], magnitude, atol=1e-4, rtol=1e-4)


def test_ia3_equals_hf_peft(mlp):
    hf = pytest.importorskip("peft")
    model, params, x = mlp
    peft = jpeft.apply(params, method=jpeft.ia3(target=["up"], feedforward=["down"]))
    peft = peft.replace(adapter=noised(peft.adapter))
    config = hf.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])
    torch, twin, layers = _torch_twin(params, config)
    leaves = {"up": peft.adapter["up"]["kernel"]["l_out"], "down": peft.adapter["down"]["kernel"]["l_in"]}
    for name, layer in layers.items():
        weight = layer.ia3_l["default"]
        weight.data = torch.tensor(np.array(leaves[name])).reshape(weight.shape)
    y = twin(torch.tensor(np.array(x)))
    torch.sin(y).sum().backward()
    got, grads = _outputs_and_gradients(model, peft, x)
    np.testing.assert_allclose(got, y.detach().numpy(), atol=1e-5)
    for name, leaf in (("up", "l_out"), ("down", "l_in")):
        want = layers[name].ia3_l["default"].grad.numpy().reshape(-1)
        np.testing.assert_allclose(grads[name]["kernel"][leaf], want, atol=1e-4, rtol=1e-4)


# --- counts -----------------------------------------------------------------------------------------------------------------------------


def t5_kernels(layers, d_model, inner, d_ff):
    """The kernels of a T5 of version 1.1, by HF's names, as shapes."""
    shape = lambda *sizes: {"kernel": jax.ShapeDtypeStruct(sizes, jnp.float32)}
    attention = lambda: {name: shape(d_model, inner) for name in "qkv"} | {"o": shape(inner, d_model)}
    dense = lambda: {"DenseReluDense": {"wi_0": shape(d_model, d_ff), "wi_1": shape(d_model, d_ff), "wo": shape(d_ff, d_model)}}
    encoder = {"layer": {"0": {"SelfAttention": attention()}, "1": dense()}}
    decoder = {"layer": {"0": {"SelfAttention": attention()}, "1": {"EncDecAttention": attention()}, "2": dense()}}
    stack = lambda block: {"block": {str(i): block for i in range(layers)}}
    return {"encoder": stack(encoder), "decoder": stack(decoder)}


def test_ia3_counts_of_the_paper():
    """T0-3B trains 540,672 scalars and T0-11B 1,081,344 (t-few)."""
    for sizes, count in (((24, 2048, 2048, 5120), 540_672), ((24, 4096, 4096, 10240), 1_081_344)):
        peft = jax.eval_shape(lambda p: jpeft.apply(p, method="ia3"), t5_kernels(*sizes))
        assert jpeft.summary(peft).trained == count


def test_dora_counts():
    """r (in + out) + out for each kernel of BERT-base's query and value."""
    params = abstract_params(BertModel(BertConfig()))
    peft = jax.eval_shape(lambda p: jpeft.apply(p, method="dora", rank=8, target=["query", "value"]), params)
    assert jpeft.summary(peft).trained == 24 * (8 * (768 + 768) + 768)


# --- order and layers of unknown classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["plain", "scan-mha", "einsum", "bert-scan"])
def test_a_chain_of_weight_methods_merges_in_its_order(model):
    """DoRA behind LoRA normalises the kernel that LoRA leaves; (IA)3 scales all that stands before it."""
    parts = {"lora": jpeft.lora(rank=2), "dora": jpeft.dora(rank=2), "ia3": jpeft.ia3()}
    parts |= {"second": jpeft.lora(rank=1), "last": jpeft.dora(rank=1)}
    for order in (list(parts), list(parts)[::-1]):
        peft = jpeft.apply(base(model), method=jpeft.chain(**{name: parts[name] for name in order}))
        peft = peft.replace(adapter=noised(peft.adapter))
        run = MODELS[model].apply
        merged = jax.jit(run)({"params": jpeft.merge(peft)}, batch()["x"])
        chex.assert_trees_all_close(jax.jit(jpeft.wrap(run, peft.method))(peft.variables, batch()["x"]), merged, atol=1e-5)


def test_a_bias_is_not_replaced_behind_the_method_that_scales_it(mlp):
    _, params, _ = mlp
    ia3 = jpeft.ia3(target=["up"], feedforward=None)
    with pytest.raises(ValueError, match="'bitfit' replaces 'up/bias', which 'ia3' before it adapts"):
        jpeft.apply(params, method=jpeft.chain(ia3=ia3, bitfit=jpeft.bitfit()))
    jpeft.apply(params, method=jpeft.chain(bitfit=jpeft.bitfit(), ia3=ia3))


class Experts(nn.Module):
    """A layer of a class that jpeft does not know, with a kernel [experts, inputs, outputs] and a bias."""

    @nn.compact
    def __call__(self, x, _=None):
        kernel = self.param("kernel", nn.initializers.normal(), (3, 8, 8))
        bias = self.param("bias", nn.initializers.normal(), (3, 8))
        return jnp.tanh((jnp.einsum("bi,eio->beo", x, kernel) + bias[None]).sum(1)), None


class Scanned(nn.Module):
    """Two of them, under `nn.scan`."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Experts, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return stack(name="blocks")(x, None)[0]


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("model", [Experts(), Scanned()], ids=["plain", "scan"])
def test_a_layer_of_an_unknown_class(method, model):
    """A rule gives the geometry in the parameters; inside a scan the kernel has one axis fewer."""
    x = jax.random.normal(KEY, (4, 8))
    params = model.init(KEY, x)["params"]
    scanned = isinstance(model, Scanned)
    axes = ((".*kernel", jpeft.KernelAxes((0, 1), (2,), (3,)) if scanned else jpeft.KernelAxes((0,), (1,), (2,))),)
    options = {"feedforward": None} if method == "ia3" else {"rank": 2}
    peft = jpeft.apply(params, method=method, axes=axes, target="(.*/)?kernel", **options)
    run = lambda peft: jpeft.wrap(model.apply, peft.method)(peft.variables, x)
    outputs = lambda result: result if scanned else result[0]
    chex.assert_trees_all_close(outputs(run(peft)), outputs(model.apply({"params": params}, x)), atol=1e-5)
    peft = peft.replace(adapter=noised(peft.adapter))
    merged = model.apply({"params": jpeft.merge(peft)}, x)
    chex.assert_trees_all_close(outputs(run(peft)), outputs(merged), atol=1e-5)
    assert jnp.abs(outputs(merged) - outputs(model.apply({"params": params}, x))).max() > 1e-3


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_merging_keeps_the_dtype_of_a_bfloat16_base(method, mlp):
    """The new kernel is computed in float32 and rounded once."""
    _, params, _ = mlp
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    options = {"target": ["up"], "feedforward": ["down"]} if method == "ia3" else {}
    peft = jpeft.apply(params, method=method, **options)
    assert {leaf.dtype for leaf in jax.tree.leaves(peft.adapter)} == {jnp.dtype("float32")}
    peft = peft.replace(adapter=noised(peft.adapter))
    wide = peft.replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jpeft.merge(wide))
    chex.assert_trees_all_equal(jpeft.merge(peft), rounded)


@pytest.mark.parametrize(("rows", "view"), [(32, "factored"), (1024, "two-view")])
def test_a_dora_step_costs_its_equation(rows, view):
    """Beside LoRA's step: ``a b`` once for the norm, a few passes over the kernel and the outputs. Nothing of the size of dW."""
    width, rank = 256, 8
    model, x = nn.Dense(width), jnp.ones((rows, width))
    params = model.init(KEY, x)["params"]
    flops, kept = {}, {}
    for name in ("lora", "dora"):
        peft = jpeft.apply(params, method=name, rank=rank, head=None)
        run = jpeft.wrap(model.apply, peft.method)
        loss = lambda adapter, x, peft=peft, run=run: jnp.sin(run(peft.replace(adapter=adapter).variables, x)).sum()
        # The merged view is taken where there are more rows than D F / (D + F), the factored one elsewhere.
        assert (rows > width / 2) == (view == "two-view")
        flops[name] = count_flops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(peft.adapter, x)).all
        kept[name] = sum(leaf.size for leaf in jax.tree.leaves(jax.vjp(lambda adapter, loss=loss: loss(adapter, x), peft.adapter)[1]))
    assert flops["dora"] - flops["lora"] <= 2 * width * width * rank + 6 * width * width + 6 * rows * width
    # The outputs before they are scaled, for the gradient of m.
    assert kept["dora"] - kept["lora"] <= rows * width + 8 * width


def test_a_dora_step_holds_no_kernel_of_its_own():
    """With few rows, the temporaries are smaller than the kernel, the norm's included."""
    model, x = nn.Dense(512), jnp.ones((32, 512))
    params = model.init(KEY, x)["params"]
    peft = jpeft.apply(params, method="dora", rank=8, head=None)
    run = jpeft.wrap(model.apply, peft.method)
    loss = lambda adapter, x: jnp.sin(run(peft.replace(adapter=adapter).variables, x)).sum()
    with optimised():
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(peft.adapter, x).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.5 * 512 * 512 * 4

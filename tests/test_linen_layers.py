"""What is linear about each layer class of linen, against the layer itself on another kernel."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from host_checks import noisy
from tables import noised

import jpeft
from jpeft.core.method import Method
from jpeft.hosts.linen import layers
from jpeft.reparameterized.matrix_form import MatrixForm

KEY = jax.random.key(0)


# --- what is linear about the layers of linen -------------------------------------------------------------------------------------------

D, N, H, E = 6, 2, 3, 4
LAYERS = {
    "dense": (nn.Dense(5), (2, 3, D)),
    "dense-general": (nn.DenseGeneral((N, H)), (2, 3, D)),
    "dense-general-heads": (nn.DenseGeneral(5, axis=(-2, -1)), (2, 3, N, H)),
    "dense-general-turned": (nn.DenseGeneral((5, 4), axis=(-1, -2)), (2, 3, N, H)),
    "dense-general-middle": (nn.DenseGeneral((N, H), axis=1), (2, D, 3)),
    "dense-general-batch": (nn.DenseGeneral((N, H), axis=-1, batch_dims=(0,)), (E, 3, D)),
    "dense-general-batch-middle": (nn.DenseGeneral(5, axis=(3, 2), batch_dims=(0, 1)), (E, 2, N, H, 3)),
    "einsum": (nn.Einsum((D, N, H), "btd,dnh->btnh"), (2, 3, D)),
    "einsum-out": (nn.Einsum((N, H, D), "btnh,nhd->btd"), (2, 3, N, H)),
    "einsum-turned": (nn.Einsum((D, N, H), "btd,dnh->bhtn", use_bias=False), (2, 3, D)),
    "einsum-ellipsis": (nn.Einsum((D, N, H), "...d,dnh->...nh"), (2, 3, D)),
    "einsum-ellipsis-middle": (nn.Einsum((D, N, H), "b...d,dnh->nb...h"), (2, 3, D)),
    "einsum-experts": (nn.Einsum((E, D, 5), "bted,edf->btef"), (2, 3, E, D)),
    "einsum-experts-last": (nn.Einsum((D, 5, E), "ebtd,dfe->bfte", use_bias=False), (E, 2, 3, D)),
    "conv": (nn.Conv(5, (3,), strides=2), (2, 6, D)),
    "embed": (nn.Embed(7, D), None),
}
NO_INPUT_SCALE = {"conv", "embed"}


def build(name: str) -> tuple[nn.Module, dict[str, Any], jax.Array]:
    module, shape = LAYERS[name]
    x = jnp.array([[1, 3, 6], [0, 0, 2]]) if shape is None else jax.random.normal(KEY, shape)
    return module, noised(module.init(KEY, x)["params"], 0.5), x


@pytest.mark.parametrize("name", LAYERS)
def test_scales_and_biases_equal_the_layer_on_a_changed_kernel(name):
    """Each function of `Linear` against the layer itself, run on the kernel that the function stands for."""
    module, own, x = build(name)
    linear = layers.linear_of(module, "__call__", own, (x,))
    assert linear is not None
    assert linear.scale_outputs is not None
    assert linear.add_bias is not None
    assert (linear.scale_inputs is None) == (name in NO_INPUT_SCALE)
    kernel = own[linear.name]
    bias = {"bias": jnp.zeros_like(own["bias"])} if "bias" in own else {}
    run = lambda params: module.apply({"params": params}, x)
    stacked = linear.axes.stack
    for axes, scale, argument in ((linear.axes.outputs, linear.scale_outputs, "y"), (linear.axes.inputs, linear.scale_inputs, "x")):
        if scale is None:
            continue
        kept = [i for i in range(kernel.ndim) if i in axes or i in stacked]
        g = jax.random.normal(jax.random.key(1), [kernel.shape[i] for i in kept])
        wide = g.reshape([kernel.shape[i] if i in kept else 1 for i in range(kernel.ndim)])
        want = run({linear.name: kernel * wide, **bias})
        plain = {linear.name: kernel, **bias}
        got = scale(run(plain), g) if argument == "y" else module.apply({"params": plain}, scale(x, g))
        chex.assert_trees_all_close(got, want, atol=1e-5)
    if bias:
        chex.assert_trees_all_close(linear.add_bias(run({linear.name: kernel, **bias}), own["bias"]), run(own), atol=1e-6)
    shape_a, shape_b = linear.axes.factor_shapes(kernel.shape, 2)
    a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate((shape_a, shape_b)))
    chex.assert_trees_all_close(linear.apply_low_rank(x, a, b), run({linear.name: linear.axes.product(a, b), **bias}), atol=1e-4)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in NO_INPUT_SCALE])
def test_vectors_equal_the_layer_on_a_changed_kernel(name):
    """Inputs as vectors times any matrix, and any other product in the place of the layer's own."""
    module, own, x = build(name)
    linear = layers.linear_of(module, "__call__", own, (x,))
    assert linear is not None
    assert linear.map_inputs is not None
    assert linear.apply_vectors is not None
    kernel, bias = own["kernel"], {"bias": jnp.zeros_like(own["bias"])} if "bias" in own else {}
    form = MatrixForm(kernel.shape, linear.axes)
    run = lambda matrix, x: module.apply({"params": {"kernel": form.from_matrix(matrix), **bias}}, x)
    matrix, ins = form.to_matrix(kernel), form.sizes[0]
    mix = jax.random.normal(jax.random.key(1), (*form.stack, ins, ins))
    turned = linear.map_inputs(x, lambda v: v @ mix)
    chex.assert_trees_all_close(run(matrix, turned), run(mix @ matrix, x), atol=1e-4, rtol=1e-4)
    outputs = tuple(kernel.shape[i] for i in linear.axes.outputs)
    product = linear.apply_vectors(x, lambda v: (v @ matrix).reshape(*v.shape[:-1], *outputs))
    chex.assert_trees_all_close(product, run(matrix, x), atol=1e-4, rtol=1e-4)


def method_for(kind: str, name: str, axes: Any) -> Method:
    target = ".*(kernel|embedding)"
    if kind == "dora":
        return jpeft.dora(rank=2, target=target, axes=axes, head=None)
    inner = kind == "ia3-inputs"
    return jpeft.ia3(target=target, feedforward=target if inner else None, axes=axes, head=None)


@pytest.mark.parametrize("kind", ["ia3", "ia3-inputs", "dora"])
@pytest.mark.parametrize("name", LAYERS)
def test_methods_merge_into_every_layer(name, kind):
    module, own, x = build(name)
    axes = jpeft.kernel_axes(module, own, x)
    peft = noisy(own, method_for(kind, name, axes))
    merged = module.apply({"params": jpeft.merge(peft)}, x)
    assert jnp.abs(merged - module.apply({"params": own}, x)).max() > 1e-2
    chex.assert_trees_all_close(jpeft.wrap(module.apply)(peft, x), merged, atol=1e-4)


@pytest.mark.parametrize("kind", ["ia3", "ia3-inputs", "dora"])
def test_tied_embeddings_agree_with_merge(kind):
    """Lookup and scores of one table, which the host runs by different functions."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(7, D, name="embed")
            return embed.attend(jnp.tanh(embed(ids)))

    model, ids = Tied(), jnp.array([[1, 3, 6]])
    params = model.init(KEY, ids)["params"]
    peft = noisy(params, method_for(kind, "embed", None))
    chex.assert_trees_all_close(jpeft.wrap(model.apply)(peft, ids), model.apply({"params": jpeft.merge(peft)}, ids), atol=1e-5)


@pytest.mark.parametrize("equation", ["bdd,dnh->bnh", "bd,dnn->bn", "bd,...d->b", "bd,nh->bdnh", "bd->b"])
def test_equations_that_are_no_product_with_a_kernel(equation):
    module = nn.Einsum((D, N, N), equation, use_bias=False)
    assert layers.linear_of(module, "__call__", {"kernel": jnp.ones((D, N, N))}) is None


@pytest.mark.parametrize("name", LAYERS)
def test_number_of_positions(name):
    """Where every input is read once, the size of the input tells at how many positions the kernel stands."""
    module, own, x = build(name)
    linear = layers.linear_of(module, "__call__", own, (x,))
    assert linear is not None
    assert linear.reads_once == name.startswith("dense")
    if linear.reads_once:
        shape = own["kernel"].shape
        positions = jax.eval_shape(module.apply, {"params": own}, x).size // linear.axes.fan_out(shape)
        assert positions == x.size // linear.axes.fan_in(shape)


DENSE = {
    "plain": nn.Dense(5),
    "without bias": nn.Dense(5, use_bias=False),
    "bfloat16": nn.Dense(5, dtype=jnp.bfloat16),
    "precision": nn.Dense(5, precision="highest"),
    "own product": nn.Dense(5, dot_general=lambda *args, **options: 2 * jax.lax.dot_general(*args, **options)),
    "own promotion": nn.Dense(5, promote_dtype=lambda *arrays, dtype: [a if a is None else a.astype(jnp.float16) for a in arrays]),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_layers_without_scopes_compute_the_same(name):
    module = DENSE[name]
    x = jax.random.normal(KEY, (2, 3, D))
    own = noised(module.init(KEY, x)["params"], 0.5)
    run = layers.direct(module, "__call__")
    assert run is not None
    out, expected = run(own, x), module.apply({"params": own}, x)
    assert out.dtype == expected.dtype
    chex.assert_trees_all_equal(out, expected)


class Doubled(nn.Dense):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def test_layers_of_other_classes_run_by_linen():
    assert layers.direct(Doubled(5), "__call__") is None
    assert layers.direct(nn.DenseGeneral(5), "__call__") is None
    assert layers.direct(nn.Dense(5, dot_general_cls=lambda: jax.lax.dot_general), "__call__") is None

"""Products: the geometry of kernels read off jaxprs, and functions run with other products in their place."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jpeft
from jpeft.core.layer import Change, Layer, NoProductError
from jpeft.hosts.products import find_products, reads, run_changed
from jpeft.hosts.products.find import geometry
from jpeft.tree.kernels import KernelAxes

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (3, 5, 8))
IDS = jax.random.randint(KEY, (3, 5), 0, 8)
LEFT, RIGHT = jax.random.normal(jax.random.key(1), (8,)) + 2, jax.random.normal(jax.random.key(2), (6,)) + 2
IO, OI, EXPERTS = KernelAxes((), (0,), (1,)), KernelAxes((), (1,), (0,)), KernelAxes((0,), (1,), (2,))


@pytest.fixture(autouse=True)
def loose():
    """Layers of users add a bias [6] to [3, 5, 6]."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Case(NamedTuple):
    """A layer as anyone may write it, and the geometry of its kernel."""

    fn: Callable[[Any, jax.Array], jax.Array]  # (w, x) -> y
    shape: tuple[int, ...]
    axes: KernelAxes


def rnn(w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda h, xt: (jnp.tanh(h @ w + xt), h), jnp.zeros((3, 8)), x.swapaxes(0, 1))[1]


def convolution(groups: int) -> Callable[[Any, jax.Array], jax.Array]:
    layout = ("NWC", "WIO", "NWC")
    return lambda w, x: jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=layout, feature_group_count=groups)


CASES = {
    "dot": Case(lambda w, x: jnp.tanh(jnp.dot(x, w) + RIGHT), (8, 6), IO),
    "matmul": Case(lambda w, x: x @ w + RIGHT, (8, 6), IO),
    "einsum": Case(lambda w, x: jnp.einsum("btd,df->btf", x, w), (8, 6), IO),
    "kernel first": Case(lambda w, x: jnp.einsum("df,btd->bft", w, x), (8, 6), IO),
    "dot_general": Case(lambda w, x: jax.lax.dot_general(x, w, (((2,), (0,)), ((), ()))), (8, 6), IO),
    "transposed": Case(lambda w, x: x @ w.T, (6, 8), OI),
    "reshaped inputs": Case(lambda w, x: (x.reshape(3, 5, 2, 4).reshape(15, 8) @ w).reshape(3, 5, 6), (8, 6), IO),
    "reshaped kernel": Case(lambda w, x: jnp.einsum("btnh,nhf->btf", x.reshape(3, 5, 2, 4), w.reshape(2, 4, 6)), (8, 6), IO),
    "heads": Case(lambda w, x: jnp.einsum("btd,dnh->bnth", x, w), (8, 2, 3), KernelAxes((), (0,), (1, 2))),
    "heads first": Case(lambda w, x: jnp.einsum("btd,ndh->btnh", x, w), (2, 8, 3), KernelAxes((), (1,), (0, 2))),
    "rows of a stack": Case(lambda w, x: jax.nn.gelu(x @ w[0]) * (x @ w[1]), (2, 8, 6), EXPERTS),
    "parts of outputs": Case(lambda w, x: (x @ w[:, :2]).sum() + x @ w[:, 2:], (8, 6), IO),
    "parts of inputs": Case(lambda w, x: x[..., :3] @ w[:3] + x[..., 3:] @ w[3:], (8, 6), IO),
    "rounded": Case(lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), (8, 6), IO),
    "times a number": Case(lambda w, x: x @ (w * 0.3), (8, 6), IO),
    "scaled outputs": Case(lambda w, x: x @ (w * RIGHT), (8, 6), IO),
    "scaled inputs": Case(lambda w, x: x @ (w / LEFT[:, None]), (8, 6), IO),
    "jit": Case(lambda w, x: jax.jit(lambda w, x: jax.nn.relu(x @ w))(w, x), (8, 6), IO),
    "remat": Case(lambda w, x: jax.checkpoint(lambda w, x: jax.nn.relu(x @ w))(w, x), (8, 6), IO),
    "cond": Case(lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: 2 * (x @ w)), (8, 6), IO),
    "recurrent": Case(rnn, (8, 8), IO),
    "vmap": Case(lambda w, x: jax.vmap(jax.vmap(lambda v: w.T @ v))(x), (8, 6), IO),
    "mapped kernels": Case(lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x), (3, 8, 6), EXPERTS),
    "experts": Case(lambda w, x: jnp.einsum("etd,edf->etf", x, w), (3, 8, 6), EXPERTS),
    "convolution": Case(convolution(1), (3, 8, 6), KernelAxes((), (0, 1), (2,))),
    "convolution in groups": Case(convolution(2), (3, 4, 6), KernelAxes((), (0, 1), (2,))),
    "lookup": Case(lambda w, x: jnp.take(w, IDS, axis=0) * 3, (8, 6), IO),
    "lookup by index": Case(lambda w, x: w[IDS], (8, 6), IO),
    "lookup of columns": Case(lambda w, x: w.T[IDS], (6, 8), OI),
    "one-hot": Case(lambda w, x: jax.nn.one_hot(IDS, 8) @ w, (8, 6), IO),
    "tied": Case(lambda w, x: jnp.tanh(w[IDS]) @ w.T, (8, 6), IO),
    "both directions": Case(lambda w, x: jnp.tanh(x @ w) @ w.T, (8, 6), IO),
}
# A geometry that is right for the low-rank update and not the layer's own: `a` stands at the outputs.
OTHER = {
    "experts in outputs": Case(lambda w, x: jnp.einsum("btd,edf->btef", x, w), (2, 8, 6), EXPERTS),
    "experts that are summed": Case(lambda w, x: jnp.einsum("bte,btd,edf->btf", x[..., :2], x, w), (2, 8, 6), EXPERTS),
    "a at the outputs": Case(lambda w, x: x @ w.T, (6, 8), IO),
    "one factor for all rows": Case(lambda w, x: jax.nn.gelu(x @ w[0]) * (x @ w[1]), (2, 8, 6), KernelAxes((), (1,), (0, 2))),
}


@pytest.mark.parametrize("name", CASES)
def test_geometry(name: str):
    case = CASES[name]
    found = find_products(lambda params, x: case.fn(params["w"], x), {"w": jax.ShapeDtypeStruct(case.shape, jnp.float32)}, X)
    assert geometry(found) == {"w": case.axes}


def wrapped(method: jpeft.Method, fn: Callable[..., Any], w: jax.Array, adapter: Any, x: jax.Array) -> jax.Array:
    """The layer as a host gives it to a method."""
    of_params = lambda params, x: fn(params["w"], x)
    change = lambda params, changes, x: run_changed(of_params, params, changes, x)
    return method.call(Layer(run=of_params, params={"w": w}, path="", run_changed=change), (x,), adapter, None)


METHODS: dict[str, Callable[[tuple[Any, ...]], jpeft.Method]] = {
    "lora": lambda axes: jpeft.lora(rank=2, target="w", axes=axes, head=None),
    "dora": lambda axes: jpeft.dora(rank=2, target="w", axes=axes, head=None),
    "ia3": lambda axes: jpeft.ia3(target="w", feedforward=None, axes=axes, head=None),
    "oft": lambda axes: jpeft.oft(block_size=2, target="w", axes=axes, head=None),
    "miss": lambda axes: jpeft.miss(rank=3, target="w", axes=axes, head=None),
}
FEW = ["dot", "transposed", "heads first", "rows of a stack", "scaled outputs", "experts", "convolution in groups", "tied", "rounded"]


@pytest.mark.parametrize(
    ("method", "name"),
    [("lora", name) for name in (*CASES, *OTHER)] + [(other, name) for other in ("dora", "ia3", "oft", "miss") for name in FEW],
)
def test_changed_products_are_those_of_the_merged_kernel(method: str, name: str):
    case = (CASES | OTHER)[name]
    w = jax.random.normal(jax.random.key(3), case.shape) / 3
    peft = jpeft.apply({"w": w}, method=METHODS[method]((("w", case.axes),)))
    noise = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(4), leaf.shape)
    peft = peft.replace(adapter=jax.tree.map(noise, peft.adapter))

    def outputs(adapter: Any) -> tuple[jax.Array, jax.Array]:
        merged = jpeft.merge(peft.replace(adapter=adapter))["w"]
        return wrapped(peft.method, case.fn, w, adapter, X), case.fn(merged, X)

    def norms(adapter: Any) -> tuple[jax.Array, jax.Array]:
        return tuple(jnp.sum(y**2) for y in outputs(adapter))  # pyright: ignore[reportReturnType]

    got, want = jax.jit(outputs)(peft.adapter)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
    grads, expected = jax.jit(jax.jacrev(norms))(peft.adapter)
    # A rounded kernel's merged gradient is rounded, too; the factored one is not.
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=0.5 if name == "rounded" else 1e-3)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda w, x: x @ w / jnp.linalg.norm(w), "also used by `reduce_sum`"),
        (lambda w, x: x @ jnp.concatenate([w, w], 1), "also used by `concatenate`"),
        (lambda w, x: x @ (w * jnp.outer(LEFT, RIGHT)), "varies along its inputs and along its outputs"),
        (lambda w, x: x[..., :6] + x[..., 6:].sum(), "no product with it is computed"),
        (lambda w, x: x[..., :6] @ (w[:6] @ w[:6]), "they are multiplied with each other"),
    ],
)
def test_what_is_no_product_is_named(fn: Callable[..., Any], reason: str):
    change = Change(IO, lambda layer, x: layer.linear.apply_low_rank(x, jnp.ones((8, 1)), jnp.ones((1, 6))))  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(NoProductError, match=reason):
        run_changed(lambda params, x: fn(params["w"], x), {"w": jnp.ones((8, 6))}, {"w": change}, X)


def test_values_that_are_no_arrays_pass_through():
    fn = lambda params, x, name: {"y": x @ params["w"], "name": name, "none": None, "w": params["w"]}
    doubled = Change(IO, lambda layer, x: 2 * layer(x))
    w = jnp.ones((8, 6))
    out = run_changed(fn, {"w": w}, {"w": doubled}, X, "relu")
    assert out["name"] == "relu"
    assert out["none"] is None
    chex.assert_trees_all_close(out["y"], 2 * X @ w)
    chex.assert_trees_all_equal(out["w"], w)


def test_reads_know_their_scopes():
    def fn(params: Any, x: jax.Array) -> jax.Array:
        with jax.named_scope("inside"):
            x = jax.jit(lambda w, x: x @ w)(params["w"], x)
        return x + params["w"].sum()

    assert [(read.primitive, read.scopes, read.product is not None) for read in reads(fn, {"w": jnp.ones((8, 8))}, X)] == [
        ("dot_general", "inside", True),
        ("reduce_sum", "", False),
    ]


# --- layers of unknown classes in linen -------------------------------------------------------------------------------------------------


class Router(nn.Module):
    """A layer that does everything that a layer may do besides."""

    @nn.compact
    def __call__(self, x):
        gate = jax.nn.softmax(x @ self.param("kernel", nn.initializers.lecun_normal(), (8, 4)))
        self.sow("intermediates", "balance", jnp.mean(gate**2))
        hidden = nn.Dense(8, name="inner")(x)
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(8))
        if self.is_mutable_collection("batch_stats"):
            mean.value = 0.9 * mean.value + 0.1 * hidden.mean((0, 1))
        noise = [jax.random.normal(self.make_rng("noise"), (8,)) for _ in range(2)]
        experts = self.param("experts", nn.initializers.lecun_normal(), (4, 8, 8))
        return jnp.einsum("ble,bld,edf->blf", gate, hidden, experts) + mean.value + noise[0] * noise[1]


class Model(nn.Module):
    """Routers under a lifted transform."""

    lift: str

    @nn.compact
    def __call__(self, x):
        if self.lift.startswith("scan"):

            class Block(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    return x + Router(name="router")(x), None

            axes = {"params": int(self.lift[-1]), "batch_stats": 0, "intermediates": 0}
            return nn.scan(Block, variable_axes=axes, split_rngs={"params": True, "noise": True}, length=3)(name="layers")(x, None)[0]
        lifted = {"plain": Router, "remat": nn.remat(Router), "jit": nn.jit(Router)}[self.lift]
        return lifted(name="one")(x) + lifted(name="two")(x)


@pytest.mark.parametrize("lift", ["plain", "remat", "jit", "scan0", "scan1"])
def test_what_an_unknown_layer_does_besides_survives(lift: str):
    model, x = Model(lift), X
    variables = model.init({"params": KEY, "noise": KEY}, x)
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    axis = int(lift[-1]) if lift.startswith("scan") else None
    stacked = lambda axes: (
        axes if axis is None else KernelAxes((axis, *_moved(axes[0], axis)), _moved(axes[1], axis), _moved(axes[2], axis))
    )
    rules = ((".*experts", stacked(EXPERTS)), (".*kernel", stacked(IO)))
    peft = jpeft.apply(params, method="lora", rank=2, target=r".*(kernel|experts)", axes=rules, head=None)
    forward, call = jpeft.wrap(model.apply, peft.method), {"rngs": {"noise": KEY}, "mutable": ["batch_stats", "intermediates"]}
    plain = jax.jit(lambda params: model.apply({"params": params, **state}, x, **call))
    run = jax.jit(lambda peft: forward({**peft.variables, **state}, x, **call))
    chex.assert_trees_all_close(run(peft), plain(params), atol=1e-6)  # outputs, sown values, statistics
    noise = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(4), leaf.shape)
    peft = peft.replace(adapter=jax.tree.map(noise, peft.adapter))
    chex.assert_trees_all_close(run(peft), plain(jpeft.merge(peft)), rtol=1e-4, atol=1e-5)
    loss = lambda adapter: jnp.sum(forward({**peft.replace(adapter=adapter).variables, **state}, x, **call)[0] ** 2)
    grads = jpeft.flatten(jax.jit(jax.grad(loss))(peft.adapter))
    assert not [path for path, leaf in grads.items() if not jnp.abs(leaf).max() > 0]


def _moved(axes: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(i + (i >= axis) for i in axes)


def test_captured_intermediates_are_captured_once():
    model = Model("plain")
    variables = model.init({"params": KEY, "noise": KEY}, X)
    peft = jpeft.apply(variables["params"], method="lora", rank=2, target=r".*router/kernel|one/kernel", head=None)
    call = {"rngs": {"noise": KEY}, "mutable": ["intermediates"], "capture_intermediates": True}
    state = {"batch_stats": variables["batch_stats"]}
    _, want = model.apply({"params": variables["params"], **state}, X, **call)
    _, got = jpeft.wrap(model.apply, peft.method)({**peft.variables, **state}, X, **call)
    chex.assert_trees_all_close(got, want, atol=1e-6)


@pytest.mark.parametrize("scan", [None, 0, 1])
def test_lora_on_an_unknown_layer_costs_what_it_costs_on_dense(scan: int | None):
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.einsum("td,df->tf", x, self.param("kernel", nn.initializers.lecun_normal(), (64, 64)))

    def flops(layer: Callable[..., nn.Module]) -> float:
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                if scan is None:
                    for i in range(3):
                        x = nn.gelu(nn.remat(type(layer()))(**_fields(layer()), name=f"l{i}")(x))
                    return x

                class Block(nn.Module):
                    @nn.compact
                    def __call__(self, x, _):
                        return nn.gelu(layer(name="l")(x)), None

                return nn.scan(Block, variable_axes={"params": scan}, split_rngs={"params": True}, length=3)(name="layers")(x, None)[0]

        model, x = Net(), jax.random.normal(KEY, (256, 64))
        params = model.init(KEY, x)["params"]
        axes = ((".*", IO if scan is None else KernelAxes((scan,), (1 - scan,), (2,))),)
        peft = jpeft.apply(params, method="lora", rank=2, axes=axes, head=None)
        forward = jpeft.wrap(model.apply)
        loss = lambda adapter: jnp.sum(forward(peft.replace(adapter=adapter), x) ** 2)
        return jax.jit(jax.grad(loss)).lower(peft.adapter).compile().cost_analysis()["flops"]  # pyright: ignore[reportOptionalSubscript]

    dense = lambda **kwargs: nn.Dense(64, use_bias=False, **kwargs)
    assert flops(Own) <= 1.05 * flops(dense)


def _fields(module: nn.Module) -> dict[str, Any]:
    return {"features": 64, "use_bias": False} if isinstance(module, nn.Dense) else {}


# --- geometry of models -----------------------------------------------------------------------------------------------------------------


class Lifted(nn.Module):
    """A block under a lifted transform, with as many layers as it is wide: no shape tells the axis of the layers."""

    lift: str

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _=None):
                heads = nn.DenseGeneral((2, 4), use_bias=False, name="query")(x)
                return x + nn.Dense(8, use_bias=False, name="wo")(heads.reshape(x.shape)), None

        match self.lift:
            case "scan0" | "scan1":
                scan = nn.scan(nn.remat(Block), variable_axes={"params": int(self.lift[-1])}, split_rngs={"params": True}, length=8)
                return scan(name="block")(x, None)[0]
            case "vmap":
                each = nn.vmap(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=8)
                return each(name="block")(x)[0]
            case "map_variables":
                return nn.map_variables(Block, "params", trans_in_fn=lambda v: v, mutable=True)(name="block")(x)[0]
        return {"plain": Block, "remat": nn.remat(Block), "jit": nn.jit(Block)}[self.lift](name="block")(x)[0]


@pytest.mark.parametrize("lift", ["plain", "remat", "jit", "map_variables", "vmap", "scan0", "scan1"])
def test_kernel_axes_under_lifted_transforms(lift: str):
    model = Lifted(lift)
    params = jax.eval_shape(model.init, KEY, X)["params"]
    query, out = KernelAxes((), (0,), (1, 2)), IO
    if lift in ("vmap", "scan0", "scan1"):
        axis = int(lift == "scan1")
        query, out = (KernelAxes((axis,), *(_moved(part, axis) for part in axes[1:])) for axes in (query, out))
    assert jpeft.kernel_axes(model, params, X) == (("block/query/kernel", query), ("block/wo/kernel", out))


def test_kernel_axes_of_tied_embeddings_and_of_calls_with_other_arguments():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids, train: bool, mode: str):
            embed = nn.Embed(30, 8, name="embed")
            hidden = nn.Dense(8, name="dense")(embed(ids))
            assert train
            return embed.attend(hidden) if mode == "attend" else hidden @ embed.variables["params"]["embedding"].T

    for mode in ("attend", "variables"):
        params = jax.eval_shape(lambda mode=mode: Tied().init(KEY, IDS, True, mode))["params"]
        assert jpeft.kernel_axes(Tied(), params, IDS, True, mode) == (("embed/embedding", IO), ("dense/kernel", IO))


def test_apply_reads_the_geometry_off_the_model():
    model = Lifted("scan1")
    params = model.init(KEY, X)["params"]
    for method in ("lora", jpeft.chain(one=jpeft.lora(rank=2), two=jpeft.lora(rank=1, target=["wo"]))):
        peft = jpeft.apply(params, method, model=model, inputs=(X,))
        lora = peft.method if method == "lora" else peft.method.parts[0][1]
        assert dict(lora.axes) == dict(jpeft.kernel_axes(model, params, X))  # pyright: ignore[reportAttributeAccessIssue]
        noise = lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape)
        peft = peft.replace(adapter=jax.tree.map(noise, peft.adapter))
        want = model.apply({"params": jpeft.merge(peft)}, X)
        chex.assert_trees_all_close(jpeft.wrap(model.apply)(peft, X), want, rtol=1e-4, atol=1e-4)
    # What names tell is no rule.
    plain = nn.MultiHeadDotProductAttention(2)
    params = plain.init(KEY, X)["params"]
    assert not jpeft.apply(params, "lora", model=plain, inputs={"inputs_q": X}).method.axes  # pyright: ignore[reportAttributeAccessIssue]


# --- what cannot be found ---------------------------------------------------------------------------------------------------------------


class Glued(nn.Module):
    """Two kernels in one product."""

    @nn.compact
    def __call__(self, x):
        parts = [self.param(name, nn.initializers.lecun_normal(), (8, 3)) for name in ("left", "right")]
        return x @ jnp.concatenate(parts, axis=1)


class GluedTwin(nnx.Module):
    """The same in NNX."""

    def __init__(self):
        self.left, self.right = (nnx.Param(jax.random.normal(KEY, (8, 3))) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ jnp.concatenate([self.left.get_value(), self.right.get_value()], axis=1)


def test_layers_that_cost_full_fine_tuning_are_named_once_and_can_be_taught():
    linen_model, nnx_model = Glued(), GluedTwin()
    linen_params = linen_model.init(KEY, X)["params"]

    def of_left(layer: Any, params: Any, inputs: Any, method: str) -> jpeft.Linear:
        del layer, params, inputs, method
        left = lambda x, a, b: jnp.pad(x @ a @ b, ((0, 0), (0, 0), (0, 3)))
        return jpeft.Linear("left", IO, left, views=("factored",))

    for model, params, cls in ((linen_model, linen_params, Glued), (nnx_model, nnx_model, GluedTwin)):
        peft = jpeft.apply(params, "lora", rank=2, target="left", head=None)
        noise = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(4), leaf.shape)
        peft = peft.replace(adapter=jax.tree.map(noise, peft.adapter))
        forward = jpeft.wrap(model)
        with pytest.warns(UserWarning, match=r"one kernel does not act.*'left'.*`concatenate`.*register_layer") as said:
            want = forward(peft, X)
            forward(peft, X)
        assert len(said) == 1
        jpeft.register_layer(cls)(of_left)
        chex.assert_trees_all_close(jpeft.wrap(model)(peft, X), want, atol=1e-5)
    with pytest.raises(ValueError, match="takes the class of a layer"):
        inspect.unwrap(jpeft.register_layer)("Glued")  # without the tests' own check of types

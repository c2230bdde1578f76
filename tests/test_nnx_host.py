"""The NNX host by itself: what it takes, what it leaves alone, what it returns, and what it refuses."""

import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from nnx_models import linen, linen_params, nnx_model
from tables import batch, compiled_flops, noised

import jpeft
from jpeft.hosts import registry
from jpeft.stats import key_values

D, VOCAB = 8, 20
X = jax.random.normal(jax.random.key(0), (3, 5, D))
IDS = jnp.arange(15).reshape(3, 5)
RNGS = functools.partial(nnx.Rngs, 0)


def bits(tree):
    """The numbers in a tree, random keys too."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: np.array(jax.random.key_data(leaf) if is_key(leaf) else leaf), tree)


def updated(model, params):
    copy = nnx.clone(model)
    nnx.update(copy, params)
    return copy


def noisy(model, method="lora", **options):
    options = {"rank": 2, **options} if method in ("lora", "dora") else options
    peft = jpeft.apply(model, method=method, head=None, **options)
    return peft.replace(adapter=noised(peft.adapter))


def check(model, x, method="lora", call=lambda model: model, **options):
    """Begins as the model, reads every leaf, merges, and leaves the model alone."""
    before = bits(nnx.state(model)), nnx.graphdef(model)
    peft = noisy(model, method, **options)
    forward = jax.jit(jpeft.wrap(call(model)))
    base, start = call(nnx.clone(model))(x), jpeft.apply(model, method=peft.method)
    chex.assert_trees_all_close(forward(start, x), base, atol=1e-5)
    grads = jax.grad(lambda adapter: jnp.square(forward(peft.replace(adapter=adapter), x)).sum())(peft.adapter)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    if peft.method.why_no_merge is None:
        chex.assert_trees_all_close(forward(peft, x), call(updated(model, jpeft.merge(peft)))(x), atol=1e-5)
    chex.assert_trees_all_equal(bits(nnx.state(model)), before[0])
    assert nnx.graphdef(model) == before[1]


# --- models -----------------------------------------------------------------------------------------------------------------------------


class Net(nnx.Module):
    """A list of layers, running means, dropout."""

    def __init__(self, rngs, rate=0.3, dtype=jnp.float32):
        make = functools.partial(nnx.Linear, D, D, rngs=rngs, param_dtype=dtype)
        self.layers, self.bn = nnx.List([make(), make()]), nnx.BatchNorm(D, rngs=rngs, param_dtype=dtype)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.drop(self.bn(x))


class Stack(nnx.Module):
    """Layers in one array on any axis, scanned."""

    def __init__(self, axis, rate=0.0, width=D, remat=True, *, rngs):
        self.remat, self.axes = remat, nnx.StateAxes({nnx.Param: axis, ...: 0})

        @nnx.split_rngs(splits=3)
        @nnx.vmap(out_axes=self.axes)
        def make(rngs):
            return nnx.Sequential(nnx.Linear(width, width, rngs=rngs), nnx.tanh, nnx.Dropout(rate, rngs=rngs))

        self.layers = make(rngs)

    def __call__(self, x):
        run = lambda x, layer: layer(x)
        return nnx.scan(nnx.remat(run) if self.remat else run, in_axes=(nnx.Carry, self.axes), out_axes=nnx.Carry)(x, self.layers)


class Own(nnx.Module):
    """A layer that no table knows, with several methods, and a counter."""

    def __init__(self, rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, D)))
        self.count = nnx.BatchStat(jnp.zeros(()))

    def encode(self, ids):
        self.count[...] += 1
        return self.table[...][ids]

    def decode(self, h):
        return h @ self.table[...].T


class Model(nnx.Module):
    def __init__(self, rngs, reads="decode"):
        self.reads, self.own, self.rest = reads, Own(rngs), nnx.Linear(D, D, rngs=rngs)

    def __call__(self, ids):
        h = jnp.tanh(self.rest(self.own.encode(ids)))
        return self.own.decode(h) if self.reads == "decode" else h @ self.own.table[...].T

    @nnx.jit
    def jitted(self, ids):
        return self(ids)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(jnp.tanh(self.embed(ids)))


class Shared(nnx.Module):
    """One module at two places, and a third that shares its kernel."""

    def __init__(self, rngs):
        self.a = self.b = nnx.Linear(D, D, rngs=rngs)
        self.c = nnx.Linear(D, D, rngs=rngs)
        self.c.kernel = self.a.kernel

    def __call__(self, x):
        return self.c(jnp.tanh(self.b(jnp.tanh(self.a(x)))))


class Lifted(nnx.Module):
    """Transforms of NNX around a module and around a method."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)

    @nnx.remat
    def again(self, x):
        return self.a(x)

    def __call__(self, x):
        x = nnx.cond(x.sum() > 1e6, lambda m, x: m.a(x), lambda m, x: m.b(x), self, x)
        return nnx.vmap(lambda m, x: m.a(x), in_axes=(None, 0))(self, x) + self.again(x)


class Layers(nnx.Module):
    """Classes of layers that are not dense."""

    def __init__(self, rngs):
        self.groups = nnx.Conv(D, D, (3,), feature_group_count=2, rngs=rngs)
        self.up = nnx.ConvTranspose(D, D, (3,), rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(D, D, rngs=rngs))
        self.lora = nnx.LoRALinear(D, D, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        return self.lora(self.rnn(self.up(self.groups(x))))


class LinenPart(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, name="down")(jnp.tanh(nn.Dense(2 * D, name="up")(x)))


class WithLinen(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.bridge.ToNNX(LinenPart(), rngs=rngs).lazy_init(X)
        self.dense = nnx.bridge.ToNNX(nn.Dense(D), rngs=rngs).lazy_init(X)
        self.out = nnx.Linear(D, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dense(self.inner(x)))


# --- right everywhere -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_layers_of_every_class(method):
    model = Layers(RNGS())
    axes = jpeft.kernel_axes(model, model, X)
    assert {path for path, _ in axes} >= {"groups/kernel", "up/kernel", "rnn/cell/dense_i/kernel"}
    check(model, X, method, axes=axes)


def test_transforms_of_nnx():
    check(Lifted(RNGS()), X)


def test_shared_modules_and_parameters():
    check(Shared(RNGS()), X, "dora")
    check(Tied(RNGS()), IDS, target=".*embedding")


def test_any_public_method_of_a_module():
    model = Model(RNGS())
    axes = jpeft.kernel_axes(model, model, IDS)
    for call in (lambda m: m, lambda m: m.__call__, lambda m: m.jitted, lambda m: functools.partial(lambda m, ids: 2 * m(ids), m)):
        check(model, IDS, target=".*(table|kernel)", axes=axes, call=call)
    _, state = jpeft.wrap(model)(noisy(model, target=".*table", axes=axes), IDS, mutable=True)
    assert [float(leaf) for leaf in jax.tree.leaves(state)] == [1.0]


@pytest.mark.parametrize("axis", [0, 1])
def test_stacks_on_any_axis(axis):
    model = Stack(axis, rngs=RNGS())
    axes = jpeft.kernel_axes(model, model, X)
    assert axes[0][1].stack == (axis,)
    check(model, X, axes=axes)


def test_methods_with_other_options_share_no_trace():
    """Under `nnx.jit`, which looks traces up by the graph."""
    model = Model(RNGS())
    low, high = (noisy(model, target=["rest"], alpha=alpha) for alpha in (2.0, 32.0))
    forward = jpeft.wrap(model.jitted)
    for peft in (low, high, low):
        chex.assert_trees_all_close(forward(peft, IDS), updated(model, jpeft.merge(peft))(IDS), atol=1e-4)


def test_linen_modules_inside():
    rank = {"inner/up/kernel": 3, ".*": 2}  # the paths that rules go by are those of the whole model
    peft = noisy(WithLinen(RNGS()), rank=rank)
    assert peft.adapter["inner"]["up"]["kernel"]["a"].shape == (D, 3)
    check(WithLinen(RNGS()), X, rank=rank)
    model = WithLinen(RNGS())
    bottlenecks = noisy(model, "adapter", target=["inner/up", "dense"], size=2)
    grads = jax.grad(lambda adapter: jpeft.wrap(model)(bottlenecks.replace(adapter=adapter), X).sum())(bottlenecks.adapter)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_geometry_is_that_of_linen():
    for twin in ("scan-mha", "einsum"):
        ours = jpeft.kernel_axes(nnx_model(twin), nnx_model(twin), batch()["x"])
        assert dict(ours) == dict(jpeft.kernel_axes(linen(twin), linen_params(twin), batch()["x"]))


class Named(nnx.Module):
    """With a module that is called as linen calls a collection."""

    def __init__(self, rngs):
        self.params, self.out = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return self.out(self.params(x))


def test_a_module_called_params():
    model = Named(RNGS())
    check(model, X)
    chex.assert_trees_all_equal(noisy(nnx.state(model)).adapter, noisy(model).adapter)


# --- cost and state ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "scan"])
def test_a_step_costs_two_forward_passes(kind):
    width, rngs = 512, RNGS()
    x = jnp.ones((4, 256, width))
    heads = [nnx.LinearGeneral(width, (4, 128), rngs=rngs), nnx.LinearGeneral((4, 128), width, axis=(-2, -1), rngs=rngs)]
    wide = [nnx.Linear(width, width, rngs=rngs) for _ in range(2)]
    model = nnx.Sequential(*wide, *heads) if kind == "list" else Stack(0, width=width, remat=False, rngs=rngs)
    peft = jpeft.apply(model, rank=2, head=None, axes=jpeft.kernel_axes(model, model, x))
    graphdef, params, others = nnx.split(model, nnx.Param, ...)
    forward = compiled_flops(lambda params: nnx.merge(graphdef, params, others, copy=True)(x), params)
    loss = lambda adapter, peft: jpeft.wrap(model)(peft.replace(adapter=adapter), x).sum()
    step = compiled_flops(jax.grad(loss), peft.adapter, peft)
    assert step <= 1.02 * 2 * forward


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit])
def test_training_traces_once_and_leaves_the_model_alone(jit):
    model = Net(RNGS())
    before = bits(nnx.state(model)), nnx.graphdef(model)
    forward, y, traces = jpeft.wrap(model), jnp.cos(X), []
    peft = jpeft.apply(model, rank=2, head=None, dropout=0.1)
    tx = jpeft.optimizer(optax.adamw(3e-2, weight_decay=0.1), peft)

    @jit
    def step(peft, opt_state, state):
        traces.append(0)

        def loss_fn(adapter):
            out, new = forward(peft.replace(adapter=adapter), X, collections=state, mutable=True)
            return jnp.square(out - y).mean(), new

        (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(peft.adapter)
        updates, opt_state = tx.update(grads, opt_state, peft.adapter)
        return peft.replace(adapter=optax.apply_updates(peft.adapter, updates)), opt_state, state, loss

    state, opt_state, losses = {"state": nnx.state(model, nnx.Not(nnx.Param))}, tx.init(peft.adapter), []
    for _ in range(20):
        peft, opt_state, state, loss = step(peft, opt_state, state)
        losses.append(float(loss))
    assert len(traces) == 1
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert int(state["state"]["drop"]["rngs"]["count"][...]) == 20
    chex.assert_trees_all_equal(bits(nnx.state(model)), before[0])
    assert nnx.graphdef(model) == before[1]
    chex.assert_trees_all_equal(bits(peft.params), bits(nnx.state(model, nnx.Param)))


def test_state_goes_in_and_comes_out():
    """As the model itself keeps it, call after call; a filter chooses."""
    model = Net(RNGS())
    peft, forward, want = noisy(model), jpeft.wrap(model), None
    merged, state = updated(model, jpeft.merge(peft)), None
    for _ in range(2):
        out, state = forward(peft, X, collections=state, mutable=True)
        want = merged(X)
        chex.assert_trees_all_close(out, want, atol=1e-5)
        chex.assert_trees_all_close(bits(state["state"]), bits(nnx.state(merged, nnx.Not(nnx.Param))), atol=1e-5)
    means = forward(peft, X, mutable=nnx.BatchStat)[1]["state"]
    assert set(jpeft.flatten(means)) == {"bn/mean", "bn/var"}
    model.layers[0].kernel[...] += 1
    model.eval()  # the wrapped function has the model as it was
    chex.assert_trees_all_close(forward(peft, X), forward(peft, X, collections={"state": nnx.state(model, nnx.RngState)}))
    assert not np.allclose(forward(peft, X), jpeft.wrap(model)(peft, X))


def test_random_exactly_when_the_model_is():
    for model in (Net(RNGS()), Stack(0, rate=0.3, rngs=RNGS())):
        thinned, whole = noisy(model, dropout=0.5), noisy(model)
        forward = jpeft.wrap(model)
        chex.assert_trees_all_equal(forward(thinned, X), forward(thinned, X))
        assert not np.allclose(forward(thinned, X), forward(whole, X), atol=1e-3)
        seeds = [forward(thinned, X, rngs={"dropout": jax.random.key(i)}) for i in range(2)]
        assert not np.allclose(*seeds, atol=1e-3)
        model.eval()
        chex.assert_trees_all_close(jpeft.wrap(model)(thinned, X), jpeft.wrap(model)(whole, X), atol=1e-6)


def test_keeps_dtypes():
    model = Net(RNGS(), dtype=jnp.bfloat16)
    model.eval()
    for method in ("lora", "bitfit"):
        peft = jpeft.apply(model, method=method, head=None)
        out = jpeft.wrap(model)(peft, X.astype(jnp.bfloat16))
        assert out.dtype == model(X.astype(jnp.bfloat16)).dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(jpeft.merge(peft))} == {jnp.dtype(jnp.bfloat16)}


# --- what is given ----------------------------------------------------------------------------------------------------------------------


def test_models_states_and_dicts(tmp_path):
    """One adapter for all forms of the parameters, through the module and through its graphdef, saved and loaded."""
    model = Net(RNGS())
    model.eval()
    graphdef, state = nnx.split(model)
    params, others = nnx.state(model, nnx.Param, ...)
    want = jpeft.wrap(model)(noisy(model), X)
    plain = jpeft.unflatten(jpeft.flatten(params))
    jpeft.save(tmp_path / "adapter", noisy(model))
    for form in (state, params, nnx.to_pure_dict(params), plain):
        peft = jpeft.load(tmp_path / "adapter", form)
        chex.assert_trees_all_equal(peft.adapter, noisy(form).adapter)
        for out in (jpeft.wrap(model)(peft, X), jpeft.wrap(graphdef)(peft, X, collections={"state": others})):
            chex.assert_trees_all_close(out, want, atol=1e-6)
        assert type(jpeft.merge(peft)) is type(form)
        assert set(jpeft.flatten(jpeft.merge(peft))) == set(jpeft.flatten(params))


def test_adapters_go_from_linen_to_nnx_and_back(tmp_path):
    model, x = nnx_model("scan-mha"), batch()["x"]
    theirs = noisy(linen_params("scan-mha"))
    jpeft.save(tmp_path / "linen", theirs)
    ours = jpeft.load(tmp_path / "linen", model)
    want = jpeft.wrap(linen("scan-mha").apply)(theirs, x)
    chex.assert_trees_all_close(jpeft.wrap(model)(ours, x), want, atol=1e-5)
    jpeft.save(tmp_path / "nnx", ours)
    chex.assert_trees_all_equal(jpeft.load(tmp_path / "nnx", linen_params("scan-mha")).adapter, theirs.adapter)


def test_outputs_inputs_and_split_batches():
    model, x = nnx_model("core"), jnp.tile(batch()["x"], (8, 1))
    peft = jpeft.apply(model, rank=2)
    forward, zeros = jpeft.wrap(model), lambda out: jax.tree.map(jnp.zeros_like, out)
    assert jnp.abs(registry.map_outputs(forward, zeros)(peft, x)).max() == 0
    split = jax.jit(jpeft.sharding.by_example(forward, jpeft.sharding.make_mesh()))
    chex.assert_trees_all_close(split(peft, x), forward(peft, x), atol=1e-5)
    ours, theirs = (key_values(m, p, jnp.array([[3, 4, 5]])) for m, p in ((model, model), (linen("core"), linen_params("core"))))
    chex.assert_trees_all_close(ours, theirs, atol=1e-5)


def test_nnx_is_not_imported_for_others():
    code = "import jax, sys, jpeft; jpeft.wrap(lambda params, x: x); jpeft.apply({'a': {'kernel': jax.numpy.ones((2, 2))}}, head=None)"
    code = f"{code}; sys.exit('flax.nnx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- refused by name --------------------------------------------------------------------------------------------------------------------


class Properties(nnx.Module):
    def __init__(self, rngs):
        self.own = Own(rngs)
        self.more = nnx.List([nnx.Param(jnp.eye(D))])

    def __call__(self, ids):
        return self.own.table[...][ids] @ self.more[0][...]


class Both(nnx.Linear):
    def first(self, x):
        return self(x)

    def second(self, x):
        return -self(x)


class Two(nnx.Module):
    def __init__(self, rngs):
        self.both = Both(D, D, rngs=rngs)

    def __call__(self, x):
        return self.both.first(x) + self.both.second(x)


def test_what_would_be_lost_is_refused():
    table = {"target": ".*table"}
    cases = [
        (Model(RNGS(), reads="outside"), table, r"adapts 'own/table', which is also read outside of its module \(`dot_general`"),
        (Properties(RNGS()), table, "adds to the module 'own', which this call passes by"),
        (Properties(RNGS()), {"target": "more/0"}, "adds to 'more', a List of parameters"),
    ]
    for model, options, match in cases:
        with pytest.raises(ValueError, match=match):
            jpeft.wrap(model)(jpeft.apply(model, head=None, **options), IDS)
    check(Model(RNGS(), reads="outside"), IDS, "freeze", target=["own"])  # what replaces a parameter is read by all
    check(Properties(RNGS()), IDS, "freeze", target=["more/0"])
    model = Two(RNGS())
    with pytest.raises(ValueError, match="of which this call runs several methods: first, second"):
        jpeft.wrap(model)(jpeft.apply(model, method="adapter", target=["both"], head=None), X)


def test_wrong_states_are_refused():
    model = Net(RNGS())
    graphdef, state = nnx.split(model)
    peft = noisy(model)
    cases = [
        (lambda: jpeft.wrap(graphdef)(peft, X), "A graphdef holds no values, and this model needs 'bn/mean'"),
        (lambda: jpeft.wrap(model)(noisy({"a": {"kernel": jnp.ones((3, 3))}}), X), "The parameters lack 'bn/bias'"),
        (
            lambda: jpeft.wrap(model)(noisy(nnx.to_pure_dict(state), "bitfit"), X),
            "hold 'bn/mean', which the model keeps, but not as an nnx.P",
        ),
        (lambda: jpeft.wrap(model)(peft, X, collections={"more": {"foo": X}}), "'more': ....* holds 'foo', which is no state"),
        (lambda: jpeft.wrap(lambda params, x: x, host="nnx"), "host='nnx' takes a module"),
        (lambda: jpeft.apply(nnx.state(model, nnx.BatchStat)), "holds no nnx.Param.*It holds: BatchStat"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()


def test_prompts_inside_a_linen_module_are_refused():
    class Part(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Dense(D, name="dense")(nn.Embed(30, D, name="embed")(ids))

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.part = nnx.bridge.ToNNX(Part(), rngs=rngs).lazy_init(jnp.zeros((2, 6), jnp.int32))

        def __call__(self, ids: jax.Array) -> jax.Array:
            return self.part(ids)

    model, ids = Model(nnx.Rngs(0)), jnp.arange(12).reshape(2, 6)
    with pytest.raises(ValueError, match=r"prompt_tuning adds to 'part[/a-z]*', which is inside a linen module"):
        jpeft.wrap(model)(jpeft.apply(model, "prompt_tuning", length=2), ids)
    assert jpeft.wrap(model)(jpeft.apply(model, "trainable_tokens", tokens=(3, 4)), ids).shape == (2, 6, D)

"""Parameters that a module uses in any way: in methods of any name, under transforms, in shared scopes; what is refused by name."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from host_checks import noisy

import jpeft

KEY = jax.random.key(0)
W = 6
X = jax.random.normal(KEY, (2, 5, W))
IDS = jax.random.randint(KEY, (2, 5), 3, 12)
lecun = nn.initializers.lecun_normal()


def check(model: nn.Module, x: jax.Array, method: Any, atol: float = 1e-5, **options: Any) -> jpeft.Peft:
    """Identity at the start, a gradient for every leaf, an effect, and merged equal to wrapped; the adapter with noise."""
    params = model.init(KEY, x)["params"]
    start, peft = jpeft.apply(params, method, **options), noisy(params, jpeft.make(method, **options))
    forward, base = jpeft.wrap(model.apply), model.apply({"params": params}, x)
    if "prompt" not in str(method):
        chex.assert_trees_all_close(forward(start, x), base, atol=0.05 if method == "adapter" else atol)
    out = forward(peft, x)
    assert jnp.abs(out - base).max() > 1e-3
    random = jnp.asarray(np.random.RandomState(0).standard_normal(out.shape), out.dtype)
    grads = jax.grad(lambda adapter: (random * forward(peft.replace(adapter=adapter), x)).sum())(peft.adapter)
    dead = [path for path, leaf in jpeft.flatten(grads).items() if not jnp.abs(leaf).max() > 0]
    assert not dead
    if peft.method.why_no_merge is None:
        chex.assert_trees_all_close(model.apply({"params": jpeft.merge(peft)}, x), out, atol=atol, rtol=1e-4)
    return peft


# --- methods of any name ----------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Computes with its kernel in several methods, of which none is `__call__`, and has others that do not."""

    def setup(self):
        self.kernel = self.param("kernel", lecun, (W, W))

    def project(self, x, transpose=False, *, scale=1.0):
        return scale * (x @ (self.kernel.T if transpose else self.kernel))

    def back(self, x):
        return x @ self.kernel.T

    def step(self, x, _):
        return jnp.tanh(self.project(x)), None

    def sign(self, x):
        return x > 0

    def describe(self):
        return "linear", jnp.ones(3), self.sign

    @nn.nowrap
    def unseen(self, x):
        return x @ self.kernel

    @property
    def matrix(self):
        return self.kernel


class Called(Linear):
    """Runs by `__call__`, which uses another of its methods."""

    def __call__(self, x):
        return jnp.tanh(self.project(x))


class Shared(nn.Module):
    """Two modules in one scope, the inner one possibly in a transform."""

    lift: bool = False

    @nn.compact
    def __call__(self, x):
        inner = (nn.remat(Called) if self.lift else Called)()
        nn.share_scope(self, inner)
        return inner(x)


class Net(nn.Module):
    """A dense layer, and a module that is run in the way that is given."""

    layer: Any
    run: Any

    def setup(self):
        self.up, self.down = nn.Dense(W), self.layer()

    def __call__(self, x):
        return self.run(self.down, self.up(x))


scanned = nn.scan(Linear, variable_axes={"params": 0}, split_rngs={"params": True}, length=3, methods=["step"])
project = lambda m, x: m.project(x)
FORMS = {
    "plain": (Linear, project),
    "several calls": (Linear, lambda m, x: m.project(jnp.tanh(m.project(x)))),
    "by itself": (Called, lambda m, x: m(x)),
    "arguments": (Linear, lambda m, x: m.project(x, True, scale=0.5)),
    "beside others": (Linear, lambda m, x: m.project(x) * m.sign(x) + len(m.describe()[0])),
    "remat": (nn.remat(Linear, methods=["project"]), project),
    "remat, static": (nn.remat(Linear, methods={"project": {"static_argnums": (1,)}}), lambda m, x: m.project(x, True)),
    "jit": (nn.jit(Linear, methods=["project"]), project),
    "scan": (scanned, lambda m, x: m.step(x, None)[0]),
    "shared scope": (Shared, lambda m, x: m(x)),
    "shared, remat": (lambda: Shared(lift=True), lambda m, x: m(x)),
}
STACKED = ((r"down/kernel", jpeft.KernelAxes((0,), (1,), (2,))),)


@pytest.mark.parametrize(
    ("form", "method"),
    [
        *((form, "lora") for form in FORMS),
        *((form, "dora") for form in ("arguments", "jit", "scan")),
        *((form, "adapter") for form in ("beside others", "remat", "scan", "shared scope", "shared, remat")),
    ],
)
def test_any_method_of_a_module(form, method):
    model = Net(*FORMS[form])
    axes: dict[str, Any] = {"axes": STACKED} if form == "scan" else {}
    options: dict[str, Any] = {"size": 2, "target": "down/kernel"} if method == "adapter" else {"rank": 2}
    peft = check(model, X, method, **options, **axes)
    if form.startswith("shared"):  # once, as around the inner module alone
        alone = Net(Called, lambda m, x: m(x))
        chex.assert_trees_all_close(jpeft.wrap(model.apply)(peft, X), jpeft.wrap(alone.apply)(peft, X), atol=1e-6)


class Embedder(nn.Module):
    """Looks up and scores, as Gemma's does."""

    def setup(self):
        self.table = self.param("embedding", nn.initializers.normal(1.0), (12, W))

    def encode(self, ids):
        return self.table[ids]

    def decode(self, hidden):
        return hidden @ self.table.T


class Model(nn.Module):
    def setup(self):
        self.embedder, self.down = Embedder(), nn.Dense(W)

    def __call__(self, ids):
        return self.embedder.decode(jnp.cumsum(self.down(self.embedder.encode(ids)), 1))


def test_a_table_with_two_methods():
    """Both ways through the table see its change, and a prompt is looked up in one of them."""
    check(Model(), IDS, "lora", rank=2, target="embedder/embedding", atol=1e-4)
    check(Model(), IDS, "trainable_tokens", tokens=[int(IDS[0, 0])], embedding="embedder/embedding", atol=1e-4)
    peft = check(Model(), IDS, "prompt_tuning", length=2)
    rows = peft.adapter["embedder"]["+"]["prompt"]
    params = peft.params
    longer = jnp.concatenate([jnp.broadcast_to(rows, (2, *rows.shape)), params["embedder"]["embedding"][IDS]], axis=1)
    hidden = jnp.cumsum(longer @ params["down"]["kernel"] + params["down"]["bias"][None, None], axis=1)[:, 2:]
    chex.assert_trees_all_close(jpeft.wrap(Model().apply)(peft, IDS), hidden @ params["embedder"]["embedding"].T, atol=1e-4)
    check(Model(), IDS, jpeft.chain(prompt=jpeft.prompt_tuning(length=2), lora=jpeft.lora(rank=2)))


def test_leaves_of_a_module_need_one_method():
    """A bottleneck would go around both: which of them is meant, nobody said."""
    model = Net(Linear, lambda m, x: m.project(m.back(x)))
    with pytest.raises(ValueError, match="adapter adds to the module 'down'.*`back` and `project`.*target="):
        check(model, X, "adapter", size=2, target="down/kernel")
    check(model, X, "lora", rank=2)


# --- what no interceptor sees -------------------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(W, name="down")(x)


class Outer(nn.Module):
    """Uses a module's parameters by hand."""

    run: Any

    @nn.compact
    def __call__(self, x):
        inner, x = Inner(name="inner"), nn.Dense(W, name="up")(x)
        return inner(x) if self.is_initializing() else self.run(self.variables["params"]["inner"], x)


clean = lambda p: {"down": {name: p["down"][name] for name in ("kernel", "bias")}}
UNSEEN = {
    "nowrap": Net(Linear, lambda m, x: m.unseen(x)),
    "property": Net(Linear, lambda m, x: x @ m.matrix),
    "variables": Outer(lambda p, x: x @ p["down"]["kernel"] + p["down"]["bias"][None, None]),
    "an apply of parts": Outer(lambda p, x: Inner().apply({"params": clean(p)}, x)),
}


@pytest.mark.parametrize("form", UNSEEN)
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_leaves_that_nothing_reads_are_refused(form, method):
    model = UNSEEN[form]
    path = "inner/down" if isinstance(model, Outer) else "down"
    options = {"size": 2, "target": f"{path}/kernel"} if method == "adapter" else {"rank": 2}
    end = "host='dense'" if method == "lora" else "another method"
    with pytest.raises(ValueError, match=rf"{method} adds to .*'{path}.*silently lost.*target=.*{end}"):
        check(model, X, method, **options)
    # What replaces a parameter needs no module.
    check(model, X, "freeze", target=f"{path}/kernel", head=None)


def test_an_apply_inside_is_adapted():
    """Of a whole module, with the leaves that stand in it; by a bound module; of a part of the model by the wrapped function."""
    check(Outer(lambda p, x: Inner().apply({"params": p}, x)), X, "lora", rank=2)
    check(Outer(lambda p, x: Inner().bind({"params": p})(x)), X, "adapter", size=2, target="inner/down/kernel")
    params = Inner().init(KEY, X)["params"]
    peft = noisy({"backbone": params}, jpeft.lora(rank=2))
    forward = jpeft.wrap(lambda variables, x: Inner().apply({"params": variables["params"]["backbone"]}, x), host="linen")
    chex.assert_trees_all_close(forward(peft, X), Inner().apply({"params": jpeft.merge(peft)["backbone"]}, X), atol=1e-5)


class Towers(nn.Module):
    def setup(self):
        self.left, self.right = nn.Dense(W), nn.Dense(W)

    def __call__(self, x, both=False):
        return self.left(x) + (self.right(x) if both or self.is_initializing() else 0)

    def one(self, x):
        return self.left(x)


def test_a_part_of_a_model():
    """Leaves in a part that a call does not enter are no error; they are named where the whole model leaves them out."""
    model = Towers()
    peft = noisy(model.init(KEY, X)["params"], jpeft.lora(rank=2))
    merged = {"params": jpeft.merge(peft)}
    calls: list[dict[str, Any]] = [{"method": model.one}, {"method": "one"}, {"both": True}]
    for options in calls:
        chex.assert_trees_all_close(jpeft.wrap(model.apply)(peft, X, **options), model.apply(merged, X, **options), atol=1e-5)
    with pytest.warns(UserWarning, match="lora adds to 'right', whose parameters this call.*does not compute with"):
        got = jpeft.wrap(model.apply)(peft, X)
    chex.assert_trees_all_close(got, model.apply(merged, X), atol=1e-5)

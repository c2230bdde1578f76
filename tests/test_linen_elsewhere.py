"""Parameters that a model uses past the module that holds them, or changes on their way to it: refused by name."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from host_checks import noisy
from test_linen_calls import IDS, KEY, Linear, Net, W, X, check, lecun

import jpeft


class Tied(nn.Module):
    """Looks words up, and scores them with the same table in the way that is given."""

    score: Any
    jit: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(12, W, name="embed")
        h = nn.Dense(W, name="down")(embed(ids))
        return self.score(self, embed, h)


class AtSetup(nn.Module):
    """Prepares its kernel in `setup`, for its own methods."""

    def setup(self):
        kernel = self.param("kernel", lecun, (W, W))
        self.kernel = kernel / (1 + jnp.abs(kernel).sum())

    def __call__(self, x):
        return x @ self.kernel


TABLE = "embed/embedding"
variables = lambda m: m.variables["params"]["embed"]["embedding"] if not m.is_initializing() else jnp.ones((12, W))
ELSEWHERE = {
    "attribute": (Tied(lambda m, e, h: h @ e.embedding.T), IDS, TABLE),
    "variables": (Tied(lambda m, e, h: h @ variables(m).T), IDS, TABLE),
    "penalty": (Tied(lambda m, e, h: e.attend(h) + jnp.square(variables(m)).sum()), IDS, TABLE),
    "nowrap": (Net(Linear, lambda m, x: m.project(m.unseen(x))), X, "down/kernel"),
    "in a loop": (Tied(lambda m, e, h: jax.lax.scan(lambda h, _: (h @ variables(m).T @ variables(m), None), h, length=2)[0]), IDS, TABLE),
}


@pytest.mark.parametrize("form", ELSEWHERE)
def test_a_parameter_that_is_read_past_its_module_is_refused(form):
    model, x, path = ELSEWHERE[form]
    with pytest.raises(ValueError, match=rf"lora adds to '{path}', which this call also uses in .*silently lost.*host='dense'"):
        check(model, x, "lora", rank=2, target=path)
    check(model, x, "freeze", target=path, head=None, atol=1e-4)


@pytest.mark.filterwarnings("ignore:lora. one kernel does not act in products")
def test_uses_within_a_module_are_its_own():
    """Scores by `attend`, and what `setup` makes of a kernel."""
    check(Tied(lambda m, e, h: e.attend(h)), IDS, "lora", rank=2, target="embed/embedding", atol=1e-4)
    check(Net(AtSetup, lambda m, x: m(x)), X, "lora", rank=2)


def test_a_function_that_reads_parameters_itself():
    model = Tied(lambda m, e, h: h)
    peft = noisy(model.init(KEY, IDS)["params"], jpeft.lora(rank=2, target="embed/embedding"))
    forward = jpeft.wrap(lambda v, ids: model.apply(v, ids) @ v["params"]["embed"]["embedding"].T)
    with pytest.raises(ValueError, match="lora adds to 'embed/embedding', which this call also uses outside of all modules"):
        jax.jit(forward)(peft, IDS)


def test_a_model_is_looked_at_once(monkeypatch):
    """Whatever the lengths of texts, and however often an equal model is wrapped."""
    looked: list[Any] = []
    monkeypatch.setattr("jpeft.hosts.linen.unread.refuse_reads_elsewhere", lambda *args: looked.append(args))
    params, run = None, lambda m, x: m.project(x)
    for length in (5, 5, 7):
        model, x = Net(Linear, run), jnp.ones((2, length, W))
        params = params or model.init(KEY, x)["params"]
        jax.jit(jpeft.wrap(model.apply))(noisy(params, jpeft.lora(rank=1)), x)
    assert len(looked) == 1


def net_of(make: Any) -> nn.Module:
    class Made(nn.Module):
        @nn.compact
        def __call__(self, x):
            return make(nn.Dense(W, name="up")(x))

    return Made()


transposed = lambda v: jax.tree.map(lambda a: a.T, v)
normalised = lambda v: jax.tree.map(lambda a: a / (1 + jnp.linalg.norm(a)), v)
CHANGED = {
    "transposed": lambda x: nn.map_variables(nn.Dense, "params", transposed, transposed, mutable=True)(W, False, name="down")(x),
    "normalised": lambda x: nn.map_variables(nn.Dense, "params", normalised, mutable=True)(W, False, name="down")(x),
    "weight norm": lambda x: nn.WeightNorm(nn.Dense(W, name="down"))(x),
}


@pytest.mark.parametrize("form", CHANGED)
def test_parameters_that_are_changed_on_their_way_are_refused(form):
    with pytest.raises(ValueError, match="lora adds to .*'down.*target=.*host='dense'"):
        check(net_of(CHANGED[form]), X, "lora", rank=W, target=".*down/kernel")


def test_functions_under_transforms_are_no_methods():
    """Loops and branches run functions on a module, which linen shows as methods of it."""

    def loop(x):
        dense = nn.Dense(W, name="down")
        dense(x)
        return nn.while_loop(lambda m, c: c[0] < 2, lambda m, c: (c[0] + 1, jnp.tanh(m(c[1]))), dense, (0, x))[1]

    def branches(x):
        dense = nn.Dense(W, name="down")
        dense(x)
        return nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: m(2 * x), dense, x)

    check(net_of(branches), X, "lora", rank=2)
    model = net_of(loop)  # a loop has no gradient
    peft = noisy(model.init(KEY, X)["params"], jpeft.lora(rank=2))
    merged = model.apply({"params": jpeft.merge(peft)}, X)
    chex.assert_trees_all_close(jpeft.wrap(model.apply)(peft, X), merged, atol=1e-5)

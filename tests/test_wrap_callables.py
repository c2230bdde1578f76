"""What people pass to `jpeft.wrap`: a model, its methods, models around models, functions that run them; what is refused."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from host_checks import noisy

import jpeft

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 8))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(8, name="down")(x))
        return nn.Dense(8, name="up")(x)

    def half(self, x):
        return self(x) / 2


class Pretrained:
    """As the Flax models of transformers: a module, its parameters, and calls that take others by keyword."""

    def __init__(self):
        self.module = Net()
        self.params = self.module.init(KEY, X)["params"]

    def __call__(self, x, params=None, dropout_rng=None, train=False):
        rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
        return self.module.apply({"params": params or self.params}, x, train, rngs=rngs)

    def encode(self, x, params=None):
        return self(x, params)


class Trainer:
    def __init__(self, model):
        self.model = model

    def of_variables(self, variables, x):
        return self.model.apply(variables, x)

    def of_params(self, params, x):
        return self.model.apply({"params": params}, x)


model, pretrained = Net(), Pretrained()
FORMS = {
    "model": model,
    "model.__call__": model.__call__,
    "partial of a model": functools.partial(model, train=False),
    "partial of apply": functools.partial(model.apply, train=False),
    "pretrained": pretrained,
    "pretrained.__call__": pretrained.__call__,
    "pretrained.encode": pretrained.encode,
    "partial of pretrained": functools.partial(pretrained, train=False),
    "of variables": lambda variables, x: model.apply(variables, x),
    "of params": lambda params, x: model.apply({"params": params}, x),
    "jitted inside": lambda variables, x: jax.jit(model.apply)(variables, x),
    "pretrained inside": lambda params, x: pretrained(x, params=params),
    "bound to a trainer": Trainer(model).of_variables,
    "bound to a trainer, of params": Trainer(model).of_params,
    "bind": lambda variables, x: model.bind(variables)(x),
    "a model made inside": lambda params, x: Net().apply({"params": params}, x),
}


@pytest.fixture(scope="module")
def peft():
    return noisy(pretrained.params, jpeft.lora(rank=2))


@pytest.mark.parametrize("form", FORMS)
def test_what_wrap_takes(peft, form):
    """Without a warning: the layers are adapted, and no weights are merged."""
    want = model.apply({"params": jpeft.merge(peft)}, X)
    fn = FORMS[form]
    got = [jpeft.wrap(fn)(peft, X), jpeft.wrap(fn, peft.method)(peft.variables, X), jax.jit(jpeft.wrap(fn))(peft, X)]
    chex.assert_trees_all_close(got, [want] * 3, atol=1e-5)


def test_other_methods_and_dropout(peft):
    want: Any = model.apply({"params": jpeft.merge(peft)}, X)
    chex.assert_trees_all_close(jpeft.wrap(model.half)(peft, X), want / 2, atol=1e-5)
    rngs = {"dropout": jax.random.key(1)}
    noised = jpeft.wrap(model.apply)(peft, X, train=True, rngs=rngs)
    assert jnp.abs(noised - want).max() > 0.1
    for fn in (pretrained, lambda variables, x, train, rngs: model.apply(variables, x, train, rngs=rngs)):
        chex.assert_trees_all_close(jpeft.wrap(fn)(peft, X, train=True, rngs=rngs), noised, atol=1e-5)


def test_the_error_is_the_models_own(peft):
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        jpeft.wrap(lambda variables, x: model.apply(variables, x, nothing=1))(peft, X)


def test_geometry_is_read_off_the_module(peft):
    axes = jpeft.kernel_axes(pretrained.module, peft.params, X)
    assert [path for path, _ in axes] == ["down/kernel", "up/kernel"]
    for target, way_out in ((pretrained, "model.module"), (model.apply, "give the model")):
        with pytest.raises(ValueError, match=f"no layers that can be read: .*{way_out}"):
            jpeft.kernel_axes(target, peft.params, X)


def test_what_wrap_refuses(peft):
    bound = model.bind({"params": peft.params})
    refused = {
        "jitted already": [jax.jit(model.apply), functools.partial(jax.jit(model.apply)), nnx.jit(model.apply)],
        "A Net was given to wrap that is bound": [bound, bound.half],
    }
    for message, callables in refused.items():
        for fn in callables:
            with pytest.raises(ValueError, match=message):
                jpeft.wrap(fn)

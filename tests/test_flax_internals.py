"""The private parts of flax that the linen host uses: that they exist, and behave as the host relies on."""

import re
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jpeft.hosts.linen import flax_internals
from jpeft.hosts.nnx import flax_internals as nnx_internals

KEY = jax.random.key(0)
ROOT = Path(__file__).parents[1]


# --- what flax keeps private ------------------------------------------------------------------------------------------------------------

VERSION = f"flax {flax.__version__} changed what jpeft/hosts/linen/flax_internals.py relies on: "


def seen_inside(module: nn.Module, look: Any, *args: Any, **variables: Any) -> list[Any]:
    """What `look(context)` gives at each intercepted call."""
    found = []

    def record(next_fun, args, kwargs, context):
        if context.method_name == "__call__":
            found.append(look(context))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        module.apply(variables, *args)
    return found


def test_flax_gives_a_collection_of_a_scope():
    model, x = nn.Dense(4), jnp.ones((2, 3))
    params = {**model.init(KEY, x)["params"], "jpeft": {"leaf": jnp.ones(1)}}
    (own,) = seen_inside(model, lambda context: dict(flax_internals.collection(context.module, "params")), x, params=params)
    assert own.keys() == params.keys(), VERSION + "Scope._collection('params') must hold all entries of the module, leaves of methods too."
    assert own["kernel"] is params["kernel"], VERSION + "Scope._collection must give the arrays themselves."
    (cache,) = seen_inside(model, lambda context: flax_internals.collection(context.module, "cache"), x, params=params)
    assert not cache, VERSION + "Scope._collection must be empty for a collection that was not given."


LIFTS = {
    "remat": nn.remat(nn.Dense),
    "jit": nn.jit(nn.Dense),
    "vmap": nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False}),
    "scan": nn.scan(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}),
    "map_variables": nn.map_variables(nn.Dense, "params", lambda tree: tree, init=True),
}


@pytest.mark.parametrize("name", LIFTS)
def test_flax_tells_lifted_classes(name):
    """The class that a transform makes enters the transform; the class inside does not."""
    lifted = LIFTS[name](4)
    message = f"flax_internals.enters_transform no longer tells the class that nn.{name} makes from the one inside."
    assert flax_internals.enters_transform(lifted, "__call__"), VERSION + message
    assert not flax_internals.enters_transform(nn.Dense(4), "__call__"), VERSION + message
    if name == "scan":
        return
    x = jnp.ones((2, 3))
    calls = seen_inside(lifted, lambda context: type(context.module), x, **lifted.init(KEY, x))
    assert calls == [nn.Dense], VERSION + "an interceptor must see the module inside of the transform, of the class that was lifted."

    class Subclass(LIFTS[name]):
        def __call__(self, x):
            return super().__call__(x)

    calls = seen_inside(Subclass(4), lambda c: flax_internals.enters_transform(c.module, c.method_name), x, **lifted.init(KEY, x))
    assert calls == [True, False], VERSION + message


@pytest.mark.parametrize("transform", [nn.remat, nn.jit])
def test_flax_tells_decorated_methods(transform):
    """A decorated method is called once, so the call does not only enter a transform."""

    class Plain(nn.Module):
        @transform
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

    x = jnp.ones((2, 3))
    calls = seen_inside(Plain(), lambda c: flax_internals.enters_transform(c.module, c.method_name), x, **Plain().init(KEY, x))
    assert calls == [False, False], VERSION + "a decorated method and the layer inside must be intercepted once each."
    lifted = transform(Plain)()
    assert flax_internals.enters_transform(lifted, "__call__"), VERSION + "a lifted class whose method is decorated enters a transform."


def test_private_flax_is_used_in_one_file():
    """`scope._x`, `module._x`, and flax's underscored modules appear in flax_internals.py alone."""
    private = re.compile(r"\bscope\._\w|\bmodule\._[a-z]|co_filename|co_qualname|flax[\w.]*\._\w|linen import transforms")
    files = [path for path in (ROOT / "jpeft").rglob("*.py") if path.name != "flax_internals.py"]
    assert [str(path.relative_to(ROOT)) for path in files if private.search(path.read_text())] == []


def test_jit_keeps_traces_by_structure():
    """What the tags stand on: `nn.jit` looks a trace up by the structure of the parameters, across calls and functions."""
    traces = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(1)
            return nn.Dense(2)(x)

    x, model = jnp.ones((1, 3)), nn.jit(Counted)()
    params = Counted().init(KEY, x)["params"]
    traces.clear()
    for extra in ({}, {}, {"jpeft": {"one": {}}}, {"jpeft": {"two": {"leaf": 1.0}}}, {"jpeft": {"two": {"leaf": 1.0}}}):
        model.apply({"params": {**params, **extra}}, x)
    np.testing.assert_array_equal(len(traces), 3, VERSION + "nn.jit must trace anew for another structure, and only then.")


def test_can_change():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    seen = []
    jax.make_jaxpr(lambda x: seen.append(nnx_internals.can_change(model)) or x)(1.0)
    assert nnx_internals.can_change(model), VERSION + "a module of this trace can be changed."
    assert seen == [False], VERSION + "a module of an outer trace cannot."

"""Unknown layers in the middle of random models: adapted exactly, or refused by name."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import jpeft

KEY, WIDTH = jax.random.key(0), 16
X = jax.random.normal(KEY, (2, 24, WIDTH))
init = nn.initializers.lecun_normal()


@pytest.fixture(autouse=True, scope="module")
def loose():
    """Layers of users add a bias [8] to [2, 5, 8]."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Product(nn.Module):
    """A dense layer as anyone may write it."""

    how: str

    @nn.compact
    def __call__(self, x):
        match self.how:
            case "matmul":
                return x @ self.param("kernel", init, (WIDTH, WIDTH)) + self.param("bias", nn.initializers.zeros, (WIDTH,))
            case "einsum of heads":
                return jnp.einsum("btd,ndh->btnh", x, self.param("w", init, (2, WIDTH, WIDTH // 2))).reshape(x.shape)
            case "transposed":
                return jax.lax.dot_general(x, self.param("weight", init, (WIDTH, WIDTH)), (((2,), (1,)), ((), ())))
            case "two kernels":
                gate, up = self.param("gating", init, (2, WIDTH, WIDTH))
                return nn.gelu(x @ gate) * (x @ up)
            case "inside jit":
                return jax.jit(lambda x, w: jnp.tanh(x @ w))(x, self.param("kernel", init, (WIDTH, WIDTH)))
            case "casts":
                return (x @ self.param("kernel", init, (WIDTH, WIDTH)).astype(jnp.bfloat16).astype(x.dtype)) * 0.5
            case "normalised":
                w = self.param("kernel", init, (WIDTH, WIDTH))
                return x @ (w / jnp.linalg.norm(w, axis=0))
            case "put together":
                parts = [self.param(name, init, (WIDTH, WIDTH // 2)) for name in ("left", "right")]
                return x @ jnp.concatenate(parts, axis=1)
            case "sows":
                y = x @ self.param("kernel", init, (WIDTH, WIDTH))
                self.sow("intermediates", "norm", jnp.sum(y**2))
                return y
            case "with a submodule":
                return nn.Dense(WIDTH, name="inner")(x @ self.param("kernel", init, (WIDTH, WIDTH)))
        raise AssertionError(self.how)


class ByName(nn.Module):
    """A layer that runs by a method of another name."""

    def setup(self):
        self.kernel = self.param("kernel", init, (WIDTH, WIDTH))

    def project(self, x):
        return x @ self.kernel


class CallsByName(nn.Module):
    """Runs a `ByName`."""

    def setup(self):
        self.down = ByName()

    def __call__(self, x):
        return self.down.project(x)


class Shared(nn.Module):
    """Two modules with one scope."""

    @nn.compact
    def __call__(self, x):
        inner = Product("matmul")
        nn.share_scope(self, inner)
        return inner(x)


class Reads(nn.Module):
    """Reads the parameters of its submodule past the submodule."""

    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(WIDTH, use_bias=False, name="inner")
        return inner(x) @ inner.variables["params"]["kernel"].T


class Tuple(nn.Module):
    """Returns something else in front of the hidden state."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(WIDTH, name="inner")(x)
        return {"cache": y[..., :2]}, y


KINDS: dict[str, Callable[[str], Callable[[Any], Any]]] = {
    **{
        how: lambda name, how=how: Product(how, name=name)
        for how in (
            "matmul",
            "einsum of heads",
            "transposed",
            "two kernels",
            "inside jit",
            "casts",
            "normalised",
            "put together",
            "sows",
            "with a submodule",
        )
    },
    "by name": lambda name: CallsByName(name=name),
    "shared scope": lambda name: Shared(name=name),
    "read elsewhere": lambda name: Reads(name=name),
    "tuple": lambda name: lambda x: Tuple(name=name)(x)[1],
}


class Block(nn.Module):
    """Known layers around unknown ones."""

    kinds: tuple[str, ...]

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(WIDTH, name="query")(nn.LayerNorm(name="norm")(x))
        for i, kind in enumerate(self.kinds):
            h = h + KINDS[kind](f"unknown_{i}")(h)
        return x + nn.Dense(WIDTH, name="out")(nn.gelu(h)), None


class Net(nn.Module):
    """Blocks, numbered or stacked, under a lifted transform."""

    kinds: tuple[str, ...]
    lift: str

    @nn.compact
    def __call__(self, x):
        if self.lift.startswith("scan"):
            axes = {"params": int(self.lift[-1]), "intermediates": 0}
            x, _ = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=2)(self.kinds, name="layers")(x, None)
        else:
            block = {"plain": Block, "remat": nn.remat(Block), "jit": nn.jit(Block)}[self.lift]
            for i in range(2):
                x, _ = block(self.kinds, name=f"block_{i}")(x)
        return nn.Dense(3, name="classifier")(x)


METHODS: dict[str, Callable[[str], dict[str, Any]]] = {
    "lora": lambda block: {"rank": 1, "target": r".*/(kernel|w|weight|gating|left|right)"},
    "adapter": lambda block: {"size": 2, "target": f"{block}/(query|unknown_0|out)(/.*)?/(kernel|w|weight|gating|left)"},
    "bitfit": lambda block: {},
    "freeze": lambda block: {"top": 1},
}


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=2).map(tuple),
    lift=st.sampled_from(["plain", "remat", "jit", "scan0", "scan1"]),
    method=st.sampled_from(sorted(METHODS)),
)
def test_an_unknown_layer_never_changes_the_result_in_silence(kinds: tuple[str, ...], lift: str, method: str):
    check(Net(kinds, lift), method)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_lora_around_each_unknown_layer(kind: str):
    check(Net((kind,), "plain"), "lora", cost=True)


def check(model: nn.Module, method: str, *, cost: bool = False) -> None:
    """A model is adapted exactly and at the factored cost, or an error or a warning names a module."""
    params = jax.jit(model.init)(KEY, X)["params"]
    block = "(?P<block>layers)" if "layers" in params else r"(?P<block>block_\d+)"
    try:
        peft = jpeft.apply(params, method, model=model, inputs=(X,), **METHODS[method](block))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run(model, peft)
    except ValueError as refusal:
        # By name: of a module, a leaf, or what there is.
        assert re.search(r"'[\w/]*(unknown_\d|inner|query|out|layers|block)[\w/]*'", str(refusal)), refusal
        return
    costly = [str(warning.message) for warning in said]
    assert all("register_layer" in message and "unknown" in message for message in costly)
    if cost and not costly:
        forward = jpeft.wrap(model.apply)
        flops = lambda fn, *args: jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]
        loss = lambda adapter: jnp.sum(forward(peft.replace(adapter=adapter), X) ** 2)
        step, once = flops(jax.grad(loss), peft.adapter), flops(lambda p: model.apply({"params": p}, X), params)
        assert step <= 2.3 * once


def run(model: nn.Module, peft: jpeft.Peft) -> None:
    """Identity at first, a gradient for every leaf, merged as wrapped."""
    base, forward = model.apply({"params": peft.params}, X), jpeft.wrap(model.apply)
    # The weights of a new bottleneck are small, and not zero.
    chex.assert_trees_all_close(forward(peft, X), base, rtol=1e-3, atol=1e-3 if peft.method.why_no_merge else 1e-5)
    noise = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape, leaf.dtype)
    peft = peft.replace(adapter=jax.tree.map(noise, peft.adapter))

    def loss(adapter: Any) -> tuple[jax.Array, jax.Array]:
        out = forward(peft.replace(adapter=adapter), X)
        return jnp.sum(out**2), out

    grads, wrapped = jax.grad(loss, has_aux=True)(peft.adapter)
    assert not [path for path, leaf in jpeft.flatten(grads).items() if not jnp.abs(leaf).max() > 0]
    if peft.method.why_no_merge is None:
        chex.assert_trees_all_close(wrapped, model.apply({"params": jpeft.merge(peft)}, X), rtol=1e-4, atol=1e-4)

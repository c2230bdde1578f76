"""`jpeft.check`: what is right passes, and each kind of fault is named."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jpeft
from jpeft.core.method import Method
from jpeft.hosts.check import Report

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 32))


class Net(nn.Module):
    """Two blocks, a normalised kernel, and a layer that does not run."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            h = nn.Dense(64, name=f"up_{i}")(nn.LayerNorm(name=f"norm_{i}")(x))
            x = x + nn.Dense(32, name=f"down_{i}")(nn.gelu(h))
        w = self.param("odd", nn.initializers.lecun_normal(), (32, 32))
        unused = self.param("unused", nn.initializers.zeros, (3, 4))
        del unused
        return nn.Dense(4, name="classifier")(x @ (w / jnp.linalg.norm(w)))


MODEL = Net()


@pytest.fixture(scope="module")
def params():
    return MODEL.init(KEY, X)["params"]


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {"rank": 2}), ("bitfit", {}), ("adapter", {"size": 4, "target": "(up|down)_0/kernel"})]
)
def test_what_is_right_passes(params: Any, method: str, options: dict[str, Any]):
    peft = jpeft.apply(params, method, **options)
    report = jpeft.check(MODEL, peft, X).raise_if_bad()
    assert report.ok
    assert not report.dead
    assert report.unread == ("unused",)
    assert "odd" in report.left
    assert (report.merge is None) == (method == "adapter")
    text = str(report)
    assert text.startswith("jpeft.")
    assert all(f"ok   {what}" in text for what in ("begins", "learns", "cost"))


def test_the_parts_of_a_chain_are_seen_together(params: Any):
    chain = jpeft.chain(bitfit=jpeft.bitfit(), lora=jpeft.lora(rank=2), adapter=jpeft.adapter(size=3, target="(up|down)_0/kernel"))
    report = jpeft.check(MODEL, jpeft.apply(params, chain), X).raise_if_bad()
    assert {"up_0/kernel", "up_0/bias", "norm_0/bias"} <= set(report.adapted)
    assert "down_0" in report.added


def test_a_function_of_parameters_and_an_nnx_model_can_be_checked(params: Any):
    class Twin(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.one, self.two = nnx.Linear(32, 32, rngs=rngs), nnx.Linear(32, 4, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.two(nnx.gelu(self.one(x)))

    model = Twin(nnx.Rngs(0))
    assert jpeft.check(model, jpeft.apply(model, "lora", rank=2, head=None), X).ok
    assert jpeft.check(lambda params, x: MODEL.apply({"params": params}, x), jpeft.apply(params, "bitfit"), X).ok


def test_dear_layers_are_named(params: Any):
    report = jpeft.check(MODEL, jpeft.apply(params, "lora", target="odd", rank=1, head=None), X)
    (said,) = [finding.text for finding in report.findings if finding.what == "warning"]
    assert "'odd'" in said
    assert "register_layer" in said


class Faulty(Method):
    """Adds a number to the outputs of the model and has a leaf that does nothing."""

    name = "faulty"
    summary = "a method with faults"
    why_no_merge = None
    begins_within = 0.0

    def init(self, key: jax.Array, params: Any, *, stats: Any = None) -> Any:
        """One leaf that moves the outputs, and one that does not."""
        del key, params, stats
        return {"up_0": {"+": {"shift": jnp.ones(()), "idle": jnp.zeros(2)}}}

    def call(self, layer: jpeft.Layer, inputs: Any, leaves: Any, rng: Any) -> Any:
        """Shift."""
        del rng
        return layer(*inputs) + leaves["+"]["shift"]

    def merge(self, params: Any, adapter: Any) -> Any:
        """Forget the change."""
        del adapter
        return params


def test_each_fault_is_named(params: Any):
    report = jpeft.check(MODEL.apply, jpeft.apply(params, Faulty()), X)
    assert isinstance(report, Report)
    assert [problem.partition(":")[0] for problem in report.problems] == ["begins", "learns", "merges"]
    assert report.dead == ("up_0/+/idle",)
    with pytest.raises(ValueError, match="does not work as it should on this model.*idle"):
        report.raise_if_bad()


def test_a_function_that_has_a_method_is_refused(params: Any):
    peft = jpeft.apply(params, "lora", rank=2)
    with pytest.raises(ValueError, match="takes the model itself"):
        jpeft.check(jpeft.wrap(MODEL.apply, peft.method), peft, X)
    with pytest.raises(ValueError, match="takes a Peft"):
        inspect.unwrap(jpeft.check)(MODEL, params, X)  # without the tests' own check of types

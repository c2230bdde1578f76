"""Activations of a model in bfloat16: none is made in float32 for a method's sake, and none is stored twice."""

from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.extend.core import jaxprs_in_params
from tables import noised

import jpeft
from jpeft.models import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

BATCH, LENGTH, WIDTH = 2, 24, 16
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 20}
HALF = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
IDS = jnp.ones((BATCH, LENGTH), jnp.int32)


class Mlp(nn.Module):
    """Layers that take their dtype from parameters and inputs, which float32 leaves would widen."""

    @nn.compact
    def __call__(self, x):
        dense = lambda width, name: nn.Dense(width, param_dtype=jnp.bfloat16, name=name)
        query = nn.DenseGeneral((2, 8), param_dtype=jnp.bfloat16, name="query")(x)
        return x + dense(WIDTH, "down")(jnp.tanh(dense(48, "up")(x))) + query.reshape(x.shape)


MODELS = {
    "mlp": (Mlp(), jnp.ones((BATCH, LENGTH, WIDTH), jnp.bfloat16)),
    "bert": (BertForSequenceClassification(BertConfig(num_hidden_layers=1, **SHAPE, **HALF), 2), IDS),
    "llama": (LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_key_value_heads=1, **SHAPE, **HALF)), IDS),
}
CASES = [
    ("mlp", {"method": "lora"}),
    ("mlp", {"method": "dora"}),
    ("mlp", {"method": "ia3", "target": "(down|up|query)/kernel"}),
    *((model, {"method": method}) for model in ("bert", "llama") for method in ("lora", "dora", "ia3", "adapter", "compacter")),
    *((model, {"method": method, "length": 3}) for model in ("bert", "llama") for method in ("prompt_tuning", "p_tuning")),
]


def zeros(tree):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def wide_activations(fn, *args):
    """Count the float32 arrays of a number for each token and feature that a program makes, by the operation that makes them."""
    found = Counter()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            for out in equation.outvars:
                shape = tuple(getattr(out.aval, "shape", ()))
                if len(shape) == 3 and shape[0] == BATCH and shape[-1] >= WIDTH and out.aval.dtype == jnp.float32:
                    found[equation.primitive.name] += 1
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


@pytest.mark.parametrize(("name", "options"), CASES)
def test_no_activation_is_widened(name, options):
    model, inputs = MODELS[name]
    params = zeros(jax.eval_shape(model.init, jax.random.key(0), inputs)["params"])
    peft = zeros(jax.eval_shape(lambda params: jpeft.apply(params, **options), params))
    forward = jpeft.wrap(model.apply)
    assert wide_activations(forward, peft, inputs) == wide_activations(model.apply, {"params": params}, inputs)
    assert forward(peft, inputs).dtype == model.apply({"params": params}, inputs).dtype


def test_the_gradient_of_a_prompt_is_summed_in_float32():
    """In bfloat16 a sum over many texts stops growing: 256 + 1 = 256."""
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=1, **SHAPE, **HALF), 2)
    params = noised(model.init(jax.random.key(0), IDS)["params"], 0.3)
    peft = jpeft.apply(params, "prompt_tuning", length=3, key=jax.random.key(1))
    forward = jpeft.wrap(model.apply)
    ids = jnp.tile(jnp.arange(8)[None], (600, 1))

    def gradient(ids):
        return jax.grad(lambda adapter: forward(peft.replace(adapter=adapter), ids)[:, 0].sum())(peft.adapter)

    one, many = (
        next(leaf for path, leaf in jpeft.flatten(gradient(x)).items() if "head" not in path and leaf.shape == (3, WIDTH))
        for x in (ids[:1], ids)
    )
    np.testing.assert_allclose(many, 600 * one, rtol=0.02, atol=0.02 * 600 * float(jnp.abs(one).max()))


@pytest.mark.parametrize(
    "options", [{"method": "lora", "target": ".*_proj/kernel"}, {"method": "dora", "target": ".*_proj/kernel"}, {"method": "adapter"}]
)
def test_recomputation_stores_a_changed_layer_once(options, capsys):
    """With remat="dots" a block stores what its products made; the summands of a changed output are not stored beside their sum."""
    config = LlamaConfig(num_hidden_layers=2, num_key_value_heads=1, remat="dots", **SHAPE, **HALF)
    model = LlamaForCausalLM(config)
    params = zeros(jax.eval_shape(model.init, jax.random.key(0), IDS)["params"])
    peft = zeros(jax.eval_shape(lambda params: jpeft.apply(params, **options), params))
    forward = jpeft.wrap(model.apply)

    def stored(fn, tree):
        print_saved_residuals(lambda tree: fn(tree).astype(jnp.float32).sum(), tree)
        sizes = []
        for line in capsys.readouterr().out.splitlines():
            dtype, _, shape = line.split(" ")[0].rstrip("]").partition("[")
            if "argument" not in line and "constant" not in line and shape.startswith(f"{BATCH},"):
                sizes.append(np.prod([int(size) for size in shape.split(",")]) * (2 if dtype == "bf16" else 4))
        return sum(sizes)

    bare = stored(lambda params: model.apply({"params": params}, IDS), params)
    assert 0 < stored(lambda adapter: forward(peft.replace(adapter=adapter), IDS), peft.adapter) <= 1.1 * bare

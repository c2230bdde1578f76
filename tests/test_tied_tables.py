"""A table that is the head of its model, too, of which the look-ups alone change."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.base import IDS, MASK
from goldens.golden import Golden, base
from tables import noised
from test_goldens import assert_close
from test_lora_layers import NNXTied, Tied

import jpeft
from jpeft.models.generation.generate import generate

KEY = jax.random.key(0)
METHODS = {
    "lora": jpeft.lora(rank=2, target=["table"], tied="lookup"),
    "start": jpeft.lora(rank=2, target=["table"], tied="lookup", init="pissa", view="factored"),
    "dora": jpeft.dora(rank=2, target=["table"], tied="lookup"),
}


@pytest.mark.parametrize("host", ["linen", "nnx"])
@pytest.mark.parametrize("name", METHODS)
def test_only_look_ups_change(name, host):
    model, ids = Tied() if host == "linen" else NNXTied(), jnp.arange(12).reshape(2, 6)
    params = model.init(KEY, ids)["params"] if host == "linen" else nnx.state(model, nnx.Param)
    peft = jpeft.apply(params, method=METHODS[name])
    peft = peft.replace(adapter=noised(peft.adapter))
    if host == "linen":
        got = jpeft.wrap(model.apply, peft.method)(peft.variables, ids)
    else:
        got = jpeft.wrap(model)(peft, ids)
    table = jpeft.flatten(peft.params)["table/embedding"]
    both = jpeft.flatten(jpeft.merge(peft.replace(method=peft.method.replace(tied="both"))))["table/embedding"]
    assert jnp.abs(both - table).max() > 1e-2
    chex.assert_trees_all_close(got, jnp.tanh(both[ids]) @ table.T, atol=1e-5)
    with pytest.raises(ValueError, match="'table/embedding' and not the scores"):
        jpeft.merge(peft)
    with pytest.raises(ValueError, match="not the scores|takes adapters"):
        jpeft.to_lora(peft, rank=1)


def test_around_another_method():
    """DoRA in a chain takes the kernel that the methods before it leave: another in a look-up than in the scores."""
    model, ids = Tied(), jnp.arange(12).reshape(2, 6)
    params = model.init(KEY, ids)["params"]
    peft = jpeft.apply(params, method=jpeft.chain(lora=METHODS["lora"], dora=METHODS["dora"].replace(tied="both")))
    peft = peft.replace(adapter=noised(peft.adapter))
    got = jpeft.wrap(model.apply, peft.method)(peft.variables, ids)
    first = jpeft.Peft(params, peft.adapter["lora"], METHODS["lora"].replace(tied="both"))
    both = METHODS["dora"].replace(tied="both")
    tables = [jpeft.merge(jpeft.Peft(each, peft.adapter["dora"], both))["table"]["embedding"] for each in (jpeft.merge(first), params)]
    chex.assert_trees_all_close(got, jnp.tanh(tables[0][ids]) @ tables[1].T, atol=1e-5)


def test_a_scanned_decoder(tmp_path):
    """HF PEFT's logits, the loss in chunks, and generation."""
    golden = Golden("gpt2", "lora-embedding")
    loaded = base("gpt2", scan=True)
    peft = jpeft.load_hf(golden.write(tmp_path / "in"), loaded.params, model=loaded.model)
    assert peft.method.tied == "lookup"
    wrapped = jpeft.wrap(loaded.model.apply)
    inputs = {"input_ids": jnp.asarray(IDS), "attention_mask": jnp.asarray(MASK)}
    logits = jax.jit(wrapped)(peft, **inputs)
    assert_close(logits, golden.logits)
    labels = jnp.where(MASK[:, 1:] != 0, IDS[:, 1:], -100)
    labels = jnp.pad(labels, ((0, 0), (0, 1)), constant_values=-100)

    def loss(adapter):
        return wrapped(peft.replace(adapter=adapter), **inputs, labels=labels).loss.sum()

    def loss_of_logits(adapter):
        scores = jax.nn.log_softmax(wrapped(peft.replace(adapter=adapter), **inputs))
        return -jnp.where(labels < 0, 0, jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], -1)[..., 0]).sum()

    got, expected = (jax.jit(jax.value_and_grad(each))(peft.adapter) for each in (loss, loss_of_logits))
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
    out = generate(jpeft.wrap(loaded.model.apply, peft.method), peft.variables, IDS[:, :5], max_new_tokens=1)
    np.testing.assert_array_equal(np.asarray(out.tokens)[:, 0], np.asarray(wrapped(peft, IDS[:, :5])[:, -1].argmax(-1)))


def test_both_are_not_written(tmp_path):
    loaded = base("gpt2", scan=True)
    peft = jpeft.apply(loaded.params, method=jpeft.lora(rank=2, target=["wte"]))
    with pytest.raises(ValueError, match="tied='lookup'"):
        jpeft.save_hf(tmp_path / "out", peft, model=loaded.model)

"""Freeze and BitFit: what exactly they choose."""

import chex
import jax
import jax.numpy as jnp
import pytest
from tables import base, batch, case, compiled_flops, noised

import jpeft
from jpeft.models import BertForSequenceClassification, abstract_params
from jpeft.models.bert.config import BertConfig

TINY = dict(vocab_size=17, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12, max_position_embeddings=10)


def chosen(params, method) -> list[str]:
    return list(jpeft.flatten(jax.eval_shape(lambda p: jpeft.apply(p, method=method), params).adapter))


def tiny_bert(**options):
    return abstract_params(BertForSequenceClassification(BertConfig(**TINY, **options), num_labels=2))


def test_bitfit_matches_names_whole():
    """As a substring, `output/dense` would also hit attention's: names are compared component by component."""
    params = tiny_bert()
    paths = chosen(params, jpeft.bitfit(subset=["intermediate/dense"], head=None))
    assert paths == [f"bert/encoder/layer/{i}/intermediate/dense/bias" for i in range(3)]
    assert len(chosen(params, jpeft.bitfit(subset=r".*layer/\d+/output/dense/bias", head=None))) == 3
    assert len(chosen(params, jpeft.bitfit(subset=["output/dense"], head=None))) == 6  # attention/output/dense ends so too


def test_bitfit_leaves_kernels_named_alike_alone():
    params = {"bias_net": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "relative_bias": jnp.ones(3)}
    assert chosen(params, jpeft.bitfit()) == ["bias_net/bias"]


def test_bitfit_without_biases():
    with pytest.raises(ValueError, match=r"no bias parameters.*\['kernel', 'scale'\].*method='lora'"):
        jpeft.apply({"a": {"kernel": jnp.ones((2, 2))}, "n": {"scale": jnp.ones(2)}}, method="bitfit")


def test_key_bias_has_no_gradient():
    """Softmax is invariant to what the key's bias adds to all logits of a query."""
    cell = case("bitfit", "plain")
    loss = lambda a: jnp.sum(jnp.sin(cell.forward(cell.noisy.replace(adapter=a).variables, batch()["x"])))
    grads = jax.grad(loss)(cell.noisy.adapter)["layer_0"]["attn"]
    assert jnp.abs(grads["key"]["bias"]).max() < 1e-6 < 1e-3 < jnp.abs(grads["query"]["bias"]).max()


def test_freeze_counts_from_the_output():
    paths = chosen(tiny_bert(), jpeft.freeze(top=1))
    assert {path.split("/")[3] for path in paths if "layer" in path} == {"2"}
    assert {path.split("/")[0] for path in paths} == {"bert", "classifier"}
    assert "bert/pooler/dense/kernel" in paths
    assert not any("embeddings" in path for path in paths)


def test_freeze_zero_layers_is_head_only():
    assert chosen(tiny_bert(), jpeft.freeze(top=0)) == ["classifier/bias", "classifier/kernel"]


def test_freeze_trains_a_slice_of_scanned_layers():
    whole, scanned = base("plain"), base("scan")
    peft = jpeft.apply(scanned, method=jpeft.freeze(top=1))
    assert peft.adapter["layers"]["up"]["kernel"].shape[0] == 1
    bound = peft.method.bind(scanned, noised(peft.adapter))
    chex.assert_trees_all_equal(bound["layers"]["up"]["kernel"][:-1], scanned["layers"]["up"]["kernel"][:-1])
    assert jnp.abs(bound["layers"]["up"]["kernel"][-1] - scanned["layers"]["up"]["kernel"][-1]).min() > 0
    unrolled = jpeft.apply(whole, method=jpeft.freeze(top=1))
    assert jpeft.summary(peft).trained == jpeft.summary(unrolled).trained


def test_freeze_shortens_the_backward_pass():
    """With one of two blocks trained, the step costs about one backward pass less than with both."""
    cell = case("freeze", "plain")

    def flops(top):
        peft = jpeft.apply(cell.params, method=jpeft.freeze(top=top, also=None))
        forward = jpeft.wrap(cell.model.apply, peft.method)
        # Everything is an argument: constants would be folded, and with them the work that is counted.
        loss = lambda adapter, peft, x: jnp.sin(forward(peft.replace(adapter=adapter).variables, x)).sum()
        return compiled_flops(jax.grad(loss), peft.adapter, peft, batch()["x"])

    forward = compiled_flops(cell.model.apply, {"params": cell.params}, batch()["x"])
    block = flops(2) - flops(1)
    assert flops(0) - forward < 0.1 * forward  # the head alone: nothing below is differentiated
    assert flops(1) - flops(0) == pytest.approx(block, rel=0.25)


def test_freeze_targets_and_patterns():
    params = tiny_bert()
    assert chosen(params, jpeft.freeze(target=["pooler/dense"], head=None)) == ["bert/pooler/dense/bias", "bert/pooler/dense/kernel"]
    by_pattern = chosen(params, jpeft.freeze(top=1, layers=r"bert/encoder/layer/(\d+)/", also=None, head=None))
    assert {path.split("/")[3] for path in by_pattern} == {"2"}
    extra = chosen(params, jpeft.freeze(top=0, also=r".*word_embeddings/embedding", head=None))
    assert extra == ["bert/embeddings/word_embeddings/embedding"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": -1}, "freeze: top=-1 must be a whole number of at least 0"),
        ({"top": 4}, "top=4, but the model has 3 layers"),
        ({"layers": "layer"}, "needs exactly one group"),
        ({"layers": r"block/(\d+)"}, "matches none of the"),
        ({"target": "nothing"}, "target='nothing' matches none"),
        ({"also": "nothing"}, "also='nothing' matches none"),
    ],
)
def test_freeze_errors(options, message):
    with pytest.raises(ValueError, match=message):
        chosen(tiny_bert(), jpeft.freeze(**options))


def test_freeze_asks_where_the_layers_are():
    with pytest.raises(ValueError, match="no numbered or stacked layers"):
        jpeft.apply({"a": {"kernel": jnp.ones((2, 2))}}, method="freeze")
    twins = {side: {str(i): {"kernel": jnp.ones((2, 2))} for i in range(2)} for side in ("encoder", "decoder")}
    with pytest.raises(ValueError, match=r"several stacks of equal size, \['decoder', 'encoder'\].*layers="):
        jpeft.apply(twins, method="freeze")


def test_selective_methods_work_on_any_pytree():
    """A registered dataclass, as equinox and NNX states are: no dict, no framework."""
    import dataclasses

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        weight: jax.Array
        bias: jax.Array

    params = [Layer(jnp.ones((3, 3)), jnp.zeros(3)) for _ in range(2)]
    peft = jpeft.apply(params, method="bitfit")
    peft = peft.replace(adapter=noised(peft.adapter))

    def model(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer.weight + layer.bias[None])
        return x

    x = jnp.ones((2, 3))
    merged = jpeft.merge(peft)
    assert isinstance(merged[0], Layer)
    chex.assert_trees_all_close(jpeft.wrap(model, peft.method)(peft.variables, x), model(merged, x))
    assert jnp.abs(model(merged, x) - model(params, x)).max() > 1e-3

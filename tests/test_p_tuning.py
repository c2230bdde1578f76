"""P-tuning: its network against torch, counts, folding, templates."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import noised
from test_prompt_tuning import LENGTHS, MASK, TEMPLATE, language_model, texts

import jpeft
from jpeft.additive.prompts.prompt_encoder import compute_prompt
from jpeft.models import BertConfig, BertModel, abstract_params

WTE = {"wte": {"embedding": jnp.ones((20, 6))}}


def network(**options):
    peft = jpeft.apply(WTE, method="p_tuning", length=5, **options)
    return noised(peft.adapter["+"], scale=0.3)


@pytest.mark.parametrize("hidden", [None, 6, 2])
def test_lstm_encoder_equals_torch(hidden):
    """Embedding -> bidirectional LSTM of two layers -> Linear, ReLU, Linear; None is half of the width of an embedding."""
    import torch

    leaves = network(hidden=hidden)
    wide = hidden or 3
    theirs = torch.nn.LSTM(6, wide, num_layers=2, bidirectional=True, batch_first=True)
    linears = {"first": torch.nn.Linear(2 * wide, 6), "second": torch.nn.Linear(6, 6)}
    put = lambda leaf, transpose=False: torch.tensor(np.array(leaf).T if transpose else np.array(leaf))
    for layer in "01":
        for direction, suffix in (("forward", ""), ("backward", "_reverse")):
            mine = leaves["lstm"][layer][direction]
            for part, name in (("input", "ih"), ("hidden", "hh")):
                getattr(theirs, f"weight_{name}_l{layer}{suffix}").data = put(mine[part]["kernel"], transpose=True)
                getattr(theirs, f"bias_{name}_l{layer}{suffix}").data = put(mine[part]["bias"])
    for name, linear in linears.items():
        linear.weight.data, linear.bias.data = put(leaves["mlp"][name]["kernel"], transpose=True), put(leaves["mlp"][name]["bias"])
    with torch.no_grad():
        states = theirs(put(leaves["embedding"])[None])[0]
        want = linears["second"](torch.relu(linears["first"](states)))[0].numpy()
    np.testing.assert_allclose(compute_prompt(leaves), want, atol=1e-5)


def test_mlp_encoder():
    """W_2 relu(W_1 E + b_1) + b_2."""
    made = network(encoder="mlp")
    leaves = jax.tree.map(np.array, made)
    first, second = leaves["mlp"]["first"], leaves["mlp"]["second"]
    want = np.maximum(leaves["embedding"] @ first["kernel"] + first["bias"], 0) @ second["kernel"] + second["bias"]
    np.testing.assert_allclose(compute_prompt(made), want, atol=1e-5)


def test_starts_as_torch_does():
    """Embedding N(0, 1), an LSTM's all U(±1/√hidden), a Linear's U(±1/√inputs)."""
    leaves = jpeft.flatten(jpeft.apply({"wte": {"embedding": jnp.ones((9, 64))}}, method="p_tuning", length=50).adapter["+"])
    assert abs(float(leaves.pop("embedding").std()) - 1) < 0.1
    for path, leaf in leaves.items():
        bound = (32 if path.startswith("lstm") else 64) ** -0.5
        assert 0.9 * bound < float(jnp.abs(leaf).max()) <= bound, path


@pytest.mark.parametrize(("width", "count", "stored"), [(768, 8_278_272, 6_912), (1024, 14_707_712, 9_216)])
def test_counts(width, count, stored):
    """The authors' LAMA setting: nine pseudo tokens, half of the width in each direction; the LSTM alone has 7,090,176 for d = 768."""
    heads = {"num_attention_heads": width // 64, "hidden_size": width, "num_hidden_layers": 1}
    params = abstract_params(BertModel(BertConfig.bert_base_cased(**heads)))
    method = jpeft.p_tuning(template=(("start", 3), (("after", 103), 3), ("end", 3)))
    peft = jax.eval_shape(lambda p: jpeft.apply(p, method=method), params)
    assert jpeft.summary(peft).trained == count
    assert jpeft.summary(jax.eval_shape(jpeft.fold, peft)).stored == stored
    if width == 768:
        assert sum(leaf.size for leaf in jax.tree.leaves(peft.adapter["+"]["lstm"])) == 7_090_176


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_folds_to_a_prompt_at_the_same_places(family, tmp_path):
    """The folded adapter is a prompt's and gives the same logits; either is saved and loaded, and the unfolded one can be trained on."""
    model, (ids, mask) = language_model(family), texts(encoder=family == "bert")
    ids[0, 3] = MASK
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    peft = jpeft.apply(params, method="p_tuning", template=TEMPLATE)
    peft = peft.replace(adapter=noised(peft.adapter))
    folded = jpeft.fold(peft)
    assert folded.method == jpeft.prompt_tuning(template=TEMPLATE)
    assert jpeft.fold(folded) is folded
    (prompt,) = jax.tree.leaves(folded.adapter)
    np.testing.assert_allclose(prompt, compute_prompt(peft.adapter["+"]))
    run = lambda p: jax.jit(jpeft.wrap(model.apply, p.method))(p.variables, ids, mask)
    chex.assert_trees_all_close(run(folded), run(peft), atol=1e-5)
    for name, one in (("folded", folded), ("unfolded", peft)):
        jpeft.save(tmp_path / name, one)
        loaded = jpeft.load(tmp_path / name, params)
        assert loaded.method == one.method
        chex.assert_trees_all_equal(loaded.adapter, one.adapter)
    assert run(folded).shape[:2] == (2, max(LENGTHS))


def test_folds_in_a_chain():
    model, (ids, mask) = language_model("bert"), texts()
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    method = jpeft.chain(prompt=jpeft.p_tuning(length=3, encoder="mlp"), prefix=jpeft.prefix_tuning(length=2, mlp=4))
    peft = jpeft.apply(params, method=method)
    folded = jpeft.fold(peft)
    assert dict(folded.method.parts)["prompt"] == jpeft.prompt_tuning(length=3)
    run = lambda p: jax.jit(jpeft.wrap(model.apply, p.method))(p.variables, ids, mask)
    chex.assert_trees_all_close(run(folded), run(peft), atol=1e-5)


def test_one_pseudo_token():
    """The few-shot templates have single ones; nothing is squeezed away."""
    peft = jpeft.apply(WTE, method="p_tuning", template=((("before", 7), 1),))
    assert compute_prompt(peft.adapter["+"]).shape == (1, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "gru"}, "encoder='gru' must be one of 'lstm', 'mlp'"),
        ({"hidden": 0}, "hidden=0 must be a whole number of at least 1"),
        ({"encoder": "mlp", "hidden": 4}, "hidden=4 is the width of the LSTM.*None for encoder='mlp'"),
        ({"length": 0}, "length=0 must be a whole number of at least 1"),
        ({"template": [["end", [5]]]}, "has no pseudo tokens"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.apply(WTE, method="p_tuning", **options)


def test_merge_says_why_not():
    with pytest.raises(ValueError, match="lengthens the text"):
        jpeft.merge(jpeft.apply(WTE, method="p_tuning"))

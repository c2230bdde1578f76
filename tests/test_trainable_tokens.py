"""trainable_tokens: its rows against NumPy and HF PEFT, what it trains of heads, its errors, and in chains."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_twins import twins
from tables import base, batch, encoder, gpt2, llama, noised

import jpeft
from jpeft.models import BertForMaskedLM, GPT2LMHeadModel, LlamaForCausalLM

TOKENS = (5, 2, 9)
IDS = np.array([[2, 4, 9, 2], [1, 5, 7, 3]])


def language_model(kind):
    config = {"tied": gpt2().config, "untied": llama().config, "masked": encoder().config}[kind]
    if kind == "untied":
        config = jpeft.models.LlamaConfig(**{**vars(config), "tie_word_embeddings": False})
    model = {"tied": GPT2LMHeadModel, "untied": LlamaForCausalLM, "masked": BertForMaskedLM}[kind](config)
    return model, model.init(jax.random.key(0), IDS)["params"]


@pytest.mark.parametrize("kind", ["tied", "untied", "masked"])
def test_language_models(kind):
    """The wrapped model is the merged one; only the chosen rows, columns and biases differ from the base, by what was added."""
    model, params = language_model(kind)
    peft = jpeft.apply(params, method="trainable_tokens", tokens=TOKENS, head=None)
    names = {"tied": "wte/embedding/rows", "untied": "lm_head/kernel/columns", "masked": "cls/predictions/bias/columns"}
    assert any(path.endswith(names[kind]) for path in jpeft.flatten(peft.adapter))
    assert len(jax.tree.leaves(peft.adapter)) == (1 if kind == "tied" else 2)
    peft = peft.replace(adapter=noised(peft.adapter))
    merged = jpeft.merge(peft)
    forward = jax.jit(jpeft.wrap(model.apply, peft.method))
    chex.assert_trees_all_close(forward(peft.variables, IDS), model.apply({"params": merged}, IDS), atol=1e-5)
    before, after, adapter = (jpeft.flatten(tree) for tree in (params, merged, peft.adapter))
    others = np.setdiff1d(np.arange(23), TOKENS)
    for path in before:
        if f"{path}/rows" in adapter:
            np.testing.assert_allclose(after[path][np.array(TOKENS)] - before[path][np.array(TOKENS)], adapter[f"{path}/rows"], atol=1e-6)
            np.testing.assert_array_equal(after[path][others], before[path][others])
        elif f"{path}/columns" in adapter:
            np.testing.assert_array_equal(after[path][..., others], before[path][..., others])
            assert not np.array_equal(after[path], before[path])
        else:
            np.testing.assert_array_equal(after[path], before[path])


def test_only_the_tokens_of_the_text_have_a_gradient():
    model, params = encoder(), base("bert")
    peft = jpeft.apply(params, method="trainable_tokens", tokens=TOKENS)
    loss = lambda adapter: jpeft.wrap(model.apply)(peft.replace(adapter=adapter), jnp.array([[2, 4, 9, 2]])).std()
    rows = next(leaf for path, leaf in jpeft.flatten(jax.grad(loss)(peft.adapter)).items() if path.endswith("rows"))
    assert [bool(np.abs(row).max() > 0) for row in rows] == [False, True, True]


def test_chains_with_methods_around_the_same_table():
    around = jpeft.lora(rank=2, target=["embed", "up"])
    method = jpeft.chain(lora=around, tokens=jpeft.trainable_tokens(tokens=TOKENS), dora=jpeft.dora(rank=1, target=["embed"]))
    peft = jpeft.apply(base("plain"), method=method)
    peft = peft.replace(adapter=noised(peft.adapter))
    from tables import MODELS

    wrapped = jax.jit(jpeft.wrap(MODELS["plain"].apply, method))(peft.variables, batch()["x"])
    chex.assert_trees_all_close(wrapped, MODELS["plain"].apply({"params": jpeft.merge(peft)}, batch()["x"]), atol=1e-5)


def test_behind_a_prompt():
    method = jpeft.chain(tokens=jpeft.trainable_tokens(tokens=TOKENS, head=None), prompt=jpeft.prompt_tuning(length=2))
    peft = jpeft.apply(base("bert"), method=method)
    peft = peft.replace(adapter=noised(peft.adapter))
    merged = peft.method.parts[0][1].merge(peft.params, peft.adapter["tokens"])
    alone = jpeft.Peft(merged, peft.adapter["prompt"], peft.method.parts[1][1])
    forward = jpeft.wrap(encoder().apply)
    chex.assert_trees_all_close(forward(peft, IDS), forward(alone, IDS), atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # HF PEFT calls transformers by names that those are to lose
@pytest.mark.parametrize(("family", "options"), [("gpt2", {}), ("llama", {"output": None})])
def test_hf_peft(family, options):
    """The same outputs, and the same gradient of the same rows, with a tied head and without one; HF PEFT's leaf holds the new rows."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("peft")
    theirs, loaded = twins(family)
    (table,) = jpeft.layouts.find(loaded.params, "@embedding")
    module = table.split("/")[-2]
    adapted = hf.get_peft_model(theirs, hf.TrainableTokensConfig(token_indices=list(TOKENS), target_modules=[module]))
    delta = next(p for name, p in adapted.named_parameters() if "trainable_tokens_delta" in name)
    peft = jpeft.apply(loaded.params, method="trainable_tokens", tokens=TOKENS, **options)
    peft = peft.replace(adapter=noised(peft.adapter))
    rows = jpeft.flatten(peft.adapter)[f"{table}/rows"]
    np.testing.assert_array_equal(delta.detach().numpy(), jpeft.flatten(loaded.params)[table][np.array(TOKENS)])
    delta.data += torch.tensor(np.asarray(rows))
    logits = adapted(torch.tensor(IDS)).logits
    forward = jpeft.wrap(loaded.model.apply)
    want = logits.detach().numpy()
    np.testing.assert_allclose(forward(peft, IDS), want, atol=1e-5 * np.abs(want).max())
    merged = jpeft.flatten(jpeft.merge(peft))[table]
    np.testing.assert_allclose(merged[np.array(TOKENS)], delta.detach().numpy(), atol=1e-6)
    logits.sin().sum().backward()
    grads = jax.grad(lambda adapter: jnp.sin(forward(peft.replace(adapter=adapter), IDS)).sum())(peft.adapter)
    np.testing.assert_allclose(jpeft.flatten(grads)[f"{table}/rows"], delta.grad.numpy(), rtol=1e-3, atol=1e-3)


def test_counts():
    peft = jpeft.apply(base("bert"), method="trainable_tokens", tokens=TOKENS, head=None)
    summary = jpeft.summary(peft)
    assert summary.trained == summary.stored == summary.changed == 3 * 16


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "needs the ids of the tokens to train"),
        ({"tokens": ()}, "tokens=\\(\\) must be"),
        ({"tokens": (3, 4, 3)}, "has 3 more than once"),
        ({"tokens": (-1,)}, "must be"),
        ({"tokens": (23,)}, "there is no token 23: .* has 23. Give it a row first: .*--add-tokens"),
        ({"tokens": (3,), "output": ["nothing"]}, "output='nothing' matches none"),
    ],
)
def test_errors(options, error):
    with pytest.raises(ValueError, match=error):
        jpeft.apply(base("bert"), method="trainable_tokens", **options)

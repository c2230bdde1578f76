"""Several prompts in one pass, their vote, and a prompt read back as words."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import noised
from test_prompt_tuning import config, texts

import jpeft
from jpeft.models import BertForSequenceClassification


@pytest.fixture(scope="module")
def params():
    model = BertForSequenceClassification(config(), num_labels=3)
    return jax.jit(model.init)(jax.random.key(0), texts()[0])["params"]


def test_one_pass_equals_one_by_one(params):
    """Every member's own prompt and head."""
    model, inputs = BertForSequenceClassification(config(), num_labels=3), texts()
    pefts = [jpeft.apply(params, method="prompt_tuning", length=4) for _ in range(3)]
    pefts = [peft.replace(adapter=noised(peft.adapter, scale=1.0, seed=i)) for i, peft in enumerate(pefts)]
    forward = jpeft.wrap(model.apply, pefts[0].method)
    stacked = jpeft.stack(pefts)
    together = jax.jit(jpeft.ensemble(forward))(stacked.variables, *inputs)
    alone = jax.jit(forward)
    chex.assert_trees_all_close(together, jnp.stack([alone(peft.variables, *inputs) for peft in pefts]), atol=1e-5)
    assert jnp.abs(together[0] - together[1]).max() > 1e-2
    assert all(mine is given for mine, given in zip(jax.tree.leaves(stacked.params), jax.tree.leaves(params)))


def test_majority():
    """Votes first, probabilities among equals: counted in NumPy."""
    logits = np.random.default_rng(0).normal(size=(5, 200, 4)).astype(np.float32) * 3
    got = np.asarray(jpeft.majority(jnp.asarray(logits)))
    shares = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).mean(0)
    tied = 0
    for i, answer in enumerate(got):
        votes = np.bincount(logits[:, i].argmax(-1), minlength=4)
        best = np.flatnonzero(votes == votes.max())
        tied += len(best) > 1
        assert answer == best[shares[i][best].argmax()]
    assert tied > 20


def test_what_cannot_be_stacked(params):
    one = jpeft.apply(params, method="prompt_tuning", length=4)
    with pytest.raises(ValueError, match="at least one"):
        jpeft.stack([])
    with pytest.raises(ValueError, match="adapters of one method, and was given jpeft.prompt_tuning"):
        jpeft.stack([one, jpeft.apply(params, method="bitfit")])
    with pytest.raises(ValueError, match="adapters of one base"):
        jpeft.stack([one, jpeft.apply(jax.tree.map(jnp.array, params), method="prompt_tuning", length=4)])


def test_reads_a_prompt_back(params):
    """The nearest by angle, whatever the length, in NumPy's order; through the fold of P-tuning and inside a chain."""
    table = np.asarray(params["bert"]["embeddings"]["word_embeddings"]["embedding"])
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    peft = jpeft.apply(params, method="prompt_tuning", init="tokens", tokens=[3, 9, 5])
    longer = peft.replace(adapter=jax.tree.map(lambda leaf: 100 * leaf, peft.adapter))
    np.testing.assert_array_equal(jpeft.nearest_tokens(longer).ids[:, 0], [3, 9, 5])
    np.testing.assert_allclose(jpeft.nearest_tokens(longer).similarity[:, 0], 1, atol=1e-5)
    chain = jpeft.apply(params, method=jpeft.chain(lora=jpeft.lora(rank=1), soft=jpeft.p_tuning(length=3, hidden=2)))
    prompt = np.asarray(jpeft.fold(chain).adapter["soft"]["bert"]["embeddings"]["word_embeddings"]["+"]["prompt"])
    found = jpeft.nearest_tokens(chain, count=4)
    np.testing.assert_array_equal(found.ids, np.argsort(-unit(prompt) @ unit(table).T, axis=-1)[:, :4])
    with pytest.raises(ValueError, match="has 0 prompts to read back"):
        jpeft.nearest_tokens(jpeft.apply(params, method="bitfit"))

"""What goes by the length of a text, and what is as long by chance: the inputs and outputs of models that are not ours."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from host_checks import noisy

import jpeft

KEY = jax.random.key(0)
VOCAB, D, LENGTH, ROWS = 12, 6, 5, 3
IDS = jax.random.randint(KEY, (2, LENGTH), 0, VOCAB)


class EncoderDecoder(nn.Module):
    @nn.compact
    def __call__(self, source, target, *, weights=None):
        embed = nn.Embed(VOCAB, D, name="embed")
        logits = nn.Dense(4, name="logits")(embed(target) + embed(source).mean(1, keepdims=True))
        return logits if weights is None else (logits, weights @ logits)


@pytest.mark.parametrize("length", [LENGTH - 1, LENGTH, LENGTH + ROWS, LENGTH + ROWS + 1])
def test_a_target_has_a_length_of_its_own(length):
    model = EncoderDecoder()
    target = jax.random.randint(jax.random.key(1), (2, length), 0, VOCAB)
    params: Any = model.init(KEY, IDS, target)["params"]
    peft = noisy(params, jpeft.prompt_tuning(length=ROWS))
    mean = jnp.concatenate([jnp.broadcast_to(prompt := peft.adapter["embed"]["+"]["prompt"], (2, *prompt.shape)),
                            params["embed"]["embedding"][IDS]], axis=1).mean(1, keepdims=True)  # fmt: skip
    want = (params["embed"]["embedding"][target] + mean) @ params["logits"]["kernel"] + params["logits"]["bias"][None, None]
    chex.assert_trees_all_close(jpeft.wrap(model.apply)(peft, IDS, target), want, atol=1e-5)
    got = jpeft.wrap(model.apply)(peft, IDS, target, weights=jnp.ones((LENGTH, length)))
    chex.assert_trees_all_close(got[0], want, atol=1e-5)


class Outputs(nn.Module):
    """Returns what has an entry for each token, and what may have the same shape without one."""

    queries: int
    width: int

    @nn.compact
    def __call__(self, ids):
        h = nn.Embed(VOCAB, D, name="embed")(ids)
        queries = self.param("queries", nn.initializers.ones, (self.queries, D))
        pooled = nn.Dense(self.width, name="pool")(h.mean(1))
        return {"hidden": h, "scores": h.sum(-1), "pooled": pooled, "queries": h.mean(1, keepdims=True) * queries[None], "note": "text"}


@pytest.mark.parametrize("same", [False, True])
def test_outputs_are_cut_where_they_grow(same):
    longer = LENGTH + ROWS
    model = Outputs(*((longer, longer) if same else (longer + 1, longer + 2)))
    shapes = {
        "embed": {"embedding": (VOCAB, D)},
        "queries": (model.queries, D),
        "pool": {"kernel": (D, model.width), "bias": (model.width,)},
    }
    peft = noisy(jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple)), jpeft.prompt_tuning(length=ROWS, head=None))
    got = jpeft.wrap(model.apply)(peft, IDS)
    assert got.pop("note") == "text"
    assert {name: leaf.shape[1] for name, leaf in got.items()} == {
        "hidden": LENGTH,
        "scores": LENGTH,
        "pooled": model.width,
        "queries": model.queries,
    }


class Body(nn.Module):
    @nn.compact
    def __call__(self, ids, bias):
        h = nn.Embed(VOCAB, D, name="embed")(ids)
        return nn.MultiHeadDotProductAttention(2, name="attention")(h, mask=bias)


class MakesTheMask(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return Body(name="body")(ids, nn.make_causal_mask(ids))


def test_a_mask_that_a_parent_makes():
    model = MakesTheMask()
    params = model.init(KEY, IDS)["params"]
    with pytest.raises(ValueError, match=r"'bias' of 'body' has shape \(2, 1, 5, 5\): only \[batch, length\] can grow.*body=''"):
        jpeft.wrap(model.apply)(noisy(params, jpeft.prompt_tuning(length=ROWS)), IDS)
    peft = noisy(params, jpeft.prompt_tuning(length=ROWS, body=""))
    got = jpeft.wrap(model.apply)(peft, IDS)
    assert got.shape == (2, LENGTH, D)
    assert jnp.abs(got - model.apply({"params": params}, IDS)).max() > 1e-3


class FromEmbeddings(nn.Module):
    """The module around the embedding is given something else first."""

    @nn.compact
    def __call__(self, ids):
        return Pictures(name="text")(jnp.ones((2, 3, 4)), ids)


class Pictures(nn.Module):
    @nn.compact
    def __call__(self, pictures, ids):
        return nn.Embed(VOCAB, D, name="embed")(ids) + pictures.mean()


def test_ids_that_do_not_come_first():
    model = FromEmbeddings()
    params = model.init(KEY, IDS)["params"]
    with pytest.raises(ValueError, match=r"'text' was given float32\[2, 3, 4\] first. Name the module that takes the ids: body=''"):
        jpeft.wrap(model.apply)(noisy(params, jpeft.prompt_tuning(length=ROWS)), IDS)
    assert jpeft.wrap(model.apply)(noisy(params, jpeft.prompt_tuning(length=ROWS, body="")), IDS).shape == (2, LENGTH, D)

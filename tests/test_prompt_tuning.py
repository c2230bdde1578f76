"""Prompt tuning: the text with the prompt in it, placement, padding, caches, starting points, what is refused."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import fit, noised

import jpeft
from jpeft.core.statistics import LabelTokens, Prompt
from jpeft.models import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    abstract_params,
)
from jpeft.models.bert.config import BertConfig

KEY = jax.random.key(0)
VOCAB, WIDTH, ROWS = 17, 8, 5
CLS, SEP, MASK = 14, 15, 16
LENGTHS = (7, 4)


def config(family="bert", **changes):
    if family == "gpt2":
        return GPT2Config(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=40,
            initializer_range=0.5, **changes,
        )  # fmt: skip
    options = dict(
        model_type=family, vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=40, pad_token_id=1 if family == "roberta" else 0, initializer_range=0.5,
        type_vocab_size=0 if family == "distilbert" else 2,
    )  # fmt: skip
    return BertConfig(**(options | changes))


def language_model(family):
    return (GPT2LMHeadModel if family == "gpt2" else BertForMaskedLM)(config(family))


def texts(side="right", encoder=True, pad=0):
    """Two texts of LENGTHS, padded on one side, in encoders between [CLS] and [SEP]: ids and mask."""
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int32)
    ids = np.random.default_rng(0).integers(2, 14, mask.shape).astype(np.int32)
    if encoder:
        ids[:, 0] = CLS
        ids[np.arange(2), np.array(LENGTHS) - 1] = SEP
    ids = np.where(mask, ids, pad)
    if side == "left":
        ids, mask = (np.stack([np.roll(row, max(LENGTHS) - n) for row, n in zip(x, LENGTHS)]) for x in (ids, mask))
    return ids.astype(np.int32), mask


def prompted(model, ids, **options):
    """A model with random parameters and a prompt with noise on it."""
    peft = jpeft.apply(jax.jit(model.init)(KEY, ids)["params"], method="prompt_tuning", **options)
    peft = peft.replace(adapter=noised(peft.adapter, scale=1.0))
    return peft, jax.jit(jpeft.wrap(model.apply, peft.method), static_argnames="cache_length")


def prompt_of(peft):
    (prompt,) = [leaf for path, leaf in jpeft.flatten(peft.adapter).items() if path.endswith("/prompt")]
    return prompt


def in_the_vocabulary(model, peft):
    """The same model with the prompt's rows at the end of its vocabulary: their ids can then be written into the text by hand."""
    rows = len(prompt_of(peft))
    longer = type(model)(dataclasses.replace(model.config, vocab_size=VOCAB + rows))
    extend = lambda path, leaf: (
        jnp.concatenate([leaf, prompt_of(peft)])
        if path.endswith(("word_embeddings/embedding", "wte/embedding"))
        else jnp.pad(leaf, (0, rows))
        if leaf.shape == (VOCAB,)
        else leaf
    )
    params = jpeft.unflatten({path: extend(path, leaf) for path, leaf in jpeft.flatten(peft.params).items()})
    return lambda ids, mask: jax.jit(longer.apply)({"params": params}, ids, mask)


def by_hand(ids, mask, put, pad=0, causal=False):
    """Each text with ``put(tokens)`` in its place: longer ids and mask, padded on the right, and where the output of each token is read."""
    rows, places = [], []
    for text, real in zip(ids, mask):
        row = put([int(t) for t in text[real.astype(bool)]])
        rows.append([token for token, _ in row])
        own = [i for i, (_, ours) in enumerate(row) if not ours]
        places.append([*(i - 1 for i in own[1:]), len(row) - 1] if causal else own)
    length = max(map(len, rows))
    return (
        np.array([row + [pad] * (length - len(row)) for row in rows], np.int32),
        np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int32),
        places,
    )


def ours(count, first=0):
    return [(VOCAB + first + i, True) for i in range(count)]


def text(tokens):
    return [(token, False) for token in tokens]


FAMILIES = ["bert", "roberta", "distilbert", "gpt2"]
TEMPLATE = (("start", 2), (("before", MASK), (-1, 3, -1)), (("after", MASK), 1), ("end", (-1, 4)))


def put_template(tokens, edges):
    """`TEMPLATE`, in plain Python."""
    stop = len(tokens) - edges[1]
    at = tokens.index(MASK) if MASK in tokens else stop
    behind = at + 1 if MASK in tokens else stop
    blocks = {
        0: (edges[0], ours(2)),
        1: (at, [*ours(1, 2), (3, True), *ours(1, 3)]),
        2: (behind, ours(1, 4)),
        3: (stop, [*ours(1, 5), (4, True)]),
    }
    out = []
    for i, token in enumerate([*tokens, None]):
        out += [new for place, block in blocks.values() if place == i for new in block]
        out += [] if token is None else [(token, False)]
    return out


# --- the equation -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["start", "template"])
def test_equals_the_model_with_the_prompt_in_the_text(family, kind):
    """Logits of the text's own tokens, padded on either side, are those of a vocabulary that has the prompt, written in by hand."""
    model, encoder = language_model(family), family != "gpt2"
    edges, pad = (1, 1) if encoder else (0, 0), 1 if family == "roberta" else 0
    ids, mask = texts(encoder=encoder, pad=pad)
    if kind == "template":
        ids[0, 3] = MASK  # and the other text has none
    options = {"length": ROWS} if kind == "start" else {"template": TEMPLATE}
    peft, forward = prompted(model, ids, **options)
    put = lambda tokens: text(tokens[: edges[0]]) + ours(ROWS) + text(tokens[edges[0] :])
    longer, longer_mask, places = by_hand(
        ids, mask, put if kind == "start" else lambda tokens: put_template(tokens, edges), pad, not encoder
    )
    want = in_the_vocabulary(model, peft)(longer, longer_mask)[..., :VOCAB]
    got = forward(peft.variables, ids, mask)
    assert got.shape == (*ids.shape, VOCAB)
    for row, place in enumerate(places):
        np.testing.assert_allclose(got[row, : LENGTHS[row]], want[row, jnp.array(place)], atol=1e-4)
    if family in ("roberta", "gpt2"):  # the other families count positions over padding on the left, with or without a prompt
        left = [np.stack([np.roll(row, len(row) - n) for row, n in zip(x, LENGTHS)]) for x in (ids, mask)]
        got = forward(peft.variables, *left)
        for row, place in enumerate(places):
            np.testing.assert_allclose(got[row, -LENGTHS[row] :], want[row, jnp.array(place)], atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_equals_torch_fed_with_embeddings(family, tmp_path):
    """[P; E(x)] as `inputs_embeds` of transformers' own model, virtual positions cut off its output."""
    import torch
    import transformers

    model, (ids, mask) = language_model(family), texts(encoder=family == "bert")
    peft, forward = prompted(model, ids, length=ROWS)
    jpeft.models.save(tmp_path / "out", model, peft.params)
    hf = {"bert": transformers.BertForMaskedLM, "gpt2": transformers.GPT2LMHeadModel}[family].from_pretrained(tmp_path / "out").eval()
    at = 1 if family == "bert" else 0
    words = hf.get_input_embeddings()(torch.tensor(ids).long())
    prompt = torch.tensor(np.array(prompt_of(peft)))[None].expand(2, -1, -1)
    embeds = torch.cat([words[:, :at], prompt, words[:, at:]], 1)
    longer = torch.tensor(np.concatenate([np.ones((2, ROWS), np.int32), mask], 1))
    with torch.no_grad():
        want = hf(inputs_embeds=embeds, attention_mask=longer).logits.numpy()
    want = np.concatenate([want[:, :at], want[:, at + ROWS :]], 1)
    real = mask.astype(bool)
    np.testing.assert_allclose(forward(peft.variables, ids, mask)[real], want[real], atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("body_only", [False, True])
def test_outputs_are_those_of_the_text(family, body_only):
    """Whatever has an entry for each position is cut: hidden states too; what the first position gives is [CLS]'s."""
    cls = (BertModel if body_only else BertForTokenClassification) if family == "bert" else (GPT2Model if body_only else GPT2LMHeadModel)
    model = cls(config(family), **({"num_labels": 3} if cls is BertForTokenClassification else {}))
    ids, mask = texts(encoder=family == "bert")
    peft = jax.eval_shape(lambda p: jpeft.apply(p, method="prompt_tuning", length=ROWS), abstract_params(model))
    options = {"output_hidden_states": True} if body_only else {}
    shapes = lambda variables, fn: jax.tree.map(jnp.shape, jax.eval_shape(lambda v: fn(v, ids, mask, **options), variables))
    assert shapes(peft.variables, jpeft.wrap(model.apply, peft.method)) == shapes({"params": peft.params}, model.apply)


def test_a_classifier_reads_the_true_first_token():
    model, (ids, mask) = BertForSequenceClassification(config(), num_labels=2), texts()
    peft, forward = prompted(model, ids, length=ROWS)
    body = jpeft.apply(peft.params["bert"], method="prompt_tuning", length=ROWS, stats=peft.adapter)
    hidden = jax.jit(jpeft.wrap(BertModel(config()).apply, body.method))(body.variables, ids, mask).pooled
    head = peft.adapter["classifier"]
    np.testing.assert_allclose(forward(peft.variables, ids, mask), hidden @ head["kernel"] + head["bias"][None], atol=1e-5)
    embeddings, prompt = np.array(peft.params["bert"]["embeddings"]["position_embeddings"]["embedding"]), prompt_of(peft)
    assert embeddings.shape == (40, WIDTH)
    assert prompt.shape == (ROWS, WIDTH)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("template", [None, (("start", 2), ("end", (-1, 3)))])
def test_a_cache_changes_nothing(side, template):
    """The prompt is written once; later tokens come after it; the slots asked for are those of the text."""
    model, (ids, mask) = GPT2LMHeadModel(config("gpt2", scan=True)), texts(side, encoder=False)
    peft, forward = prompted(model, ids, **({"template": template} if template else {"length": ROWS}))
    more = np.random.default_rng(1).integers(2, 14, (2, 3)).astype(np.int32)
    wrapped = jpeft.wrap(model.apply, peft.method)
    prefill = jax.jit(lambda v: wrapped(v, ids, mask, cache_length=max(LENGTHS) + 3, mutable=["cache"]))
    step = jax.jit(lambda v, new: wrapped(v, new, mutable=["cache"]))
    logits, cache = prefill(peft.variables)
    new = 4 if template else ROWS
    assert cache["cache"]["transformer"]["causal"]["tokens"].shape == (2, max(LENGTHS) + 3 + new)
    real = mask.astype(bool)
    np.testing.assert_allclose(logits[real], forward(peft.variables, ids, mask)[real], atol=1e-4)
    out = []
    for part in (more[:, :2], more[:, 2:]):
        logits, cache = step(peft.variables | cache, part)
        out.append(logits)
    if template is None:  # a block at the end stands between the text and its continuation
        for row in range(2):
            whole = np.concatenate([ids[row][real[row]], more[row]])[None]
            np.testing.assert_allclose(np.concatenate(out, 1)[row], forward(peft.variables, whole)[0, -3:], atol=1e-4)
    else:
        longer, longer_mask, _ = by_hand(ids, mask, lambda tokens: ours(2) + text(tokens) + [*ours(1, 2), (3, True)] + text([1, 1, 1]))
        for row, n in enumerate(LENGTHS):
            longer[row, n + new : n + new + 3] = more[row]
        want = in_the_vocabulary(model, peft)(longer, longer_mask)[..., :VOCAB]
        for row, n in enumerate(LENGTHS):
            np.testing.assert_allclose(np.concatenate(out, 1)[row], want[row, n + new : n + new + 3], atol=1e-4)


def test_padding_and_other_examples_do_not_matter():
    model, (ids, mask) = BertForTokenClassification(config(), num_labels=2), texts()
    peft, forward = prompted(model, ids, length=ROWS)
    alone = forward(peft.variables, ids[1:, : LENGTHS[1]])
    chex.assert_trees_all_close(forward(peft.variables, ids, mask)[1:, : LENGTHS[1]], alone, atol=1e-5)


def test_gradients_reach_the_prompt_alone():
    """Every row gets one; what a plain vocabulary's rows get is the same."""
    model, (ids, mask) = language_model("bert"), texts()
    peft, _ = prompted(model, ids, length=ROWS)
    forward = jpeft.wrap(model.apply, peft.method)
    got = jax.jit(jax.grad(lambda a: jnp.sin(forward(peft.replace(adapter=a).variables, ids, mask)).sum()))(peft.adapter)
    given = lambda p: peft.replace(adapter=jax.tree.map(lambda _: p, peft.adapter)).variables
    numeric = lambda direction: (
        (
            jnp.sin(forward(given(prompt_of(peft) + 1e-2 * direction), ids, mask)).sum()
            - jnp.sin(forward(given(prompt_of(peft) - 1e-2 * direction), ids, mask)).sum()
        )
        / 2e-2
    )
    gradient = jax.tree.leaves(got)[0]
    assert jnp.abs(gradient).max(1).min() > 1e-3
    direction = jax.random.normal(KEY, gradient.shape) / 10
    assert float(jax.jit(numeric)(direction)) == pytest.approx(float(jnp.vdot(gradient, direction)), rel=0.05, abs=0.05)


# --- models that are not ours -------------------------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """Takes positions and a mask from outside, the latter by name only, and pools over what the mask shows."""

    @nn.compact
    def __call__(self, tokens, position_ids=None, scale=2.0, *, mask=None):
        x = scale * nn.Embed(VOCAB, WIDTH, name="embed")(tokens)
        if position_ids is not None:
            x = x + nn.Embed(40, WIDTH, name="where")(position_ids)
        weight = jnp.ones(tokens.shape) if mask is None else mask.astype(jnp.float32)
        x = jnp.cumsum(x * weight[..., None], axis=1)
        return nn.Dense(3, name="out")(x)


@pytest.mark.parametrize("template", [None, (("start", 2), (("after", MASK), 3), ("end", 1))])
def test_a_foreign_model(template):
    model, (ids, mask) = Foreign(), texts(encoder=False)
    ids[0, 2] = MASK
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    params = model.init(KEY, ids, positions)["params"]
    peft = jpeft.apply(params, method="prompt_tuning", **({"template": template} if template else {"length": 6}))
    got = jpeft.wrap(model.apply, peft.method)(peft.variables, ids, position_ids=positions, mask=mask)

    def put(tokens):
        if not template:
            return ours(6) + text(tokens)
        at = tokens.index(MASK) + 1 if MASK in tokens else len(tokens)
        return ours(2) + text(tokens[:at]) + ours(3, 2) + text(tokens[at:]) + ours(1, 5)

    longer, longer_mask, places = by_hand(ids, mask, put, causal=True)
    table = jnp.concatenate([params["embed"]["embedding"], prompt_of(peft)])
    x = 2.0 * table[longer] + params["where"]["embedding"][: longer.shape[1]][None]
    x = jnp.cumsum(x * longer_mask[..., None], axis=1) @ params["out"]["kernel"] + params["out"]["bias"][None, None]
    for row, place in enumerate(places):
        np.testing.assert_allclose(got[row, : LENGTHS[row]], x[row, jnp.array(place)], atol=1e-4)


class Segmented(nn.Module):
    """Has an input for each token that nothing is known about."""

    @nn.compact
    def __call__(self, tokens, segments):
        return nn.Embed(VOCAB, WIDTH, name="embed")(tokens) * segments[..., None]


def test_what_a_foreign_model_must_be():
    ids, _ = texts()
    peft = jpeft.apply({"embed": {"embedding": jnp.ones((VOCAB, WIDTH))}}, method="prompt_tuning", length=2)
    forward = jpeft.wrap(Segmented().apply, peft.method)
    with pytest.raises(ValueError, match="'segments' of 'the model' has an entry for each token, and what it says"):
        forward(peft.variables, ids, ids)
    with pytest.raises(ValueError, match=r"takes token ids \[batch, length\], but 'the model' was given int32\[7\]"):
        forward(peft.variables, ids[0], ids[0])
    wide = jpeft.wrap(Foreign().apply, peft.method)
    params = {"embed": {"embedding": jnp.ones((VOCAB, WIDTH))}, "out": {"kernel": jnp.ones((WIDTH, 3)), "bias": jnp.zeros(3)}}
    with pytest.raises(ValueError, match=r"'mask' of 'the model' has shape \(2, 1, 7\): only \[batch, length\]"):
        wide({**peft.variables, "params": params}, ids, mask=np.ones((2, 1, 7)))


# --- together with others -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_two_prompts_and_a_low_rank_update_of_the_vocabulary(order):
    """Rows of one prompt are not taken for rows of another, nor for words."""
    model, (ids, mask) = language_model("gpt2"), texts("left", encoder=False)
    parts = {
        "task": jpeft.prompt_tuning(length=2),
        "lora": jpeft.lora(rank=2, target=".*wte/embedding"),
        "domain": jpeft.prompt_tuning(template=(("start", 1), ("end", 2))),
    }
    parts = parts if order == "inside" else dict(reversed(parts.items()))
    params = jax.jit(model.init)(KEY, ids)["params"]
    peft = jpeft.apply(params, method=jpeft.chain(**parts))
    peft = peft.replace(adapter=noised(peft.adapter, scale=0.5))
    got = jax.jit(jpeft.wrap(model.apply, peft.method))(peft.variables, ids, mask)
    task, domain = (jax.tree.leaves(peft.adapter[name])[0] for name in ("task", "domain"))
    merged = jpeft.merge(jpeft.Peft(params, peft.adapter["lora"], parts["lora"]))
    merged["transformer"]["wte"]["embedding"] = jnp.concatenate([merged["transformer"]["wte"]["embedding"], task, domain])
    # The first listed is the closest to the base, so its prompt is in front of all that the others put in.
    put = lambda tokens: (
        ours(2) + ours(1, 2) + text(tokens) + ours(2, 3) if order == "inside" else ours(1, 2) + ours(2) + text(tokens) + ours(2, 3)
    )
    longer, longer_mask, places = by_hand(ids, mask, put, causal=True)
    model = GPT2LMHeadModel(dataclasses.replace(config("gpt2"), vocab_size=VOCAB + 5))
    want = jax.jit(model.apply)({"params": merged}, longer, longer_mask)[..., :VOCAB]
    for row, place in enumerate(places):
        np.testing.assert_allclose(got[row, -LENGTHS[row] :], want[row, jnp.array(place)], atol=1e-4)


# --- counts and starting points ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "length", "count"), [(512, 20, 10_240), (768, 100, 76_800), (1024, 100, 102_400), (4096, 50, 204_800), (4096, 100, 409_600)]
)
def test_counts(width, length, count):
    """Lester et al.'s l d, from the shapes of T5's embeddings."""
    params = {"encoder": {"shared": {"embedding": jax.ShapeDtypeStruct((32128, width), jnp.float32)}}}
    peft = jax.eval_shape(lambda p: jpeft.apply(p, method="prompt_tuning", length=length), params)
    assert (jpeft.summary(peft).trained, jpeft.summary(peft).stored, jpeft.summary(peft).changed) == (count, count, 0)


WTE = {"wte": {"embedding": jnp.arange(60.0).reshape(20, 3)}}


def start(**options):
    return prompt_of(jpeft.apply(WTE, method="prompt_tuning", key=jax.random.key(5), **options))


def test_starts_from_the_vocabulary():
    words = np.array(start(length=8, sample=8))
    assert sorted(words[:, 0] / 3) == list(range(8))  # without replacement
    assert set(np.array(start(length=4, sample=5))[:, 0] / 3) <= set(range(5))
    assert len(start()) == 20


def test_starts_from_uniform_numbers():
    """The paper's symmetric range, not the half of it that its code draws from."""
    numbers = start(length=1000, init="uniform")
    assert -0.5 <= float(numbers.min()) < -0.48
    assert 0.48 < float(numbers.max()) <= 0.5


def test_starts_from_tokens():
    np.testing.assert_array_equal(start(init="tokens", tokens=[3, 1])[:, 0], [9, 3])
    np.testing.assert_array_equal(start(init="tokens", tokens=[3, 1], length=3)[:, 0], [9, 3, 9])
    np.testing.assert_array_equal(start(init="tokens", tokens=[3, 1], length=1)[:, 0], [9])


def test_starts_from_labels():
    """The mean of each label's tokens, then words of the vocabulary; given as an option or as statistics."""
    given = start(init="labels", labels=[[1], [2, 4]], length=4)
    np.testing.assert_array_equal(given[:2, 0], [3, 9])
    assert not set(np.array(given[2:, 0])) - set(range(0, 60, 3))
    method = jpeft.prompt_tuning(init="labels", length=4)
    assert method.requires_stats == (LabelTokens,)
    np.testing.assert_array_equal(
        jpeft.apply(WTE, method=method, key=jax.random.key(5), stats=[[1], [2, 4]]).adapter["wte"]["+"]["prompt"], given
    )


def test_starts_from_another_prompt(tmp_path):
    first = jpeft.apply(WTE, method="prompt_tuning", length=4, init="labels", stats=[[1]])
    np.testing.assert_array_equal(start(length=4, stats=first.adapter), prompt_of(first))
    np.testing.assert_array_equal(start(length=4, stats=np.array(prompt_of(first))), prompt_of(first))
    np.testing.assert_array_equal(start(length=4, init="labels", stats=[LabelTokens(((2,),)), Prompt(prompt_of(first))]), prompt_of(first))
    with pytest.raises(ValueError, match=r"has the shape \(4, 3\) where \(5, 3\) is needed"):
        start(length=5, stats=first.adapter)
    jpeft.save(tmp_path / "out", first)  # a method that needs statistics to begin with needs none to be loaded
    chex.assert_trees_all_equal(jpeft.load(tmp_path / "out", WTE).adapter, first.adapter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0 must be a whole number of at least 1"),
        ({"init": "random"}, "init='random' must be one of 'vocab', 'uniform', 'tokens', 'labels'"),
        ({"tokens": [1]}, "tokens= is for init='tokens', and init is 'vocab'"),
        ({"init": "tokens"}, "init='tokens' needs tokens="),
        ({"init": "tokens", "tokens": [20]}, "There is no token 20: the vocabulary has 20"),
        ({"init": "labels"}, "init='labels' needs the token ids of each class label"),
        ({"init": "labels", "labels": [[1], [2]], "length": 1}, "There are 2 labels and only 1 rows"),
        ({"length": 21}, "21 different tokens cannot be drawn from 20 of the vocabulary"),
        ({"sample": 0}, "sample=0 must be a whole number of at least 1"),
        ({"length": 2, "template": [["start", 3]]}, "length=2, but the template has 3 pseudo tokens"),
        ({"template": [["start", [4, 5]]]}, "The template has no pseudo tokens.*jpeft.hard_prompt"),
        ({"template": [["middle", 3]]}, r"\('middle', 3\) is not a pair of a place"),
        ({"template": [["start", 0]]}, "at 'start' a number of pseudo tokens or a tuple of token ids must stand, not 0"),
        ({"edges": (1, -1)}, r"edges=\(1, -1\) must be \(a whole number of at least 0, a whole number of at least 0\), or None"),
        ({"embedding": "wpe/embedding"}, "embedding='wpe/embedding' matches none"),
        ({"body": "encoder"}, "body='encoder' does not contain the embedding 'wte/embedding'"),
        ({"body": "wte"}, "body='wte' does not contain the embedding 'wte/embedding'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.apply(WTE, method="prompt_tuning", **options)


def test_ambiguous_and_bare_embeddings_are_refused():
    with pytest.raises(ValueError, match="matches 'a/wte/embedding', 'b/wte/embedding': name the one"):
        jpeft.apply({"a": WTE, "b": WTE}, method="prompt_tuning")
    with pytest.raises(ValueError, match="is the whole model"):
        jpeft.apply(WTE["wte"], method="prompt_tuning", embedding="embedding")


def test_learns_with_the_defaults():
    """Which of two words is in a text, told by the prompt alone to the frozen encoder's first position, the head frozen."""
    model = BertForSequenceClassification(config(hidden_size=16, initializer_range=0.3), num_labels=2)
    ids = jax.random.randint(KEY, (32, 6), 4, VOCAB)
    labels = jnp.arange(32) % 2
    ids = ids.at[:, 3].set(2 + labels)
    peft = jpeft.apply(jax.jit(model.init)(KEY, ids)["params"], method="prompt_tuning", head=None, length=10)
    losses = fit(model, peft, ids, labels, steps=60, rate=3 * jpeft.methods()["prompt_tuning"].learning_rate)
    assert losses[-1] < 0.8 * losses[0], losses[::10]

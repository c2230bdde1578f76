"""LLaMA-Adapter: its equation, HF PEFT, the top blocks of numbered and scanned models, caches, counts, errors."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_twins import to_torch, twins
from tables import DECODER_SIZES, HEADS, MODELS, base, batch, gpt2, noised
from test_forms import stacked

import jpeft
from jpeft.models import BertConfig, BertModel, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, abstract_params, generate
from jpeft.models.bert.encoder import SelfAttention

KEY = jax.random.key(0)
IDS = np.array([[2, 4, 9, 2, 7], [1, 5, 7, 3, 6]])


def made(params, length=3, **options):
    peft = jpeft.apply(params, method="adaption_prompt", length=length, **options)
    return peft.replace(adapter=noised(peft.adapter, scale=0.5))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_equation():
    """softmax(Q Kᵀ / √d) V + g softmax(Q K_Pᵀ / √d) V_P, head by head, with K_P and V_P made by the layer's projections."""
    config = BertConfig(vocab_size=17, hidden_size=8, num_attention_heads=2, initializer_range=0.5)
    attention, x = SelfAttention(config), jax.random.normal(KEY, (3, 6, 8))
    mask = jnp.ones((1, 1, 1, 6), bool)
    params = noised(attention.init(KEY, x, mask, True)["params"])  # biases too
    peft = made(params)
    got = jpeft.wrap(attention.apply, peft.method)(peft.variables, x, mask, True)
    project = lambda rows, name: np.asarray(rows) @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
    own = jax.tree.map(np.asarray, peft.adapter["+"])
    q, k, v = (project(x, name) for name in ("query", "key", "value"))
    prompt_k, prompt_v = project(own["prompt"], "key"), project(own["prompt"], "value")
    for b in range(3):
        for h in (slice(0, 4), slice(4, 8)):
            want = softmax(q[b][:, h] @ k[b][:, h].T / 2) @ v[b][:, h]
            want += own["gate"] * softmax(q[b][:, h] @ prompt_k[:, h].T / 2) @ prompt_v[:, h]
            np.testing.assert_allclose(got[b][:, h], want, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # HF PEFT calls transformers by names that those are to lose
@pytest.mark.parametrize(("family", "scan"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_hf_peft(family, scan):
    """The same logits with the same prompt and gate in the last of two blocks; and the same gradients of both."""
    hf = pytest.importorskip("peft")
    theirs, loaded = twins(family, scan=scan)
    wrapped = hf.get_peft_model(theirs, hf.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)).eval()
    peft = made(loaded.params, layers=1, **({"project": False, "heads": 2} if family == "gpt2" else {}))
    leaves = {name.rpartition(".")[2]: p for name, p in wrapped.named_parameters() if "adaption_" in name}
    own = {path.rpartition("/")[2]: np.asarray(leaf) for path, leaf in jpeft.flatten(peft.adapter).items()}
    leaves["adaption_prompt"].data = to_torch(own["prompt"].reshape(1, 3, 16))
    leaves["adaption_gate"].data = to_torch(own["gate"].reshape(1))
    want = wrapped(input_ids=to_torch(IDS).long()).logits
    forward = jpeft.wrap(loaded.model.apply)

    @jax.jit
    def run(peft):
        def loss(adapter):
            logits = forward(peft.replace(adapter=adapter), IDS)
            return jnp.sin(logits).sum(), logits

        return jax.value_and_grad(loss, has_aux=True)(peft.adapter)

    (_, got), grads = run(peft)
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5 * np.abs(want.detach().numpy()).max())
    want.sin().sum().backward()
    for name, leaf in leaves.items():
        (mine,) = [leaf for path, leaf in jpeft.flatten(grads).items() if path.endswith(f"/{name.removeprefix('adaption_')}")]
        np.testing.assert_allclose(np.asarray(mine).ravel(), leaf.grad.numpy().ravel(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"project": False, "heads": HEADS}])
def test_numbered_and_scanned_blocks_and_caches_agree(options, tmp_path):
    """The prompt of the top block is its own in either form; so is a cache, in which it has no part, and a saved adapter."""
    model, scanned = GPT2LMHeadModel(gpt2().config), GPT2LMHeadModel(gpt2(scan=True).config)
    params = model.init(KEY, IDS)["params"]
    peft = made(params, layers=1, **options)
    jpeft.save(tmp_path / "out", peft)
    there = jpeft.load(tmp_path / "out", stacked(params))
    assert {leaf.shape for leaf in jax.tree.leaves(there.adapter)} == {(1, 3, 16), (1, 1)}
    want = jax.jit(jpeft.wrap(model.apply, peft.method))(peft.variables, IDS)
    forward = jax.jit(jpeft.wrap(scanned.apply, there.method), static_argnames=("cache_length", "mutable"))
    chex.assert_trees_all_close(forward(there.variables, IDS), want, atol=1e-5)
    first, cache = forward(there.variables, IDS[:, :4], cache_length=8, mutable="cache")
    last, _ = forward(there.variables | cache, IDS[:, 4:], mutable="cache")
    chex.assert_trees_all_close(jnp.concatenate([first, last], 1), want, atol=1e-5)
    if not options:
        tokens = generate(jpeft.wrap(scanned.apply, there.method), there.variables, IDS, max_new_tokens=2).tokens
        np.testing.assert_array_equal(tokens[:, 0], want[:, -1].argmax(-1))


def test_groups_of_heads():
    """Fewer heads of keys than of queries: as if each of them stood once for each of its query heads."""
    sizes: dict[str, Any] = DECODER_SIZES | {"num_attention_heads": 4, "intermediate_size": 32}
    few, many = (LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=heads)) for heads in (2, 4))
    params = few.init(KEY, IDS)["params"]
    repeat = lambda path, leaf: (
        jnp.repeat(leaf.reshape(16, 2, 4), 2, axis=1).reshape(16, 16) if path.rpartition("/")[0].endswith(("k_proj", "v_proj")) else leaf
    )
    peft = made(params)
    wide = peft.replace(params=jpeft.unflatten({path: repeat(path, leaf) for path, leaf in jpeft.flatten(params).items()}))
    run = lambda model, peft: jax.jit(jpeft.wrap(model.apply))(peft, IDS)
    chex.assert_trees_all_close(run(few, peft), run(many, wide), atol=1e-5)


def test_gates_open_first():
    """A closed gate hides its prompt, so that the first step moves the gates alone; then both are trained."""
    peft = jpeft.apply(base("gpt2"), method="adaption_prompt", length=3, head=None)
    forward = jpeft.wrap(gpt2().apply)
    grad = jax.jit(jax.grad(lambda adapter: jnp.sin(forward(peft.replace(adapter=adapter), batch()["x"])).sum()))
    moved = lambda adapter: {path: bool(jnp.abs(leaf).max() > 0) for path, leaf in jpeft.flatten(grad(adapter)).items()}
    assert moved(peft.adapter) == {path: path.endswith("gate") for path in jpeft.flatten(peft.adapter)}
    assert all(moved(noised(peft.adapter)).values())


def test_counts():
    """``layers (l d + 1)``: the paper's 1.2 M for the 30 top blocks of LLaMA 7B; of an encoder too."""
    sizes: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 4096,
        "intermediate_size": 16,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    }
    params = abstract_params(LlamaForCausalLM(LlamaConfig(**sizes, scan=True)))
    summary = jpeft.summary(jax.eval_shape(lambda p: jpeft.apply(p, method="adaption_prompt", layers=30), params))
    assert summary.trained == summary.stored == 30 * (10 * 4096 + 1) == 1_228_830
    assert summary.changed == 0
    encoder = abstract_params(BertModel(BertConfig.bert_base_cased(scan=False)))
    assert jpeft.summary(jax.eval_shape(lambda p: jpeft.apply(p, method="adaption_prompt"), encoder)).trained == 12 * 7681


KERNEL = {"kernel": jnp.ones((8, 8))}


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ("gpt2", {"layers": 3}, "layers=3, but the model has 2"),
        ("gpt2", {"project": False}, "project=False needs heads="),
        ("gpt2", {"heads": 2}, "heads=2 is for project=False"),
        ("gpt2", {"project": False, "heads": 5}, "heads=5 that divide both alike"),
        ("llama", {"project": False, "heads": 4}, "makes keys alone. Leave it out"),
        ("bert", {"value": ["output/dense"]}, "names 0 kernels beside '.*self/key/kernel'"),
        ("bert", {"target": ["nothing"]}, "target='nothing' matches none"),
        ("bert", {"length": 0}, "length=0 must be a whole number of at least 1"),
        ({"attn": {"key": KERNEL}}, {}, "value='@value'"),
    ],
)
def test_errors(params, options, message):
    with pytest.raises(ValueError, match=message):
        made(base(params) if isinstance(params, str) else params, **options)


def test_errors_of_a_call():
    with pytest.raises(ValueError, match="attention of their own"):
        jpeft.merge(made(base("gpt2")))
    peft = made(base("gpt2"), width=4)
    with pytest.raises(ValueError, match=r"2 heads of 8, 16 in all, but its prompt has 4.*width=16"):
        jpeft.wrap(gpt2().apply)(peft, batch()["x"])
    peft = made(base("plain"))
    with pytest.raises(ValueError, match="adds to the module 'layer_0/attn/core', but no such module ran"):
        jpeft.wrap(MODELS["plain"].apply)(peft, batch()["x"])

"""LN tuning: its equation, HF PEFT, which modules it takes, counts, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hf_twins import to_torch, twins
from tables import noised

import jpeft
from jpeft.models import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, abstract_params

IDS = np.array([[2, 4, 9, 2], [1, 5, 7, 3]])


def chosen(params, **options) -> list[str]:
    return list(jpeft.flatten(jax.eval_shape(lambda p: jpeft.apply(p, method="ln_tuning", **options), params).adapter))


@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_equation(norm):
    """The normalised input, times g, plus b where there is one."""
    layer, x = getattr(nn, norm)(name=norm), jax.random.normal(jax.random.key(0), (3, 8))
    params = {norm: layer.init(jax.random.key(0), x)["params"]}
    peft = jpeft.apply(params, method="ln_tuning")
    peft = peft.replace(adapter=noised(peft.adapter, scale=1.0))
    got = layer.apply({"params": jpeft.merge(peft)[norm]}, x)
    x = np.asarray(x)
    centred = x - x.mean(-1, keepdims=True) if norm == "LayerNorm" else x
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    own = jax.tree.map(np.asarray, peft.adapter[norm])
    np.testing.assert_allclose(got, unit * own["scale"] + own.get("bias", 0), atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # HF PEFT calls transformers by names that those are to lose
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hf_peft(family):
    """The same modules, and the same outputs with the same values."""
    hf = pytest.importorskip("peft")
    theirs, loaded = twins(family)
    wrapped = hf.get_peft_model(theirs, hf.LNTuningConfig(task_type="CAUSAL_LM"))
    peft = jpeft.apply(loaded.params, method="ln_tuning")
    leaves = [p for name, p in wrapped.named_parameters() if "ln_tuning_layers" in name and p.requires_grad]
    assert sum(p.numel() for p in leaves) == jpeft.summary(peft).trained
    # The copies begin as the modules; the values of both are changed in the same way.
    peft = peft.replace(adapter=jax.tree.map(lambda leaf: leaf * 1.5 + 0.25, peft.adapter))
    for p in leaves:
        p.data = p.data * 1.5 + 0.25
    want = wrapped(input_ids=to_torch(IDS).long()).logits.detach().numpy()
    got = jax.jit(jpeft.wrap(loaded.model.apply, peft.method))(peft.variables, IDS)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_counts():
    """``2 d (2 L + 1)`` with a LayerNorm behind the embeddings or behind the blocks, ``d (2 L + 1)`` with RMSNorms; scanned or not."""
    for model, count in (
        (BertModel(BertConfig.bert_base_cased()), 38_400),
        (GPT2Model(GPT2Config.gpt2_medium(scan=True)), 2 * 1024 * 49),
        (LlamaModel(LlamaConfig.llama_3_2_1b(scan=True)), 2048 * 33),
        (LlamaModel(LlamaConfig.qwen3_4b(scan=False, num_hidden_layers=3)), 2560 * 7),  # no norms of queries and keys
    ):
        peft = jax.eval_shape(lambda p: jpeft.apply(p, method="ln_tuning"), abstract_params(model))
        summary = jpeft.summary(peft)
        assert summary.trained == summary.stored == summary.changed == count


def test_names_and_roles():
    params = abstract_params(LlamaModel(LlamaConfig.qwen3_4b(scan=False, num_hidden_layers=2)))
    assert chosen(params, target=["post_attention_layernorm"]) == [f"layers/{i}/post_attention_layernorm/scale" for i in range(2)]
    assert chosen(params, target=r".*/(q|k)_norm/scale")[0] == "layers/0/self_attn/k_norm/scale"
    assert chosen(params, target="@final_norm") == ["norm/scale"]


def test_unknown_names_are_found_by_structure():
    """What holds a scale and perhaps a bias, numbered or stacked; a scale beside a kernel is none."""
    block = {"u": {"scale": jnp.ones(4), "bias": jnp.ones(4)}, "w": {"kernel": jnp.ones((4, 4)), "scale": jnp.ones(4)}}
    assert chosen({f"cell_{i}": block for i in range(2)}) == [f"cell_{i}/u/{name}" for i in range(2) for name in ("bias", "scale")]
    stacked = {"layers": jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), block), "z": {"scale": jnp.ones(4)}}
    assert chosen(stacked) == ["layers/u/bias", "layers/u/scale", "z/scale"]


def test_normalisations_of_images_are_among_them():
    """As flax names them, or in short, also beside a LayerNorm."""
    norm = {"scale": jnp.ones(4), "bias": jnp.ones(4)}
    names = ("BatchNorm_0", "GroupNorm_1", "LayerNorm_0", "bn1", "gn", "group_norm_out")
    params = {"stem": dict.fromkeys(names, norm) | {"gate": norm, "kernel": jnp.ones((4, 4))}}
    assert chosen(params) == [f"stem/{name}/{leaf}" for name in names for leaf in ("bias", "scale")]


def test_merges_by_replacing():
    params = {"ln": {"scale": jnp.ones(4, jnp.bfloat16)}, "w": {"kernel": jnp.ones((4, 4))}}
    peft = jpeft.apply(params, method="ln_tuning")
    assert peft.adapter["ln"]["scale"].dtype == jnp.float32
    merged = jpeft.merge(peft)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    assert merged["w"]["kernel"] is params["w"]["kernel"]


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ({"w": {"kernel": jnp.ones((2, 2))}}, {}, r"the model has no normalisations.*\['w/kernel'\]"),
        ({"ln": {"scale": jnp.ones(2)}}, {"target": ["norm"]}, "norm matches none|target='norm' matches none"),
    ],
)
def test_errors(params, options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.apply(params, method="ln_tuning", **options)

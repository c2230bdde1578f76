"""Published and derived parameter counts, from abstract parameters: no weights are ever allocated."""

import jax
import pytest

import jpeft
from jpeft.models import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    abstract_params,
)


def counted(params, method) -> jpeft.Summary:
    return jpeft.summary(jax.eval_shape(lambda p: jpeft.apply(p, method=method), params))


@pytest.fixture(scope="module")
def bert_base():
    return abstract_params(BertModel(BertConfig.bert_base_cased()))


@pytest.fixture(scope="module")
def roberta_base():
    return abstract_params(BertModel(BertConfig.roberta_base(), pooling=False))


def test_bitfit_on_bert_base(bert_base):
    """Ben Zaken et al.: 0.09 % of BERT-base; encoder, embedding LayerNorm and pooler."""
    s = counted(bert_base, jpeft.bitfit())
    assert (s.trained, s.changed, s.base) == (102_912, 102_912, 108_310_272)


def test_bitfit_subset_on_bert_base(bert_base):
    assert counted(bert_base, jpeft.bitfit(subset="query+middle")).trained == 46_080


def test_bitfit_on_bert_large():
    params = abstract_params(BertModel(BertConfig.bert_large_cased()))
    assert counted(params, jpeft.bitfit()).trained == 272_384
    assert counted(params, jpeft.bitfit(subset="query+middle")).trained == 122_880


def test_bitfit_with_head_on_bert_base():
    params = abstract_params(BertForSequenceClassification(BertConfig.bert_base_cased(), num_labels=2))
    assert counted(params, jpeft.bitfit()).trained == 104_450


def test_bitfit_on_roberta_base(roberta_base):
    assert counted(roberta_base, jpeft.bitfit()).trained == 102_144


def test_adapter_on_bert_base(bert_base):
    """Houlsby et al., m = 64: 24 adapters of 2 d m + m + d; 25 LayerNorms of 2 d besides."""
    assert counted(bert_base, jpeft.adapter(size=64, train_norms=False)).trained == 2_379_264
    s = counted(bert_base, jpeft.adapter(size=64))
    assert (s.trained, s.changed) == (2_379_264 + 25 * 2 * 768, 25 * 2 * 768)


def test_adapter_on_bert_large():
    params = abstract_params(BertModel(BertConfig.bert_large_cased()))
    assert counted(params, jpeft.adapter(size=64, train_norms=False)).trained == 6_343_680
    assert counted(params, jpeft.adapter(size=64)).trained == 6_444_032


def test_adapters_on_roberta_large():
    """Hu et al., "0.8M": Pfeiffer's of 16 and Houlsby's of 8, without LayerNorms and head."""
    large = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    params = abstract_params(BertModel(BertConfig.roberta_base(**large), pooling=False))
    assert counted(params, jpeft.pfeiffer(size=16)).trained == 811_392
    assert counted(params, jpeft.adapter(size=8, train_norms=False)).trained == 835_968


def test_pfeiffer_on_bert_base(bert_base):
    """Reduction 16, m = 48: 12 adapters, and the base is as it was."""
    s = counted(bert_base, jpeft.pfeiffer())
    assert (s.trained, s.stored, s.changed) == (894_528, 894_528, 0)


@pytest.mark.parametrize(("size", "count"), [(6, 368_784), (224, 11_089_152)])
def test_lin_adapters_on_gpt2_medium(size, count):
    """Hu et al., "0.37M" and "11.09M": L (2 d m + m + d) + 2 L d."""
    for scan in (False, True):
        params = abstract_params(GPT2Model(GPT2Config.gpt2_medium(scan=scan)))
        assert counted(params, jpeft.pfeiffer(size=size, own_norm=True)).trained == count


@pytest.mark.parametrize(("size", "count"), [(8, 875_808), (248, 23_002_848)])
def test_lin_adapters_on_gpt2_large(size, count):
    params = abstract_params(GPT2Model(GPT2Config.gpt2(hidden_size=1280, num_hidden_layers=36, num_attention_heads=20)))
    assert counted(params, jpeft.pfeiffer(size=size, own_norm=True)).trained == count


def test_mix_and_match_on_roberta_base(roberta_base):
    """He et al. on GLUE: a prefix of 16, 2 L d l, and parallel adapters of 16, L (2 d m + m + d); "0.5 %"."""
    method = jpeft.chain(prefix=jpeft.prefix_tuning(length=16, mlp=None), ffn=jpeft.parallel_adapter(size=16, scale=2.0))
    assert counted(roberta_base, jpeft.parallel_adapter(size=16)).trained == 304_320
    assert counted(roberta_base, method).trained == 294_912 + 304_320


def test_lora_on_roberta_base(roberta_base):
    """Hu et al.: "0.3M" for rank 8 on query and value; they change 24 kernels of 768 x 768."""
    s = counted(roberta_base, jpeft.lora(rank=8, target=["query", "value"]))
    assert (s.trained, s.stored, s.changed) == (294_912, 294_912, 24 * 768 * 768)


def test_lora_on_roberta_base_with_mnli_head():
    params = abstract_params(BertForSequenceClassification(BertConfig.roberta_base(), num_labels=3))
    assert counted(params, jpeft.lora(rank=8, target=["query", "value"])).trained == 887_811


@pytest.mark.parametrize("scan", [False, True])
def test_scanned_layers_count_alike(scan):
    params = abstract_params(BertForSequenceClassification(BertConfig.bert_base_cased(scan=scan), num_labels=2))
    counts = [counted(params, m).trained for m in (jpeft.bitfit(), jpeft.lora(), jpeft.adapter(), jpeft.freeze(top=2))]
    layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    pooler, head = 768 * 768 + 768, 2 * 768 + 2
    lora = 8 * (12 * (4 * 2 * 768 + 2 * (768 + 3072)) + 2 * 768)
    assert counts == [104_450, lora + head, 2_379_264 + 25 * 2 * 768 + head, 2 * layer + pooler + head]


def test_freeze_two_blocks_of_gpt2_medium():
    """Hu et al., FT-Top2: "25.19M" is two blocks of 12 d^2 + 13 d."""
    d = 1024
    shape = lambda *s: jax.ShapeDtypeStruct(s, "float32")
    block = {
        "ln_1": {"scale": shape(d), "bias": shape(d)},
        "attn": {
            "c_attn": {"kernel": shape(d, 3 * d), "bias": shape(3 * d)},
            "c_proj": {"kernel": shape(d, d), "bias": shape(d)},
        },
        "ln_2": {"scale": shape(d), "bias": shape(d)},
        "mlp": {
            "c_fc": {"kernel": shape(d, 4 * d), "bias": shape(4 * d)},
            "c_proj": {"kernel": shape(4 * d, d), "bias": shape(d)},
        },
    }
    params = {"wte": {"embedding": shape(50257, d)}, "h": {str(i): block for i in range(24)}, "ln_f": {"scale": shape(d), "bias": shape(d)}}
    assert counted(params, jpeft.freeze(top=2, also=None)).trained == 25_192_448
    assert counted(params, jpeft.freeze(top=2)).trained == 25_192_448 + 2 * d


@pytest.mark.parametrize(
    ("config", "mlp", "attention", "unembedding"),
    [
        (LlamaConfig.llama_3_1_8b(), 1_769_472, 851_968, 132_352),
        (LlamaConfig.llama_3_2_1b(scan=True), 491_520, 212_992, 130_304),
        (LlamaConfig.qwen3_8b(scan=True), 1_769_472, 958_464, 156_032),
        (LlamaConfig.qwen3_4b(), 1_327_104, 737_280, 154_496),
    ],
    ids=["llama-3.1-8b", "llama-3.2-1b", "qwen3-8b", "qwen3-4b"],
)
def test_lora_per_unit_of_rank_on_decoders(config, mlp, attention, unembedding):
    """Thinking Machines' table for "LoRA Without Regret": r (in + out) for every kernel; a tied head is the embedding."""
    params = abstract_params(LlamaForCausalLM(config))
    head = r"model/embed_tokens/embedding" if config.tie_word_embeddings else r"lm_head/kernel"
    targets = {r".*/mlp/.*kernel": mlp, r".*/self_attn/.*kernel": attention, head: unembedding}
    for target, per_rank in targets.items():
        assert counted(params, jpeft.lora(rank=1, target=target)).trained == per_rank
        assert counted(params, jpeft.lora(rank=16, target=target)).trained == 16 * per_rank

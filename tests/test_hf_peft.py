"""Adapters of HF PEFT in and out: what it computes, what it writes, and what is refused."""

import json
import warnings

import numpy as np
import pytest
from hf_peft_models import HF_TASKS, assert_close, hf_adapter, in_torch, logits, tensors, tiny
from peft import (
    IA3Config,
    LNTuningConfig,
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
)

import jpeft

ATTENTION = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
NAMES = {"bert": ["query", "dense"], "gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}
PATTERNS = {
    "bert": {"target_modules": ["query", "value"], "rank_pattern": {"query": 2}, "alpha_pattern": {r"layer\.1.*value": 3}},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"h.1.attn.c_attn": 6}, "alpha_pattern": {"c_fc": 9}},
    "llama": {"target_modules": r".*\.(q|v)_proj", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5}},
}
SAVED = {"bert": ["pooler"], "gpt2": ["ln_f"], "llama": ["lm_head", "norm"]}
EXCLUDED = {"bert": ["output.dense"], "gpt2": r".*mlp.*", "llama": ["v_proj"]}
EMBEDDED = {"bert": ["word_embeddings", "query"], "gpt2": ["wpe", "c_attn"], "llama": ["embed_tokens", "q_proj"]}


def lora(**options):
    return lambda family: LoraConfig(r=4, task_type=HF_TASKS[family], **{key: own(value, family) for key, value in options.items()})


def of(cls, **options):
    return lambda family: cls(task_type=HF_TASKS[family], **{key: own(value, family) for key, value in options.items()})


def own(value, family):
    return value[family] if isinstance(value, dict) and family in value else value


# Name of a case -> family, whether layers are stacked, and what makes HF PEFT's configuration.
CASES = {
    "lora-bert": ("bert", False, lora()),
    "lora-bert-scan": ("bert", True, lora(target_modules="all-linear")),
    "lora-gpt2": ("gpt2", False, lora(target_modules=NAMES)),
    "lora-llama-scan": ("llama", True, lora(target_modules=NAMES)),
    "patterns-bert": ("bert", False, lambda family: LoraConfig(r=4, lora_alpha=7, task_type=HF_TASKS[family], **PATTERNS[family])),
    "patterns-gpt2-scan": ("gpt2", True, lambda family: LoraConfig(r=4, use_rslora=True, task_type=HF_TASKS[family], **PATTERNS[family])),
    "patterns-llama": ("llama", False, lambda family: LoraConfig(r=4, use_rslora=True, task_type=HF_TASKS[family], **PATTERNS[family])),
    "dora-gpt2": ("gpt2", False, lora(use_dora=True)),
    "dora-llama-scan": ("llama", True, lora(use_dora=True)),
    "bias-all-bert-scan": ("bert", True, lora(bias="all")),
    "bias-lora-gpt2": ("gpt2", False, lora(bias="lora_only")),
    "saved-bert": ("bert", False, lora(modules_to_save=SAVED)),
    "saved-llama-scan": ("llama", True, lora(modules_to_save=SAVED)),
    "tokens-gpt2-scan": ("gpt2", True, lora(trainable_token_indices=[7, 3])),
    "excluded-bert": ("bert", False, lora(target_modules=NAMES, exclude_modules=EXCLUDED)),
    "layers-llama-scan": ("llama", True, lora(target_modules=ATTENTION, layers_to_transform=[1])),
    "embedding-bert-scan": ("bert", True, lora(target_modules=EMBEDDED)),
    "pissa-gpt2-scan": ("gpt2", True, lora(init_lora_weights="pissa", use_rslora=True, rank_pattern={r"h\.1.*c_attn": 2})),
    "olora-llama": ("llama", False, lora(init_lora_weights="olora")),
    "tied-llama-scan": ("llama-tied", True, lora(target_modules=["q_proj", "embed_tokens"], use_rslora=True, ensure_weight_tying=True)),
    "lora-bias-bert": ("bert", False, lora(target_modules=["query"], lora_bias=True)),
    "ia3-bert": ("bert", False, of(IA3Config)),
    "ia3-gpt2-scan": ("gpt2", True, of(IA3Config)),
    "ln-bert-scan": ("bert", True, of(LNTuningConfig, target_modules=["LayerNorm"])),
    "ln-llama": ("llama", False, of(LNTuningConfig)),
    "rows-gpt2": ("gpt2", False, of(TrainableTokensConfig, token_indices=[9, 3])),
    "rows-of-the-head-llama": ("llama", False, of(TrainableTokensConfig, token_indices=[9, 3], target_modules=["embed_tokens", "lm_head"])),
    "lokr-dropout-bert": (
        "bert",
        False,
        of(LoKrConfig, r=2, target_modules=["query"], rank_dropout=0.1, module_dropout=0.2, rank_dropout_scale=True),
    ),
    "prompt-bert": ("bert", False, of(PromptTuningConfig, num_virtual_tokens=3)),
    "prompt-llama-scan": ("llama", True, of(PromptTuningConfig, num_virtual_tokens=3)),
    "p-tuning-gpt2": ("gpt2", False, of(PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=8)),
    "prefix-llama-scan": ("llama", True, of(PrefixTuningConfig, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8)),
    "prefix-gpt2": ("gpt2", False, of(PrefixTuningConfig, num_virtual_tokens=3)),
}


@pytest.mark.parametrize("case", CASES)
def test_in_and_out(tmp_path, case):
    family, scan, config = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = hf_adapter(family, tmp_path / "hf", config(family))
        model, params, _ = tiny(family, scan)
        peft = jpeft.load_hf(tmp_path / "hf", params, model=model)
        assert_close(logits(peft, family, scan), expected, family)
        jpeft.save_hf(tmp_path / "ours", peft, model=model)
        assert_close(in_torch(family, tmp_path / "ours"), expected, family)
    if not case.startswith(("pissa", "olora")):  # written as plain LoRA
        assert_same_file(tmp_path / "hf", tmp_path / "ours", scaled="patterns" in case and scan)


def assert_same_file(one, other, scaled=False):
    """Equal keys, shapes and values; and equal configurations but for the spelling of what is chosen."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.shape == second[name].shape
        if not (scaled and "lora_B" in name):
            np.testing.assert_allclose(second[name], tensor, rtol=1e-6, atol=1e-6, err_msg=name)
    read = lambda path: json.loads((path / "adapter_config.json").read_text())
    ours, theirs = read(other), read(one)
    spelled = {"target_modules", "exclude_modules", "alpha_pattern", "rank_pattern", "base_model_name_or_path"}
    spelled |= {"prefix_projection"}  # of no meaning here
    if theirs["peft_type"] == "P_TUNING":  # the network that made the prompt is in no file
        spelled |= {"encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"}
    if "encoder_hidden_size" in theirs and theirs.get("prefix_projection"):
        spelled |= {"encoder_hidden_size"}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key not in spelled:
            assert {*ours[key]} == {*value} if isinstance(value, list) else ours[key] == value, key

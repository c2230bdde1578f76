"""Adapters that HF PEFT wrote: the same logits, and the same file when they are written again."""

import functools
import json
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.base import IDS, MASK, TASKS
from goldens.golden import base, base_logits, goldens
from safetensors.numpy import load_file

import jpeft

# Written in another form that computes the same: the base as it was with twice the rank.
CONVERTED = ("pissa", "olora")

# Where HF PEFT's forward cannot be that of merged weights.
RUNS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT")
# The head of GPT-2 is its embedding, of which HF PEFT changes the look-ups alone; Llama's layers have no biases.
NO_MERGE = ("gpt2-lora-embedding", "llama-lora-own-bias")
# Keys that say where an adapter comes from, and those whose rules may be put in other words that choose the same.
WORDING = {"base_model_name_or_path", "peft_version", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
RULES = {"rank_pattern", "alpha_pattern", "r", "lora_alpha"}


def is_scanned(golden):
    """Llama's layers are stacked, unless an adapter differs from layer to layer in a way that a stack cannot hold."""
    return golden.model == "llama" and "patterns" not in golden.case


@functools.cache
def forward_of_base(model, scan):
    return jax.jit(base(model, scan=scan).model.apply)


def logits_of(peft, golden, scan):
    """The logits with the adapter: merged, which needs no program of its own, where it can be."""
    inputs = {"input_ids": jnp.asarray(IDS), "attention_mask": jnp.asarray(MASK)}
    if golden.config["peft_type"] in RUNS or f"{golden.model}-{golden.case}" in NO_MERGE:
        if golden.case.startswith("multitask"):
            peft = jpeft.assign(peft, jnp.asarray(TASKS))
        return jax.jit(jpeft.wrap(base(golden.model, scan=scan).model.apply))(peft, **inputs)
    return forward_of_base(golden.model, scan)({"params": jpeft.merge(peft)}, **inputs)


def assert_close(got, expected):
    """Within 1e-5 of the largest logit, for all tokens that are not padding."""
    real = slice(None) if expected.ndim == 2 else MASK.astype(bool)
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], rtol=0, atol=1e-5 * np.abs(expected[real]).max())


def read(folder):
    """The tensors of a folder by name, and its configuration."""
    tensors = {name: np.asarray(tensor, np.float32) for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    return tensors, json.loads((folder / "adapter_config.json").read_text())


def assert_same_file(before, after):
    """Equal names, shapes and values, and equal keys of the configuration, but for those that may be put in other words."""
    (old, old_config), (new, new_config) = read(before), read(after)
    assert {name: tensor.shape for name, tensor in new.items()} == {name: tensor.shape for name, tensor in old.items()}
    for name, tensor in old.items():
        np.testing.assert_allclose(new[name], tensor, rtol=1e-6, atol=1e-7, err_msg=name)
    assert new_config.keys() == old_config.keys()
    if old_config.get("encoder_hidden_size"):  # of an encoder that was folded into the prompt
        return
    rules = WORDING if old_config["peft_type"] == "ADALORA" else WORDING | RULES
    known = new_config.keys() - rules - ({"bias"} if not any(name.endswith("bias") for name in old) else set())
    put = lambda config: {key: sorted(set(value)) if isinstance(value := config[key], list) else value for key in known}
    assert put(new_config) == put(old_config)


def assert_hf_reads(golden, folder):
    """HF PEFT itself finds all that it needs in the folder, nothing else, and computes the same."""
    import peft
    from goldens.hf import base_model, run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")
        model = peft.PeftModel.from_pretrained(base_model(golden.model), folder)
        assert_close(run(model, golden.case).numpy(), golden.logits)


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("scan", [False, True])
def test_the_bases_are_the_same(model, scan):
    inputs = {"input_ids": jnp.asarray(IDS), "attention_mask": jnp.asarray(MASK)}
    assert_close(forward_of_base(model, scan)({"params": base(model, scan=scan).params}, **inputs), base_logits(model))


@pytest.mark.parametrize("golden", goldens(), ids=lambda golden: f"{golden.model}-{golden.case}")
def test_golden(golden, tmp_path):
    scan = is_scanned(golden)
    loaded = base(golden.model, scan=scan)
    load = lambda folder: jpeft.load_hf(folder, loaded.params, model=loaded.model)
    peft = load(golden.write(tmp_path / "in"))
    assert_close(logits_of(peft, golden, scan), golden.logits)
    jpeft.save_hf(tmp_path / "out", peft, model=loaded.model)
    assert_hf_reads(golden, tmp_path / "out")
    again = load(tmp_path / "out")
    if golden.case in CONVERTED:
        assert_close(logits_of(again, golden, scan), golden.logits)
        return
    assert_same_file(tmp_path / "in", tmp_path / "out")
    chex.assert_trees_all_close(again.adapter, peft.adapter, rtol=1e-6)
    assert again.method == peft.method


@pytest.mark.parametrize("case", ["lora-patterns", "loha-patterns", "lora-layers"])
def test_layers_of_a_stack_may_differ(case, tmp_path):
    """Those of lower ranks are filled up, and a factor takes up what their scale is more than that of the stack."""
    golden = next(each for each in goldens(["llama"]) if each.case == case)
    loaded = base("llama", scan=True)
    peft = jpeft.load_hf(golden.write(tmp_path / "in"), loaded.params, model=loaded.model)
    assert_close(logits_of(peft, golden, True), golden.logits)
    jpeft.save_hf(tmp_path / "out", peft, model=loaded.model)
    shapes = [{name: tensor.shape for name, tensor in read(tmp_path / folder)[0].items()} for folder in ("in", "out")]
    assert shapes[0] == shapes[1]
    assert_hf_reads(golden, tmp_path / "out")


@pytest.mark.parametrize("method", ["loha", "lokr", "oft", "boft", "hra", "miss", "shira"])
def test_what_hf_peft_has_for_linear_layers_alone_is_not_written_for_others(method, tmp_path):
    loaded = base("gpt2", scan=False)
    options = {"oft": {"block_size": 4}, "miss": {"rank": 4}, "shira": {"rank": 1}}.get(method, {})
    peft = jpeft.apply(loaded.params, method=method, target=["c_attn"], **options)
    with pytest.raises(ValueError, match="HF PEFT's [A-Z]+ is (not written for|for linear layers)"):
        jpeft.save_hf(tmp_path / "out", peft, model=loaded.model)
    assert not (tmp_path / "out").exists()

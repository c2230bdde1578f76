"""A head of a language model with a table of its own, where the checkpoint has one table for both."""

import dataclasses

import jax
import numpy as np
import pytest
import transformers
from hf_peft_models import assert_close, batch, randomised, torch_logits
from peft import LoraConfig, PeftModel, get_peft_model
from test_bert import random_params
from test_bert import tiny as tiny_bert
from test_decoders import GPT2, LLAMA

import jpeft
from jpeft.models import BertForMaskedLM, GPT2LMHeadModel, LlamaForCausalLM, load, save
from jpeft.training.adapter_folder import load_adapter
from jpeft.tree import flatten, unflatten

MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2),
    "llama": lambda: LlamaForCausalLM(dataclasses.replace(LLAMA, tie_word_embeddings=True)),
    **{name: lambda name=name: BertForMaskedLM(tiny_bert(name)) for name in ("bert", "roberta", "distilbert", "electra")},
}
# The names of a layer and of the table in torch.
NAMES = {"gpt2": ("c_attn", "wte"), "llama": ("q_proj", "embed_tokens")}
# One of the two tables, adapted or held whole.
ADAPTERS = {
    "head held whole": lambda layer, table: {"target_modules": [layer], "modules_to_save": ["lm_head"]},
    "embedding held whole": lambda layer, table: {"target_modules": [layer], "modules_to_save": [table]},
    "head adapted": lambda layer, table: {"target_modules": ["lm_head"]},
    "head adapted among others": lambda layer, table: {"target_modules": [layer, "lm_head"]},
    "embedding adapted": lambda layer, table: {"target_modules": [table]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a tied model of each kind."""
    root = tmp_path_factory.mktemp("tied")
    for name, make in MODELS.items():
        model = make()
        save(root / name, model, random_params(model))
    return root


def task(name):
    return "causal-lm" if name in NAMES else "masked-lm"


def logits(model, params):
    return np.asarray(jax.jit(model.apply)({"params": params}, *batch()))


@pytest.mark.parametrize("name", MODELS)
def test_begins_as_the_tied_model(name, folders, tmp_path):
    tied, untied = load(folders / name, task=task(name)), load(folders / name, task=task(name), untie=True)
    assert not untied.config.tie_word_embeddings
    assert (untied.initialised, untied.unused, untied.note) == (tied.initialised, tied.unused, tied.note)
    np.testing.assert_array_equal(logits(untied.model, untied.params), logits(tied.model, tied.params))
    # torch reads a model whose head alone was changed.
    leaves = flatten(untied.params)
    (kernel,) = [path for path, leaf in leaves.items() if path not in flatten(tied.params) and leaf.ndim == 2]
    changed = unflatten(leaves | {kernel: leaves[kernel] * 2})
    save(tmp_path / "out", untied.model, changed)
    torch_class = transformers.AutoModelForCausalLM if name in NAMES else transformers.AutoModelForMaskedLM
    assert_close(logits(untied.model, changed), torch_logits(torch_class.from_pretrained(tmp_path / "out").eval(), name), name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_of_one_of_the_two(adapter, name, folders, tmp_path):
    in_torch = lambda: transformers.AutoModelForCausalLM.from_pretrained(folders / name).eval()
    there = randomised(get_peft_model(in_torch(), LoraConfig(task_type="CAUSAL_LM", r=2, **ADAPTERS[adapter](*NAMES[name]))))
    there.save_pretrained(tmp_path / "adapter")
    tied = load(folders / name, task="causal-lm")
    if adapter != "embedding adapted":  # which changes the look-ups of a tied base alone
        with pytest.raises(ValueError, match="untie=True"):
            jpeft.load_hf(tmp_path / "adapter", tied.params, model=tied.model)
    untied = load(folders / name, task="causal-lm", untie=True)
    peft = jpeft.load_hf(tmp_path / "adapter", untied.params, model=untied.model)
    got = logits(untied.model, jpeft.merge(peft))
    assert_close(got, torch_logits(there, name), name)
    jpeft.save_hf(tmp_path / "again", peft, model=untied.model)
    assert_close(got, torch_logits(PeftModel.from_pretrained(in_torch(), tmp_path / "again").eval(), name), name)


@pytest.mark.filterwarnings("ignore")
def test_the_command_line_unties(folders, tmp_path, fails):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])).save_pretrained(tmp_path / "adapter")
    base = {"model": folders / "llama", "task": "generation"}
    flags = ["--model", folders / "llama", "--task", "generation", "--data", "x"]
    assert "--untie" in fails("eval", "--adapter", tmp_path / "adapter", *flags)
    run = load_adapter(tmp_path / "adapter", untie=True, **base)
    assert "lm_head/kernel/b" in flatten(run.peft.adapter)
    line = fails("train", "--untie", "--model", folders / "bert", "--data", "builtin", "--output", tmp_path / "run")
    assert "is about the head of a language model" in line

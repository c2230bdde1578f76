"""Tiny models here and in torch, with the same parameters, and adapters of HF PEFT on them."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.numpy import load_file
from test_bert import random_params
from test_bert import tiny as tiny_bert
from test_decoders import GPT2, LLAMA

import jpeft
from jpeft.models import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM, load, save

DECODERS = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "llama-tied": "LlamaForCausalLM"}
TASKS = {"bert": "sequence-classification"} | dict.fromkeys(DECODERS, "causal-lm")
TORCH = {"bert": "BertForSequenceClassification"} | DECODERS
HF_TASKS = {"bert": "SEQ_CLS"} | dict.fromkeys(DECODERS, "CAUSAL_LM")


class Tiny(NamedTuple):
    """A model and its parameters, and the folder that both sides read."""

    model: Any
    params: Any
    folder: Path


@functools.cache
def folder(family: str) -> Path:
    """A folder with a tiny model of random parameters."""
    model = {
        "bert": lambda: BertForSequenceClassification(tiny_bert("bert"), 3),
        "gpt2": lambda: GPT2LMHeadModel(GPT2),
        "llama": lambda: LlamaForCausalLM(LLAMA),
        "llama-tied": lambda: LlamaForCausalLM(dataclasses.replace(LLAMA, tie_word_embeddings=True)),
    }[family]()
    path = Path(tempfile.mkdtemp(), family)
    save(path, model, random_params(model))
    return path


@functools.cache
def tiny(family: str, scan: bool = False) -> Tiny:
    """The model here."""
    loaded = load(folder(family), task=TASKS[family], scan=scan)
    return Tiny(loaded.model, loaded.params, folder(family))


def torch_model(family: str) -> Any:
    """The model in torch, fresh: HF PEFT changes the model that it is given."""
    return getattr(transformers, TORCH[family]).from_pretrained(folder(family)).eval()


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, padded on the right."""
    mask = (np.arange(8) < np.array([8, 5])[:, None]).astype(np.int32)
    ids = np.random.default_rng(0).integers(5, 50, mask.shape).astype(np.int32)
    return np.where(mask, ids, 0).astype(np.int32), mask


def torch_logits(model: Any, family: str) -> np.ndarray:
    """The logits in torch, at all positions."""
    ids, mask = (torch.tensor(array).long() for array in batch())
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.float().numpy()


@functools.cache
def _forward(family: str, scan: bool, merged: bool) -> Any:
    apply = tiny(family, scan).model.apply
    return jax.jit((lambda params, *inputs: apply({"params": params}, *inputs)) if merged else jpeft.wrap(apply))


def logits(peft: jpeft.Peft, family: str, scan: bool = False) -> np.ndarray:
    """The logits here; of the merged model where there is one, so that few programs are compiled."""
    parts = [part for _, part in peft.method.parts] or [peft.method]
    merges = all(part.why_no_merge is None for part in parts)
    out = _forward(family, scan, merges)(jpeft.merge(peft) if merges else peft, *batch())
    return np.asarray(getattr(out, "logits", out))


def assert_close(one: np.ndarray, other: np.ndarray, family: str) -> None:
    """Equal within 1e-5, relative to the largest, where the text is no padding."""
    # HF PEFT leaves the rows of a prompt in the outputs.
    one, other = (array[:, -len(batch()[0][0]) :] if array.ndim == 3 else array for array in (one, other))
    real = batch()[1].astype(bool) if one.ndim == 3 else slice(None)
    scale = np.abs(other[real]).max()
    np.testing.assert_allclose(one[real] / scale, other[real] / scale, atol=1e-5, rtol=0)


def randomised(model: Any) -> Any:
    """A model of HF PEFT whose trained parameters have other numbers than at the start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def hf_adapter(family: str, path: Path, config: Any) -> np.ndarray:
    """Save an adapter that HF PEFT made, and return its logits."""
    model = randomised(get_peft_model(torch_model(family), config))
    model.save_pretrained(path)
    return torch_logits(model, family)


def in_torch(family: str, path: Path) -> np.ndarray:
    """The logits of HF PEFT with the adapter in a folder."""
    return torch_logits(PeftModel.from_pretrained(torch_model(family), path).eval(), family)


def tensors(path: Path) -> dict[str, np.ndarray]:
    """What an adapter's file holds."""
    return load_file(path / "adapter_model.safetensors")

"""Adapters that HF PEFT wrote: the same logits, and the same file when they are written again."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.base import IDS, MASK, TASKS
from goldens.golden import Golden, base, base_logits, goldens
from safetensors.numpy import load_file

import jpeft
from jpeft.hf_peft.formats import formats

# Where HF PEFT's forward cannot be that of merged weights.
RUNS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT")


def is_scanned(golden):
    """Llama's layers are stacked, unless an adapter differs from layer to layer in a way that a stack cannot hold."""
    return golden.model == "llama"


@functools.cache
def forward_of_base(model, scan):
    return jax.jit(base(model, scan=scan).model.apply)


def logits_of(peft, golden, scan):
    """The logits with the adapter: merged, which needs no program of its own, where it can be."""
    inputs = {"input_ids": jnp.asarray(IDS), "attention_mask": jnp.asarray(MASK)}
    if golden.config["peft_type"] in RUNS:
        if golden.case.startswith("multitask"):
            peft = jpeft.assign(peft, jnp.asarray(TASKS))
        return jax.jit(jpeft.wrap(base(golden.model, scan=scan).model.apply))(peft, **inputs)
    return forward_of_base(golden.model, scan)({"params": jpeft.merge(peft)}, **inputs)


def assert_close(got, expected):
    """Within 1e-5 of the largest logit, for all tokens that are not padding."""
    real = slice(None) if expected.ndim == 2 else MASK.astype(bool)
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], rtol=0, atol=1e-5 * np.abs(expected[real]).max())


def check(golden, folder, scan):
    loaded = base(golden.model, scan=scan)
    peft = jpeft.load_hf(golden.write(folder / "in"), loaded.params, model=loaded.model)
    assert_close(logits_of(peft, golden, scan), golden.logits)
    jpeft.save_hf(folder / "out", peft, model=loaded.model)
    return peft


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("scan", [False, True])
def test_the_bases_are_the_same(model, scan):
    inputs = {"input_ids": jnp.asarray(IDS), "attention_mask": jnp.asarray(MASK)}
    assert_close(forward_of_base(model, scan)({"params": base(model, scan=scan).params}, **inputs), base_logits(model))


@pytest.mark.parametrize("golden", goldens(), ids=lambda golden: f"{golden.model}-{golden.case}")
def test_golden(golden, tmp_path):
    if golden.config["peft_type"] not in formats():
        pytest.skip("no format yet")
    check(golden, tmp_path, is_scanned(golden))

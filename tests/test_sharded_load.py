"""Checkpoints of which each process reads only the parts that its devices hold."""

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_bert import random_params, tiny

import jpeft
from jpeft import sharding
from jpeft.models import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    load,
    partition_rules,
    save,
)
from jpeft.models.checkpoints.layout import checkpoint_layout
from jpeft.models.checkpoints.tensors import Tensors

GPT2 = GPT2Config(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
LLAMA = LlamaConfig(
    model_type="qwen3", vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    intermediate_size=12, max_position_embeddings=16,
)  # fmt: skip
MODELS = {
    "bert": (BertForSequenceClassification(tiny("bert"), 3), "sequence-classification"),
    "roberta": (BertForSequenceClassification(tiny("roberta"), 3), "sequence-classification"),
    "gpt2": (GPT2LMHeadModel(GPT2), "causal-lm"),
    "qwen3": (LlamaForCausalLM(LLAMA), "causal-lm"),
}


class Spy:
    """A safetensors file that records what is read from it."""

    def __init__(self, file, reads):
        self.file, self.reads = file, reads

    def keys(self):
        return self.file.keys()

    def get_tensor(self, name):
        raise AssertionError(f"all of {name} was read")

    def get_slice(self, name):
        return SpySlice(self.file.get_slice(name), name, self.reads)


class SpySlice:
    def __init__(self, tensor, name, reads):
        self.tensor, self.name, self.reads = tensor, name, reads

    def get_shape(self):
        return self.tensor.get_shape()

    def __getitem__(self, part):
        read = self.tensor[part]
        self.reads.append((self.name, read.nbytes))
        return read


def spy(monkeypatch):
    """Record everything that is read from safetensors files from now on, as (tensor, bytes)."""
    found, real = [], Tensors._open
    monkeypatch.setattr(Tensors, "_open", lambda self, file: Spy(real(self, file), found))
    return found


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("name", MODELS)
def test_each_part_is_read_once_and_nothing_else(tmp_path, monkeypatch, name, scan):
    model, task = MODELS[name]
    save(tmp_path / "model", model, random_params(model))
    want = load(tmp_path / "model", task=task, scan=scan)

    found = spy(monkeypatch)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    got = load(tmp_path / "model", task=task, scan=scan, mesh=mesh)

    chex.assert_trees_all_equal(jax.device_get(got.params), jax.device_get(want.params))
    where = jpeft.flatten(sharding.shardings(want.params, mesh, partition_rules(want.model)))
    assert {path: leaf.sharding for path, leaf in jpeft.flatten(got.params).items()} == where
    assert (got.initialised, got.unused, got.labels) == (want.initialised, want.unused, want.labels)

    # Every byte is read once, though two devices hold it, and no read is larger than what one device holds of a tensor.
    assert sum(size for _, size in found) == sum(leaf.nbytes for leaf in jax.tree.leaves(want.params))
    largest = {}
    for tensor, size in found:
        largest[tensor] = max(size, largest.get(tensor, 0))
    for entry in checkpoint_layout(want.model):
        per_layer = jpeft.flatten(got.params)[entry.path].addressable_shards[0].data.nbytes // (len(entry.names) if entry.stacked else 1)
        stored = Tensors(tmp_path / "model", want.config.model_type)
        for tensor in entry.names:
            assert largest[stored._where[stored._find(tensor)][0]] == per_layer
    query = jpeft.flatten(got.params)[next(path for path in where if path.endswith(("query/kernel", "c_attn/kernel", "q_proj/kernel")))]
    assert len({str(shard.index) for shard in query.addressable_shards}) == 4


def test_new_leaves_other_rules_and_other_types(tmp_path, monkeypatch):
    model, task = MODELS["bert"]
    save(tmp_path / "model", model, random_params(model))
    mesh, reads = sharding.make_mesh(fsdp=-1, data=1), spy(monkeypatch)
    rules = ((".*query/kernel", P(None, "fsdp")), (".*", P()))
    got = load(tmp_path / "model", task=task, mesh=mesh, rules=rules, fresh_head=True, param_dtype="bfloat16", num_labels=5)
    leaves = jpeft.flatten(got.params)
    assert leaves["classifier/kernel"].shape[-1] == 5
    assert all(leaf.sharding.mesh == mesh and leaf.dtype == "bfloat16" for leaf in leaves.values())
    query = next(leaf for path, leaf in leaves.items() if path.endswith("query/kernel"))
    assert query.sharding.spec == P(None, "fsdp")
    assert not any(tensor.startswith("classifier") for tensor, _ in reads)
    with pytest.raises(ValueError, match="pass mesh= too"):
        load(tmp_path / "model", task=task, rules=rules)


def test_a_loaded_model_runs_where_it_is(tmp_path):
    model, task = MODELS["bert"]
    save(tmp_path / "model", model, random_params(model))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    alone, there = load(tmp_path / "model", task=task), load(tmp_path / "model", task=task, mesh=mesh)
    ids = np.arange(16, dtype=np.int32).reshape(4, 4)
    run = jax.jit(sharding.by_example(model.apply, mesh))
    got = run({"params": there.params}, sharding.shard_batch(ids, mesh))
    np.testing.assert_allclose(got, jax.jit(model.apply)({"params": alone.params}, ids), atol=1e-5)

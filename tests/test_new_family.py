"""A new family is one folder and one line: the skeleton of the guide, and a toy encoder-decoder, from a checkpoint to a trained adapter."""

import doctest
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from tables import noised
from test_bert import random_params

import jpeft
import jpeft.models
from jpeft import sharding
from jpeft.models import families
from jpeft.models.common.contract import check_model

SKELETON = Path(__file__).parents[1] / "docs" / "skeletons" / "family"
WITHOUT_PATH = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # the copy is found first
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}


WALK = """
import jax, jax.numpy as jnp
import jpeft
from jpeft import models
from jpeft.models.skeleton.config import SkeletonConfig
from jpeft.models.skeleton.model import SkeletonForCausalLM

model = SkeletonForCausalLM(SkeletonConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
ids = jnp.array([[3, 5, 2]])
models.save("base", model, model.init(jax.random.key(0), ids)["params"])
loaded = models.load("base", task="causal-lm")
peft = jpeft.apply(loaded.params, method="lora", rank=1)
jpeft.wrap(loaded.model.apply, peft.method)(peft.variables, ids)
jpeft.save("adapter", peft)
models.save("merged", loaded.model, jpeft.merge(jpeft.load("adapter", loaded.params)))
print(models.load("merged", task="language-model").config.model_type)
"""


def test_a_family_is_one_folder_and_one_line(tmp_path):
    """In a copy of the package, the skeleton's folder and its line in families.py make a family."""
    shutil.copytree(SKELETON.parents[2] / "jpeft", tmp_path / "jpeft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(SKELETON, tmp_path / "jpeft" / "models" / "skeleton")
    listing = tmp_path / "jpeft" / "models" / "families.py"
    listing.write_text(listing.read_text().replace('    "llama",\n', '    "llama",\n    "skeleton",\n'))
    done = subprocess.run([sys.executable, "-c", WALK], cwd=tmp_path, env=WITHOUT_PATH, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["skeleton"]


def forget(prefix):
    for name in [name for name in sys.modules if name == prefix or name.startswith(f"{prefix}.")]:
        del sys.modules[name]


@pytest.fixture
def skeleton(tmp_path, monkeypatch):
    """The one folder: docs/skeletons/family, copied to jpeft/models/skeleton."""
    shutil.copytree(SKELETON, tmp_path / "models" / "skeleton")
    monkeypatch.setattr(jpeft.models, "__path__", [*jpeft.models.__path__, str(tmp_path / "models")])
    importlib.invalidate_caches()
    yield importlib.import_module("jpeft.models.skeleton.family").FAMILY, SIZES | {"num_hidden_layers": 2}, 1
    forget("jpeft.models.skeleton")


@pytest.fixture
def toy():
    """The one folder: tests/toy_family."""
    family = importlib.import_module("toy_family.family").FAMILY
    return family, SIZES | {"num_hidden_layers": 3, "num_decoder_layers": 2}, 2


@pytest.fixture(params=["skeleton", "toy"])
def new(request, monkeypatch):
    """A new family, sizes of a small model, and how many texts that takes."""
    family, sizes, texts = request.getfixturevalue(request.param)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, family))  # the one line
    return family, sizes, texts


def language_model(family, sizes, **changes):
    return family.models[family.language_model].module(family.config(**sizes | changes))


def batch(texts):
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 2, 5)).astype(np.int32)
    return [jnp.asarray(ids[i]) for i in range(texts)]


@pytest.mark.parametrize("scan", [False, True])
def test_promises_to_methods(new, scan):
    family, sizes, _ = new
    for described in family.models.values():
        check_model(described.module(family.config(**sizes, scan=scan)), family)


@pytest.mark.parametrize("scan", [False, True])
def test_folders_are_written_and_read(tmp_path, new, scan):
    family, sizes, texts = new
    model = language_model(family, sizes, scan=scan)
    params = random_params(model)
    jpeft.models.save(tmp_path / "out", model, params)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    (model_type, prefix) = next(iter(family.hf_classes.items()))
    assert about["model_type"] == model_type
    assert about["architectures"] == [prefix + family.models[family.language_model].hf_suffix]
    loaded = jpeft.models.load(tmp_path / "out", task="language-model", scan=scan)
    assert loaded.config == model.config
    assert loaded.initialised == loaded.unused == frozenset()
    chex.assert_trees_all_equal(loaded.params, params)
    other = jpeft.models.load(tmp_path / "out", task=family.language_model, scan=not scan)
    want = jax.jit(model.apply)({"params": params}, *batch(texts))
    np.testing.assert_allclose(jax.jit(other.model.apply)({"params": other.params}, *batch(texts)), want, atol=1e-5)
    body = jpeft.models.load(tmp_path / "out", task=next(iter(family.models)), scan=scan)
    chex.assert_trees_all_equal(body.params, params[family.names.body])


def test_both_stacks_are_found(tmp_path, toy, monkeypatch):
    family, sizes, _ = toy
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, family))
    model = language_model(family, sizes, scan=True)
    params = random_params(model)
    assert params["transformer"]["encoder"]["block"]["mlp"]["wi"]["kernel"].shape == (3, 16, 24)
    assert params["transformer"]["decoder"]["block"]["mlp"]["wi"]["kernel"].shape == (2, 16, 24)
    jpeft.models.save(tmp_path / "out", model, params)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert {name.rsplit("block.")[1][0] for name in names if name.startswith("encoder.")} == set("012")
    assert {name.rsplit("block.")[1][0] for name in names if name.startswith("decoder.")} == set("01")
    assert "shared.weight" in names


@pytest.mark.parametrize("scan", [False, True])
def test_lora_is_trained_saved_merged_and_read(tmp_path, new, scan):
    family, sizes, texts = new
    model = language_model(family, sizes, scan=scan)
    jpeft.models.save(tmp_path / "base", model, random_params(model))
    load = lambda folder: jpeft.models.load(tmp_path / folder, task="language-model", scan=scan)
    loaded = load("base")
    peft = jpeft.apply(loaded.params, method="lora", rank=2)
    forward = jax.jit(jpeft.wrap(loaded.model.apply, peft.method))
    plain = loaded.model.apply({"params": loaded.params}, *batch(texts))
    np.testing.assert_allclose(forward(peft.variables, *batch(texts)), plain, atol=1e-5)

    loss = lambda adapter: (forward(peft.replace(adapter=adapter).variables, *batch(texts)) ** 2).mean()
    peft = peft.replace(adapter=noised(peft.adapter))
    step = jax.tree.map(lambda leaf, grad: leaf - 1e-3 * grad, peft.adapter, jax.grad(loss)(peft.adapter))
    assert loss(step) < loss(peft.adapter)
    assert len(jax.tree.leaves(peft.adapter)) == 2 * sum(path.endswith("kernel") for path in jpeft.flatten(loaded.params))

    jpeft.save(tmp_path / "adapter", peft)
    again = jpeft.load(tmp_path / "adapter", load("base").params)
    want = forward(peft.variables, *batch(texts))
    np.testing.assert_array_equal(forward(again.variables, *batch(texts)), want)
    jpeft.models.save(tmp_path / "merged", loaded.model, jpeft.merge(peft))
    merged = load("merged")
    np.testing.assert_allclose(merged.model.apply({"params": merged.params}, *batch(texts)), want, atol=1e-4)


def test_parameters_are_split_over_a_mesh(tmp_path, new):
    family, sizes, _ = new
    model = language_model(family, sizes)
    jpeft.models.save(tmp_path / "out", model, random_params(model))
    want = jpeft.models.load(tmp_path / "out", task="language-model", scan=False)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    got = jpeft.models.load(tmp_path / "out", task="language-model", mesh=mesh, scan=False)
    chex.assert_trees_all_equal(jax.device_get(got.params), jax.device_get(want.params))
    specs = {path: leaf.sharding.spec for path, leaf in jpeft.flatten(got.params).items()}
    for role, spec in {
        "attention_in": P("fsdp", "tensor"),
        "attention_out": P("tensor", "fsdp"),
        "ffn_in": P("fsdp", "tensor"),
        "ffn_out": P("tensor", "fsdp"),
        "embedding": P("tensor", "fsdp"),
        "norms": P(),
    }.items():
        assert {specs[path] for path in specs if family.roles.matches(role, path)} == {spec}, role


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "bitfit", "adapter", "parallel_adapter"])
def test_methods_find_the_modules_of_the_skeleton(skeleton, monkeypatch, method):
    family, sizes, texts = skeleton
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, family))
    model = language_model(family, sizes)
    params = random_params(model)
    if method == "bitfit":
        with pytest.raises(ValueError, match="no bias parameters"):
            jpeft.apply(params, method=method)
        return
    options = {"length": 3} if method.startswith("pr") else {}
    peft = jpeft.apply(params, method=method, **options)
    peft = peft.replace(adapter=noised(peft.adapter))
    forward = jpeft.wrap(model.apply, peft.method)
    want, got = model.apply({"params": params}, *batch(texts)), forward(peft.variables, *batch(texts))
    assert got.shape == want.shape
    assert jnp.abs(got - want).max() > 1e-2
    out = jpeft.models.generate(forward, peft.variables, *batch(texts), max_new_tokens=3)
    np.testing.assert_array_equal(out.tokens[:, 0], got[:, -1].argmax(-1))


def test_examples_of_the_skeleton(skeleton):
    for name in ("config", "model", "family"):
        module = importlib.import_module(f"jpeft.models.skeleton.{name}")
        assert doctest.testmod(module, extraglobs={"jax": jax, "jnp": jnp}).failed == 0

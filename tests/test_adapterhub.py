"""Bottlenecks that the library adapters wrote: the same logits, and the same files when they are written again."""

import functools
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.base import IDS, MASK
from goldens.golden import HERE, base
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.training.adapter_folder import adapter_labels, open_adapter


@functools.cache
def about():
    return json.loads((HERE / "adapterhub.json").read_text())


@functools.cache
def tensors():
    return load_file(HERE / "adapterhub.safetensors")


def write(key, folder):
    """Make the folder of a case, as the library wrote it."""
    folder.mkdir(parents=True)
    for name, content in about()[key].items():
        (folder / name).write_text(json.dumps(content))
    for file in ("adapter.safetensors", "model_head.safetensors"):
        prefix = f"{key}|{file}|"
        if own := {name.removeprefix(prefix): tensor for name, tensor in tensors().items() if name.startswith(prefix)}:
            save_file(own, folder / file)
    return folder


def logits_of(peft, loaded):
    inputs = {"input_ids": jnp.asarray(IDS), "attention_mask": jnp.asarray(MASK)}
    return jax.jit(jpeft.wrap(loaded.model.apply))(peft, **inputs)


@pytest.mark.parametrize("key", about())
def test_golden(tmp_path, key):
    loaded = base(key.split("|")[0], scan=key.startswith("llama"))
    folder = write(key, tmp_path / "in")
    peft = jpeft.load_adapterhub(folder, loaded.params, model=loaded.model)
    expected = tensors()[f"{key}|logits"]
    real = slice(None) if expected.ndim == 2 else MASK.astype(bool)
    got = np.asarray(logits_of(peft, loaded))[real]
    np.testing.assert_allclose(got, expected[real], rtol=0, atol=1e-5 * np.abs(expected[real]).max())

    labels = adapter_labels(folder)
    jpeft.save_adapterhub(tmp_path / "out", peft, model=loaded.model, name="reviews", labels=labels)
    for file in sorted(path.name for path in folder.glob("*.safetensors")):
        old, new = load_file(folder / file), load_file(tmp_path / "out" / file)
        assert new.keys() == old.keys()
        for name, tensor in old.items():
            np.testing.assert_array_equal(new[name], tensor)
    read = lambda place: json.loads((place / "adapter_config.json").read_text())
    new, old = read(tmp_path / "out"), read(folder)
    differ = {name for name in new["config"].keys() | old["config"].keys() if new["config"].get(name) != old["config"].get(name)}
    assert differ <= {"init_weights", "reduction_factor"}
    assert 16 // new["config"]["reduction_factor"] == 16 // old["config"]["reduction_factor"]
    assert {name: new[name] for name in ("hidden_size", "model_type", "name", "version")} == {
        name: old[name] for name in ("hidden_size", "model_type", "name", "version")
    }
    for path, leaf in jpeft.flatten(open_adapter(tmp_path / "out", loaded).adapter).items():
        np.testing.assert_array_equal(leaf, jpeft.flatten(peft.adapter)[path])
    if key == "bert|flex-head":
        assert labels == ("no", "perhaps", "yes")


# --- what cannot be read ------------------------------------------------------------------------------------------------------------------


def change_config(folder, **changes):
    content = json.loads((folder / "adapter_config.json").read_text())
    content["config"] |= changes
    (folder / "adapter_config.json").write_text(json.dumps(content))


def change_about(folder, **changes):
    content = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(content))


def change_tensors(folder, change):
    file = folder / "adapter.safetensors"
    content = {name: np.array(tensor) for name, tensor in load_file(file).items()}
    save_file(change(content) or content, file)


def only_pickles(folder):
    (folder / "adapter.safetensors").unlink()
    (folder / "pytorch_adapter.bin").write_bytes(b"\x80\x02}q\x00.")


FIRST = "bert.encoder.layer.0.output.adapters.reviews.adapter_up.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: change_config(f, use_gating=True), "use_gating=True has no counterpart in jpeft; False has"),
        (lambda f: change_config(f, scaling="learned"), "scaling must be a number, not 'learned'"),
        (lambda f: change_config(f, scaling=2.0), "scaling=2.0 .*has no counterpart in jpeft; 1.0 has"),
        (lambda f: change_config(f, residual_before_ln=False), "residual_before_ln=False has no counterpart"),
        (lambda f: change_config(f, leave_out=[0]), r"leave_out=\[0\] has no counterpart"),
        (lambda f: change_config(f, inv_adapter="nice"), "inv_adapter='nice' has no counterpart"),
        (lambda f: change_config(f, non_linearity="leakyrelu"), "non_linearity must be one of gelu, gelu_new, relu"),
        (lambda f: change_config(f, reduction_factor=0), "reduction_factor must be one number above 0"),
        (lambda f: change_config(f, reduction_factor={"0": 2, "default": 4}), "reduction_factor must be one number above 0 for all layers"),
        (lambda f: change_config(f, reduction_factor=2), "has shape|does not fit"),
        (lambda f: change_config(f, mh_adapter="yes"), "mh_adapter must be true or false, not 'yes'"),
        (lambda f: change_config(f, twist=3), "jpeft does not know twist=3 of bottlenecks"),
        (lambda f: change_config(f, architecture="lora"), "architecture 'lora' is none of bottlenecks"),
        (lambda f: change_about(f, config=None), "config must be an object, not None"),
        (lambda f: change_about(f, hidden_size=32), "trained on another base: its hidden_size is 32, that here is 16"),
        (lambda f: change_about(f, model_type="roberta"), "trained on another base: its model_type is 'roberta'"),
        (lambda f: (f / "adapter_config.json").write_text("[1]"), "holds no JSON object"),
        (
            lambda f: change_tensors(f, lambda t: {n: a for n, a in t.items() if n != FIRST}),
            "1 tensors are missing .*adapters.NAME.adapter_up",
        ),
        (lambda f: change_tensors(f, lambda t: t | {"../../etc/passwd": t[FIRST]}), "1 have no place in the model"),
        (lambda f: change_tensors(f, lambda t: t | {FIRST: t[FIRST][:, :1]}), "does not fit its configuration and the model"),
        (lambda f: change_tensors(f, lambda t: t | {FIRST: t[FIRST] * np.nan}), "not finite"),
        (only_pickles, "pytorch_adapter.bin is a pickle"),
        (lambda f: (f / "adapter.safetensors").write_bytes(struct.pack("<Q", 2**60)), "is damaged or not a safetensors file"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, spoil, message):
    folder = write("bert|pfeiffer", tmp_path / "in")
    spoil(folder)
    loaded = base("bert", scan=False)
    with pytest.raises(ValueError, match=message) as error:
        jpeft.load_adapterhub(folder, loaded.params, model=loaded.model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {}, "this is lora: write it for HF PEFT"),
        ("adapter", {"size": 2}, None),  # its normalisations are those of the base
        ("parallel_adapter", {"size": 2}, "In pre-norm blocks the parallel bottleneck"),
    ],
)
def test_what_cannot_be_written(tmp_path, method, options, message):
    loaded = base("llama", scan=True)
    peft = jpeft.apply(loaded.params, method=method, **options)
    if message is None:
        jpeft.save_adapterhub(tmp_path / "out", peft, model=loaded.model)
        moved = peft.replace(adapter=jax.tree.map(lambda leaf: leaf + 1, peft.adapter))
        peft, message = moved, "keeps normalisations as they are, and .* was trained: use train_norms=False"
    with pytest.raises(ValueError, match=message):
        jpeft.save_adapterhub(tmp_path / "new", peft, model=loaded.model)
    assert not (tmp_path / "new").exists()

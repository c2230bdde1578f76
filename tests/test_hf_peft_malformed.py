"""Adapters of HF PEFT that are damaged, tampered with, or of another base: one line that names what is wrong, and never a traceback."""

import json
import os
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from goldens.golden import Golden, base
from safetensors.numpy import load_file, save_file

import jpeft.models

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
HEAD = "base_model.model.classifier.weight"


def tensors(change):
    """Change the tensors of a folder, by a function of the dictionary of all of them."""

    def spoil(folder):
        content = {name: np.array(tensor) for name, tensor in load_file(folder / TENSORS).items()}
        save_file(change(content) or content, folder / TENSORS)

    return spoil


def config(**changes):
    """Change keys of the configuration."""

    def spoil(folder):
        content = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(content))

    return spoil


def written(name, content):
    """Replace a file."""
    return lambda folder: (folder / name).write_bytes(content)


def without(name, then=None):
    """Remove a file, and put another in its place."""

    def spoil(folder):
        (folder / name).unlink()
        if then:
            (folder / then).write_bytes(b"\x80\x02}q\x00.")

    return spoil


def header(change):
    """Change the header of the tensors' file, and leave the numbers."""

    def spoil(folder):
        raw = (folder / TENSORS).read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        text = json.dumps(change(json.loads(raw[8 : 8 + size]))).encode()
        (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return spoil


def cut(length):
    """Cut the tensors' file short."""
    return lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:length])


def renamed(old, new):
    return tensors(lambda content: {new if name == old else name: tensor for name, tensor in content.items()})


def quantised(content):
    content[A] = content[A].astype(ml_dtypes.float8_e4m3fn)


DAMAGED = "damaged or not a safetensors file"
CASES = {
    # tensors
    "missing": (tensors(lambda t: {n: a for n, a in t.items() if n != A}), r"1 tensors are missing \(bert.encoder.layer.0.*lora_A.weight"),
    "spare": (tensors(lambda t: t | {A.replace("query", "key"): t[A]}), "1 have no place in the model .*self.key.lora_A"),
    "rank": (tensors(lambda t: t | {A: t[A][:1]}), r"lora_A.weight' has shape \(1, 16\), \(2, 16\) is needed"),
    "axes": (tensors(lambda t: t | {A: t[A].T}), r"has shape \(16, 2\)"),
    "flat": (tensors(lambda t: t | {A: t[A].reshape(-1)}), r"has shape \(32,\)"),
    "empty": (tensors(lambda t: t | {A: t[A][:0]}), r"has shape \(0, 16\)"),
    "none": (tensors(lambda t: {"x": t[A]}), "tensors are missing"),
    "nan": (tensors(lambda t: t | {A: t[A] * np.nan}), "not finite"),
    "infinite head": (tensors(lambda t: t | {HEAD: t[HEAD] + np.inf}), "not finite"),
    "whole numbers": (tensors(lambda t: t | {A: t[A].astype(np.int8)}), "holds whole numbers of the type I8"),
    "head of other labels": (tensors(lambda t: t | {HEAD: t[HEAD][:2]}), r"classifier.weight' has shape \(2, 16\), \(3, 16\) is needed"),
    "path up": (tensors(lambda t: t | {"../../" + A: t[A]}), "1 have no place in the model"),
    "path up inside": (renamed(A, A.replace("layer.0", "layer.0/../1")), "1 tensors are missing"),
    "absolute": (tensors(lambda t: t | {"/etc/passwd": t[A]}), "1 have no place in the model"),
    "wide name": (tensors(lambda t: t | {"x" * 10**5: t[A]}), "1 have no place in the model"),
    "twice": (tensors(lambda t: t | {A.removeprefix("base_model.model."): t[A] + 1}), "twice, as .* and they differ"),
    # the tensors' file
    "no bytes": (written(TENSORS, b""), DAMAGED),
    "zeros": (written(TENSORS, b"\0" * 64), DAMAGED),
    "pointer": (written(TENSORS, b"version https://git-lfs.github.com/spec/v1"), DAMAGED),
    "huge header": (written(TENSORS, struct.pack("<Q", 2**62) + b"{}"), DAMAGED),
    "long header": (written(TENSORS, struct.pack("<Q", 200_000_000) + b" " * 64), DAMAGED),
    "no json": (written(TENSORS, struct.pack("<Q", 8) + b"{]{]{]{]"), DAMAGED),
    "deep json": (written(TENSORS, struct.pack("<Q", 4000) + b"[" * 4000), DAMAGED),
    "cut in the header": (cut(100), DAMAGED),
    "cut in the numbers": (cut(-10), DAMAGED),
    "beyond the end": (header(lambda h: h | {A: h[A] | {"data_offsets": [0, 10**9]}}), DAMAGED),
    "backwards": (header(lambda h: h | {A: h[A] | {"data_offsets": [128, 0]}}), DAMAGED),
    "negative shape": (header(lambda h: h | {A: h[A] | {"shape": [-2, -16]}}), DAMAGED),
    "huge shape": (header(lambda h: h | {A: h[A] | {"shape": [2**40, 2**40]}}), DAMAGED),
    "unknown type": (header(lambda h: h | {A: h[A] | {"dtype": "F7"}}), DAMAGED),
    "pickle": (without(TENSORS, "adapter_model.bin"), "adapter_model.bin is a pickle, which can run any code"),
    "no tensors": (without(TENSORS), "holds no adapter_model.safetensors"),
    # the configuration
    "no config": (without(CONFIG), "holds no adapter_config.json"),
    "config not json": (written(CONFIG, b"{"), "adapter_config.json is not valid JSON"),
    "config not text": (written(CONFIG, b"\xff\xfe{}"), "adapter_config.json is not valid JSON"),
    "config no object": (written(CONFIG, b"[1]"), "holds no JSON object"),
    "config deep": (written(CONFIG, b'{"r":' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "adapter_config.json"),
    "no type": (config(peft_type=None), "peft_type None is not one that jpeft reads"),
    "type of another kind": (config(peft_type=["LORA"]), "peft_type .* is not one that jpeft reads"),
    "unknown type of adapter": (config(peft_type="../LORA"), "peft_type '../LORA' is not one that jpeft reads: ADALORA, "),
    "type of other tensors": (config(peft_type="BOFT"), "jpeft does not know|does not fit"),
    "rank as text": (config(r="2"), "r must be a whole number of at least 1, not '2'"),
    "negative rank": (config(r=-2), "r must be a whole number of at least 1, not -2"),
    "rank of a half": (config(r=2.5), "r must be a whole number of at least 1"),
    "enormous rank": (config(r=10**9), "is needed"),
    "more than enormous rank": (config(r=10**30), "r must be a whole number of at least 1"),
    "true rank": (config(r=True), "r must be a whole number of at least 1, not True"),
    "alpha": (config(lora_alpha=float("nan")), "lora_alpha must be a number above 0, not nan"),
    "no alpha": (config(lora_alpha=0), "lora_alpha must be a number above 0"),
    "infinite alpha": (config(lora_alpha=float("inf")), "lora_alpha must be a number above 0"),
    "dropout": (config(lora_dropout=1.5), "lora_dropout must be a number from 0 to below 1"),
    "targets as a number": (config(target_modules=5), "target_modules must be a list of names"),
    "targets of numbers": (config(target_modules=[5]), "target_modules must be a list of names"),
    "targets as a wrong regex": (config(target_modules="(query"), "target_modules must be a list of names, a regular expression or null"),
    "no targets": (config(target_modules=["nothing"]), "nothing|tensors are missing|no place"),
    "more targets": (config(target_modules=["query", "value", "dense"]), "tensors are missing"),
    "targets up": (config(target_modules=["../query"]), "target_modules|no place"),
    "excluded": (config(exclude_modules=["query"]), "have no place in the model"),
    "layers": (config(layers_to_transform="all"), "layers_to_transform must be a whole number, a list of them or null"),
    "layers that are not there": (config(layers_to_transform=[7]), "chooses no module of the model"),
    "pattern as a list": (config(rank_pattern=[2]), "rank_pattern must be an object"),
    "pattern of texts": (config(rank_pattern={"query": "2"}), "rank_pattern must be an object"),
    "pattern with a wrong regex": (config(rank_pattern={"(query": 2}), "rank_pattern must be an object"),
    "bias": (config(bias="some"), "bias must be one of 'none', 'all', 'lora_only'"),
    "biases that are not there": (config(bias="all"), "tensors are missing"),
    "saved modules as a text": (config(modules_to_save="classifier"), "modules_to_save must be a list of names or null"),
    "saved modules that are not there": (config(modules_to_save=["classifier", "pooler"]), "tensors are missing .*pooler"),
    "tokens": (config(trainable_token_indices=[10**6]), "trainable_token_indices|1000000"),
    "negative tokens": (config(trainable_token_indices=[-1]), "trainable_token_indices|-1"),
    "tokens as a text": (config(trainable_token_indices="1"), "trainable_token_indices"),
    "dora as a text": (config(use_dora="yes"), "use_dora must be true or false"),
    "dora": (config(use_dora=True), "tensors are missing .*lora_magnitude_vector"),
    "unknown option": (config(new_maths=3), "jpeft does not know new_maths=3 of LORA"),
    "replicated layers": (config(layer_replication=[[0, 2], [1, 2]]), "jpeft does not know layer_replication"),
    "loftq": (config(init_lora_weights="loftq"), "init_lora_weights"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_one_line(tmp_path, case):
    spoil, message = CASES[case]
    folder = Golden("bert", "lora").write(tmp_path / "in")
    spoil(folder)
    loaded = base("bert", scan=False)
    with pytest.raises(ValueError, match=message) as error:
        jpeft.load_hf(folder, loaded.params, model=loaded.model)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 3000


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_another_model_is_named(tmp_path, model):
    folder = Golden("bert", "lora").write(tmp_path / "in")
    loaded = base(model, scan=True)
    with pytest.raises(ValueError, match="target_modules|does not fit|no place") as error:
        jpeft.load_hf(folder, loaded.params, model=loaded.model)
    assert "\n" not in str(error.value)


def test_a_head_that_is_the_embedding_is_named(tmp_path):
    folder = Golden("gpt2-untied", "lokr").write(tmp_path / "in")
    loaded = base("gpt2", scan=True)
    with pytest.raises(ValueError, match="an adapter of 'lm_head', which in this base is the word embedding.*untie=True") as error:
        jpeft.load_hf(folder, loaded.params, model=loaded.model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_pattern": {"embed_tokens": 7}}, "give 'lm_head' other numbers than 'model.embed_tokens', with which it is tied"),
        ({"use_dora": True}, "gives 'model.embed_tokens' and 'lm_head' two magnitudes"),
        (None, "'lm_head.lora_A.weight' is not the transpose of 'model.embed_tokens.lora_embedding_B'"),
    ],
)
def test_a_tie_that_is_none_is_named(tmp_path, changes, message):
    about = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = jpeft.models.LlamaForCausalLM(jpeft.models.LlamaConfig(**about, tie_word_embeddings=True))
    params = model.init(jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    jpeft.save_hf(tmp_path / "in", jpeft.apply(params, method="lora", target=["embed_tokens"]), model=model)
    head = "base_model.model.lm_head.lora_A.weight"
    spoil = config(**changes) if changes else tensors(lambda content: content | {head: content[head] + 1})
    jpeft.load_hf(tmp_path / "in", params, model=model)
    spoil(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        jpeft.load_hf(tmp_path / "in", params, model=model)


def test_a_base_of_another_size_is_named(tmp_path):
    folder = Golden("llama", "lora").write(tmp_path / "in")
    loaded = base("gpt2", scan=False)
    model = jpeft.models.LlamaForCausalLM(
        jpeft.models.LlamaConfig(vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    del loaded
    with pytest.raises(ValueError, match=r"has shape \(2, 16\), \(2, 32\) is needed"):
        jpeft.load_hf(folder, jpeft.models.abstract_params(model), model=model)


@pytest.mark.parametrize("name", ["..", ".", "", "/etc", "a/b", "../in"])
def test_the_name_of_an_adapter_leads_nowhere_else(tmp_path, name):
    folder = Golden("bert", "lora").write(tmp_path / "in")
    loaded = base("bert", scan=False)
    with pytest.raises(ValueError, match="is no name of an adapter"):
        jpeft.load_hf(folder, loaded.params, model=loaded.model, name=name)


def test_nothing_is_written_through_a_link(tmp_path):
    loaded = base("bert", scan=False)
    peft = jpeft.apply(loaded.params, method="lora", rank=2)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "notes.txt").write_text("mine")
    os.symlink(tmp_path / "real", tmp_path / "link")
    with pytest.raises(ValueError, match="link"):
        jpeft.save_hf(tmp_path / "link", peft, model=loaded.model, overwrite=True)
    assert (tmp_path / "real" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["tensors", "config"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, kind):
    folder = Golden("bert", "lora").write(tmp_path / "in")
    file = folder / (TENSORS if kind == "tensors" else CONFIG)
    file.unlink()
    os.symlink(tmp_path / "gone", file)
    loaded = base("bert", scan=False)
    with pytest.raises(ValueError, match=f"holds no {file.name}"):
        jpeft.load_hf(folder, loaded.params, model=loaded.model)

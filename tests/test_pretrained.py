"""Pretrained checkpoints as users have them: other heads, ties, quantised, wrapped, foreign and hostile ones."""

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_bert import batch, random_params, tiny
from test_decoders import CASES
from test_hf import edit, edit_config
from tiny_text import make_base, make_decoder, make_model, shard

from jpeft.cli import main
from jpeft.models import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaForCausalLM,
    load,
    save,
)
from jpeft.models.checkpoints.notes import CheckpointNote
from jpeft.models.checkpoints.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name of a model -> its folder; written once."""
    done = {}

    def make(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name) / "model"
            if name == "decoder":
                model = LlamaForCausalLM(CASES["qwen2"][0])  # tied
            elif name == "encoder":
                model = BertModel(tiny("bert"))
            elif name == "tagger":
                model = BertForTokenClassification(tiny("bert"), 3)
            else:
                model = BertForSequenceClassification(tiny(name), 3)
            save(done[name], model, random_params(model), labels=("x", "y", "z") if hasattr(model, "num_labels") else None)
        return done[name]

    return make


@pytest.fixture
def copy(saved, tmp_path):
    """Name of a model -> a copy of its folder, to be changed."""
    return lambda name="bert": shutil.copytree(saved(name), tmp_path / name)


def rename(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def refused(folder, message, **options):
    """Loading fails with one line that holds the message."""
    with pytest.raises(ValueError, match=message) as error:
        load(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- heads with labels ---


def head_of(loaded):
    params = loaded.params["classifier"]
    return {name: np.asarray(leaf) for name, leaf in (params.get("out_proj") or params).items()}


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_rows_of_a_head_follow_the_names(saved, recwarn, name):
    stored, loaded = load(saved(name)), load(saved(name), labels=("z", "x", "y"))
    assert (loaded.labels, loaded.initialised, loaded.unused) == (("z", "x", "y"), frozenset(), frozenset())
    for leaf, values in head_of(loaded).items():
        np.testing.assert_array_equal(values, head_of(stored)[leaf][..., [2, 0, 1]])
    assert not [warning for warning in recwarn if issubclass(warning.category, CheckpointNote)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"labels": ("a", "b", "c")}, r"its labels are x, y, z, and those asked for a, b, c \(--keep-head keeps it\)"),
        ({"labels": ("x", "y")}, "its labels are x, y, z, and those asked for x, y; newly initialised"),
        ({"num_labels": 4}, "it has 3 outputs, and 4 are asked for; newly initialised"),
    ],
)
def test_a_head_for_other_labels_is_made_anew_and_this_is_said(saved, options, reason):
    with pytest.warns(CheckpointNote, match=f"the checkpoint's head is left out, because {reason}") as said:
        loaded = load(saved("bert"), **options)
    assert len(said) == 1
    assert "without a place in the model: classifier.bias, classifier.weight" in str(said[0].message)
    assert loaded.initialised == {"classifier/bias", "classifier/kernel"}
    assert not loaded.params["classifier"]["bias"].any()
    assert loaded.model.num_labels == len(loaded.labels) == len(options.get("labels", range(4)))


def test_a_head_without_names_stays_where_it_is(copy):
    folder = copy()
    edit_config(folder, id2label={i: f"LABEL_{i}" for i in range(3)}, label2id=None)
    with pytest.warns(CheckpointNote, match="taken in their order: LABEL_0 for a, LABEL_1 for b, LABEL_2 for c"):
        loaded = load(folder, labels=("a", "b", "c"))
    np.testing.assert_array_equal(loaded.params["classifier"]["bias"], load_file(folder / "model.safetensors")["classifier.bias"])
    assert load(folder, labels=("LABEL_2", "LABEL_0", "LABEL_1")).params["classifier"]["bias"][0] == loaded.params["classifier"]["bias"][2]
    assert load(folder, labels=("a", "b")).initialised


def test_fresh_head_and_keep_head_decide(saved):
    bias = load(saved("bert")).params["classifier"]["bias"]
    kept = load(saved("bert"), labels=("a", "b", "c"), keep_head=True)
    assert (kept.labels, kept.initialised) == (("a", "b", "c"), frozenset())
    np.testing.assert_array_equal(kept.params["classifier"]["bias"], bias)
    assert load(saved("bert"), labels=("z", "y", "x"), keep_head=True).params["classifier"]["bias"][0] == bias[2]
    assert load(saved("bert"), fresh_head=True).initialised
    refused(saved("encoder"), "has no head for this task", labels=("a", "b"), keep_head=True)


def test_the_head_of_another_task_is_left_out(saved):
    with pytest.warns(CheckpointNote, match="because it was trained as BertForTokenClassification"):
        assert "classifier/kernel" in load(saved("tagger"), labels=("x", "y", "z")).initialised
    assert load(saved("tagger"), task="token-classification", labels=("y", "x", "z")).initialised == frozenset()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": {"0": "x", "2": "z"}}, "id2label must name the outputs 0 to 1"),
        ({"id2label": ["x", "y"]}, "id2label must be an object"),
        ({"id2label": {"0": "x", "1": "x", "2": "z"}, "label2id": None}, "gives two labels one name"),
        ({"id2label": None, "label2id": None, "num_labels": 10**12}, "num_labels must be a whole number from 1 to 1000000"),
        ({"id2label": None, "label2id": None, "num_labels": 2}, r"classifier.(weight|bias) has shape \(3.*fresh_head=True"),
    ],
)
def test_labels_that_are_none(copy, config, message):
    folder = copy()
    edit_config(folder, **config)
    assert "config.json" in refused(folder, message) or "has shape" in message


def test_the_command_line_says_in_one_line_what_was_made_anew(tmp_path, capsys):
    """Head and labels of a run: other names, the same names in another order, and what is left after merging."""
    base = make_base(tmp_path, train=18, test=6)
    loaded = load(base["model"], labels=("water", "fruit", "metal"))
    save(tmp_path / "named", loaded.model, loaded.params, labels=loaded.labels, tokenizer=loaded.tokenizer)
    save(tmp_path / "other", loaded.model, loaded.params, labels=("x", "y", "z"), tokenizer=loaded.tokenizer)
    flags = ["--data", base["data"], "--max-length", "8", "--progress", "none", "--steps", "2", "--batch-size", "8", "--method", "bitfit"]

    def jpeft(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, [line for line in capsys.readouterr().err.splitlines() if line.startswith(("note: ", "error: "))]

    why = "the checkpoint's head is left out, because its labels are x, y, z"
    said = f"note: Pretrained checkpoint .*other: {why}, .*newly initialised: classifier/"
    commands = [("train", "--model", tmp_path / "other", "--output", tmp_path / "run", *flags), ("eval", tmp_path / "run")]
    for command in (*commands, ("merge", tmp_path / "run", tmp_path / "merged")):
        status, (line,) = jpeft(*command)
        assert status == 0
        assert re.match(said, line)
    assert load(tmp_path / "merged").labels == ("fruit", "metal", "water")
    named = ("train", "--model", tmp_path / "named", "--output", tmp_path / "run2", *flags)
    assert jpeft(*named) == (0, [])
    assert jpeft("eval", tmp_path / "run2") == (0, [])
    status, (line,) = jpeft(*named, "--resume", "--fresh-head")
    assert (status, "False before, True now" in line) == (2, True)
    status, (line,) = jpeft(*named, "--overwrite", "--fresh-head", "--keep-head")
    assert (status, "give one of them" in line) == (2, True)


# --- language models ---


def torch_logits(folder, ids, cls):
    import torch
    import transformers

    with torch.no_grad():
        return getattr(transformers, cls).from_pretrained(folder).eval()(torch.tensor(ids)).logits.numpy()


def logits(loaded, ids):
    return jax.jit(loaded.model.apply)({"params": loaded.params}, ids)


IDS = np.arange(6)[None] + 5


def test_a_decoder_whose_file_holds_another_head_is_untied(copy, tmp_path):
    folder, rng = copy("decoder"), np.random.default_rng(0)
    edit(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
    assert load(folder, task="causal-lm").config.tie_word_embeddings
    edit(folder, lambda tensors: tensors | {"lm_head.weight": rng.normal(size=(50, 16)).astype(np.float32)})
    with pytest.warns(CheckpointNote, match="config.json ties lm_head.weight to the word embedding, but the file holds another tensor"):
        loaded = load(folder, task="causal-lm")
    assert not loaded.config.tie_word_embeddings
    np.testing.assert_allclose(logits(loaded, IDS), torch_logits(folder, IDS, "Qwen2ForCausalLM"), atol=1e-4)
    save(tmp_path / "out", loaded.model, loaded.params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_allclose(torch_logits(tmp_path / "out", IDS, "Qwen2ForCausalLM"), logits(loaded, IDS), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "decoder", "cls"),
    [
        ("bert", "cls.predictions.decoder", "BertForMaskedLM"),
        ("xlm-roberta", "lm_head.decoder", "XLMRobertaForMaskedLM"),
        ("electra", "generator_lm_head", "ElectraForMaskedLM"),
    ],
)
def test_an_encoder_whose_file_holds_another_decoder_is_untied(tmp_path, kind, decoder, cls):
    model, rng = BertForMaskedLM(tiny(kind)), np.random.default_rng(0)
    save(tmp_path / "model", model, random_params(model))
    width = model.config.embedding_width

    def untie(tensors):
        more = {f"{decoder}.weight": rng.normal(size=(50, width)), f"{decoder}.bias": rng.normal(size=50)}
        return tensors | {name: value.astype(np.float32) for name, value in more.items()}

    edit(tmp_path / "model", untie)
    loaded = load(tmp_path / "model", task="masked-lm")
    ids = batch(loaded.config)[0][:1]
    want = torch_logits(tmp_path / "model", ids, cls)
    np.testing.assert_allclose(logits(loaded, ids), want, atol=1e-4)
    save(tmp_path / "out", loaded.model, loaded.params)
    np.testing.assert_allclose(torch_logits(tmp_path / "out", ids, cls), want, atol=1e-4)
    again = load(tmp_path / "out", task="masked-lm")
    assert not again.config.tie_word_embeddings
    assert again.unused == frozenset()


def test_a_language_model_without_its_head_is_refused(copy):
    folder = copy("decoder")
    edit_config(folder, tie_word_embeddings=False)
    refused(folder, r"not a language model: it lacks lm_head.weight.*tie_word_embeddings", task="causal-lm")
    assert load(folder, task="decoder").initialised == frozenset()


# --- quantised checkpoints ---


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_a_configuration_of_quantisation_is_refused(copy, method):
    folder = copy()
    edit_config(folder, quantization_config={"quant_method": method})
    refused(folder, f"is a quantised checkpoint .config.json has quantization_config, method '{method}'")


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {f"{QUERY}.weight": t[f"{QUERY}.weight"].astype(np.int8)}, f"{QUERY}.weight holds numbers of the type I8"),
        (lambda t: t | {f"{QUERY}.weight": t[f"{QUERY}.weight"] > 0}, "of the type BOOL"),
        (lambda t: t | {f"{QUERY}.SCB": np.ones(16, np.float32)}, "it holds .*query.SCB"),
        (lambda t: t | {f"{QUERY}.weight_scale_inv": np.ones((1, 1), np.float32)}, "it holds .*weight_scale_inv"),
        (lambda t: t | {f"{QUERY}.weight.quant_state.bitsandbytes__nf4": np.ones(4, np.uint8)}, "it holds .*nf4"),
        (rename(lambda n: n.replace("query.weight", "query.qweight")), "it holds .*query.qweight"),
        (rename(lambda n: n.replace("query.weight", "query.weight_packed")), "it holds .*weight_packed"),
        (lambda t: t | {f"{QUERY}.lora_A.default.weight": np.ones((2, 16), np.float32)}, "holds an adapter that is not merged"),
    ],
)
def test_quantised_and_adapted_tensors_are_refused(copy, change, message):
    folder = copy()
    edit(folder, change)
    refused(folder, message)


def test_float8_is_refused(copy):
    folder = copy()
    tensors = load_file(folder / "model.safetensors")
    data = tensors[f"{QUERY}.weight"].astype(ml_dtypes.float8_e4m3fn)
    # `save_file` of NumPy does not write float8: write bytes, and give their type in the header.
    save_file(tensors | {f"{QUERY}.weight": data.view(np.uint8)}, folder / "model.safetensors")
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw.replace(b'"U8"', b'"F8_E4M3"', 1).replace(len_of(raw), len_of(raw, 5), 1))
    refused(folder, "numbers of the type F8_E4M3, which are no weights but quantised ones")


def len_of(raw, more=0):
    return (int.from_bytes(raw[:8], "little") + more).to_bytes(8, "little")


# --- prefixes and duplicates ---


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "auto_model.", "model.", "bert.bert.", "module._orig_mod.", "0.auto_model."])
@pytest.mark.parametrize("name", ["encoder", "bert"])
def test_a_foreign_prefix_is_named(copy, name, prefix):
    folder = copy(name)
    edit(folder, rename(lambda n: prefix + n))
    refused(folder, r"lacks \d+ tensors of the bert body: .*under the foreign prefix '.*removeprefix", labels=("a", "b"))


def test_a_wrapper_inside_of_names_is_named(copy):
    folder = copy()
    edit(folder, rename(lambda n: n.replace("layer.0.", "layer.0._checkpoint_wrapped_module.")))
    refused(folder, "hold those of a wrapper, such as .*_checkpoint_wrapped_module")


def test_a_prefix_of_a_decoder_is_named(copy):
    folder = copy("decoder")
    edit(folder, rename(lambda n: f"model.{n}"))
    refused(folder, "under the foreign prefix 'model.'", task="causal-lm")


def test_one_parameter_under_two_names_is_refused(copy):
    folder = copy()
    edit(folder, lambda t: t | {QUERY.removeprefix("bert.") + ".weight": np.zeros((16, 16), np.float32)})
    refused(folder, "the checkpoint holds twice .*query.weight and .*query.weight, which are one parameter")


def test_values_that_are_not_finite_are_refused(copy):
    folder = copy()
    edit(folder, lambda t: t | {f"{QUERY}.weight": np.where(np.eye(16) > 0, np.nan, 0).astype(np.float32)})
    for scan in (False, True):
        refused(folder, "model.safetensors: .*query.weight.* holds 16 values of .* that are NaN or infinite", scan=scan)


# --- folders that hold something else ---


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model.bin": b""}, "It holds pytorch_model.bin: pickled files.*save_pretrained"),
        ({"model.pt": b""}, "It holds model.pt: pickled files"),
        ({"model-q4.gguf": b""}, "It holds model-q4.gguf: a GGUF file"),
        ({"tf_model.h5": b""}, "weights of TensorFlow"),
        ({"other.safetensors": b""}, "It holds other.safetensors, and the name must be model.safetensors"),
        ({"adapter_config.json": b'{"base_model_name_or_path": "acme/base"}'}, "an adapter of HF PEFT .* for acme/base.*merge_and_unload"),
        ({"jpeft.json": b"{}"}, "is an adapter of jpeft, not a model"),
    ],
)
@pytest.mark.parametrize("configured", [True, False])
def test_other_folders_are_named(copy, files, message, configured):
    folder = copy()
    (folder / "model.safetensors").unlink()
    if not configured:
        (folder / "config.json").unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    refused(folder, message)


def test_runs_and_folders_around_a_model_are_named(saved, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"run": {}, "labels": []}))
    refused(tmp_path, "is a run of jpeft, not a model: write its model with `jpeft merge")
    outer = tmp_path / "sentences"
    shutil.copytree(saved("encoder"), outer / "0_Transformer")
    (outer / "modules.json").write_text("[]")
    refused(outer, "sentence-transformers, with its parts in folders. Give the folder of the model inside it: .*0_Transformer")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "x.gguf", "is a GGUF file")


# --- sizes, paths, hostile files ---


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *(("hidden_size", value, "hidden_size") for value in (-16, 0, True, "16", 16.5, 10**40, [16])),
        ("vocab_size", 2**31 - 1, r"word_embeddings.weight has shape \(50, 16\), the model needs \(2147483647, 16\)"),
        ("hidden_size", 2**30, r"the model needs \(.*1073741824"),
        ("intermediate_size", 10**9, "the model needs"),
        ("num_hidden_layers", 3, r"num_hidden_layers is 3, but the checkpoint holds 2 blocks \(layer.0 to 1\)"),
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000 is out of range"),
        ("num_attention_heads", 3, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ("num_attention_heads", 0, "num_attention_heads must be a whole number from 1"),
        ("layer_norm_eps", float("nan"), "layer_norm_eps must be a number of at least 0, not nan"),
        ("layer_norm_eps", -1.0, "layer_norm_eps must be a number of at least 0"),
        ("hidden_dropout_prob", 1.5, "hidden_dropout_prob must be a number from 0 to 1"),
        ("hidden_act", "mish2", "Unknown hidden_act 'mish2'"),
        ("hidden_act", ["gelu"], "hidden_act"),
        ("type_vocab_size", 0, "type_vocab_size=0"),
        ("architectures", 5, ""),
    ],
)
def test_sizes_are_checked_before_anything_is_built(copy, monkeypatch, field, value, message):
    folder = copy()
    monkeypatch.setattr("jpeft.models.checkpoints.tensors.Tensors.read", lambda *_: pytest.fail("a tensor was read"))
    edit_config(folder, **{field: value})
    if message:
        assert "config.json: " in refused(folder, message) or "the model needs" in message


def test_rotary_positions_are_checked(copy):
    for parameters in ({"rope_theta": "x"}, {"rope_theta": -1.0}, {"rope_type": ["default"]}, {"rope_type": "linear", "factor": 0.0}):
        folder = copy("decoder")
        edit_config(folder, rope_parameters={"rope_theta": 100.0, "rope_type": "default"} | parameters)
        assert "config.json: " in refused(folder, "rotary positions|rope_type", task="causal-lm")
        shutil.rmtree(folder)


@pytest.mark.parametrize("shard_name", ["/etc/hosts", "../model.safetensors", "a/../../model.safetensors", "", "x\0y", "a\nb", 5, None])
def test_files_of_an_index_stay_inside(copy, shard_name):
    folder = copy()
    shard(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["classifier.bias"] = shard_name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model.safetensors.index.json: weight_map")


def test_links_of_an_index_stay_inside(copy, tmp_path):
    folder = copy()
    first, *_ = shard(folder)
    (folder / first).rename(tmp_path / first)
    (folder / first).symlink_to(tmp_path / first)
    refused(folder, f"{first} is a link to .*, outside of this folder")
    # The hub's cache is made of such links.
    cache = tmp_path / "models--acme--tiny"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    (folder / first).unlink()
    shutil.move(tmp_path / first, cache / "blobs" / "1234")
    snapshot = shutil.move(folder, cache / "snapshots" / "abcd")
    os.symlink("../../blobs/1234", snapshot / first)
    assert load(snapshot).labels == ("x", "y", "z")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[" * 100_000, "config.json is not valid JSON: it is nested too deeply"),
        ("config.json", b'{"a": ' * 100_000, "config.json is not valid JSON: it is nested too deeply"),
        ("config.json", b"\xff\xfe", "config.json is not valid JSON"),
        ("config.json", b'{"model_type": ["bert"]}', r"model_type \['bert'\]; supported"),
        ("model.safetensors", (2**63).to_bytes(8, "little") + b"{}", "model.safetensors is damaged or not a safetensors file"),
        ("model.safetensors", (10**8 + 1).to_bytes(8, "little") + b"{}", "model.safetensors is damaged or not a safetensors file"),
        ("model.safetensors", (10**5).to_bytes(8, "little") + b"[" * 10**5, "model.safetensors is damaged or not a safetensors file"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}", "it holds none at all"),
        ("tokenizer.json", b"[" * 100_000, "tokenizer.json is not valid JSON: it is nested too deeply"),
        ("tokenizer.json", b"{}", "its tokenizer cannot be read .tokenizer.json is damaged"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds no JSON object"),
    ],
)
def test_hostile_files(tmp_path, name, content, message):
    folder = make_model(tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        _ = load(folder, num_labels=2).tokenizer
    assert "\n" not in str(error.value)


def test_code_of_a_folder_is_not_run(tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    edit_config(folder, auto_map=names)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"auto_map": names}))
    assert load(folder, num_labels=2).tokenizer("apple").input_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_max_length": "x"}, "tokenizer_config.json: model_max_length must be a positive number, not 'x'"),
        ({"model_max_length": -1}, "model_max_length must be a positive number"),
        ({"tokenizer_class": None}, "tokenizer.json holds a WordLevel tokenizer, but .* makes a BPE one: write"),
    ],
)
def test_tokenizers_that_do_not_fit_their_configuration(tmp_path, change, message):
    folder = make_decoder(tmp_path / "model")
    about = json.loads((folder / "tokenizer_config.json").read_text()) | change
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        read_tokenizer(folder)


def test_half_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ValueError, match="vocab.json needs merges.txt beside it"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_of_xlm_roberta(saved, copy):
    from transformers import XLMRobertaTokenizer

    folder = copy("roberta")
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁the", -1.0), ("▁film", -2.0), ("<mask>", 0.0)]
    edit_config(folder, model_type="xlm-roberta", architectures=["XLMRobertaForSequenceClassification"])
    XLMRobertaTokenizer(vocab=pieces).save_pretrained(folder)
    loaded = load(folder)
    assert loaded.config.model_type == "xlm-roberta"
    assert loaded.tokenizer("the film")["input_ids"] == [0, 4, 5, 2]


def test_a_revision_is_for_the_hub(saved, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **options: asked.append(options) or str(saved("bert")))
    load("acme/tiny", revision="v1.0")
    load("acme/tiny")
    assert [options.get("revision") for options in asked] == ["v1.0", None]
    refused(saved("bert"), "is a local folder, which has no revision 'v1.0'", revision="v1.0")


def test_nothing_is_said_of_a_model_that_fits(saved, recwarn):
    load(saved("bert"))
    load(saved("decoder"), task="causal-lm", param_dtype=jnp.bfloat16)
    assert not list(recwarn)

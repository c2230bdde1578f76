"""Files of HF PEFT adapters: names that other programs write, what is refused, and where they are found. Nothing here needs torch."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_bert import random_params, tiny

import jpeft
from jpeft.models import BertForSequenceClassification, BertModel

MODEL = BertForSequenceClassification(tiny("bert"), 3)
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@pytest.fixture(scope="module")
def peft(params):
    """An adapter with numbers everywhere."""
    made = jpeft.apply(params, method="lora", rank=2, target=["query", "value"])
    return made.replace(adapter=jax.tree.map(lambda leaf: leaf + 0.125, made.adapter))


@pytest.fixture
def folder(tmp_path, peft):
    jpeft.save_hf(tmp_path / "adapter", peft, model=MODEL)
    return tmp_path / "adapter"


def edit(folder, change):
    """Write the tensors anew, by a function of their dictionary."""
    tensors = {name: np.array(tensor) for name, tensor in load_file(folder / FILE).items()}
    save_file(change(tensors) or tensors, folder / FILE)


def configure(folder, **values):
    content = json.loads((folder / CONFIG).read_text()) | values
    (folder / CONFIG).write_text(json.dumps(content))


def assert_same(folder, params, peft, model=MODEL, **options):
    loaded = jpeft.load_hf(folder, params, model=model, **options)
    expected, got = jpeft.flatten(peft.adapter), jpeft.flatten(loaded.adapter)
    assert expected.keys() == got.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


# --- names ---


def renamed(pattern):
    return lambda tensors: {pattern(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "pattern",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: "base_model.model." + name,
        lambda name: "module." + name,
        lambda name: "_orig_mod." + name,
        lambda name: name.replace("encoder.layer.0.", "encoder.layer.0._checkpoint_wrapped_module."),
        lambda name: name.replace("lora_A.weight", "lora_A.default.weight"),
        lambda name: name.replace("classifier.", "classifier.modules_to_save.default."),
        lambda name: name.replace("model.bert.", "model."),  # made for the encoder alone
    ],
    ids=["bare", "twice", "parallel", "compiled", "checkpointed", "named", "wrapped", "body"],
)
def test_names_that_others_write(folder, params, peft, pattern):
    edit(folder, renamed(pattern))
    assert_same(folder, params, peft)


def test_an_adapter_of_a_classifier_fits_the_encoder(folder, params, peft):
    without_head = lambda tensors: {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    edit(folder, without_head)
    configure(folder, modules_to_save=None, task_type=None)
    encoder = BertModel(tiny("bert"))
    loaded = jpeft.load_hf(folder, params["bert"], model=encoder)
    assert jpeft.flatten(loaded.adapter).keys() == jpeft.flatten(peft.adapter["bert"]).keys()


def test_a_tensor_that_is_there_twice(folder, params, peft):
    def twice(tensors, add=0.0):
        head = tensors["base_model.model.classifier.bias"]
        return tensors | {
            "base_model.model.classifier.modules_to_save.bias": head + np.float32(add),
            "base_model.model.classifier.original_module.bias": head + 1,
        }

    edit(folder, twice)
    assert_same(folder, params, peft)
    edit(folder, lambda tensors: twice(tensors, add=1.0))
    with pytest.raises(ValueError, match=r"holds 'classifier.bias' twice, as .* and they differ"):
        jpeft.load_hf(folder, params, model=MODEL)


def test_embeddings_of_the_base_are_left_out_if_they_are_the_bases(folder, params, peft):
    table = np.asarray(params["bert"]["embeddings"]["word_embeddings"]["embedding"])
    name = "base_model.model.bert.embeddings.word_embeddings.weight"
    edit(folder, lambda tensors: tensors | {name: table.astype(ml_dtypes.bfloat16)})
    assert_same(folder, params, peft)
    edit(folder, lambda tensors: tensors | {name: table + 1})
    with pytest.raises(ValueError, match=r"holds 'bert.embeddings.word_embeddings.weight', .* it differs from that of the base"):
        jpeft.load_hf(folder, params, model=MODEL)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_types_of_floats_are_read_as_float32(folder, params, dtype):
    edit(folder, lambda tensors: {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    loaded = jpeft.load_hf(folder, params, model=MODEL)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.adapter)} == {jnp.dtype("float32")}
    a = load_file(folder / FILE)[f"{QUERY}.lora_A.weight"]
    got = loaded.adapter["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"]["a"]
    np.testing.assert_array_equal(got, a.astype(np.float32).T)


# --- what is refused ---


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


BAD_TENSORS = {
    "missing": (without(f"{QUERY}.lora_A.weight"), r"1 tensors are missing \(bert.encoder.layer.0.attention.self.query.lora_A.weight\)"),
    "unexpected": (
        lambda tensors: tensors | {QUERY.replace("query", "key") + ".lora_A.weight": np.ones((2, 16), np.float32)},
        r"1 have no place in the model \(base_model.model.bert.encoder.layer.0.attention.self.key.lora_A.weight\)",
    ),
    "misshapen": (
        lambda tensors: tensors | {f"{QUERY}.lora_A.weight": np.ones((2, 15), np.float32)},
        r"1 have another shape \('base_model\S+' has shape \(2, 15\), \(2, 16\) is needed\)",
    ),
    "nan": (lambda tensors: tensors | {f"{QUERY}.lora_A.weight": np.full((2, 16), np.nan, np.float32)}, "not finite"),
    "quantised": (lambda tensors: tensors | {f"{QUERY}.lora_A.weight": np.ones((2, 16), ml_dtypes.float8_e4m3fn)}, "the type F8_E4M3"),
    "head": (without("base_model.model.classifier.bias"), r"missing \(classifier.bias\)"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(folder, params, case):
    change, said = BAD_TENSORS[case]
    edit(folder, change)
    with pytest.raises(ValueError, match=said):
        jpeft.load_hf(folder, params, model=MODEL)


BAD_CONFIGS = {
    "type": ({"peft_type": "POLY"}, "peft_type 'POLY' is not one that jpeft reads: "),
    "unknown": ({"alora_invocation_tokens": [1], "new_option": 2}, "does not know alora_invocation_tokens=.*, new_option=2 of LORA"),
    "rank": ({"r": "8"}, "r must be a whole number of at least 1, not '8'"),
    "regex": ({"target_modules": "("}, "target_modules must be a list of names, a regular expression or null"),
    "start": ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' may have changed the base"),
    "saved": ({"modules_to_save": ["classifier", "lm_head"]}, "modules_to_save names 'lm_head', which the model does not have"),
    "tokens": ({"trainable_token_indices": [50]}, "has the token 50, but .* has 50 rows"),
    "pattern": ({"modules_to_save": ["a(b"]}, "which is no regular expression"),
    "layers": ({"layers_to_transform": [0], "layers_pattern": ["(layer"]}, "which is no regular expression"),
    "list": ({"modules_to_save": "classifier"}, "modules_to_save must be a list of names or null, not 'classifier'"),
    "none": ({"target_modules": ["q_proj"]}, "chooses no module of the model"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations(folder, params, case):
    values, said = BAD_CONFIGS[case]
    configure(folder, **values)
    with pytest.raises(ValueError, match=said) as error:
        jpeft.load_hf(folder, params, model=MODEL)
    assert CONFIG in str(error.value)


def test_options_that_are_not_used_may_be_unknown(folder, params, peft):
    configure(folder, alora_invocation_tokens=None, use_new=False, new_config={}, runtime_config=None)
    assert_same(folder, params, peft)


def test_no_adapter(folder, params, tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        jpeft.load_hf(tmp_path / "nowhere" / "at all", params, model=MODEL)
    (folder / FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle, .* model.save_pretrained\(OUT\)"):
        jpeft.load_hf(folder, params, model=MODEL)
    (folder / FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        jpeft.load_hf(folder, params, model=MODEL)
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=f"is no adapter of HF PEFT: it holds no {CONFIG}"):
        jpeft.load_hf(folder, params, model=MODEL)


# --- where it is ---


def test_an_adapter_in_a_folder_of_its_name(folder, params, peft, tmp_path):
    outer = tmp_path / "outer"
    shutil.copytree(folder, outer / "mine")
    assert_same(outer, params, peft)
    assert_same(outer, params, peft, name="mine")
    shutil.copytree(folder, outer / "other")
    with pytest.raises(ValueError, match="holds several adapters: choose one by name=. There are mine, other"):
        jpeft.load_hf(outer, params, model=MODEL)
    with pytest.raises(ValueError, match="is no name of an adapter"):
        jpeft.load_hf(outer, params, model=MODEL, name="../adapter")


def test_an_adapter_of_the_hub(folder, params, peft, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0" * 40
    cache = tmp_path / "cache" / "models--owner--name"
    shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert_same("owner/name", params, peft)
    with pytest.raises(ValueError, match="the hub did not give it"):
        jpeft.load_hf("owner/other", params, model=MODEL)


def test_a_folder_is_replaced_when_asked(folder, peft, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        jpeft.save_hf(folder, peft, model=MODEL)
    jpeft.save_hf(folder, peft, model=MODEL, base="google/bert", overwrite=True)
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == "google/bert"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is no adapter of HF PEFT"):
        jpeft.save_hf(tmp_path / "mine", peft, model=MODEL, overwrite=True)


# --- models of one's own ---


def test_a_model_of_ones_own(tmp_path):
    """Numbered blocks with attention heads as axes, and stacked ones."""
    own = {f"blocks_{i}": {"q": {"kernel": jnp.full((8, 2, 4), i + 1.0), "bias": jnp.ones((2, 4))}} for i in range(2)}
    stacked = {"layers": {"mlp": {"up": {"kernel": jnp.ones((3, 8, 16))}, "down": {"kernel": jnp.ones((3, 16, 8))}}}}
    params = own | stacked
    rules = [
        (r"blocks_(\d+)/q/kernel", r"model.blocks.\1.q.weight"),
        (r"blocks_(\d+)/q/bias", r"model.blocks.\1.q.bias"),
        (r"layers/mlp/(\w+)/kernel", r"model.layers.*.mlp.\1.weight"),
    ]
    axes = (("blocks_./q/kernel", jpeft.KernelAxes((), (0,), (1, 2))),)
    peft = jpeft.apply(params, method="lora", rank=2, axes=axes)
    peft = peft.replace(adapter=jax.tree.map(lambda leaf: leaf + 0.5, peft.adapter))
    jpeft.save_hf(tmp_path / "out", peft, names=rules)
    tensors = load_file(tmp_path / "out" / FILE)
    assert tensors["base_model.model.model.blocks.1.q.lora_B.weight"].shape == (8, 2)
    assert tensors["base_model.model.model.layers.2.mlp.down.lora_A.weight"].shape == (2, 16)
    loaded = jpeft.load_hf(tmp_path / "out", params, names=rules, axes=axes)
    for path, leaf in jpeft.flatten(peft.adapter).items():
        np.testing.assert_array_equal(jpeft.flatten(loaded.adapter)[path], leaf)
    with pytest.raises(ValueError, match=r"no model was given: give model=, one of jpeft.models, or names="):
        jpeft.load_hf(tmp_path / "out", params)


# --- what training needs besides ---


@pytest.mark.parametrize(
    "method", [jpeft.p_tuning(length=3, edges=(0, 0)), jpeft.prefix_tuning(length=3, mlp=4)], ids=["p_tuning", "prefix_tuning"]
)
def test_training_goes_on_from_the_network(tmp_path, params, method):
    peft = jpeft.apply(params, method=method)
    jpeft.save_hf(tmp_path / "out", peft, model=MODEL)
    loaded = jpeft.load_hf(tmp_path / "out", params, model=MODEL)
    assert type(loaded.method) is type(method)
    for path, leaf in jpeft.flatten(peft.adapter).items():
        np.testing.assert_array_equal(jpeft.flatten(loaded.adapter)[path], leaf)
    # With another prompt the network is another one's.
    edit(tmp_path / "out", lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.warns(UserWarning, match="belongs to another adapter_model.safetensors and is left out"):
        loaded = jpeft.load_hf(tmp_path / "out", params, model=MODEL)
    assert not loaded.method.folds


# --- what cannot be written ---


UNWRITABLE = {
    "bitfit": (jpeft.bitfit(), r"no type of adapter for bitfit. It has types for .*: jpeft.chain\(lora=..., ...\). Or export the merged"),
    "pfeiffer": (jpeft.pfeiffer(), "no type of adapter for pfeiffer"),
    "two": (jpeft.chain(one=jpeft.lora(), two=jpeft.ia3()), "the chain has 2: one, two. Export them one by one"),
    "edges": (jpeft.prompt_tuning(length=3), r"stands behind 1 of its tokens, .* Train with edges=\(0, 0\)"),
    "positions": (jpeft.prefix_tuning(length=3, mlp=None, shift=False), "Train with shift=True"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_hf_peft_cannot_hold(tmp_path, params, case):
    method, said = UNWRITABLE[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft = jpeft.apply(params, method=method)
        with pytest.raises(ValueError, match=said):
            jpeft.save_hf(tmp_path / "out", peft, model=MODEL)
    assert not (tmp_path / "out").exists()


def test_a_chain_that_one_folder_holds(tmp_path, params):
    method = jpeft.chain(lora=jpeft.lora(rank=2), bitfit=jpeft.bitfit(), tokens=jpeft.trainable_tokens(tokens=[7, 3], head=None))
    peft = jpeft.apply(params, method=method)
    peft = peft.replace(adapter=jax.tree.map(lambda leaf: leaf + 0.125, peft.adapter))
    jpeft.save_hf(tmp_path / "out", peft, model=MODEL)
    content = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (content["bias"], content["trainable_token_indices"]) == ("all", [7, 3])
    loaded = jpeft.load_hf(tmp_path / "out", params, model=MODEL)
    for path, leaf in jpeft.flatten(peft.adapter).items():
        np.testing.assert_allclose(jpeft.flatten(loaded.adapter)[path], leaf, atol=1e-6, err_msg=path)

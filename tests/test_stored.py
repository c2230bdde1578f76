"""The base stays as its checkpoint stores it; what is trained is float32; a merged model is rounded once."""

import json
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tables import METHODS, NEED_STATS, base, encoder
from tiny_text import make_base

import jpeft
from jpeft.cli import main
from jpeft.models import load
from jpeft.models.checkpoints.plan import default_dtype
from jpeft.stats import Fisher, Movement
from jpeft.training.build import picks_blocks
from jpeft.training.config import TrainConfig
from jpeft.training.remat import choose_remat
from jpeft.training.run import load_run

HALF = jnp.bfloat16


def half(tree):
    return jax.tree.map(lambda leaf: leaf.astype(HALF), tree)


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run's model, in bfloat16, and data."""
    fields = make_base(tmp_path_factory.mktemp("base"), train=16, validation=6, test=6)
    file = f"{fields['model']}/model.safetensors"
    save_file({name: np.asarray(tensor).astype(HALF) for name, tensor in load_file(file).items()}, file)
    return fields | {"progress": "lines"}


@pytest.mark.parametrize("method", ["lora rank=2", "bitfit"])
def test_the_command_line_keeps_the_base_as_it_is_stored(stored, tmp_path, method):
    run = tmp_path / "run"
    name, *options = method.split()
    flags = [part for name, value in stored.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    arguments = ["train", *options, "--method", name, "--export", "--steps", "2", "--output", str(run), *flags]
    assert main(arguments) == 0
    opened = load_run(run)
    assert dtypes(opened.peft.params) == {"bfloat16"}
    assert dtypes(opened.peft.adapter) == {"float32"}
    assert {str(tensor.dtype) for tensor in load_file(run / "merged" / "model.safetensors").values()} == {"bfloat16"}
    about = json.loads((run / "merged" / "config.json").read_text())
    assert about.get("dtype", about.get("torch_dtype")) == "bfloat16"
    recorded = json.loads((run / "config.json").read_text())["run"]
    assert (recorded["dtype"], recorded["scan"]) == ("float32", False)
    assert load_run(run).config.scan is False
    # The same command continues the run, though what it leaves open is recorded.
    assert main([*arguments, "--resume"]) == 0


def test_each_parameter_keeps_its_own_type(stored, tmp_path):
    file = f"{stored['model']}/model.safetensors"
    kept = {name: tensor.astype(np.float32 if "LayerNorm" in name else HALF) for name, tensor in load_file(file).items()}
    save_file(kept, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{stored['model']}/{name}", tmp_path)
    loaded = load(tmp_path, task="encoder", scan=True)
    flat = jpeft.flatten(loaded.params)
    assert {str(leaf.dtype) for path, leaf in flat.items() if "LayerNorm" in path} == {"float32"}
    assert {str(leaf.dtype) for path, leaf in flat.items() if path.endswith("kernel")} == {"bfloat16"}
    assert loaded.config.param_dtype == HALF
    assert dtypes(load(tmp_path, task="encoder", param_dtype="float32").params) == {"float32"}
    with pytest.raises(ValueError, match=r"param_dtype='int8' is no type of floats: give 'float32'"):
        load(tmp_path, task="encoder", param_dtype="int8")


def test_the_type_of_computation_follows_device_and_base():
    assert default_dtype("bfloat16", "cuda") == default_dtype("bfloat16", "tpu") == HALF
    assert default_dtype("float16", "cuda") == default_dtype("float32", "cuda") == default_dtype("bfloat16", "cpu") == jnp.float32


@pytest.mark.parametrize("name", [name for name in METHODS if name != "lora-eva"])  # the leaves of lora; it looks at inputs
def test_what_is_trained_is_float32(name):
    params = half(base("bert"))

    def init(params):
        scores = jax.tree.map(jnp.ones_like, params)
        stats = [Fisher(scores), Movement(scores)] if name in NEED_STATS else None
        return jpeft.apply(params, method=METHODS[name], stats=stats).adapter

    # Methods that choose entries look at values.
    values = METHODS[name].requires_stats and "far" not in name
    adapter = init(params) if values else jax.eval_shape(init, params)
    assert dtypes(adapter) == {"float32"} if jax.tree.leaves(adapter) else True


def test_a_replaced_leaf_is_rounded_where_it_is_used():
    """Our models compute in float32 here, so a step that bfloat16 would swallow is seen; merged, it is rounded."""
    model, params = encoder(), half(base("bert"))
    peft = jpeft.apply(params, method="bitfit")
    moved = peft.replace(adapter=jax.tree.map(lambda leaf: leaf + 1e-5, peft.adapter))
    run = jax.jit(jpeft.wrap(model.apply))
    ids = np.ones((1, 4), np.int32)
    assert jnp.abs(run(moved, ids) - run(peft, ids)).max() > 0
    assert dtypes(jpeft.merge(moved)) == {"bfloat16"}


def test_a_chain_is_rounded_once():
    params = {"dense": {"kernel": jnp.full((4, 4), 1.0, HALF)}}
    method = jpeft.chain(one=jpeft.lora(rank=1, alpha=1.0), two=jpeft.lora(rank=1, alpha=1.0))
    peft = jpeft.apply(params, method=method)
    # 1 + 1/256 is halfway to the next number of bfloat16: a sum that is rounded after the first part stays 1.
    part = {"dense": {"kernel": {"a": jnp.ones((4, 1)), "b": jnp.full((1, 4), 1 / 256)}}}
    merged = jpeft.merge(peft.replace(adapter={"one": part, "two": part}))["dense"]["kernel"]
    np.testing.assert_array_equal(merged.astype(jnp.float32), np.full((4, 4), 1 + 1 / 128))
    assert merged.dtype == HALF


@pytest.mark.parametrize(
    ("method", "options", "picks"),
    [
        ("freeze", (), True),
        ("freeze", ("top=0",), False),
        ("lora", ("target=.*layer/0/.*query/kernel",), True),
        ("lora", ("target=['query', 'c_fc1']",), False),
        ("lora", ("rank={'.*/(10|11)/.*': 4, '.*': 2}",), True),
    ],
)
def test_methods_that_pick_single_blocks_are_trained_on_numbered_ones(method, options, picks):
    assert picks_blocks(TrainConfig(model="m", data="d", output="o", method=method, options=options)) is picks


def test_remat_is_the_cheapest_that_fits():
    needs = {False: 100, "dots": 50, True: 10}
    tried = []

    def compile_with(remat):
        tried.append(remat)
        sizes = {"argument_size_in_bytes": needs[remat], "output_size_in_bytes": 5, "temp_size_in_bytes": 0, "alias_size_in_bytes": 5}
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes))

    found = {limit: choose_remat("auto", compile_with, limit) for limit in (1000, 60, 20, 5)}
    assert [choice.remat for choice in found.values()] == [False, "dots", True, True]
    assert tried == [False, False, "dots", False, "dots", True, False, "dots", True]
    assert found[60].line == "dots: a step takes 50 B of 60 B"
    assert "no other way takes less" in found[5].line
    assert choose_remat("dots", compile_with, 5).remat == "dots"


# --- memory -------------------------------------------------------------------------------------------------------------------------------

CHILD = """
import gc, resource, sys
import jax, jpeft.models
from jpeft.models.checkpoints.folder import config_class
config_class("llama")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
for scan in (True, False):
    loaded = jpeft.models.load(sys.argv[1], task="causal-lm", scan=scan)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    del loaded
    gc.collect()
print(peak() - before)
"""


def write_llama(folder, *, hidden, layers, wide, vocab):
    """A Llama in bfloat16, of numbers that are not looked at; the bytes of its tensors."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": wide, "vocab_size": vocab}
    about = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_act": "silu", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(sizes | about | {"max_position_embeddings": 128, "rms_norm_eps": 1e-5}))
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    for i in range(layers):
        block = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        block |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
        block |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text, numbers = json.dumps(header).encode(), np.full(2**20, 0.5, HALF).tobytes()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, len(numbers)):
            file.write(numbers[: end - start])
    return end


def test_reading_takes_little_more_memory_than_the_checkpoint(tmp_path):
    total = write_llama(tmp_path, hidden=1024, layers=5, wide=2816, vocab=32000)
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 1.3 * total

"""A core install, without the packages of the extra `hf`: everything that needs them says what to install, in one line."""

import subprocess
import sys

import pytest

# flax itself installs rich, so a core install has it.
BLOCK = """
import importlib.abc, sys

BLOCKED = ("transformers", "tokenizers", "safetensors", "huggingface_hub", "tyro", "grain", "pyarrow", "matplotlib")

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""

PYTHON = """
import json, pathlib, tempfile
import jpeft, jpeft.models
from jpeft.cli import main

print(len(jpeft.methods()))
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
model = jpeft.models.BertModel(jpeft.models.BertConfig(hidden_size=4, num_attention_heads=1, vocab_size=8, num_hidden_layers=1))
for call in (
    lambda: jpeft.models.load("bert-base-cased"),
    lambda: jpeft.models.load(folder, num_labels=2),
    lambda: jpeft.models.save(folder / "out", model, {}),
    lambda: __import__("jpeft.data"),
    lambda: __import__("jpeft.training.train"),
    lambda: __import__("jpeft.comparison.compare"),
    lambda: jpeft.load_run(folder),
):
    try:
        call()
        print("no error")
    except ModuleNotFoundError as error:
        print(error)
for arguments in (["--version"], ["--help"], [], ["train", "--help"], ["predict", "run"], ["methods"]):
    print(main(arguments), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def core():
    return subprocess.run([sys.executable, "-c", BLOCK + PYTHON], capture_output=True, text=True, check=True)


def test_python_says_what_to_install(core):
    count, *lines = core.stdout.splitlines()
    assert int(count) > 10
    assert len(lines) == 7
    for line in lines:
        assert line.startswith("This needs ")
        assert line.endswith(', which is not installed: pip install "jpeft[hf]"')


def test_every_command_says_what_to_install(core):
    lines = core.stderr.splitlines()
    assert lines[1::2] == ["2"] * 6
    assert set(lines[::2]) == {'error: This needs tyro, which is not installed: pip install "jpeft[hf]"'}

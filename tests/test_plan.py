"""tpu/plan.py: a 70B model on 256 devices that are not there."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tpu" / "plan.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("tpu_plan", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["tpu_plan"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_seventy_billion_parameters_on_a_slice(script, capsys):
    assert script.main(script.Args()) == 0
    shown = capsys.readouterr().out
    # 2 * 128256 * 8192 + 80 * (2 * 8192^2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192) + 8192
    assert "llama-3.1-70b: 70,553,706,496 parameters, jpeft.lora(" in shown
    assert "256 devices: data=1, fsdp=32, tensor=8" in shown
    row = lambda path: re.search(rf"^{re.escape(path)} .*$", shown, flags=re.MULTILINE)[0]
    # 80 * 8192 * 28672 * 2 bytes / 256; a is split by fsdp, b by tensor: 80 * 8 * (8192 / 32 and 28672 / 8) * 4 bytes.
    assert re.search(r"\(80, 8192, 28672\) +bfloat16 +\(·, fsdp, tensor\) +140\.0 MiB", row("model/layers/mlp/up_proj/kernel"))
    assert re.search(r"\(80, 8192, 8\) +float32 +\(·, fsdp, ·\) +640\.0 KiB", row("model/layers/mlp/up_proj/kernel/a"))
    assert re.search(r"\(80, 8, 28672\) +float32 +\(·, ·, tensor\) +8\.8 MiB", row("model/layers/mlp/up_proj/kernel/b"))
    # All weights by 256, and 161 norms of 8192 on every device.
    norms = 161 * 8192 * 2
    base = (70_553_706_496 * 2 - norms) / 256 + norms
    assert f"base       {base / 2**20:>8.1f} MiB per device" in shown
    assert "inputs of all blocks" in shown
    assert re.search(r"80 layers \* 4,096 tokens \* 8,192 wide \* 2 B +5\.0 GiB", shown)
    assert "it fits into 32 GiB" in shown


def test_other_dimensions_methods_and_devices(script, capsys):
    small = dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, intermediate_size=512, vocab_size=1000)
    args = script.Args(devices=8, mesh="fsdp=-1", batch=16, length=128, method="bitfit", **small)
    with pytest.raises(ValueError, match="bitfit"):  # a Llama has no biases
        script.main(args)
    args = dataclasses.replace(args, method="lora", options=("rank=4", "target=.*q_proj/kernel"))
    assert script.main(dataclasses.replace(args, memory=1e-3)) == 1
    shown = capsys.readouterr().out
    assert "8 devices: data=1, fsdp=8, tensor=1" in shown
    assert re.search(r"q_proj/kernel/a +1 +\(2, 256, 4\) +float32 +\(·, fsdp, ·\)", shown)
    assert "it does not fit into 0.001 GiB" in shown
    with pytest.raises(ValueError, match="12 sequences cannot be split over data \\* fsdp = 8"):
        script.main(dataclasses.replace(args, batch=12))
    with pytest.raises(ValueError, match=r"asks for 3 devices, and there are 8"):
        script.main(dataclasses.replace(args, mesh="fsdp=3"))
    with pytest.raises(ValueError, match="is not one of llama-3.1-8b"):
        script.main(script.Args(model="llama-9"))


def test_a_configuration_of_another_family(script, tmp_path, capsys):
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128, "n_positions": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert script.main(script.Args(config=str(tmp_path), devices=4, mesh="fsdp=2,tensor=2", batch=2, length=16, num_hidden_layers=2)) == 0
    shown = capsys.readouterr().out
    assert re.search(r"transformer/h/attn/c_attn/kernel +1 +\(2, 64, 192\) +bfloat16 +\(·, fsdp, tensor\)", shown)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type 'bert'; supported: gpt2"):
        script.main(script.Args(config=str(tmp_path)))


def test_runs_from_the_shell():
    done = subprocess.run([sys.executable, SCRIPT, "--mesh", "fsdp=3"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: mesh data=1, fsdp=3, tensor=1 asks for 3 devices, and there are 256.")

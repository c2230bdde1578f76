"""Adapters of HF PEFT on models of one's own: stacked kernels of experts, and convolutions."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from torch import nn

import jpeft

EXPERTS, INNER, WIDTH = 3, 5, 8


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))

    def forward(self, x):
        gate, up = torch.einsum("bh,eoh->beo", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("bei,ehi->bh", torch.tanh(gate) * up, self.down_proj)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.experts, self.conv = nn.Linear(WIDTH, WIDTH, bias=False), Experts(), nn.Conv2d(2, 4, (3, 2))

    def forward(self, x):
        return self.experts(self.q(x)) + self.conv(x.reshape(len(x), 2, 4, 1).repeat(1, 1, 1, 2)).mean((1, 2, 3))[:, None]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


NAMES = {
    "layers/q/kernel": "layers.*.q.weight",
    # The parameters of a module of experts in the order of torch.
    "layers/experts/gate_up/kernel": "layers.*.experts.gate_up_proj",
    "layers/experts/down/kernel": "layers.*.experts.down_proj",
    r"conv_(\d)/kernel": r"layers.\1.conv.weight",
}
AXES = (
    ("layers/experts/.*", jpeft.KernelAxes((0, 1), (2,), (3,))),
    ("layers/q/kernel", jpeft.KernelAxes((0,), (1,), (2,))),
    ("conv_./kernel", jpeft.KernelAxes((), (0, 1, 2), (3,))),
)


def flax_form(state):
    """The parameters of the net as a scanned model has them, its convolutions apart."""
    stack = lambda name: jnp.stack([jnp.asarray(state[f"layers.{i}.{name}"].numpy()) for i in range(2)]).swapaxes(-1, -2)
    convs = {f"conv_{i}": {"kernel": jnp.asarray(state[f"layers.{i}.conv.weight"].numpy().transpose(2, 3, 1, 0))} for i in range(2)}
    experts = {"gate_up": {"kernel": stack("experts.gate_up_proj")}, "down": {"kernel": stack("experts.down_proj")}}
    return {"layers": {"q": {"kernel": stack("q.weight")}, "experts": experts}, **convs}


CASES = {
    "experts": {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q"]},
    "one": {"target_parameters": ["experts.down_proj"], "target_modules": []},
    "layer": {"target_parameters": ["layers.1.experts.gate_up_proj"], "target_modules": ["q"]},
    "conv": {"target_modules": ["conv", "q"]},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_hf_peft(tmp_path, case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=3, **CASES[case]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "hf")
        x = torch.randn(4, WIDTH)
        expected = model(x).detach()
        params = flax_form(Net().state_dict())
        peft = jpeft.load_hf(tmp_path / "hf", params, names=NAMES, axes=AXES)
        merged = jpeft.flatten(jpeft.merge(peft))
        for path, leaf in jpeft.flatten(flax_form(model.merge_and_unload().state_dict())).items():
            np.testing.assert_allclose(merged[path], leaf, atol=1e-5, err_msg=path)
        jpeft.save_hf(tmp_path / "ours", peft, names=NAMES)
        got = PeftModel.from_pretrained(Net(), tmp_path / "ours")(x).detach()
    torch.testing.assert_close(got, expected)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("hf", "ours"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)


def test_experts_of_old_versions_are_on_the_other_sides(tmp_path):
    """Up to 0.18, A had the first axis of a parameter [experts, outputs, inputs], and B the second."""
    params = flax_form(Net().state_dict())
    rng = np.random.default_rng(0)
    prefix, (experts, width, inner), r = "base_model.model.layers.1.experts", (EXPERTS, WIDTH, INNER), 2
    a, b = rng.normal(size=(r * experts, width)), rng.normal(size=(inner, r * experts))
    content = {"peft_type": "LORA", "r": r, "lora_alpha": 4, "target_parameters": ["1.experts.down_proj"], "peft_version": "0.18.1"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    tensors = {f"{prefix}.lora_A.weight": a.astype(np.float32), f"{prefix}.lora_B.weight": b.astype(np.float32)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    merged = jpeft.merge(jpeft.load_hf(tmp_path, params, names=NAMES, axes=AXES))
    expected = 2 * np.einsum("ire,ero->eio", b.reshape(inner, r, experts), a.reshape(experts, r, width))
    got = merged["layers"]["experts"]["down"]["kernel"] - params["layers"]["experts"]["down"]["kernel"]
    np.testing.assert_allclose(got[1], expected, atol=1e-5)
    np.testing.assert_array_equal(got[0], 0)

"""One adapter that HF PEFT wrote, and the base that it belongs to."""

import dataclasses
import functools
import json
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import jpeft.models
from goldens.base import base_tensor

HERE = Path(__file__).parent
MODELS = ("bert", "gpt2", "gpt2-untied", "llama")


@dataclasses.dataclass(frozen=True)
class Golden:
    """One case of `make.py` for one model."""

    model: str
    case: str

    @property
    def config(self) -> dict[str, Any]:
        """What adapter_config.json holds."""
        return _about(self.model)[f"adapter {self.case}"]

    @property
    def logits(self) -> np.ndarray:
        """What HF PEFT computes for the batch of `base.py`."""
        header, content = _pack(self.model)
        return _tensor(header[f"{self.case}|logits"], content)

    def write(self, folder: Path) -> Path:
        """Make the folder, as `save_pretrained` left it."""
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config, indent=2, sort_keys=True))
        header, content = _pack(self.model)
        prefix = f"{self.case}|adapter|"
        own = {name.removeprefix(prefix): about for name, about in header.items() if name.startswith(prefix)}
        parts = {name: content[slice(*about["data_offsets"])] for name, about in own.items()}
        ends = dict(zip(parts, np.cumsum([len(part) for part in parts.values()]).tolist()))
        new = {name: about | {"data_offsets": [ends[name] - len(parts[name]), ends[name]]} for name, about in own.items()}
        text = json.dumps({"__metadata__": {"format": "pt"}} | new).encode()
        text += b" " * (-len(text) % 8)
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts.values()))
        return folder


def goldens(models: Iterable[str] = MODELS) -> list[Golden]:
    """All of them, or those of some models."""
    prefix = "adapter "
    return [Golden(model, key.removeprefix(prefix)) for model in models for key in _about(model) if key.startswith(prefix)]


def base_logits(model: str) -> np.ndarray:
    """What the base alone computes."""
    header, content = _pack(model)
    return _tensor(header["base|logits"], content)


@functools.cache
def base(model: str, *, scan: bool) -> Any:
    """The base, loaded from a folder in Hugging Face's format."""
    about = _about(model)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(about["config"]))
        save_file({name: base_tensor(name, tuple(shape)) for name, shape in about["shapes"].items()}, Path(folder, "model.safetensors"))
        return jpeft.models.load(folder, task="sequence-classification" if model == "bert" else "causal-lm", scan=scan)


@functools.cache
def _about(model: str) -> dict[str, Any]:
    return json.loads((HERE / f"{model}.json").read_text())


@functools.cache
def _pack(model: str) -> tuple[dict[str, Any], bytes]:
    """The header of a file and the bytes behind it: the adapters' types, bfloat16 among them, stay as they are."""
    content = (HERE / f"{model}.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _tensor(about: dict[str, Any], content: bytes) -> np.ndarray:
    assert about["dtype"] == "F32"
    return np.frombuffer(content[slice(*about["data_offsets"])], np.float32).reshape(about["shape"])

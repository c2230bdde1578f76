"""The independent reader of a pretrained model: torch and transformers. A file that they read as jpeft does says what is right."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.folders import World
from fuzz.targets import Operation, Target, outputs, tokens


def explain(world: World, target: Target, operation: Operation, value: Any, expected: Any) -> str | None:
    """Why the value of an operation on a damaged model is right, though it is not that of the whole model; None if it is not."""
    if not target.plain:
        return None
    if operation.name == "encode":
        return _explain_tokens(world.path / target.folder, value)
    task = "encoder" if target.folder == "encoder" else "causal-lm"
    if operation.name == "train":
        value = outputs(world.path / target.folder, task)
    if isinstance(expected, dict) and value["reported"] != expected["reported"]:
        return f"`Loaded` reports {value['reported']}"
    return _explain_logits(world.path / target.folder, task, value)


def _explain_tokens(folder: Path, ids: list[list[int]]) -> str | None:
    from transformers import AutoTokenizer

    return "as transformers encodes" if tokens(AutoTokenizer.from_pretrained(folder)) == ids else None


def _explain_logits(folder: Path, task: str, value: dict[str, Any]) -> str | None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    try:
        model = (AutoModel if task == "encoder" else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            out = model(torch.tensor(value["ids"]))
    except Exception:
        return None
    theirs = (out.last_hidden_state if task == "encoder" else out.logits).numpy()
    ours = np.frombuffer(value["logits"], np.float32)
    if ours.size != theirs.size:
        return None
    return "as torch computes" if np.allclose(ours.reshape(theirs.shape), theirs, rtol=1e-3, atol=1e-3, equal_nan=True) else None

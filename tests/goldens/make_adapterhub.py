"""Write the goldens of the library adapters: `PYTHONPATH=tests python tests/goldens/make_adapterhub.py`. Needs adapters 1.3.0, and torch.

It needs an old transformers, and so an environment of its own. As in `make.py`: tiny models with the weights of `base.py`, noise on
whatever is trained, saved, loaded again, and run.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from safetensors.torch import load_file, save_file

from goldens.base import IDS, MASK, base_tensor, uniform
from goldens.hf import CLASSES, CONFIGS

HERE = Path(__file__).parent

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "houlsby": ("double_seq_bn", {"reduction_factor": 4}),
    "attention-only": ("double_seq_bn", {"reduction_factor": 4, "output_adapter": False}),
    "pfeiffer": ("seq_bn", {"reduction_factor": 3.2}),
    "parallel": ("par_bn", {"reduction_factor": 4, "scaling": 2.0}),
    "compacter": ("compacter", {"reduction_factor": 4, "phm_dim": 2, "phm_rank": 2}),
    "flex-head": ("seq_bn", {"reduction_factor": 8, "non_linearity": "gelu_new"}),
}


def base_model(name: str, flex: bool) -> Any:
    """Return the tiny model with the weights of `base.py`."""
    torch.manual_seed(0)
    model = (adapters.BertAdapterModel if flex else CLASSES[name])(CONFIGS[name]).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(base_tensor(key, tuple(parameter.shape))))
    if not flex:
        adapters.init(model)
    return model


def run(model: Any) -> torch.Tensor:
    """Return the logits."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK)).logits


def make(case: str, name: str, folder: Path) -> torch.Tensor:
    """Write the adapter of a case and return its logits."""
    kind, options = CASES[case]
    flex = case == "flex-head"
    model = base_model(name, flex)
    model.add_adapter("reviews", config=adapters.AdapterConfig.load(kind, **options))
    if flex:
        model.add_classification_head("reviews", num_labels=3, id2label={0: "no", 1: "perhaps", 2: "yes"})
    model.train_adapter("reviews")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.from_numpy(uniform(f"{case} {key}", tuple(parameter.shape))))
    model.save_adapter(folder, "reviews", use_safetensors=True)
    loaded = base_model(name, flex)
    loaded.load_adapter(str(folder), use_safetensors=True, set_active=True)
    logits = run(loaded)
    print(name, case, float((logits - run(base_model(name, flex))).abs().max()) if not flex else "")
    return logits


def main() -> None:
    """Write the files."""
    transformers.logging.set_verbosity_error()
    tensors: dict[str, torch.Tensor] = {}
    about: dict[str, Any] = {}
    for name in ("bert", "gpt2", "llama"):
        for case in CASES:
            if name != "bert" and case in ("parallel", "flex-head"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                key = f"{name}|{case}"
                tensors[f"{key}|logits"] = make(case, name, Path(folder)).contiguous()
                files = sorted(Path(folder).iterdir())
                about[key] = {file.name: json.loads(file.read_text()) for file in files if file.suffix == ".json"}
                for file in files:
                    if file.suffix == ".safetensors" and not (name != "bert" and "head" in file.name):
                        tensors |= {f"{key}|{file.name}|{each}": tensor for each, tensor in load_file(file).items()}
    save_file(tensors, HERE / "adapterhub.safetensors")
    lines = [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in about.items()]
    (HERE / "adapterhub.json").write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()

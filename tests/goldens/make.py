"""Write the goldens with HF PEFT: `PYTHONPATH=tests python tests/goldens/make.py`. Needs peft 0.21.2, transformers and torch.

For every case of the table: a tiny model with the weights of `base.py`, HF PEFT's adapter in it with noise on whatever is trained, so that
nothing is zero, saved by `save_pretrained`, loaded again onto the base, and run. The logits are those of the loaded model.
"""

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from goldens.base import IDS, MASK, uniform
from goldens.hf import CLASSES, CONFIGS, base_model, run

HERE = Path(__file__).parent


# Names that the cases use: those of two projections of attention, and of the last layer of the feed-forward network.
ATTENTION = {"bert": ["query", "value"], "gpt2": ["c_attn"], "gpt2-untied": ["lm_head"], "llama": ["q_proj", "v_proj"]}
DOWN = {"bert": "output.dense", "gpt2": "mlp.c_proj", "llama": "down_proj"}
EMBEDDING = {"bert": "word_embeddings", "gpt2": "wte", "llama": "embed_tokens"}
LAYERS = {"bert": "layer", "gpt2": "h", "llama": "layers"}
# A kernel of the second layer, from the part of its name that is the same in every kernel.
ONE = {"bert": "layer.1.attention.self.query", "gpt2": "h.1.attn.c_attn", "llama": "layers.1.self_attn.q_proj"}
NORMS = {"bert": ["LayerNorm"], "gpt2": ["ln_1", "ln_2"], "llama": ["input_layernorm", "post_attention_layernorm", "norm"]}
ALSO = {"bert": ["pooler"], "gpt2": ["ln_f"], "llama": ["lm_head", "norm"]}
REGEX = {
    "bert": r".*\.layer\.1\..*\.(query|key)|bert\.pooler\.dense",
    "gpt2": r".*\.h\.1\.(attn|mlp)\.c_proj",
    "llama": r"model\.layers\.\d+\.(self_attn\.[ko]_proj|mlp\.gate_proj)",
}

Options = Callable[[str], dict[str, Any]]


def attention(**options: Any) -> Options:
    """Return options for a method on two projections of attention."""
    return lambda model: {"target_modules": ATTENTION[model], **options}


def wide(**options: Any) -> Options:
    """Return options for a method on attention and on kernels that are not square."""
    return lambda model: {"target_modules": [*ATTENTION[model], *([DOWN[model]] if model in DOWN else ())], **options}


CASES: dict[str, tuple[type, Options]] = {
    "lora": (peft.LoraConfig, wide(r=2, lora_alpha=3)),
    "lora-all-linear": (peft.LoraConfig, lambda model: {"r": 1, "target_modules": "all-linear"}),
    "lora-regex": (peft.LoraConfig, lambda model: {"r": 2, "target_modules": REGEX[model]}),
    "lora-exclude": (peft.LoraConfig, lambda model: {"r": 2, "target_modules": ATTENTION[model], "exclude_modules": [ONE[model]]}),
    "lora-layers": (
        peft.LoraConfig,
        lambda model: {"r": 2, "target_modules": ATTENTION[model], "layers_to_transform": [1], "layers_pattern": LAYERS[model]},
    ),
    "lora-patterns": (
        peft.LoraConfig,
        lambda model: {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": [*ATTENTION[model], DOWN[model]],
            "rank_pattern": {ONE[model]: 3, DOWN[model]: 1},
            "alpha_pattern": {ONE[model]: 5, r"\d+." + (DOWN[model] if model == "bert" else "mlp." + DOWN[model].removeprefix("mlp.")): 7},
        },
    ),
    "lora-save": (peft.LoraConfig, lambda model: {"r": 2, "target_modules": ATTENTION[model], "modules_to_save": ALSO[model]}),
    "lora-bias-only": (peft.LoraConfig, attention(r=2, bias="lora_only")),
    "lora-bias-all": (peft.LoraConfig, attention(r=2, bias="all")),
    "lora-own-bias": (peft.LoraConfig, attention(r=2, lora_bias=True)),
    "lora-embedding": (peft.LoraConfig, lambda model: {"r": 2, "target_modules": [EMBEDDING[model], *ATTENTION[model]]}),
    "lora-tokens": (peft.LoraConfig, attention(r=2, trainable_token_indices=[5, 8, 30])),
    "lora-bfloat16": (peft.LoraConfig, attention(r=2)),
    "rslora": (peft.LoraConfig, attention(r=4, lora_alpha=3, use_rslora=True)),
    "dora": (peft.LoraConfig, wide(r=2, lora_alpha=3, use_dora=True)),
    "pissa": (peft.LoraConfig, wide(r=2, lora_alpha=3, init_lora_weights="pissa")),
    "olora": (peft.LoraConfig, attention(r=2, lora_alpha=3, init_lora_weights="olora")),
    "orthogonal": (peft.LoraConfig, attention(r=2, init_lora_weights="orthogonal")),
    "adalora": (peft.AdaLoraConfig, wide(init_r=3, target_r=2, lora_alpha=4, total_step=9)),
    "adalora-pruned": (
        peft.AdaLoraConfig,
        wide(init_r=3, target_r=1, lora_alpha=4, total_step=8, tinit=1, tfinal=3, deltaT=1, beta1=0.5, beta2=0.5),
    ),
    "vera": (peft.VeraConfig, wide(r=4, d_initial=0.5)),
    "ia3": (peft.IA3Config, lambda model: {"target_modules": [*ATTENTION[model], DOWN[model]], "feedforward_modules": [DOWN[model]]}),
    "loha": (peft.LoHaConfig, wide(r=2, alpha=3)),
    "loha-patterns": (
        peft.LoHaConfig,
        lambda model: wide(r=2, alpha=3, rank_pattern={ONE[model]: 1}, alpha_pattern={ONE[model]: 5})(model),
    ),
    "lokr": (peft.LoKrConfig, wide(r=2, alpha=3)),
    "lokr-full": (peft.LoKrConfig, wide(r=8, alpha=3)),
    "lokr-both": (peft.LoKrConfig, wide(r=1, alpha=3, decompose_both=True, decompose_factor=4)),
    "oft": (peft.OFTConfig, wide(r=0, oft_block_size=4)),
    "oft-cayley": (peft.OFTConfig, wide(r=2, oft_block_size=0, use_cayley_neumann=False)),
    "oft-share": (peft.OFTConfig, wide(r=0, oft_block_size=4, block_share=True, num_cayley_neumann_terms=3)),
    # Without CUDA, HF PEFT takes one factor of several.
    "boft": (peft.BOFTConfig, attention(boft_block_size=4)),
    "hra": (peft.HRAConfig, wide(r=2)),
    "hra-gram-schmidt": (peft.HRAConfig, wide(r=2, apply_GS=True)),
    "miss": (peft.MissConfig, wide(r=4)),
    "miss-bat": (peft.MissConfig, attention(r=4, init_weights="bat")),
    "miss-mini": (peft.MissConfig, attention(r=4, mini_r=2, init_weights="mini")),
    "shira": (peft.ShiraConfig, wide(r=1)),
    "ln-tuning": (peft.LNTuningConfig, lambda model: {"target_modules": NORMS[model]}),
    "trainable-tokens": (peft.TrainableTokensConfig, lambda model: {"target_modules": [EMBEDDING[model]], "token_indices": [5, 8, 30]}),
    "prompt-tuning": (peft.PromptTuningConfig, lambda model: {"num_virtual_tokens": 3}),
    "prefix-tuning": (peft.PrefixTuningConfig, lambda model: {"num_virtual_tokens": 3}),
    "prefix-projection": (
        peft.PrefixTuningConfig,
        lambda model: {"num_virtual_tokens": 2, "prefix_projection": True, "encoder_hidden_size": 6},
    ),
    "p-tuning": (peft.PromptEncoderConfig, lambda model: {"num_virtual_tokens": 3, "encoder_hidden_size": 6}),
    "p-tuning-lstm": (
        peft.PromptEncoderConfig,
        lambda model: {"num_virtual_tokens": 3, "encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"},
    ),
    "multitask-prompt-tuning": (peft.MultitaskPromptTuningConfig, lambda model: {"num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 2}),
    "adaption-prompt": (peft.AdaptionPromptConfig, lambda model: {"adapter_len": 3, "adapter_layers": 1}),
}

LINEAR_ONLY = ("loha", "lokr", "oft", "boft", "hra", "miss", "shira")
# Values that training moves around another value than 0, those that must stay small to stay near a rotation, and factors of long products.
AROUND_ONE = ("ia3_l", "boft_s", "lora_magnitude_vector")
SMALL = ("oft_R", "boft_R")
PRODUCTS = ("hada_", "lokr_")


def can(case: str, name: str) -> bool:
    """Return whether HF PEFT has the case for a model."""
    if case.startswith(LINEAR_ONLY) and case != "loha-patterns":
        return name != "gpt2"
    # It knows adaption prompts for decoders only, and takes a Conv1D for its transpose in OLoRA.
    return name != "gpt2-untied" and (case, name) not in {("adaption-prompt", "bert"), ("olora", "gpt2"), ("loha-patterns", "gpt2")}


def add_noise(model: torch.nn.Module, case: str) -> None:
    """Move everything that the adapter trains away from where it began."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.from_numpy(uniform(f"{case} {key}", tuple(parameter.shape))).to(parameter.dtype)
            if any(part in key for part in AROUND_ONE):
                parameter.mul_(1 + 0.3 * noise)
            else:
                if any(part in key for part in PRODUCTS):
                    noise += noise.sign()
                parameter.add_(noise * (0.05 if any(part in key for part in SMALL) else 0.3))


def prune(model: Any, name: str) -> None:
    """Train AdaLoRA for a few steps, so that it drops ranks."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    inputs = {"input_ids": torch.from_numpy(IDS), "attention_mask": torch.from_numpy(MASK)}
    labels = torch.tensor([0, 2, 1]) if name == "bert" else torch.from_numpy(IDS)
    for step in range(8):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def make(case: str, name: str, folder: Path) -> torch.Tensor:
    """Write the adapter of a case and return its logits."""
    config_class, options = CASES[case]
    torch.manual_seed(1)
    model = peft.get_peft_model(base_model(name), config_class(task_type="SEQ_CLS" if name == "bert" else "CAUSAL_LM", **options(name)))
    add_noise(model, case)
    if case == "adalora-pruned":
        prune(model, name)
    expected = run(model, case)
    if case == "lora-bfloat16":
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder)
    logits = run(peft.PeftModel.from_pretrained(base_model(name), folder), case)
    change = (logits - run(base_model(name), case)).abs().max() / logits.abs().max()
    error = (logits - expected).abs().max() / logits.abs().max()
    note = "" if error < 1e-5 or case in ("lora-bfloat16", "adalora-pruned") else "   !!! HF's own reload differs"
    print(f"{name:6} {case:24} changes the logits by {change:.3f}, differs after loading by {error:.1e}{note}")
    assert change > 0.01, f"{case} of {name} changes little"
    zeros = [
        key for key, tensor in load_file(folder / "adapter_model.safetensors").items() if tensor.is_floating_point() and not tensor.all()
    ]
    assert not zeros, f"{case} of {name} has zeros in {zeros}"
    return logits


def main() -> None:
    """Write the files of every model."""
    warnings.simplefilter("ignore")
    for name in CONFIGS:
        tensors: dict[str, torch.Tensor] = {}
        adapters: dict[str, Any] = {}
        for case in CASES:
            if not can(case, name):
                continue
            with tempfile.TemporaryDirectory() as folder:
                logits = make(case, name, Path(folder))
                tensors[f"{case}|logits"] = logits.contiguous()
                tensors |= {f"{case}|adapter|{key}": tensor for key, tensor in load_file(Path(folder, "adapter_model.safetensors")).items()}
                config = json.loads(Path(folder, "adapter_config.json").read_text())
            # HF PEFT writes sets in the order of the process.
            adapters[case] = {
                key: sorted(value) if key == "target_modules" and isinstance(value, list) else value for key, value in config.items()
            }
        model = base_model(name)
        tensors["base|logits"] = run(model, "base").contiguous()
        save_file(tensors, HERE / f"{name}.safetensors")
        shapes = {key: list(parameter.shape) for key, parameter in model.named_parameters()}
        config = CONFIGS[name].to_dict() | {"architectures": [CLASSES[name].__name__]}
        parts = {"config": config, "shapes": shapes} | {f"adapter {case}": about for case, about in adapters.items()}
        lines = [f"{json.dumps(part)}: {json.dumps(about, sort_keys=True)}" for part, about in parts.items()]
        (HERE / f"{name}.json").write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()

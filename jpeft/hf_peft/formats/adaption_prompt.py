"""ADAPTION_PROMPT: LLaMA-Adapter's prompts behind gates."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.additive.prefixes.adaption_prompt import GATE, PROMPT, AdaptionPrompt
from jpeft.core.method import Method
from jpeft.hf_peft.config import COUNT, TARGETS, Config, Key
from jpeft.hf_peft.formats.base import Arrays, File, Format, Shapes, Written
from jpeft.hf_peft.sites import Base, Site
from jpeft.tree.adapters import ADDED
from jpeft.tree.paths import Path

_PROMPT, _GATE = "adaption_prompt", "adaption_gate"
# HF PEFT's models, and their modules. In GPT-2 one kernel makes queries, keys and values, and the output of the prompts is not projected.
_MODELS = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}
_ONE_KERNEL = ("gpt2",)


class AdaptionPromptFormat(Format):
    """``adaption_prompt`` [1, length, width] is ``prompt``, and ``adaption_gate`` is ``gate``, in each of the top layers."""

    peft_type = "ADAPTION_PROMPT"
    methods = ("adaption_prompt",)
    saves_modules = False
    keys = {"target_modules": Key(None, TARGETS), "adapter_len": Key(None, COUNT), "adapter_layers": Key(None, COUNT)}

    def check(self, config: Config, base: Base) -> None:
        """Refuse models that HF PEFT does not have, and other modules than attention."""
        if config["adapter_len"] is None or config["adapter_layers"] is None:
            raise config.error("adapter_len and adapter_layers must be given.")
        _check_model(base)
        usual = _MODELS[str(base.model_type)]
        if config["target_modules"] not in (None, usual, [usual]):
            raise config.error(f"target_modules is {config['target_modules']!r}; jpeft reads prompts in the attention, {usual!r}.")

    def expected(self, config: Config, base: Base, sites: Sequence[Site], rename: Callable[[str], str]) -> Shapes:
        """The prompts and gates of the top layers."""
        out: Shapes = {}
        for _, modules, width in _places(self._method(config, base), base):
            for module in modules:
                out |= {f"{module}.{_PROMPT}": (1, config["adapter_len"], width), f"{module}.{_GATE}": (1,)}
        return out

    def load(self, file: File, sites: Sequence[Site]) -> tuple[Method, Arrays]:
        """`jpeft.adaption_prompt`."""
        method = self._method(file.config, file.base)
        out: Arrays = {}
        for path, modules, _ in _places(method, file.base):
            prompts, gates = [file.read(f"{name}.{_PROMPT}")[0] for name in modules], [file.read(f"{name}.{_GATE}") for name in modules]
            stacked = file.base.count(_kernel_at(method, file.base, path)) is not None
            out |= {
                f"{path}/{PROMPT}": np.stack(prompts) if stacked else prompts[0],
                f"{path}/{GATE}": np.stack(gates) if stacked else gates[0],
            }
        return method, out

    def _method(self, config: Config, base: Base) -> AdaptionPrompt:
        one = base.model_type in _ONE_KERNEL
        how: dict[str, Any] = {"project": False, "heads": base.config.num_attention_heads} if one else {}
        try:
            method = AdaptionPrompt(length=config["adapter_len"], layers=config["adapter_layers"], head=None, **how)
            method.sites(base.params)
        except ValueError as error:
            raise config.error(str(error)) from error
        return method

    def save(self, method: Any, leaves: Mapping[Path, Any], base: Base) -> Written:
        """The prompts and gates, layer by layer."""
        _check_model(base)
        if method.project == (base.model_type in _ONE_KERNEL):
            raise ValueError(
                f"HF PEFT's {self.peft_type} of {base.model_type} {'does not project' if method.project else 'projects'} the output of the "
                f"prompts: train with project={not method.project} to export."
            )
        tensors: Arrays = {}
        count = 0
        for path, modules, width in _places(method, base):
            prompt = np.asarray(leaves[f"{path}/{PROMPT}"]).reshape(len(modules), 1, -1, width)
            gate = np.asarray(leaves[f"{path}/{GATE}"]).reshape(len(modules), 1)
            count += len(modules)
            for i, module in enumerate(modules):
                tensors |= {f"{module}.{_PROMPT}": prompt[i], f"{module}.{_GATE}": gate[i]}
        config = {"target_modules": _MODELS[str(base.model_type)], "adapter_len": method.length, "adapter_layers": count}
        return Written(tensors, config)


def _places(method: AdaptionPrompt, base: Base) -> list[tuple[Path, list[str], int]]:
    """For each attention that gets prompts: where its leaves stand, the torch modules of its layers that do, and the width of a prompt."""
    out = []
    for site, count in method.sites(base.params):
        around = site.core.rpartition("/")[0]
        modules = [torch.module.rpartition(".")[0] for torch in base.at(site.kernel)]
        out.append((f"{around}/{ADDED}", modules[-count:], site.inputs))
    return out


def _kernel_at(method: AdaptionPrompt, base: Base, path: Path) -> Path:
    """The key kernel of the attention whose leaves stand at a path."""
    return next(site.kernel for site, _ in method.sites(base.params) if f"{site.core.rpartition('/')[0]}/{ADDED}" == path)


def _check_model(base: Base) -> None:
    """Refuse models that HF PEFT does not have, or computes otherwise.

    Raises:
      ValueError: naming those that it has.
    """
    if base.model_type not in _MODELS:
        raise ValueError(f"HF PEFT has adaption prompts for {', '.join(_MODELS)}, and this model is of the type {base.model_type}.")
    if any(name.endswith("o_proj.bias") for name in base.sites):
        raise ValueError("HF PEFT adds the bias of the output projection twice with adaption prompts, and this model has such a bias.")

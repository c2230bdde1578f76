"""Options under the names that other libraries give them, for the message that refuses them."""

from collections.abc import Mapping
from typing import Any

# Options as HF PEFT and the library adapters call them -> the options of ours that mean the same; a method has one of them at most.
SAME: Mapping[str, tuple[str, ...]] = {
    "r": ("rank", "block_num"),
    "lora_r": ("rank",),
    "lora_rank": ("rank",),
    "loraplus_lr_ratio": ("b_lr_scale",),
    "init_r": ("rank",),
    "target_r": ("target_rank",),
    "tinit": ("t_init",),
    "tfinal": ("t_final",),
    "deltaT": ("interval",),
    "total_step": ("total_steps",),
    "orth_reg_weight": ("orthogonal",),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "rank_pattern": ("rank",),
    "alpha_pattern": ("alpha",),
    "target_modules": ("target",),
    "target_parameters": ("target",),
    "layers_to_transform": ("target",),
    "layers_pattern": ("target",),
    "exclude_modules": ("target",),
    "feedforward_modules": ("feedforward",),
    "modules_to_save": ("head",),
    "use_rslora": ("rslora",),
    "init_lora_weights": ("init",),
    "num_virtual_tokens": ("length",),
    "prefix_length": ("length",),
    "prompt_length": ("length",),
    "pre_seq_len": ("length",),
    "prompt_tuning_init": ("init",),
    "prompt_tuning_init_text": ("tokens",),
    "encoder_reparameterization_type": ("encoder",),
    "encoder_hidden_size": ("hidden", "mlp"),
    "prefix_projection": ("mlp",),
    "bottleneck_size": ("size", "mlp"),
    "adapter_size": ("size",),
    "adapter_dim": ("size",),
    "reduction_factor": ("reduction",),
    "non_linearity": ("activation",),
    "scaling": ("scale", "alpha"),
    "phm_dim": ("division",),
    "phm_rank": ("rank",),
    "init_weights": ("init", "variant"),
    "density": ("sparsity",),
    "use_effective_conv2d": ("effective_conv",),
    "oft_block_size": ("block_size",),
    "use_cayley_neumann": ("terms",),
    "num_cayley_neumann_terms": ("terms",),
    "projection_prng_key": ("seed",),
    "random_seed": ("seed",),
    "apply_GS": ("apply_gs",),
    "mini_r": ("mini_rank",),
    "vera_dropout": ("dropout",),
    "miss_dropout": ("dropout",),
    "module_dropout": ("block_dropout",),
    "boft_dropout": ("block_dropout",),
    "boft_block_size": ("block_size",),
    "boft_block_num": ("block_num",),
    "boft_n_butterfly_factor": ("n_butterfly_factor",),
}
# The same, where something else than an option of the method does it.
ELSEWHERE: Mapping[str, str] = {
    "use_dora": "Weight-decomposed LoRA is a separate method: method='dora'",
    "bias": "Biases are trained by another method beside it: jpeft.chain(lora=jpeft.lora(), bitfit=jpeft.bitfit())",
    "fan_in_fan_out": "The layers tell how their kernels lie: leave it out",
    "task_type": "The model's task is none of the method's options: leave it out",
    "peft_type": "The method is given by its name, method='lora'",
    "inference_mode": "There is no such mode: keep the adapter, or jpeft.merge it",
    "base_model_name_or_path": "The method is given the parameters of any model: leave it out",
    "tokenizer_name_or_path": "The method is given token ids: leave it out",
    "token_dim": "Widths and depths are read off the parameters: leave it out",
    "num_layers": "Widths and depths are read off the parameters: leave it out",
    "num_attention_heads": "Widths and depths are read off the parameters: leave it out",
    "num_transformer_submodules": "Widths and depths are read off the parameters: leave it out",
    "learning_rate": "The learning rate is the optimizer's: `learning_rate` of the trainer, or optax.adamw(rate) in your own loop",
    "lr": "The learning rate is the optimizer's: `learning_rate` of the trainer, or optax.adamw(rate) in your own loop",
}


def hint(name: str, options: Mapping[str, Any]) -> str:
    """A sentence on an option that a method does not have and another library calls so; nothing for any other name.

    >>> hint("lora_alpha", {"rank": 8, "alpha": 16})
    "Here 'lora_alpha' is called 'alpha'."
    """
    known = [other for other in SAME.get(name, ()) if other in options]
    if known:
        return f"Here {name!r} is called {known[0]!r}."
    return f"{ELSEWHERE[name]}." if name in ELSEWHERE else ""

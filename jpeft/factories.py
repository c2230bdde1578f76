"""Every method by its public spelling. Written by `make docs` from the methods' classes."""

from jpeft.additive.bottlenecks.adapter import adapter as adapter
from jpeft.additive.bottlenecks.compacter import compacter as compacter
from jpeft.additive.bottlenecks.parallel_adapter import parallel_adapter as parallel_adapter
from jpeft.additive.bottlenecks.pfeiffer import pfeiffer as pfeiffer
from jpeft.additive.prefixes.adaption_prompt import adaption_prompt as adaption_prompt
from jpeft.additive.prefixes.p_tuning_v2 import p_tuning_v2 as p_tuning_v2
from jpeft.additive.prefixes.prefix_tuning import prefix_tuning as prefix_tuning
from jpeft.additive.prompts.hard_prompt import hard_prompt as hard_prompt
from jpeft.additive.prompts.multitask_prompt_tuning import multitask_prompt_tuning as multitask_prompt_tuning
from jpeft.additive.prompts.p_tuning import p_tuning as p_tuning
from jpeft.additive.prompts.prompt_tuning import prompt_tuning as prompt_tuning
from jpeft.reparameterized.adalora import adalora as adalora
from jpeft.reparameterized.boft import boft as boft
from jpeft.reparameterized.dora import dora as dora
from jpeft.reparameterized.hra import hra as hra
from jpeft.reparameterized.ia3 import ia3 as ia3
from jpeft.reparameterized.loha import loha as loha
from jpeft.reparameterized.lokr import lokr as lokr
from jpeft.reparameterized.lora import lora as lora
from jpeft.reparameterized.miss import miss as miss
from jpeft.reparameterized.oft import oft as oft
from jpeft.reparameterized.vera import vera as vera
from jpeft.selective.bitfit import bitfit as bitfit
from jpeft.selective.diff_pruning import diff_pruning as diff_pruning
from jpeft.selective.far import far as far
from jpeft.selective.fish_mask import fish_mask as fish_mask
from jpeft.selective.freeze import freeze as freeze
from jpeft.selective.ln_tuning import ln_tuning as ln_tuning
from jpeft.selective.shira import shira as shira
from jpeft.selective.trainable_tokens import trainable_tokens as trainable_tokens

__all__ = [
    "adalora",
    "adapter",
    "adaption_prompt",
    "bitfit",
    "boft",
    "compacter",
    "diff_pruning",
    "dora",
    "far",
    "fish_mask",
    "freeze",
    "hard_prompt",
    "hra",
    "ia3",
    "ln_tuning",
    "loha",
    "lokr",
    "lora",
    "miss",
    "multitask_prompt_tuning",
    "oft",
    "p_tuning",
    "p_tuning_v2",
    "parallel_adapter",
    "pfeiffer",
    "prefix_tuning",
    "prompt_tuning",
    "shira",
    "trainable_tokens",
    "vera",
]

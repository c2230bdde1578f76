"""jpeft: parameter-efficient fine-tuning for JAX.

    peft = jpeft.apply(params, method="lora", rank=8)      # frozen base + small trained pytree
    forward = jpeft.wrap(model.apply)                      # the model, with the method in it
    logits = forward(peft, x)
    params = jpeft.merge(peft)                             # plain parameters again

Pretrained models (`jpeft.models`), the trainer (`jpeft.training`) and the command line are imported on demand.
"""

from importlib.metadata import version as _version

from jpeft import sharding as sharding
from jpeft import stats as stats
from jpeft import tree as tree
from jpeft.additive.bottlenecks.adapter import adapter as adapter
from jpeft.additive.bottlenecks.compacter import compacter as compacter
from jpeft.additive.bottlenecks.parallel_adapter import parallel_adapter as parallel_adapter
from jpeft.additive.bottlenecks.pfeiffer import pfeiffer as pfeiffer
from jpeft.additive.prefixes.p_tuning_v2 import p_tuning_v2 as p_tuning_v2
from jpeft.additive.prefixes.prefix_tuning import prefix_tuning as prefix_tuning
from jpeft.additive.prompts.hard_prompt import hard_prompt as hard_prompt
from jpeft.additive.prompts.nearest_tokens import nearest_tokens as nearest_tokens
from jpeft.additive.prompts.p_tuning import p_tuning as p_tuning
from jpeft.additive.prompts.prompt_tuning import prompt_tuning as prompt_tuning
from jpeft.checkpoint.adapter import load as load
from jpeft.checkpoint.adapter import save as save
from jpeft.core.chain import chain as chain
from jpeft.core.ensemble import ensemble as ensemble
from jpeft.core.ensemble import majority as majority
from jpeft.core.ensemble import stack as stack
from jpeft.core.groups import Group as Group
from jpeft.core.layer import Layer as Layer
from jpeft.core.layer import Linear as Linear
from jpeft.core.method import Method as Method
from jpeft.core.optimizer import optimizer as optimizer
from jpeft.core.peft import Peft as Peft
from jpeft.core.peft import advance as advance
from jpeft.core.peft import apply as apply
from jpeft.core.peft import fold as fold
from jpeft.core.peft import merge as merge
from jpeft.core.peft import penalty as penalty
from jpeft.core.peft import wrap as wrap
from jpeft.core.stages import Stage as Stage
from jpeft.core.summary import Summary as Summary
from jpeft.core.summary import summary as summary
from jpeft.hosts.registry import kernel_axes as kernel_axes
from jpeft.registry import MethodInfo as MethodInfo
from jpeft.registry import make as make
from jpeft.registry import methods as methods
from jpeft.reparameterized.dora import dora as dora
from jpeft.reparameterized.ia3 import ia3 as ia3
from jpeft.reparameterized.lora import lora as lora
from jpeft.selective.bitfit import bitfit as bitfit
from jpeft.selective.diff_pruning import diff_pruning as diff_pruning
from jpeft.selective.far import far as far
from jpeft.selective.fish_mask import fish_mask as fish_mask
from jpeft.selective.freeze import freeze as freeze
from jpeft.tree.kernels import KernelAxes as KernelAxes
from jpeft.tree.paths import flatten as flatten
from jpeft.tree.paths import unflatten as unflatten

__version__ = _version("jpeft")

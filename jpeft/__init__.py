"""jpeft: parameter-efficient fine-tuning for JAX.

    peft = jpeft.apply(params, method="lora", rank=8)      # frozen base + small trained pytree
    forward = jpeft.wrap(model.apply, peft.method)         # the model, with the method in it
    logits = forward(peft.variables, x)
    params = jpeft.merge(peft)                             # plain parameters again

Pretrained models (`jpeft.models`), the trainer (`jpeft.training`) and the command line are imported on demand.
"""

from importlib.metadata import version as _version

from . import sharding as sharding
from .additive.adapter import adapter as adapter
from .additive.compacter import compacter as compacter
from .additive.hard_prompt import hard_prompt as hard_prompt
from .additive.p_tuning import p_tuning as p_tuning
from .additive.p_tuning_v2 import p_tuning_v2 as p_tuning_v2
from .additive.parallel_adapter import parallel_adapter as parallel_adapter
from .additive.pfeiffer import pfeiffer as pfeiffer
from .additive.prefix_tuning import prefix_tuning as prefix_tuning
from .additive.prompt_tuning import prompt_tuning as prompt_tuning
from .chain import chain as chain
from .checkpoint.orbax import load as load
from .checkpoint.orbax import save as save
from .ensemble import ensemble as ensemble
from .ensemble import majority as majority
from .ensemble import stack as stack
from .hosts.linen import kernel_axes as kernel_axes
from .method import Group as Group
from .method import Layer as Layer
from .method import Linear as Linear
from .method import Method as Method
from .method import Stage as Stage
from .optim import optimizer as optimizer
from .peft import Peft as Peft
from .peft import advance as advance
from .peft import apply as apply
from .peft import fold as fold
from .peft import merge as merge
from .peft import penalty as penalty
from .peft import wrap as wrap
from .readback import nearest_tokens as nearest_tokens
from .registry import MethodInfo as MethodInfo
from .registry import make as make
from .registry import methods as methods
from .reparameterized.lora import lora as lora
from .select import KernelAxes as KernelAxes
from .selective.bitfit import bitfit as bitfit
from .selective.diff_pruning import diff_pruning as diff_pruning
from .selective.far import far as far
from .selective.fish_mask import fish_mask as fish_mask
from .selective.freeze import freeze as freeze
from .summary import Summary as Summary
from .summary import summary as summary
from .tree import flatten as flatten
from .tree import unflatten as unflatten

__version__ = _version("jpeft")

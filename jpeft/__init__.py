"""jpeft: parameter-efficient fine-tuning for JAX.

    peft = jpeft.apply(params, method="lora", rank=8)      # frozen base + small trained pytree
    forward = jpeft.wrap(model.apply)                      # the model, with the method in it
    logits = forward(peft, x)
    params = jpeft.merge(peft)                             # plain parameters again

Pretrained models (`jpeft.models`), the trainer (`jpeft.training`) and the command line are imported on demand.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from jpeft import layouts as layouts
from jpeft import sharding as sharding
from jpeft import stats as stats
from jpeft import tree as tree
from jpeft.additive.prompts.nearest_tokens import nearest_tokens as nearest_tokens
from jpeft.checkpoint.adapter import load as load
from jpeft.checkpoint.adapter import save as save
from jpeft.core.assign import assign as assign
from jpeft.core.chain import chain as chain
from jpeft.core.decay import decay_mask as decay_mask
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
from jpeft.factories import *
from jpeft.hosts.registry import kernel_axes as kernel_axes
from jpeft.hosts.taught import register_layer as register_layer
from jpeft.many.combine import combine as combine
from jpeft.many.pool import mix as mix
from jpeft.many.pool import swap as swap
from jpeft.many.to_lora import to_lora as to_lora
from jpeft.registry import MethodInfo as MethodInfo
from jpeft.registry import make as make
from jpeft.registry import methods as methods
from jpeft.tree.kernels import KernelAxes as KernelAxes
from jpeft.tree.paths import flatten as flatten
from jpeft.tree.paths import unflatten as unflatten

__version__: str

if _TYPE_CHECKING:
    from jpeft.adapterhub.load import load_adapterhub as load_adapterhub
    from jpeft.adapterhub.save import save_adapterhub as save_adapterhub
    from jpeft.estimation.estimate import estimate as estimate
    from jpeft.hf_peft.load import load_hf as load_hf
    from jpeft.hf_peft.save import save_hf as save_hf
    from jpeft.hosts.check.check import check as check
    from jpeft.training.run import load_run as load_run
else:
    from importlib import import_module as _import_module

    # Takes long to import.
    _LATER = {
        "check": "jpeft.hosts.check.check",
        "estimate": "jpeft.estimation.estimate",
        "load_adapterhub": "jpeft.adapterhub.load",
        "load_hf": "jpeft.hf_peft.load",
        "load_run": "jpeft.training.run",
        "save_adapterhub": "jpeft.adapterhub.save",
        "save_hf": "jpeft.hf_peft.save",
    }

    def __getattr__(name: str) -> _Any:
        """What takes long to import; or the class of a method whose file is newer than `make docs`, so that `jpeft.factories` lacks it."""
        if name == "__version__":
            from importlib.metadata import PackageNotFoundError, version

            try:
                return version("jpeft")
            except PackageNotFoundError:  # run from its folder, without being installed
                return "0+folder"
        if name in _LATER:
            return getattr(_import_module(_LATER[name]), name)  # says what to install where a package is missing
        from jpeft.registry import classes

        if name in classes():
            return classes()[name]
        raise AttributeError(f"module 'jpeft' has no attribute {name!r}")

    def __dir__() -> list[str]:
        """All public names, those of `__getattr__` among them."""
        return sorted({*globals(), *_LATER})

"""Names of methods: name -> factory, and back from a configuration to a `Method`."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jpeft.additive.bottlenecks.adapter import adapter
from jpeft.additive.bottlenecks.compacter import compacter
from jpeft.additive.bottlenecks.parallel_adapter import parallel_adapter
from jpeft.additive.bottlenecks.pfeiffer import pfeiffer
from jpeft.additive.prefixes.p_tuning_v2 import p_tuning_v2
from jpeft.additive.prefixes.prefix_tuning import prefix_tuning
from jpeft.additive.prompts.hard_prompt import hard_prompt
from jpeft.additive.prompts.p_tuning import p_tuning
from jpeft.additive.prompts.prompt_tuning import prompt_tuning
from jpeft.core.chain import chain
from jpeft.core.method import Method
from jpeft.reparameterized.lora import lora
from jpeft.selective.bitfit import bitfit
from jpeft.selective.diff_pruning import diff_pruning
from jpeft.selective.far import far
from jpeft.selective.fish_mask import fish_mask
from jpeft.selective.freeze import freeze


class MethodInfo(NamedTuple):
    """What is known of a method by its name alone.

    Attributes:
      name: As in ``jpeft.apply(params, method=name)``.
      family: ``"selective"``, ``"additive"`` or ``"reparameterized"``.
      summary: One line.
      factory: ``factory(**options) -> Method``.
      learning_rate: Peak AdamW learning rate that suits the method's defaults on a classification task.
      head_rate: That of a newly made head, as a multiple: it starts from nothing, and where little else moves it has most to do.
    """

    name: str
    family: str
    summary: str
    factory: Callable[..., Method]
    learning_rate: float
    head_rate: float = 5.0


_METHODS = (
    MethodInfo("freeze", "selective", "train the top layers and what follows them, freeze the rest", freeze, 5e-4),
    MethodInfo("bitfit", "selective", "train the biases (all, or query and middle-of-MLP)", bitfit, 1e-2, 20.0),
    MethodInfo("diff_pruning", "selective", "learn which weights to change by gates, then train the k largest changes", diff_pruning, 1e-3),
    MethodInfo("far", "selective", "train the feed-forward neurons that move the most in a short priming", far, 1e-3),
    MethodInfo("fish_mask", "selective", "train the weights of highest Fisher information (needs stats)", fish_mask, 2e-3),
    MethodInfo("adapter", "additive", "bottleneck layers after attention and feed-forward (Houlsby)", adapter, 2e-3),
    MethodInfo("pfeiffer", "additive", "one bottleneck layer a block, between two runs of its LayerNorm", pfeiffer, 2e-3),
    MethodInfo(
        "parallel_adapter", "additive", "bottleneck layers beside the feed-forward ones, scaled (He et al.)", parallel_adapter, 1e-3
    ),
    MethodInfo("compacter", "additive", "bottlenecks of Kronecker products with shared factors (Compacter, Compacter++)", compacter, 3e-3),
    MethodInfo("hard_prompt", "additive", "words put into every text, nothing trained but the head", hard_prompt, 4e-3),
    MethodInfo("prompt_tuning", "additive", "trained embeddings in front of the text's own", prompt_tuning, 1e-2),
    MethodInfo("p_tuning", "additive", "trained embeddings around the text, made by an LSTM or MLP in training", p_tuning, 2e-2),
    MethodInfo(
        "prefix_tuning", "additive", "trained keys and values in every layer, made by an MLP in training", prefix_tuning, 1e-3, 20.0
    ),
    MethodInfo("p_tuning_v2", "additive", "deep prompts: trained keys and values in every layer and a task head", p_tuning_v2, 1e-2),
    MethodInfo("lora", "reparameterized", "low-rank updates of kernels, merged for inference", lora, 3e-3),
)


def methods() -> dict[str, MethodInfo]:
    """All methods by name.

    >>> import jpeft
    >>> jpeft.methods()["lora"].family
    'reparameterized'
    """
    return {info.name: info for info in _METHODS}


def make(method: str | Mapping[str, Any] | Method, **options: Any) -> Method:
    """A `Method` from its name and options, or from the plain data that `Method.config` gives.

    Raises:
      ValueError: for an unknown name or option, or options given beside a finished `Method`.

    >>> import jpeft
    >>> jpeft.make("lora", rank=4) == jpeft.make({"method": "lora", "rank": 4}) == jpeft.lora(rank=4)
    True
    """
    if isinstance(method, Method):
        if options:
            raise ValueError(f"{method!r} is finished: give the options {sorted(options)} to its factory instead.")
        return method
    if isinstance(method, Mapping):
        options = {**method, **options}
        name = options.pop("method", None)
        if name == "chain":
            return chain(**{part: make(config) for part, config in options["parts"].items()})
    else:
        name = method
    known = methods()
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"There is no method {name!r}.{hint} Methods: {', '.join(known)}; or pass a jpeft.Method of your own.")
    return known[name].factory(**options)

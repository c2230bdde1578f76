"""PREFIX_TUNING: keys and values in front of those of every layer."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft import tree
from jpeft.additive.prefixes.key_values import NAMES, from_rows, to_adapter, to_rows
from jpeft.additive.prefixes.prefix_tuning import PrefixTuning
from jpeft.core.method import Method
from jpeft.hf_peft import prompts
from jpeft.hf_peft.config import Config
from jpeft.hf_peft.formats.base import Arrays, File, Format, Shapes, Written
from jpeft.hf_peft.sites import Base, Site
from jpeft.tree.adapters import ADDED
from jpeft.tree.paths import Path

# Models that HF PEFT gives no prefix, because they take no cache.
_WITHOUT_CACHE = ("distilbert",)


class PrefixTuningFormat(Format):
    """``prompt_embeddings`` has for each row the key and the value of each layer, [rows, layers * 2 * width]."""

    peft_type = "PREFIX_TUNING"
    methods = ("prefix_tuning", "p_tuning_v2")
    prefix = "base_model."
    bare = (prompts.TENSOR,)
    needs_head = True
    keys = prompts.keys("prefix_projection", "encoder_hidden_size", "init_weights")

    def check(self, config: Config, base: Base) -> None:
        """Refuse prefixes that jpeft's models cannot have."""
        prompts.check_prompt(config, base)
        _say_of_windows(base)

    def expected(self, config: Config, base: Base, sites: Sequence[Site], rename: Callable[[str], str]) -> Shapes:
        """The prefix."""
        width = 2 * sum(site.layers * site.width for site in self._method(config).sites(base.params))
        return {prompts.TENSOR: (config["num_virtual_tokens"], width)}

    def load(self, file: File, sites: Sequence[Site]) -> tuple[Method, Arrays]:
        """`jpeft.prefix_tuning` without a network."""
        method = self._method(file.config).replace(head=file.head)
        found = method.sites(file.base.params)
        prefix = to_adapter(found, from_rows(found, jnp.asarray(file.read(prompts.TENSOR))))
        return method, {path: np.asarray(leaf) for path, leaf in tree.flatten(prefix).items()}

    def _method(self, config: Config) -> Any:
        return PrefixTuning(length=config["num_virtual_tokens"], mlp=None)

    def save(self, method: Any, leaves: Mapping[Path, Any], base: Base) -> Written:
        """The prefix."""
        _say_of_windows(base)
        prompts.require_task(base, "prefixes")
        if base.model_type in _WITHOUT_CACHE:
            raise ValueError(f"HF PEFT gives no prefix to models of the type {base.model_type}, because they take no cache.")
        if not method.shift:
            raise ValueError("HF PEFT counts the positions of a text from the end of the prefix on. Train with shift=True to export.")
        sites = method.sites(base.params)
        prefix = {site.core: {name: jnp.asarray(leaves[f"{site.core}/{ADDED}/{name}"]) for name in NAMES} for site in sites}
        rows = np.asarray(to_rows(sites, prefix))
        heads = getattr(base.config, "num_key_value_heads", None) or getattr(base.config, "num_attention_heads", None)
        config = prompts.sizes(base, sites[0].width, method.rows, heads)
        return Written({prompts.TENSOR: rows}, config | {"prefix_projection": False, "encoder_hidden_size": sites[0].width})


def _say_of_windows(base: Base) -> None:
    """Say that a window of attention moves away from the prefix in HF PEFT."""
    window = getattr(base.config, "sliding_window", None)
    if window is not None:
        warnings.warn(
            f"The attention of this model has a window of {window} tokens. In HF PEFT the prefix is in it like other tokens, here every "
            f"token sees the prefix: the outputs differ where a text and its prefix are longer than {window}.",
            stacklevel=2,
        )

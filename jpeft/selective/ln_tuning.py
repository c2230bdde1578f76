"""LN tuning: train the normalisations."""

import re
from typing import Any

import jax

from jpeft import layouts, tree
from jpeft.core.method import Method, with_head
from jpeft.core.options import Names, Pattern
from jpeft.tree.head import not_head
from jpeft.tree.select import select

NORMS = "@norms"
GAIN, SHIFT = "scale", "bias"  # the leaves of a normalisation, as flax calls them
_OF_IMAGES = re.compile(r"(.*/)?((?i:(batch|group|instance)_?norm\w*)|[bg]n_?\d*)")  # modules that normalise over batches or positions


class LnTuning(Method):
    r"""LN tuning: ``y = x̂ ⊙ g + b`` with only the gains ``g`` and shifts ``b`` of the normalisations trained, and the task head.

    x̂ is the normalised input, of a LayerNorm or an RMSNorm; the latter has no shift. The normalisations in and around the blocks are meant,
    the one behind the embeddings and the last one too. Those of queries and keys are not, unless `target` names them.

    Args:
      target: The modules to train, whole: a role (`jpeft.layouts`), a regex, or names. With the default, a model without names that are
        known has its normalisations found by structure: modules that hold nothing but a vector ``scale`` and perhaps a ``bias``.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` that replaces leaves, works in any framework and merges by keeping them.

    Raises:
      ValueError: from `init`, if the model has no such modules.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}, "LayerNorm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    >>> jpeft.flatten(jpeft.apply(params, method="ln_tuning").adapter).keys()
    dict_keys(['LayerNorm/bias', 'LayerNorm/scale'])

    Reference: Zhao et al., Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, 2023,
    https://arxiv.org/abs/2312.11420.

    HF PEFT keeps a copy of each module, which is what the adapter holds here. It knows the modules of some families by a table, and of
    Qwen2 and Qwen3 takes the second normalisation of each block alone: ``target=["post_attention_layernorm"]``.
    """

    target: Names = NORMS
    head: Pattern | None = "auto"

    name = "ln_tuning"
    family = "selective"
    summary = "train gains and shifts of the normalisations"
    learning_rate = 1e-2
    head_lr_scale = 20.0
    why_no_merge = None
    begins_within = 0.0

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Copies of the chosen modules' leaves, and the head."""
        del key, stats
        leaves = not_head(params, self.head)
        return with_head({path: tree.trained_copy(leaves[path]) for path in self._chosen(leaves, params)}, params, self.head)

    def _chosen(self, leaves: dict[str, Any], params: tree.Params) -> list[str]:
        if self.target != NORMS:
            return select(leaves, self.target, params=params)
        # Of what looks like a normalisation, those with names that models of text do not have are taken, too, and all if there is no other.
        by_structure, of_role = _by_structure(leaves), set(layouts.find(params, NORMS, required=False))
        of_images = {path for path in by_structure if _OF_IMAGES.fullmatch(path.rpartition("/")[0])}
        found = [path for path in leaves if path in of_role | of_images] or by_structure
        if not found:
            raise ValueError(
                "ln_tuning: the model has no normalisations: no module of a known name, and none that holds nothing but a vector "
                f"'{GAIN}' and perhaps a '{SHIFT}'. Name the modules to train, target=[...], or use another method, e.g. method='lora'. "
                f"Parameters begin with {list(leaves)[:5]}."
            )
        return found


def _by_structure(leaves: dict[str, Any]) -> list[str]:
    """The leaves of the modules that hold a vector ``scale`` and at most a vector ``bias`` besides, stacked or not."""
    axes = layouts.layer_axes(leaves)
    modules: dict[str, set[str]] = {}
    for path, leaf in leaves.items():
        module, _, name = path.rpartition("/")
        is_vector = len(leaf.shape) - (axes.get(path) is not None) == 1
        modules.setdefault(module, set()).add(name if is_vector else "")
    return [path for path in leaves if GAIN in (names := modules[path.rpartition("/")[0]]) and names <= {GAIN, SHIFT}]


ln_tuning = LnTuning

"""BitFit: train the biases."""

from typing import Any

import jax

from jpeft import tree
from jpeft.core.method import Method, with_head
from jpeft.core.options import Names, Pattern
from jpeft.tree.head import not_head
from jpeft.tree.select import select

# In the paper, two kinds of biases make up most of the effect: those of the query and of the first feed-forward layer.
SMALLER_SUBSET = "@query/bias|@ffn_in/bias"


class BitFit(Method):
    r"""BitFit: ``y = W x + b`` with only the bias vectors ``b`` trained, and the task head.

    Args:
      subset: "all" biases, those of LayerNorms included; "query+middle", the paper's smaller set (query biases and those of the first
        feed-forward layer); a regex; roles (`jpeft.layouts`); or a list of module names. Names are compared whole, component by component:
        the name ``dense`` matches ``output/dense`` and not ``output/dense_2``.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` that replaces leaves, works in any framework and merges by keeping them.

    Raises:
      ValueError: from `init`, if the model has no such biases (T5, Llama and most recent decoders have none).

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"query": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}, "LayerNorm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    >>> jpeft.flatten(jpeft.apply(params, method="bitfit").adapter).keys()
    dict_keys(['LayerNorm/bias', 'query/bias'])

    Reference: Ben Zaken et al., BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models, 2021,
    https://arxiv.org/abs/2106.10199.

    Differs from the authors' code, which matches names by substring and always adds the pooler's bias to a subset. In attention without
    rotary positions, the key's bias adds the same number to all logits of a query, so its gradient is zero and training does not move it.
    """

    subset: Names = "all"
    head: Pattern | None = "auto"

    name = "bitfit"
    family = "selective"
    summary = "train the biases (all, or query and middle-of-MLP)"
    learning_rate = 1e-2
    head_lr_scale = 20.0
    why_no_merge = None
    begins_within = 0.0

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Copies of the chosen biases, and the head."""
        del key, stats
        leaves = not_head(params, self.head)
        biases = {path: leaf for path, leaf in leaves.items() if path.rpartition("/")[2] == "bias"}
        if not biases:
            raise ValueError(
                "bitfit: the model has no bias parameters, so there is nothing to train. "
                f"Its leaves are called {sorted({path.rpartition('/')[2] for path in leaves})}. Use another method, e.g. method='lora'."
            )
        if self.subset == "all":
            chosen = list(biases)
        else:
            subset = SMALLER_SUBSET if self.subset == "query+middle" else self.subset
            chosen = select(biases, subset, option="subset", params=params)
        return with_head({path: tree.trained_copy(biases[path]) for path in chosen}, params, self.head)


bitfit = BitFit

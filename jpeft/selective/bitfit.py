"""BitFit: train the biases."""

from collections.abc import Sequence
from typing import Any

import jax

from jpeft import tree
from jpeft.method import Method, factory, not_head, passthrough, with_head
from jpeft.tree.select import select

# The paper's two kinds of biases that do half of the work: the query's and the middle of the MLP's, by their names in common families.
QUERY = r"(.*/)?(query|q_lin|q_proj|q)/bias"
MIDDLE = r"(.*/)?(intermediate/dense|lin1|fc1|c_fc|up_proj|wi|mlp/up|mlp/Dense_0)/bias"


@factory
def bitfit(
    *,
    subset: str | Sequence[str] = "all",
    head: str | None = "auto",
) -> Method:
    r"""BitFit: ``y = W x + b`` with only the bias vectors ``b`` trained, and the task head.

    Args:
      subset: "all" biases, those of LayerNorms included; "query+middle", the paper's smaller set (query biases and those of the first
        feed-forward layer); a regex; or a list of module names. Names are matched whole: ``output/dense`` does not also match
        ``attention/output/dense``'s sibling layers by accident, as a substring would.
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
    rotary positions the key's bias shifts all logits of a query alike, so its gradient is zero and it stays as it is.
    """

    def init_fn(key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        del key, stats
        leaves = not_head(params, head)
        biases = {path: leaf for path, leaf in leaves.items() if path.rpartition("/")[2] == "bias"}
        if not biases:
            raise ValueError(
                "bitfit: the model has no bias parameters, so there is nothing to train. "
                f"Its leaves are called {sorted({path.rpartition('/')[2] for path in leaves})}. Use another method, e.g. method='lora'."
            )
        if subset == "all":
            chosen = list(biases)
        elif subset == "query+middle":
            chosen = select(biases, QUERY, option="subset") + select(biases, MIDDLE, option="subset")
        else:
            chosen = select(biases, subset, option="subset")
        return tree.unflatten({path: tree.copy(biases[path]) for path in chosen})

    return Method(init=with_head(init_fn, head), call=passthrough, merge=tree.graft)

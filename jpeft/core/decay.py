"""Which leaves of an adapter weight decay acts on."""

import re
from typing import Any

import jax

from jpeft.tree.adapters import ADDED
from jpeft.tree.paths import path_str

# A bias anywhere in the path: the leaf itself, or the leaves beside a bias. A normalisation by its module, or by Flax's name for its gain.
_WITHOUT_DECAY = re.compile(r"(.*/)?(bias|\w+_bias|bias_\w+|scale|\w*norm\w*|ln\d*|ln_\w+)(/.*)?", re.IGNORECASE)


def decay_mask(tree: Any) -> Any:
    """Return which leaves weight decay acts on: all but biases and the gains of normalisations.

    A bias or a gain has few scalars and no scale to regularise, so the field's recipes, such as the optimizers of BERT and of HF
    transformers, leave both out. The mask is meant for optax, which calls it with the leaves that are trained:

        optax.adamw(1e-3, weight_decay=0.01, mask=jpeft.decay_mask)

    Args:
      tree: Parameters, or an adapter. What stands beside a bias in an adapter, such as the trained values of a sparse method, counts as
        the bias does.

    Returns:
      A tree of bools of the same structure.

    >>> import jax.numpy as jnp, jpeft
    >>> jpeft.decay_mask({"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "LayerNorm_0": {"scale": jnp.ones(2)}})
    {'LayerNorm_0': {'scale': False}, 'dense': {'bias': False, 'kernel': True}}
    """
    return jax.tree_util.tree_map_with_path(lambda keys, _: _decays(path_str(keys)), tree)


def _decays(path: str) -> bool:
    """Whether a leaf decays. What a method adds to a normalisation, such as a bottleneck, is no part of that normalisation."""
    return not _WITHOUT_DECAY.fullmatch(path.rpartition(f"{ADDED}/")[2])

"""How a family's parameters are split over a mesh: ordered path rules, as `jpeft.sharding` takes them, made from the family's roles.

The scheme is Megatron's (Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053) combined with fully sharded data parallelism. ``tensor``
splits the outputs of the first projection of attention and of the feed-forward network and the inputs of the last one. Each device then
computes whole heads and whole inner units, and one sum over devices completes each half of a block. ``fsdp`` splits the other axis; a
kernel is gathered along that axis when its layer runs. The word embedding is split by words. Vectors are on every device, except for the
biases of kernels whose outputs ``tensor`` splits.
"""

from jax.sharding import PartitionSpec as P

from jpeft.models.common.family import Roles
from jpeft.sharding import Rules

_FIRST, _LAST, _TABLE = P("fsdp", "tensor"), P("tensor", "fsdp"), P(None, "fsdp")


def megatron_rules(roles: Roles) -> Rules:
    """Return the rules of a family.

    >>> roles = Roles(embedding="wte", attention_in="q|k|v", attention_out="o", ffn_in="up", ffn_out="down", norms="norm")
    >>> megatron_rules(roles)[0]
    ('(.*/)?(q|k|v|up|(?!))/kernel', P('fsdp', 'tensor'))
    """
    first = f"{roles.attention_in}|{roles.ffn_in}|{roles.word_head}"
    last = f"{roles.attention_out}|{roles.ffn_out}"
    return (
        (rf"(.*/)?({first})/kernel", _FIRST),
        (rf"(.*/)?({first})/bias", P("tensor")),
        (rf"(.*/)?({last})/kernel", _LAST),
        (rf"(.*/)?({roles.embedding})/embedding", _LAST),
        (rf"(.*/)?({roles.position_tables})/embedding", _TABLE),
        (rf"(.*/)?({roles.label_head})/kernel", P()),  # has few columns and is trained
        (r".*/kernel", P("fsdp")),  # poolers, and layers between a body and its head
        (r".*", P()),
    )

"""How the families' parameters are split over a mesh: ordered path rules, as `jpeft.sharding` takes them.

The scheme is Megatron's (Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053) crossed with fully sharded data parallelism. ``tensor``
splits the outputs of the first projection of attention and of the MLP and the inputs of the last one, so each device computes whole heads
and whole inner units, and one sum for each half of a block puts them together. ``fsdp`` splits the other axis, along which a kernel is
gathered when its layer runs. The word embedding is split by words. Vectors are on every device, but for biases of what ``tensor`` splits.
"""

from jax.sharding import PartitionSpec as P

from jpeft.sharding import Rules

_FIRST, _LAST, _TABLE = P("fsdp", "tensor"), P("tensor", "fsdp"), P(None, "fsdp")


def _rules(*, first: str, last: str, words: str, tables: str = "(?!)") -> Rules:
    """Rules from the names of modules, alternatives of a regex each."""
    return (
        (rf"(.*/)?({first})/kernel", _FIRST),
        (rf"(.*/)?({first})/bias", P("tensor")),
        (rf"(.*/)?({last})/kernel", _LAST),
        (rf"(.*/)?({words})/embedding", _LAST),
        (rf"(.*/)?({tables})/embedding", _TABLE),
        (r"(.*/)?(classifier|score|out_proj)/kernel", P()),  # a few columns, and trained
        (r".*/kernel", P("fsdp")),  # poolers, and what stands before a head
        (r".*", P()),
    )


BERT_RULES = _rules(
    first="query|key|value|q_lin|k_lin|v_lin|intermediate/dense|lin1",
    last="attention/output/dense|output/dense|out_lin|lin2",
    words="word_embeddings",
    tables="position_embeddings|token_type_embeddings",
)
# Queries, keys and values come from one kernel: a device's part of its outputs is not its heads, and XLA has to exchange activations.
GPT2_RULES = _rules(first="c_attn|c_fc|lm_head", last="c_proj", words="wte", tables="wpe")
LLAMA_RULES = _rules(first="q_proj|k_proj|v_proj|gate_proj|up_proj|lm_head", last="o_proj|down_proj", words="embed_tokens")

"""The description of GPT-2's family."""

from jpeft.models.common.family import BlockStack, CheckpointNames, Family, Roles, TaskModel
from jpeft.models.common.partition import megatron_rules
from jpeft.models.gpt2.config import GPT2Config
from jpeft.models.gpt2.model import GPT2LMHeadModel, GPT2Model

ROLES = Roles(
    embedding="wte",
    position_tables="wpe",
    attention_in="c_attn",
    attention_out="attn/c_proj",
    ffn_in="c_fc",
    ffn_out="mlp/c_proj",
    norms="ln_1|ln_2",
    final_norm="ln_f",
    word_head="lm_head",
    label_head="classifier|score",
    head="lm_head",
)

FAMILY = Family(
    config=GPT2Config,
    hf_classes={"gpt2": "GPT2"},
    models={
        "decoder": TaskModel(module=GPT2Model, hf_suffix="Model"),
        "causal-lm": TaskModel(module=GPT2LMHeadModel, hf_suffix="LMHeadModel", scores_words=True, generates=True),
    },
    language_model="causal-lm",
    stacks=(BlockStack(path="h"),),
    roles=ROLES,
    # One kernel makes queries, keys and values. A device's part of its outputs is not whole heads, so XLA exchanges activations there.
    partition=megatron_rules(ROLES),
    names=CheckpointNames(
        body="transformer",
        untransposed=r".*/(c_attn|c_proj|c_fc)/kernel",
        buffers=r"h\.\d+\.attn\.(masked_)?bias",  # causal masks
        tied=r"lm_head\.weight",
    ),
)

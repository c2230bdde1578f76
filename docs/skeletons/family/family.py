"""The description of Skeleton's family."""

from jpeft.models.skeleton.config import SkeletonConfig
from jpeft.models.skeleton.model import SkeletonForCausalLM, SkeletonModel

from jpeft.models.common.family import BlockStack, CheckpointNames, Family, Roles, TaskModel
from jpeft.models.common.partition import megatron_rules

ROLES = Roles(
    embedding="embed_tokens",
    attention_in="q_proj|k_proj|v_proj",
    attention_out="o_proj",
    ffn_in="up_proj",
    ffn_out="down_proj",
    norms="input_norm|output_norm",
    final_norm="norm",
    word_head="lm_head",
    head="lm_head",
)

FAMILY = Family(
    config=SkeletonConfig,
    hf_classes={"skeleton": "Skeleton"},
    models={
        "decoder": TaskModel(module=SkeletonModel, hf_suffix="Model"),
        "causal-lm": TaskModel(module=SkeletonForCausalLM, hf_suffix="ForCausalLM", scores_words=True, generates=True),
    },
    language_model="causal-lm",
    stacks=(BlockStack(path="layers"),),
    roles=ROLES,
    partition=megatron_rules(ROLES),
    names=CheckpointNames(body="model", tied=r"lm_head\.weight"),
)

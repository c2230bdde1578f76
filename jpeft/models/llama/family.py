"""The description of Llama's family."""

from jpeft.models.common.family import BlockStack, CheckpointNames, Family, Roles, TaskModel
from jpeft.models.common.partition import megatron_rules
from jpeft.models.llama.config import LlamaConfig
from jpeft.models.llama.model import LlamaForCausalLM, LlamaModel

ROLES = Roles(
    embedding="embed_tokens",
    attention_in="q_proj|k_proj|v_proj",
    attention_out="o_proj",
    ffn_in="gate_proj|up_proj",
    ffn_out="down_proj",
    norms="input_layernorm|post_attention_layernorm|q_norm|k_norm",
    final_norm="norm",
    word_head="lm_head",
    label_head="classifier|score",
    head="lm_head",
)

FAMILY = Family(
    config=LlamaConfig,
    hf_classes={"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"},
    models={
        "decoder": TaskModel(module=LlamaModel, hf_suffix="Model"),
        "causal-lm": TaskModel(module=LlamaForCausalLM, hf_suffix="ForCausalLM", scores_words=True, generates=True),
    },
    language_model="causal-lm",
    stacks=(BlockStack(path="layers"),),
    roles=ROLES,
    partition=megatron_rules(ROLES),
    names=CheckpointNames(
        body="model",
        buffers=r".*rotary_emb\.inv_freq",
        tied=r"lm_head\.weight",
    ),
)

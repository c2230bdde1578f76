"""The description of BERT's family."""

from jpeft.models.bert.classification import BertForSequenceClassification, BertForTokenClassification
from jpeft.models.bert.config import BertConfig
from jpeft.models.bert.masked_lm import BertForMaskedLM
from jpeft.models.bert.model import BertModel
from jpeft.models.common.family import BlockStack, CheckpointNames, Family, Roles, TaskModel
from jpeft.models.common.partition import megatron_rules

ROLES = Roles(
    embedding="word_embeddings",
    position_tables="position_embeddings|token_type_embeddings",
    embedding_out="embeddings_project",
    attention_in="query|key|value|q_lin|k_lin|v_lin",
    attention_out="attention/output/dense|out_lin",
    ffn_in="intermediate/dense|lin1",
    ffn_out="(?<!attention/)output/dense|lin2",
    norms="embeddings/LayerNorm|output/LayerNorm|sa_layer_norm|output_layer_norm",
    label_head="classifier|out_proj",
    head="classifier|pre_classifier|cls|lm_head|vocab_transform|vocab_layer_norm|vocab_projector|generator_predictions|generator_lm_head",
    pooler="pooler",
)

FAMILY = Family(
    config=BertConfig,
    hf_classes={
        "bert": "Bert",
        "roberta": "Roberta",
        "distilbert": "DistilBert",
        "xlm-roberta": "XLMRoberta",
        "camembert": "Camembert",
        "electra": "Electra",
    },
    models={
        "encoder": TaskModel(module=BertModel, hf_suffix="Model"),
        "sequence-classification": TaskModel(module=BertForSequenceClassification, hf_suffix="ForSequenceClassification", has_labels=True),
        "token-classification": TaskModel(module=BertForTokenClassification, hf_suffix="ForTokenClassification", has_labels=True),
        "masked-lm": TaskModel(module=BertForMaskedLM, hf_suffix="ForMaskedLM", scores_words=True),
    },
    language_model="masked-lm",
    stacks=(BlockStack(path="layer"),),
    roles=ROLES,
    partition=megatron_rules(ROLES),
    names=CheckpointNames(
        # XLM-RoBERTa and CamemBERT call the body as RoBERTa does.
        body={name: BertConfig(model_type=name).architecture for name in BertConfig.HF_FIELDS},
        old_names=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
        # A file may hold the bias of the decoder under either of two names, or under both; the decoder's own is the one that torch adds.
        second_names=((r"^(cls\.predictions|lm_head)\.bias$", r"\1.decoder.bias"),),
        buffers=r".*\.position_ids",
        tied=r"cls\.predictions\.decoder\.\w+|lm_head\.decoder\.\w+|lm_head\.weight|vocab_projector\.weight|generator_lm_head\.weight",
    ),
)

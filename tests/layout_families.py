"""All families whose parameter trees the tests write down."""

from layout_families_hf import (
    BART,
    BERT,
    CAMEMBERT,
    DISTILBERT,
    ELECTRA,
    FALCON,
    GPT2,
    LLAMAS,
    MIXTRAL,
    MIXTRAL5,
    NEOX,
    OPT,
    PHI,
    ROBERTA,
    T5,
    WHISPER,
    XLM_ROBERTA,
)
from layout_families_jax import (
    BONSAI_GEMMA3,
    BONSAI_QWEN3,
    BONSAI_VIT,
    EASYLM,
    FLAX_BLOCK,
    GEMMAS,
    LM1B,
    MAXTEXT,
    OCTO,
    SCALABLE_T5X,
    T5X,
)  # fmt: skip
from layout_families_vit import BIG_VISION, VISION_TRANSFORMER, VIT, VIT5

FAMILIES = {
    family.name: family
    for family in (
        BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, ELECTRA,
        GPT2, NEOX, OPT, BART, T5, *LLAMAS, PHI, FALCON, MIXTRAL, MIXTRAL5, WHISPER, VIT, VIT5,
        VISION_TRANSFORMER, BIG_VISION, *GEMMAS, MAXTEXT, T5X,
        SCALABLE_T5X, LM1B, OCTO, EASYLM, FLAX_BLOCK, BONSAI_VIT, BONSAI_QWEN3, BONSAI_GEMMA3,
    )
}  # fmt: skip

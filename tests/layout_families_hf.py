"""Families of Hugging Face's transformers. A Linear's weight is a kernel and a LayerNorm's a scale, as in its Flax models and in ours."""

import dataclasses

from layout_trees import Family, Part

# --- Hugging Face: encoders ---------------------------------------------------------------------------------------------------------------

_BERT_ATTENTION = """
    attention/self/{query,key,value} D>D
    attention/output/dense D>D
"""
_BERT = Part(
    "bert/encoder/layer/{i}",
    f"""{_BERT_ATTENTION}
    attention/output/LayerNorm norm
    intermediate/dense D>F
    output/dense F>D
    output/LayerNorm norm""",
    {
        "@query": "attention/self/query/kernel", "@key": "attention/self/key/kernel", "@value": "attention/self/value/kernel",
        "@attention_out": "attention/output/dense/kernel", "@ffn_in": "intermediate/dense/kernel", "@ffn_out": "output/dense/kernel",
        "@ffn_residual": "output", "@block": ".",
        "@norms": "{attention/,}output/LayerNorm/{scale,bias}", "@post_norm": "output/LayerNorm/{scale,bias}",
    },
)  # fmt: skip
_BERT_TABLES = """
    bert/embeddings/word_embeddings/embedding V,D
    bert/embeddings/position_embeddings/embedding P,D
    bert/embeddings/token_type_embeddings/embedding 2,D
    bert/embeddings/LayerNorm norm
"""
_BERT_OUTSIDE = {
    "@embedding": "bert/embeddings/word_embeddings/embedding",
    "@positions": "bert/embeddings/position_embeddings/embedding",
    "@norms": "bert/embeddings/LayerNorm/{scale,bias}",
}

BERT = Family(
    "BERT", "bert", (_BERT,), f"""{_BERT_TABLES}
    bert/pooler/dense D>D
    classifier D>C""",
    _BERT_OUTSIDE | {"@pooler": "bert/pooler/dense/{kernel,bias}", "@head": "classifier/{kernel,bias}"},
)  # fmt: skip


def _renamed(part: Part, old: str, new: str) -> Part:
    return dataclasses.replace(part, at=part.at.replace(old, new))


def _roles_renamed(roles: dict[str, str], old: str, new: str) -> dict[str, str]:
    return {role: names.replace(old, new) for role, names in roles.items()}


ROBERTA = Family(
    "RoBERTa", "bert", (_renamed(_BERT, "bert", "roberta"),), _BERT_TABLES.replace("bert/", "roberta/") + """
    lm_head/dense D>D
    lm_head/layer_norm norm
    lm_head/bias V""",
    _roles_renamed(_BERT_OUTSIDE, "bert/", "roberta/") | {
        # The head's own normalisation is the last one of all.
        "@lm_head": "lm_head/dense/{kernel,bias} lm_head/layer_norm/{scale,bias} lm_head/bias",
        "@final_norm": "lm_head/layer_norm/{scale,bias}",
        "@norms": "roberta/embeddings/LayerNorm/{scale,bias} lm_head/layer_norm/{scale,bias}",
    },
)  # fmt: skip
XLM_ROBERTA = dataclasses.replace(ROBERTA, name="XLM-RoBERTa")
CAMEMBERT = dataclasses.replace(ROBERTA, name="CamemBERT")
ELECTRA = Family(
    "ELECTRA", "bert", (_renamed(_BERT, "bert", "electra"),), _BERT_TABLES.replace("bert/", "electra/") + """
    electra/embeddings_project D>D
    classifier/dense D>D
    classifier/out_proj D>C""",
    _roles_renamed(_BERT_OUTSIDE, "bert/", "electra/") | {"@head": "classifier/{dense,out_proj}/{kernel,bias}"},
)  # fmt: skip
DISTILBERT = Family(
    "DistilBERT", "distilbert",
    (Part("distilbert/transformer/layer/{i}", """
        attention/{q,k,v,out}_lin D>D
        sa_layer_norm norm
        ffn/lin1 D>F
        ffn/lin2 F>D
        output_layer_norm norm""", {
            "@query": "attention/q_lin/kernel", "@key": "attention/k_lin/kernel", "@value": "attention/v_lin/kernel",
            "@attention_out": "attention/out_lin/kernel", "@ffn_in": "ffn/lin1/kernel", "@ffn_out": "ffn/lin2/kernel",
            "@ffn": "ffn", "@block": ".",
            "@norms": "{sa,output}_layer_norm/{scale,bias}", "@post_norm": "output_layer_norm/{scale,bias}",
        }),), """
    distilbert/embeddings/word_embeddings/embedding V,D
    distilbert/embeddings/position_embeddings/embedding P,D
    distilbert/embeddings/LayerNorm norm
    pre_classifier D>D
    classifier D>C""", {
        "@embedding": "distilbert/embeddings/word_embeddings/embedding",
        "@positions": "distilbert/embeddings/position_embeddings/embedding",
        "@norms": "distilbert/embeddings/LayerNorm/{scale,bias}", "@head": "{pre_,}classifier/{kernel,bias}",
    },
)  # fmt: skip

# --- Hugging Face: decoders, and encoders with decoders -----------------------------------------------------------------------------------

GPT2 = Family(
    "GPT-2", "gpt2",
    (Part("transformer/h/{i}", """
        ln_{1,2} norm
        attn/c_attn D>3D
        attn/c_proj D>D
        mlp/c_fc D>F
        mlp/c_proj F>D""", {
            "@qkv": "attn/c_attn/kernel", "@attention_out": "attn/c_proj/kernel", "@ffn_in": "mlp/c_fc/kernel",
            "@ffn_out": "mlp/c_proj/kernel", "@ffn": "mlp", "@block": ".", "@norms": "ln_{1,2}/{scale,bias}",
        }),), """
    transformer/wte/embedding V,D
    transformer/wpe/embedding P,D
    transformer/ln_f norm""", {
        "@embedding": "transformer/wte/embedding", "@positions": "transformer/wpe/embedding",
        "@norms": "transformer/ln_f/{scale,bias}", "@final_norm": "transformer/ln_f/{scale,bias}",
    },
)  # fmt: skip


def _megatron(name: str, at: str, attention: str, outside: str, roles: dict[str, str]) -> Family:
    block = f"""
        {{input,post_attention}}_layernorm norm
        {attention}/query_key_value D>3D
        {attention}/dense D>D
        mlp/dense_h_to_4h D>F
        mlp/dense_4h_to_h F>D"""
    found = {
        "@qkv": f"{attention}/query_key_value/kernel", "@attention_out": f"{attention}/dense/kernel",
        "@ffn_in": "mlp/dense_h_to_4h/kernel", "@ffn_out": "mlp/dense_4h_to_h/kernel", "@ffn": "mlp", "@block": ".",
        "@norms": "{input,post_attention}_layernorm/{scale,bias}",
    }  # fmt: skip
    return Family(name, "megatron", (Part(at, block, found),), outside, roles)


NEOX = _megatron("GPT-NeoX", "gpt_neox/layers/{i}", "attention", """
    gpt_neox/embed_in/embedding V,D
    gpt_neox/final_layer_norm norm
    embed_out D>V nobias""", {
        "@embedding": "gpt_neox/embed_in/embedding", "@lm_head": "embed_out/kernel",
        "@norms": "gpt_neox/final_layer_norm/{scale,bias}", "@final_norm": "gpt_neox/final_layer_norm/{scale,bias}",
    })  # fmt: skip
FALCON = _megatron("Falcon", "transformer/h/{i}", "self_attention", """
    transformer/word_embeddings/embedding V,D
    transformer/ln_f norm
    lm_head D>V nobias""", {
        "@embedding": "transformer/word_embeddings/embedding", "@lm_head": "lm_head/kernel",
        "@norms": "transformer/ln_f/{scale,bias}", "@final_norm": "transformer/ln_f/{scale,bias}",
    })  # fmt: skip

_SELF = """
    self_attn/{q,k,v,out}_proj D>D
    self_attn_layer_norm norm
    fc1 D>F
    fc2 F>D
    final_layer_norm norm
"""
_SELF_ROLES = {
    "@query": "self_attn/q_proj/kernel", "@key": "self_attn/k_proj/kernel", "@value": "self_attn/v_proj/kernel",
    "@attention_out": "self_attn/out_proj/kernel", "@ffn_in": "fc1/kernel", "@ffn_out": "fc2/kernel", "@block": ".",
    "@norms": "{self_attn,final}_layer_norm/{scale,bias}",
}  # fmt: skip
_CROSS = f"""{_SELF}
    encoder_attn/{{q,k,v,out}}_proj D>D
    encoder_attn_layer_norm norm
"""
_CROSS_ROLES = _SELF_ROLES | {
    "@query": "{self,encoder}_attn/q_proj/kernel", "@key": "{self,encoder}_attn/k_proj/kernel",
    "@value": "{self,encoder}_attn/v_proj/kernel", "@cross_attention_out": "encoder_attn/out_proj/kernel",
    "@norms": "{self_attn,encoder_attn,final}_layer_norm/{scale,bias}",
}  # fmt: skip
_POST = {"@post_norm": "final_layer_norm/{scale,bias}"}

OPT = Family(
    "OPT", "opt", (Part("model/decoder/layers/{i}", _SELF, _SELF_ROLES),), """
    model/decoder/embed_tokens/embedding V,D
    model/decoder/embed_positions/embedding P,D
    model/decoder/final_layer_norm norm""", {
        "@embedding": "model/decoder/embed_tokens/embedding", "@positions": "model/decoder/embed_positions/embedding",
        "@norms": "model/decoder/final_layer_norm/{scale,bias}", "@final_norm": "model/decoder/final_layer_norm/{scale,bias}",
    },
)  # fmt: skip
BART = Family(
    "BART", "bart",
    (Part("model/encoder/layers/{i}", _SELF, _SELF_ROLES | _POST), Part("model/decoder/layers/{i}", _CROSS, _CROSS_ROLES | _POST)), """
    model/shared/embedding V,D
    model/{encoder,decoder}/embed_positions/embedding P,D
    model/{encoder,decoder}/layernorm_embedding norm
    classification_head/dense D>D
    classification_head/out_proj D>C""", {
        "@embedding": "model/shared/embedding", "@positions": "model/{encoder,decoder}/embed_positions/embedding",
        "@norms": "model/{encoder,decoder}/layernorm_embedding/{scale,bias}", "@head": "classification_head/{dense,out_proj}/{kernel,bias}",
    },
)  # fmt: skip
_KEYS = "    {}_attn/k_proj D>D nobias\n"
WHISPER = Family(
    "Whisper", "opt",
    (
        Part("model/encoder/layers/{i}", _SELF.replace("k,v", "v") + _KEYS.format("self"), _SELF_ROLES),
        Part("model/decoder/layers/{i}", _CROSS.replace("k,v", "v") + _KEYS.format("{self,encoder}"), _CROSS_ROLES),
    ), """
    model/encoder/conv1 W,W>D
    model/encoder/conv2 W,D>D
    model/encoder/embed_positions/embedding P,D
    model/decoder/embed_tokens/embedding V,D
    model/decoder/embed_positions/embedding P,D
    model/{encoder,decoder}/layer_norm norm""", {
        "@embedding": "model/decoder/embed_tokens/embedding", "@positions": "model/{encoder,decoder}/embed_positions/embedding",
        "@norms": "model/{encoder,decoder}/layer_norm/{scale,bias}", "@final_norm": "model/{encoder,decoder}/layer_norm/{scale,bias}",
    },
)  # fmt: skip
PHI = Family(
    "Phi", "phi",
    (Part("model/layers/{i}", """
        input_layernorm norm
        self_attn/{q,k,v}_proj D>D
        self_attn/dense D>D
        self_attn/{q,k}_layernorm norm
        mlp/fc1 D>F
        mlp/fc2 F>D""", {
            "@query": "self_attn/q_proj/kernel", "@key": "self_attn/k_proj/kernel", "@value": "self_attn/v_proj/kernel",
            "@attention_out": "self_attn/dense/kernel", "@ffn_in": "mlp/fc1/kernel", "@ffn_out": "mlp/fc2/kernel", "@ffn": "mlp",
            "@block": ".",
            "@norms": "input_layernorm/{scale,bias}",
        }),), """
    model/embed_tokens/embedding V,D
    model/final_layernorm norm
    lm_head D>V""", {
        "@embedding": "model/embed_tokens/embedding", "@lm_head": "lm_head/{kernel,bias}",
        "@norms": "model/final_layernorm/{scale,bias}", "@final_norm": "model/final_layernorm/{scale,bias}",
    },
)  # fmt: skip

_T5_SELF = """
    layer/0/SelfAttention/{q,k,v,o} D>D nobias
    layer/0/layer_norm rms
"""
_T5_ENCODER = Part("encoder/block/{i}", f"""{_T5_SELF}
    layer/1/DenseReluDense/wi_{{0,1}} D>F nobias
    layer/1/DenseReluDense/wo F>D nobias
    layer/1/layer_norm rms""", {
        "@query": "layer/0/SelfAttention/q/kernel", "@key": "layer/0/SelfAttention/k/kernel", "@value": "layer/0/SelfAttention/v/kernel",
        "@attention_out": "layer/0/SelfAttention/o/kernel", "@ffn_in": "layer/1/DenseReluDense/wi_{0,1}/kernel",
        "@ffn_out": "layer/1/DenseReluDense/wo/kernel", "@ffn": "layer/1/DenseReluDense", "@block": "layer/1",
        "@norms": "layer/{0,1}/layer_norm/scale",
    })  # fmt: skip
_T5_DECODER = Part("decoder/block/{i}", f"""{_T5_SELF}
    layer/1/EncDecAttention/{{q,k,v,o}} D>D nobias
    layer/1/layer_norm rms
    layer/2/DenseReluDense/wi_{{0,1}} D>F nobias
    layer/2/DenseReluDense/wo F>D nobias
    layer/2/layer_norm rms""", {
        "@query": "layer/{0/Self,1/EncDec}Attention/q/kernel", "@key": "layer/{0/Self,1/EncDec}Attention/k/kernel",
        "@value": "layer/{0/Self,1/EncDec}Attention/v/kernel", "@attention_out": "layer/0/SelfAttention/o/kernel",
        "@cross_attention_out": "layer/1/EncDecAttention/o/kernel", "@ffn_in": "layer/2/DenseReluDense/wi_{0,1}/kernel",
        "@ffn_out": "layer/2/DenseReluDense/wo/kernel", "@ffn": "layer/2/DenseReluDense", "@block": "layer/2",
        "@norms": "layer/{0,1,2}/layer_norm/scale",
    })  # fmt: skip
T5 = Family("T5", "t5", (_T5_ENCODER, _T5_DECODER), """
    shared/embedding V,D
    {encoder,decoder}/final_layer_norm rms
    lm_head D>V nobias""", {
        "@embedding": "shared/embedding", "@lm_head": "lm_head/kernel", "@norms": "{encoder,decoder}/final_layer_norm/scale",
        "@final_norm": "{encoder,decoder}/final_layer_norm/scale",
    }, uneven="{encoder,decoder}/block/0/layer/0/SelfAttention/relative_attention_bias/embedding P,N")  # fmt: skip


def _llama(name: str, norms: str, *, biases: str = "nobias", qk_norms: bool = False, tied: bool = False) -> Family:
    block = f"""
        {norms} rms
        self_attn/q_proj D>D {biases}
        self_attn/{{k,v}}_proj D>K {biases}
        self_attn/o_proj D>D nobias
        mlp/{{gate,up}}_proj D>F nobias
        mlp/down_proj F>D nobias"""
    block += "\nself_attn/{q,k}_norm/scale K" if qk_norms else ""
    found = {
        "@query": "self_attn/q_proj/kernel", "@key": "self_attn/k_proj/kernel", "@value": "self_attn/v_proj/kernel",
        "@attention_out": "self_attn/o_proj/kernel", "@ffn_in": "mlp/{gate,up}_proj/kernel", "@ffn_out": "mlp/down_proj/kernel",
        "@ffn": "mlp", "@block": ".", "@norms": f"{norms}/scale",
    }  # fmt: skip
    outside = "model/embed_tokens/embedding V,D\nmodel/norm rms" + ("" if tied else "\nlm_head D>V nobias")
    roles = {"@embedding": "model/embed_tokens/embedding", "@norms": "model/norm/scale", "@final_norm": "model/norm/scale"}
    return Family(
        name, "llama", (Part("model/layers/{i}", block, found),), outside, roles | ({} if tied else {"@lm_head": "lm_head/kernel"})
    )


_TWO, _FOUR = "{input,post_attention}_layernorm", "{input,post_attention,pre_feedforward,post_feedforward}_layernorm"
LLAMAS = (
    _llama("Llama", _TWO), _llama("Mistral", _TWO), _llama("Qwen2", _TWO, biases=""), _llama("Qwen3", _TWO, qk_norms=True),
    _llama("Gemma 1", _TWO, tied=True), _llama("Gemma 2", _FOUR, tied=True), _llama("Gemma 3", _FOUR, qk_norms=True, tied=True),
)  # fmt: skip
MIXTRAL = Family(
    "Mixtral", "mixtral",
    (Part("model/layers/{i}", """
        {input,post_attention}_layernorm rms
        self_attn/q_proj D>D nobias
        self_attn/{k,v}_proj D>K nobias
        self_attn/o_proj D>D nobias
        block_sparse_moe/gate D>E nobias
        block_sparse_moe/experts/{0,1}/{w1,w3} D>F nobias
        block_sparse_moe/experts/{0,1}/w2 F>D nobias""", {
            "@query": "self_attn/q_proj/kernel", "@key": "self_attn/k_proj/kernel", "@value": "self_attn/v_proj/kernel",
            "@attention_out": "self_attn/o_proj/kernel", "@ffn_in": "block_sparse_moe/experts/{0,1}/{w1,w3}/kernel",
            "@ffn_out": "block_sparse_moe/experts/{0,1}/w2/kernel", "@ffn": "block_sparse_moe", "@block": ".",
            "@norms": "{input,post_attention}_layernorm/scale",
        }),), LLAMAS[0].outside, LLAMAS[0].roles,
)  # fmt: skip

MIXTRAL5 = dataclasses.replace(
    MIXTRAL, name="Mixtral (HF 5)",
    parts=(Part("model/layers/{i}", """
        {input,post_attention}_layernorm rms
        self_attn/q_proj D>D nobias
        self_attn/{k,v}_proj D>K nobias
        self_attn/o_proj D>D nobias
        mlp/gate D>E nobias
        mlp/experts/gate_up_proj E,2F,D
        mlp/experts/down_proj E,D,F""", MIXTRAL.parts[0].roles | {
            "@ffn_in": "mlp/experts/gate_up_proj", "@ffn_out": "mlp/experts/down_proj", "@ffn": "mlp",
        }),),
)  # fmt: skip

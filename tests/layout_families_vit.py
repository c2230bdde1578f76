"""Vision transformers in the spellings of Hugging Face, google-research/vision_transformer and google-research/big_vision."""

from layout_trees import Family, Part

VIT = Family(
    "ViT (HF)", "hf_vit",
    (Part("vit/encoder/layer/{i}", """
        layernorm_{before,after} norm
        attention/attention/{query,key,value} D>D
        attention/output/dense D>D
        intermediate/dense D>F
        output/dense F>D""", {
            "@query": "attention/attention/query/kernel", "@key": "attention/attention/key/kernel",
            "@value": "attention/attention/value/kernel",
            "@attention_out": "attention/output/dense/kernel", "@ffn_in": "intermediate/dense/kernel", "@ffn_out": "output/dense/kernel",
            "@block": ".", "@norms": "layernorm_{before,after}/{scale,bias}",
        }),), """
    vit/embeddings/cls_token 1,1,D
    vit/embeddings/position_embeddings 1,P,D
    vit/embeddings/patch_embeddings/projection W,W,3>D
    vit/layernorm norm
    classifier D>C""", {
        "@positions": "vit/embeddings/position_embeddings", "@norms": "vit/layernorm/{scale,bias}",
        "@final_norm": "vit/layernorm/{scale,bias}", "@head": "classifier/{kernel,bias}",
    },
)  # fmt: skip
VIT5 = Family(
    "ViT (HF 5)", "hf_vit5",
    (Part("vit/layers/{i}", """
        layernorm_{before,after} norm
        attention/{q,k,v,o}_proj D>D
        mlp/fc1 D>F
        mlp/fc2 F>D""", {
            "@query": "attention/q_proj/kernel", "@key": "attention/k_proj/kernel", "@value": "attention/v_proj/kernel",
            "@attention_out": "attention/o_proj/kernel", "@ffn_in": "mlp/fc1/kernel", "@ffn_out": "mlp/fc2/kernel", "@ffn": "mlp",
            "@block": ".",
            "@norms": "layernorm_{before,after}/{scale,bias}",
        }),), VIT.outside, VIT.roles,
)  # fmt: skip


def _flax_vit(name: str, attention: str, mlp: str, norms: str, outside: str, roles: dict[str, str]) -> Family:
    block = f"""
        {norms} norm
        {attention}/{{query,key,value}} D>N,K
        {attention}/out N,K>D
        {mlp}/Dense_0 D>F
        {mlp}/Dense_1 F>D"""
    found = {
        "@query": f"{attention}/query/kernel", "@key": f"{attention}/key/kernel", "@value": f"{attention}/value/kernel",
        "@attention_out": f"{attention}/out/kernel", "@ffn_in": f"{mlp}/Dense_0/kernel", "@ffn_out": f"{mlp}/Dense_1/kernel",
        "@ffn": mlp, "@block": ".", "@norms": f"{norms}/{{scale,bias}}",
    }  # fmt: skip
    shared = {
        "@norms": "Transformer/encoder_norm/{scale,bias}", "@final_norm": "Transformer/encoder_norm/{scale,bias}",
        "@head": "head/{kernel,bias}",
    }  # fmt: skip
    return Family(name, "flax_vit", (Part("Transformer/encoderblock_{i}", block, found),), f"""{outside}
        embedding W,W,3>D
        cls 1,1,D
        Transformer/encoder_norm norm
        head D>C""", shared | roles)  # fmt: skip


VISION_TRANSFORMER = _flax_vit(
    "ViT (vision_transformer)", "MultiHeadDotProductAttention_1", "MlpBlock_3", "LayerNorm_{0,2}",
    "Transformer/posembed_input/pos_embedding 1,P,D", {"@positions": "Transformer/posembed_input/pos_embedding"},
)  # fmt: skip
BIG_VISION = _flax_vit(
    "ViT (big_vision)", "MultiHeadDotProductAttention_0", "MlpBlock_0", "LayerNorm_{0,1}",
    "pos_embedding 1,P,D", {"@positions": "pos_embedding"},
)  # fmt: skip

"""Families of JAX libraries, by the names in their code.

They are google-deepmind/gemma, google-research/t5x, AI-Hypercomputer/maxtext, young-geng/EasyLM, jax-ml/bonsai, and a block of flax's own
classes.
"""

import dataclasses

from layout_families_hf import LLAMAS
from layout_trees import Family, Part


def _gemma(name: str, norms: str, attention: str, roles: dict[str, str]) -> Family:
    """google-deepmind/gemma: einsums whose weight is called `w`, and a feed-forward layer whose weights are leaves of `mlp` itself."""
    block = f"""
        {norms} rms
        {attention}
        attn/attn_vec_einsum N,K>D w
        mlp/gating_einsum 2,F,D
        mlp/linear F,D"""
    found = {
        "@attention_out": "attn/attn_vec_einsum/w", "@ffn_in": "mlp/gating_einsum", "@ffn_out": "mlp/linear", "@ffn": "mlp", "@block": ".",
        "@norms": f"{norms}/scale",
    }  # fmt: skip
    outside, outer = "embedder/input_embedding V,D\nfinal_norm rms", {"@norms": "final_norm/scale", "@final_norm": "final_norm/scale"}
    part = Part("layer_{i}", block, found | roles)
    return Family(name, "gemma", (part,), outside, outer | {"@embedding": "embedder/input_embedding"})


_QKV = "attn/q_einsum/w N,D,K\nattn/kv_einsum/w 2,M,D,K"
_QKV_ROLES = {"@query": "attn/q_einsum/w", "@kv": "attn/kv_einsum/w"}
GEMMAS = (
    _gemma("Gemma 1 (google)", "pre_{attention,ffw}_norm", "attn/qkv_einsum/w 3,N,D,K", {"@qkv": "attn/qkv_einsum/w"}),
    _gemma("Gemma 2 (google)", "{pre,post}_{attention,ffw}_norm", _QKV, _QKV_ROLES),
    _gemma("Gemma 3 (google)", "{pre,post}_{attention,ffw}_norm", f"{_QKV}\nattn/_{{query,key}}_norm/scale K", _QKV_ROLES),
)

_T5X_FFN = {"@ffn_in": "mlp/wi_{0,1}/kernel", "@ffn_out": "mlp/wo/kernel", "@ffn": "mlp", "@block": "."}
_T5X_ENCODER = Part("encoder/layers_{i}", """
    pre_{attention,mlp}_layer_norm rms
    attention/{query,key,value,out} D>D nobias
    mlp/wi_{0,1} D>F nobias
    mlp/wo F>D nobias""", _T5X_FFN | {
        "@query": "attention/query/kernel", "@key": "attention/key/kernel", "@value": "attention/value/kernel",
        "@attention_out": "attention/out/kernel", "@norms": "pre_{attention,mlp}_layer_norm/scale",
    })  # fmt: skip
_T5X_DECODER = Part("decoder/layers_{i}", """
    pre_{self_attention,cross_attention,mlp}_layer_norm rms
    {self,encoder_decoder}_attention/{query,key,value,out} D>D nobias
    mlp/wi_{0,1} D>F nobias
    mlp/wo F>D nobias""", _T5X_FFN | {
        "@query": "{self,encoder_decoder}_attention/query/kernel", "@key": "{self,encoder_decoder}_attention/key/kernel",
        "@value": "{self,encoder_decoder}_attention/value/kernel", "@attention_out": "self_attention/out/kernel",
        "@cross_attention_out": "encoder_decoder_attention/out/kernel",
        "@norms": "pre_{self_attention,cross_attention,mlp}_layer_norm/scale",
    })  # fmt: skip
T5X = Family("t5x", "t5x", (_T5X_ENCODER, _T5X_DECODER), """
    token_embedder/embedding V,D
    {encoder,decoder}/relpos_bias/rel_embedding N,P
    {encoder,decoder}/{encoder,decoder}_norm rms
    decoder/logits_dense D>V nobias""".replace("{encoder,decoder}/{encoder,decoder}_norm", "{encoder/encoder,decoder/decoder}_norm"), {
        "@embedding": "token_embedder/embedding", "@lm_head": "decoder/logits_dense/kernel",
        "@norms": "{encoder/encoder,decoder/decoder}_norm/scale", "@final_norm": "{encoder/encoder,decoder/decoder}_norm/scale",
    })  # fmt: skip
MAXTEXT = Family("MaxText", "t5x", (Part("decoder/layers_{i}", """
    {pre,post}_self_attention_layer_norm rms
    self_attention/query D>N,K nobias
    self_attention/{key,value} D>M,K nobias
    self_attention/out N,K>D nobias
    mlp/wi_{0,1} D>F nobias
    mlp/wo F>D nobias""", _T5X_FFN | {
        "@query": "self_attention/query/kernel", "@key": "self_attention/key/kernel", "@value": "self_attention/value/kernel",
        "@attention_out": "self_attention/out/kernel", "@norms": "{pre,post}_self_attention_layer_norm/scale",
    }),), """
    token_embedder/embedding V,D
    decoder/decoder_norm rms
    decoder/logits_dense D>V nobias""", {
        "@embedding": "token_embedder/embedding", "@lm_head": "decoder/logits_dense/kernel",
        "@norms": "decoder/decoder_norm/scale", "@final_norm": "decoder/decoder_norm/scale",
    })  # fmt: skip
EASYLM = Family("Llama (EasyLM)", "meta_llama", (Part("transformer/h/{i}", """
    {attention,ffn}_norm/kernel D
    attention/{wq,wk,wv,wo} D>D nobias
    feed_forward/{w1,w3} D>F nobias
    feed_forward/w2 F>D nobias""", {
        "@query": "attention/wq/kernel", "@key": "attention/wk/kernel", "@value": "attention/wv/kernel",
        "@attention_out": "attention/wo/kernel", "@ffn_in": "feed_forward/{w1,w3}/kernel", "@ffn_out": "feed_forward/w2/kernel",
        "@ffn": "feed_forward", "@block": ".", "@norms": "{attention,ffn}_norm/kernel",
    }),), """
    transformer/wte/embedding V,D
    transformer/ln_f/kernel D
    lm_head D>V nobias""", {
        "@embedding": "transformer/wte/embedding", "@lm_head": "lm_head/kernel", "@norms": "transformer/ln_f/kernel",
        "@final_norm": "transformer/ln_f/kernel",
    })  # fmt: skip

_ATTENTION = "MultiHeadDotProductAttention_0"
FLAX_BLOCK = Family("nn.MultiHeadDotProductAttention", "flax_block", (Part("EncoderBlock_{i}", f"""
    LayerNorm_{{0,1}} norm
    {_ATTENTION}/{{query,key,value}} D>N,K
    {_ATTENTION}/out N,K>D
    Dense_0 D>F
    Dense_1 F>D""", {
        "@query": f"{_ATTENTION}/query/kernel", "@key": f"{_ATTENTION}/key/kernel", "@value": f"{_ATTENTION}/value/kernel",
        "@attention_out": f"{_ATTENTION}/out/kernel", "@ffn_in": "Dense_0/kernel", "@ffn_out": "Dense_1/kernel", "@block": ".",
        "@norms": "LayerNorm_{0,1}/{scale,bias}",
    }),), """
    Embed_0/embedding V,D
    Embed_1/embedding P,D
    LayerNorm_0 norm
    Dense_0 D>C""", {
        "@embedding": "Embed_0/embedding", "@norms": "LayerNorm_0/{scale,bias}",
    })  # fmt: skip

# jax-ml/bonsai, paths of NNX states. Its Qwen3 keeps heads apart in einsums whose weight is called `w`, as is that of its RMSNorm.
BONSAI_QWEN3 = Family("Qwen3 (bonsai)", "llama", (Part("layers/{i}", """
    {input,post_attention}_layernorm/w D
    attn/q_proj D>N,K w
    attn/{k,v}_proj D>M,K w
    attn/o_proj N,K>D w
    attn/{q,k}_norm/w K
    mlp/{gate,up}_proj D>F nobias
    mlp/down_proj F>D nobias""", {
        "@query": "attn/q_proj/w", "@key": "attn/k_proj/w", "@value": "attn/v_proj/w", "@attention_out": "attn/o_proj/w",
        "@ffn_in": "mlp/{gate,up}_proj/kernel", "@ffn_out": "mlp/down_proj/kernel", "@ffn": "mlp", "@block": ".",
        "@norms": "{input,post_attention}_layernorm/w",
    }),), """
    embedder/input_emb V,D
    final_norm/w D
    lm_head D>V w""", {
        "@embedding": "embedder/input_emb", "@lm_head": "lm_head/w", "@norms": "final_norm/w", "@final_norm": "final_norm/w",
    })  # fmt: skip
BONSAI_GEMMA3 = dataclasses.replace(
    LLAMAS[-1], name="Gemma3 (bonsai)", outside="embed_tokens/weight/embedding V,D\nmodel/norm rms",
    roles=LLAMAS[-1].roles | {"@embedding": "embed_tokens/weight/embedding"},
)  # fmt: skip
BONSAI_VIT = Family("ViT (bonsai)", "bonsai_vit", (Part("layers/{i}", """
    layernorm_{before,after} norm
    attention/{query,key,value} D>N,K
    attention/out N,K>D
    linear1 D>F
    linear2 F>D""", {
        "@query": "attention/query/kernel", "@key": "attention/key/kernel", "@value": "attention/value/kernel",
        "@attention_out": "attention/out/kernel", "@ffn_in": "linear1/kernel", "@ffn_out": "linear2/kernel", "@block": ".",
        "@norms": "layernorm_{before,after}/{scale,bias}",
    }),), """
    pos_embeddings/projection W,W,3>D
    pos_embeddings/{cls_token,pos_embeddings} 1,P,D
    ln norm
    classifier D>C""", {
        "@positions": "pos_embeddings/pos_embeddings", "@norms": "ln/{scale,bias}", "@final_norm": "ln/{scale,bias}",
        "@head": "classifier/{kernel,bias}",
    })  # fmt: skip
SCALABLE_T5X = Family("t5x (scalable)", "t5x", (
    dataclasses.replace(_T5X_ENCODER, at="encoder/encoder_{i}", block="""
        pre_{attention,mlp}_layer_norm rms
        attention/{query,key,value} D>N,K nobias
        attention/out N,K>D nobias
        relpos_bias/rel_embedding N,P
        mlp/wi_{0,1} D>F nobias
        mlp/wo F>D nobias"""),
    dataclasses.replace(_T5X_DECODER, at="decoder/decoder_{i}", block="""
        pre_{self_attention,cross_attention,mlp}_layer_norm rms
        {self,encoder_decoder}_attention/{query,key,value} D>N,K nobias
        {self,encoder_decoder}_attention/out N,K>D nobias
        relpos_bias/rel_embedding N,P
        mlp/wi_{0,1} D>F nobias
        mlp/wo F>D nobias"""),
), """
    token_embedder/embedding V,D
    {encoder/encoder,decoder/decoder}_norm rms
    decoder/logits_dense D>V nobias""", T5X.roles)  # fmt: skip

# google/flax, examples/lm1b, and octo-models/octo, whose blocks stand deep in modules that are numbered themselves.
LM1B = Family("lm1b (flax)", "flax_vit", (Part("decoder/encoderdecoderblock_{i}", """
    LayerNorm_{0,1} norm
    SelfAttention_0/{query,key,value} D>N,K nobias
    SelfAttention_0/out N,K>D nobias
    MlpBlock_0/Dense_0 D>F
    MlpBlock_0/Dense_1 F>D""", {
        "@query": "SelfAttention_0/query/kernel", "@key": "SelfAttention_0/key/kernel", "@value": "SelfAttention_0/value/kernel",
        "@attention_out": "SelfAttention_0/out/kernel", "@ffn_in": "MlpBlock_0/Dense_0/kernel", "@ffn_out": "MlpBlock_0/Dense_1/kernel",
        "@ffn": "MlpBlock_0", "@block": ".", "@norms": "LayerNorm_{0,1}/{scale,bias}",
    }),), """
    decoder/Embed_0/embedding V,D
    decoder/posembed_output/pos_embedding 1,P,D
    decoder/encoderdecoder_norm norm
    decoder/logitdense D>V""", {
        "@embedding": "decoder/Embed_0/embedding", "@positions": "decoder/posembed_output/pos_embedding",
        "@norms": "decoder/encoderdecoder_norm/{scale,bias}", "@final_norm": "decoder/encoderdecoder_norm/{scale,bias}",
        "@lm_head": "decoder/logitdense/{kernel,bias}",
    })  # fmt: skip
OCTO = Family("octo", "flax_vit", (Part("octo_transformer/BlockTransformer_0/Transformer_0/encoderblock_{i}", """
    LayerNorm_{0,1} norm
    MultiHeadDotProductAttention_0/{query,key,value} D>N,K
    MultiHeadDotProductAttention_0/out N,K>D
    MlpBlock_0/Dense_0 D>F
    MlpBlock_0/Dense_1 F>D""", FLAX_BLOCK.parts[0].roles | {
        "@ffn_in": "MlpBlock_0/Dense_0/kernel", "@ffn_out": "MlpBlock_0/Dense_1/kernel", "@ffn": "MlpBlock_0",
    }),), """
    octo_transformer/obs_primary_projection F>D
    octo_transformer/obs_primary_pos_embedding 1,2,P,D
    octo_transformer/BlockTransformer_0/Transformer_0/encoder_norm norm
    heads_action/mean_proj D>C""", {
        "@norms": "octo_transformer/BlockTransformer_0/Transformer_0/encoder_norm/{scale,bias}",
        "@final_norm": "octo_transformer/BlockTransformer_0/Transformer_0/encoder_norm/{scale,bias}",
    })  # fmt: skip

"""Where bottlenecks sit in common model families, as regexes on the paths of parameters."""

_ATTENTION = (
    r"attention/output/dense|out_lin|attn/c_proj|o_proj|(?<!encoder_attn/)out_proj|SelfAttention/o|attn/out|attention/out|"
    r"MultiHeadDotProductAttention_\d+/out"
)
_CROSS_ATTENTION = r"encoder_attn/out_proj|EncDecAttention/o"
_FEED_FORWARD = r"(?<!attention/)output/dense|lin2|mlp/c_proj|down_proj|fc2|wo|down"

# The projections whose outputs a block adds to its residual stream.
FEED_FORWARD = rf"(.*/)?({_FEED_FORWARD})/kernel"
SELF_AND_FEED_FORWARD = rf"(.*/)?({_ATTENTION}|{_FEED_FORWARD})/kernel"
PROJECTIONS = rf"(.*/)?({_ATTENTION}|{_CROSS_ATTENTION}|{_FEED_FORWARD})/kernel"

# The blocks of pre-norm families. The block is found through the last kernel of its feed-forward layer. A kernel that stands in the block
# without a module between them (`down`) is tried last, because the group `.+?` takes the shortest path that fits.
BLOCKS = r"(?P<block>.+?)/(mlp/(c_proj|down_proj|down|fc2|wo)|DenseReluDense/wo|(?<!attention/)output/dense|down)/kernel"

# The feed-forward layers that are modules (group `layer`). In BERT and its relatives the feed-forward layer is two modules; the group
# `residual` holds the second one, which adds the layer's input x to the layer's output.
FEED_FORWARD_MODULES = (
    r"(?P<layer>(.*/)?(mlp|ffn|feed_forward|DenseReluDense))/(c_proj|lin2|down_proj|down|fc2|wo)/kernel|"
    r"(?P<residual>(.*/)?(?<!attention/)output)/LayerNorm/scale"
)

# In post-norm blocks, the normalisation of the sum of the feed-forward layer's output and its residual.
POST_NORM = r"(.*/)?((?<!attention/)output/LayerNorm|output_layer_norm)/scale"

# The parameters of all normalisations.
NORMS = r"(.*/)?([^/]*([Ll]ayer_?[Nn]orm|rmsnorm|RMSNorm)[^/]*|ln_\w+|ln\d*|norm\w*)/(scale|bias|weight)"

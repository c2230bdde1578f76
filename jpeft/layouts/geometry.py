"""The geometry of kernels with more than two axes, by the names that known layouts give them."""

# Convolutions, patch embeddings among them: [*window, channels, width].
NAMED_CONVOLUTION = r"(.*/)?[^/]*[Cc]onv[^/]*/kernel"
CONVOLUTION = rf"{NAMED_CONVOLUTION}|(.*/)?(patch_embed[^/]*|projection|embedding)/kernel"

# (regex of the leaf's path, one letter for each axis): i is contracted with the input, o is produced. A stack of layers comes on top.
KERNEL_AXES: tuple[tuple[str, str], ...] = (
    # nn.MultiHeadDotProductAttention, nnx.MultiHeadAttention, MaxText: [width, heads, head_dim] and [heads, head_dim, width].
    (r"(.*/)?(query|key|value)/kernel", "ioo"),
    (r"(.*/)?out/kernel", "iio"),
    (CONVOLUTION, "iio"),
    (CONVOLUTION, "iiio"),
    (CONVOLUTION, "iiiio"),
    # bonsai: [width, heads, head_dim] and [heads, head_dim, width].
    (r"(.*/)?[qkv]_proj/w", "ioo"),
    (r"(.*/)?o_proj/w", "iio"),
    # google-deepmind/gemma: [heads, width, head_dim], [2 or 3, heads, width, head_dim] and [heads, head_dim, width]. Its gating_einsum is
    # [2, width, hidden] in some versions and [2, hidden, width] in others, so it is not here.
    (r"(.*/)?q_einsum/w", "oio"),
    (r"(.*/)?q?kv_einsum/w", "ooio"),
    (r"(.*/)?attn_vec_einsum/w", "iio"),
    (r".*", "io"),
)

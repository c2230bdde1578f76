"""Layers with the dtypes and initialisers of a configuration."""

from typing import Any

import flax.linen as nn


def dense(config: Any, features: int, name: str | None = None, *, bias: bool = True) -> nn.Dense:
    """Return a Dense layer."""
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, use_bias=bias, dtype=config.dtype, param_dtype=config.param_dtype, kernel_init=init, name=name)


def embedding(config: Any, rows: int, name: str | None = None, *, width: int | None = None) -> nn.Embed:
    """Return a table of `rows` vectors, of the hidden size if no width is given."""
    init = nn.initializers.normal(config.initializer_range)
    return nn.Embed(rows, width or config.hidden_size, dtype=config.dtype, param_dtype=config.param_dtype, embedding_init=init, name=name)


def layer_norm(config: Any, name: str | None = None) -> nn.LayerNorm:
    """Return a LayerNorm, which computes its statistics in float32."""
    # The "fast" variance E[x^2] - E[x]^2 cancels where the mean is large; torch does not use it either.
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        use_fast_variance=False,
        name=name,
    )


def rms_norm(config: Any, name: str | None = None) -> nn.RMSNorm:
    """Return an RMSNorm, ``scale · x / √(mean x² + eps)``, which computes its statistics in float32."""
    return nn.RMSNorm(epsilon=config.rms_norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name)

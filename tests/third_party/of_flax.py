"""Flax's own attention and recurrent layers."""

import jax
from flax import linen as nn
from flax import nnx

from third_party.built import IDS, VECTORS, Built, Maker
from third_party.built import linen as of_linen
from third_party.built import nnx as of_nnx


class Block(nn.Module):
    """Attention of flax, and a feed-forward layer."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm_1")(x))
        h = nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm(name="norm_2")(x)))
        return x + nn.Dense(16, name="down")(h)


class Encoder(nn.Module):
    """Two such blocks."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(32, 16, name="embed")(ids)
        for i in range(2):
            x = Block(name=f"layer_{i}")(x)
        return nn.Dense(4, name="classifier")(x.mean(1))


class Recurrent(nn.Module):
    """A cell of flax under `nn.RNN`, which scans it."""

    cell: type[nn.RNNCellBase]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(nn.RNN(self.cell(16), name="rnn")(x)[:, -1])


class NnxBlock(nnx.Module):
    """Attention of NNX, and a feed-forward layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.norm_1, self.norm_2 = nnx.LayerNorm(16, rngs=rngs), nnx.LayerNorm(16, rngs=rngs)
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class NnxEncoder(nnx.Module):
    """Two such blocks."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(32, 16, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.classifier = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x.mean(1))


class NnxRecurrent(nnx.Module):
    """A cell of NNX under `nnx.RNN`."""

    def __init__(self, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(16, 16, rngs=rngs))
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.rnn(x)[:, -1])


def _self_attention() -> Built:
    return of_linen(nn.SelfAttention(2), VECTORS)


MODELS: dict[str, Maker] = {
    "linen attention": lambda: of_linen(Encoder(), IDS),
    "linen SelfAttention": _self_attention,
    "linen LSTM": lambda: of_linen(Recurrent(nn.OptimizedLSTMCell), VECTORS),
    "linen GRU": lambda: of_linen(Recurrent(nn.GRUCell), VECTORS),
    "nnx attention": lambda: of_nnx(NnxEncoder(nnx.Rngs(0)), IDS),
    "nnx GRU": lambda: of_nnx(NnxRecurrent(nnx.Rngs(0)), VECTORS),
}

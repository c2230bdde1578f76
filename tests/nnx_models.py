"""The small models of `tables.py` in NNX, with the paths and the numbers of their linen twins, and a pair that prefixes can enter."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from tables import BATCH, CLASSES, HEADS, LAYERS, LENGTH, VOCAB, WIDTH, Classifier

import jpeft

HEAD = WIDTH // HEADS


def attend(query, key, value, mask=None):
    """Softmax attention of [batch, length, heads, head], over the keys that a mask shows."""
    scores = jnp.einsum("bqnh,bknh->bnqk", query, key) / HEAD**0.5
    weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -1e9))
    return jnp.einsum("bnqk,bknh->bqnh", weights, value)


class Positions(NamedTuple):
    position_ids: jax.Array
    offset: int = 0


class Attention(nnx.Module):
    def __init__(self, flavour: str, rngs: nnx.Rngs):
        self.flavour = flavour
        if flavour == "mha":
            self.mha = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            return
        project = out = lambda: nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        if flavour == "einsum":
            project = lambda: nnx.Einsum("btd,dnh->btnh", (WIDTH, HEADS, HEAD), (HEADS, HEAD), rngs=rngs)
            out = lambda: nnx.Einsum("btnh,nhd->btd", (HEADS, HEAD, WIDTH), (WIDTH,), rngs=rngs)
        self.query, self.key, self.value, self.out = project(), project(), project(), out()
        self.core = Core()

    def __call__(self, x):
        if self.flavour == "mha":
            return self.mha(x)
        heads = (*x.shape[:2], HEADS, HEAD)
        query, key, value = (each(x).reshape(heads) for each in (self.query, self.key, self.value))
        mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))[None, None] if self.flavour == "core" else None
        y = self.core(query, key, value, mask)
        return self.out(y if self.flavour == "einsum" else y.reshape(x.shape))


class Core(nnx.Module):
    def __call__(self, query, key, value, mask):
        return attend(query, key, value, mask)


class Block(nnx.Module):
    def __init__(self, flavour: str, rngs: nnx.Rngs):
        self.ln_1, self.ln_2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attn = Attention(flavour, rngs)
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.down(nnx.gelu(self.up(self.ln_2(x))))


class PositionCounter(nnx.Module):
    def __call__(self, ids):
        return Positions(jnp.arange(ids.shape[1])[None])


class NNXClassifier(nnx.Module):
    """`tables.Classifier`: the same names, the same numbers."""

    def __init__(self, lift: str = "plain", flavour: str = "dense", conv: bool = False, *, rngs: nnx.Rngs):
        self.lift, self.flavour = lift, flavour
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs) if conv else None
        if flavour == "core":
            self.position = nnx.Embed(32, WIDTH, rngs=rngs)
            self.positions = PositionCounter()
        if "scan" in lift:
            make = nnx.split_rngs(splits=LAYERS)(nnx.vmap(lambda rngs: Block(flavour, rngs)))
            self.layers = make(rngs)
        else:
            for i in range(LAYERS):
                setattr(self, f"layer_{i}", Block(flavour, rngs))
        self.ln_f, self.classifier = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        if self.flavour == "core":
            x = x + self.position(self.positions(ids).position_ids)
        if self.conv is not None:
            x = x + self.conv(x)
        run = lambda x, block: block(x)
        if "remat" in self.lift:
            run = nnx.remat(run)
        if self.lift == "jit":
            run = nnx.jit(run)
        if "scan" in self.lift:
            x = nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        else:
            for i in range(LAYERS):
                x = run(x, getattr(self, f"layer_{i}"))
        return self.classifier(self.ln_f(x).mean(1))


# --- linen twins that `tables.py` does not have ------------------------------------------------------------------------------------------


class LinenCore(nn.Module):
    @nn.compact
    def __call__(self, query, key, value, mask):
        return attend(query, key, value, mask)


class LinenCounter(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return Positions(jnp.arange(ids.shape[1])[None])


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        query, key, value = (nn.Dense(WIDTH, name=name)(x).reshape(*x.shape[:2], HEADS, HEAD) for name in ("query", "key", "value"))
        mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))[None, None]
        return nn.Dense(WIDTH, name="out")(LinenCore(name="core")(query, key, value, mask).reshape(x.shape))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + LinenAttention(name="attn")(nn.LayerNorm(name="ln_1")(x))
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm(name="ln_2")(x)))), None


class LinenWithCore(nn.Module):
    lift: str = "plain"

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(ids)
        x = x + nn.Embed(32, WIDTH, name="position")(LinenCounter(name="positions")(ids).position_ids)
        if self.lift == "scan":
            stack = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            x, _ = stack(name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = LinenBlock(name=f"layer_{i}")(x)
        return nn.Dense(CLASSES, name="classifier")(nn.LayerNorm(name="ln_f")(x).mean(1))


TWINS: dict[str, tuple[dict[str, Any], nn.Module]] = {
    "plain": ({}, Classifier()),
    "remat": ({"lift": "remat"}, Classifier(lift="remat")),
    "jit": ({"lift": "jit"}, Classifier(lift="jit")),
    "scan": ({"lift": "scan"}, Classifier(lift="scan")),
    "scan-remat": ({"lift": "scan-remat"}, Classifier(lift="scan")),
    "mha": ({"flavour": "mha"}, Classifier(flavour="mha")),
    "scan-mha": ({"lift": "scan", "flavour": "mha"}, Classifier(lift="scan", flavour="mha")),
    "einsum": ({"flavour": "einsum", "conv": True}, Classifier(flavour="einsum", conv=True)),
    "core": ({"flavour": "core"}, LinenWithCore()),
    "core-remat": ({"flavour": "core", "lift": "remat"}, LinenWithCore()),
    "core-scan": ({"flavour": "core", "lift": "scan-remat"}, LinenWithCore(lift="scan")),
}


def linen(name: str) -> nn.Module:
    return TWINS[name][1]


@functools.cache
def linen_params(name: str) -> Any:
    ids = jnp.zeros((BATCH, LENGTH), jnp.int32)
    return jax.jit(linen(name).init)(jax.random.key(0), ids)["params"]


@functools.cache
def nnx_model(name: str) -> NNXClassifier:
    """The NNX model with the weights of its linen twin."""
    model = NNXClassifier(**TWINS[name][0], rngs=nnx.Rngs(0))
    nnx.update(model, jpeft.tree.replace(nnx.state(model, nnx.Param), jpeft.flatten(linen_params(name))))
    return model

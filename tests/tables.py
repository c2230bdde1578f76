"""The two tables that the conformance suite crosses: every method, every kind of linen model."""

import contextlib
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jpeft
from jpeft.models import BertConfig, BertForSequenceClassification, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, Rope
from jpeft.stats import Movement, fisher, input_moments

WIDTH, HEADS, LENGTH, BATCH, LAYERS, CLASSES, VOCAB = 16, 2, 6, 5, 2, 3, 23


class Attention(nn.Module):
    """Self-attention in the three ways that people write it."""

    flavour: str

    @nn.compact
    def __call__(self, x):
        if self.flavour == "mha":
            return nn.MultiHeadDotProductAttention(num_heads=HEADS, name="mha")(x)
        heads = WIDTH // HEADS
        if self.flavour == "einsum":
            project = lambda name: nn.Einsum((WIDTH, HEADS, heads), "btd,dnh->btnh", name=name)(x)
            out = lambda y: nn.Einsum((HEADS, heads, WIDTH), "btnh,nhd->btd", name="out")(y)
        else:
            project = lambda name: nn.Dense(WIDTH, name=name)(x).reshape(*x.shape[:2], HEADS, heads)
            out = lambda y: nn.Dense(WIDTH, name="out")(y.reshape(*x.shape))
        query, key, value = project("query"), project("key"), project("value")
        weights = jax.nn.softmax(jnp.einsum("bqnh,bknh->bnqk", query, key) / heads**0.5)
        return out(jnp.einsum("bnqk,bknh->bqnh", weights, value))


class Block(nn.Module):
    """A pre-norm transformer block; returns a pair, as `nn.scan` wants it."""

    flavour: str = "dense"

    @nn.compact
    def __call__(self, x, _=None):
        x = x + Attention(self.flavour, name="attn")(nn.LayerNorm(name="ln_1")(x))
        h = nn.gelu(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm(name="ln_2")(x)))
        return x + nn.Dense(WIDTH, name="down")(h), None


class Classifier(nn.Module):
    """Embedding, (convolution,) blocks under some lifted transform, final norm, head."""

    lift: str = "plain"
    flavour: str = "dense"
    conv: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(ids)
        if self.conv:
            x = x + nn.Conv(WIDTH, (3,), name="conv")(x)
        if self.lift == "scan":
            stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            x, _ = stack(self.flavour, name="layers")(x, None)
        else:
            block = {"plain": Block, "remat": nn.remat(Block), "jit": nn.jit(Block)}[self.lift]
            for i in range(LAYERS):
                x, _ = block(self.flavour, name=f"layer_{i}")(x)
        return nn.Dense(CLASSES, name="classifier")(nn.LayerNorm(name="ln_f")(x).mean(1))


def encoder(**changes: Any) -> nn.Module:
    """A BERT: the methods that lengthen a sequence or its keys need its modules `positions` and `core`."""
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=2 * WIDTH,
        max_position_embeddings=32, initializer_range=0.3, **changes,
    )  # fmt: skip
    return BertForSequenceClassification(config, num_labels=CLASSES)


class Decoder(nn.Module):
    """A GPT-2, or one of Llama's family, that classifies at its last position."""

    config: GPT2Config | LlamaConfig

    @nn.compact
    def __call__(self, ids):
        body = GPT2Model(self.config, name="transformer") if isinstance(self.config, GPT2Config) else LlamaModel(self.config, name="model")
        return nn.Dense(CLASSES, name="classifier")(body(ids).last_hidden_state[:, -1])


DECODER_SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, max_position_embeddings=32, initializer_range=0.3
)


def gpt2(**changes: Any) -> nn.Module:
    """Fused projections, learned positions, LayerNorm, biases everywhere."""
    return Decoder(GPT2Config(**DECODER_SIZES, num_attention_heads=HEADS, **changes))


def llama(**changes: Any) -> nn.Module:
    """A Qwen3: two heads of keys and values for four of queries, rotary positions, RMSNorm, also of queries and keys, a gated MLP.

    Attention has biases, which that family may have, so that BitFit has something to train.
    """
    heads: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=2 * WIDTH, rope=Rope(100.0))
    return Decoder(LlamaConfig(model_type="qwen3", **DECODER_SIZES, **heads, attention_bias=True, **changes))


ENCODERS = {"bert": encoder(), "bert-remat": encoder(remat=True), "bert-scan": encoder(scan=True)}
DECODERS = {"gpt2": gpt2(), "gpt2-remat": gpt2(remat=True), "gpt2-scan": gpt2(scan=True)}
DECODERS |= {"llama": llama(), "llama-remat": llama(remat=True), "llama-scan": llama(scan=True)}
MODELS = {
    "plain": Classifier(),
    "remat": Classifier(lift="remat"),
    "jit": Classifier(lift="jit"),
    "scan": Classifier(lift="scan"),
    "mha": Classifier(flavour="mha"),
    "einsum": Classifier(flavour="einsum", conv=True),
    "scan-mha": Classifier(lift="scan", flavour="mha"),
    **ENCODERS,
    **DECODERS,
}


def skeleton(name: str) -> Any:
    """A module of docs/skeletons."""
    spec = importlib.util.spec_from_file_location(f"skeleton_{name}", Path(__file__).parents[1] / "docs" / "skeletons" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where `typing.get_type_hints` looks up the annotations of its classes
    spec.loader.exec_module(module)
    return module


# --- methods: one row each ---------------------------------------------------------------------------------------------------------------

KINDS = ("plain", "bert-remat", "llama-scan")  # one of each
SMALL = ("plain", "jit", "mha", "einsum", "scan-mha")
NONLINEAR = "nonlinear layer of its own"
LONGER_KEYS = "lengthens the keys and values"
LONGER_TEXT = "lengthens the text"
OWN_ATTENTION = "attention of their own"


@dataclasses.dataclass(frozen=True)
class Row:
    """A method, and what the conformance suite must know of it.

    Attributes:
      method: The method. Where its default activation is relu, another one: central differences are to be compared with.
      models: Which models it meets: plain, rematerialised and scanned ones, an encoder and a decoder, one of Llama's family among them.
        Methods that go around layers meet every small model; the others one of each kind that tells them apart.
      tolerance: How far its first output may be from the base's.
      why_no_merge: Part of the reason that it gives; None if it merges.
    """

    method: jpeft.Method
    models: tuple[str, ...]
    tolerance: float = 1e-5
    why_no_merge: str | None = None


ROWS = {
    # What only replaces leaves has nothing to do with kinds of layers.
    "freeze": Row(jpeft.freeze(top=1), ("remat", "bert-scan", "gpt2", "llama-scan")),
    "bitfit": Row(jpeft.bitfit(), ("jit", "scan-mha", "bert", "gpt2-remat", "llama-scan")),
    "ln_tuning": Row(jpeft.ln_tuning(), ("plain", "bert-remat", "llama-scan")),
    "trainable_tokens": Row(jpeft.trainable_tokens(tokens=(7, 3, 20)), ("plain", "bert-remat", "llama-scan")),
    "fish_mask": Row(jpeft.fish_mask(sparsity=0.05), ("scan", "bert-remat", "llama")),
    # A penalty that leaves the loss of so small a model visible beside it.
    "diff_pruning": Row(jpeft.diff_pruning(sparsity=0.05, l0=1e-5), ("gpt2", "bert-scan", "llama-remat")),
    "diff_pruning-mask": Row(jpeft.diff_pruning(sparsity=0.05, stage="mask"), ("scan", "bert-remat", "llama")),
    "far": Row(jpeft.far(), ("plain", "bert-scan", "llama-remat")),
    "far-learners": Row(jpeft.far(retention=0.4, stage="learners"), ("jit", "bert-remat", "gpt2", "llama-scan")),
    "adapter": Row(jpeft.adapter(size=4), (*SMALL, "remat", "bert-scan", "gpt2-scan", "llama-remat"), 1e-2, NONLINEAR),
    "pfeiffer": Row(jpeft.pfeiffer(size=4, activation="gelu"), ("jit", "bert-scan", "gpt2", "llama-remat"), 0.1, NONLINEAR),
    "pfeiffer-lin": Row(jpeft.pfeiffer(size=4, activation="silu", own_norm=True), ("bert", "gpt2-scan", "llama-remat"), 0.1, NONLINEAR),
    "compacter": Row(jpeft.compacter(size=4), ("scan-mha", "bert", "gpt2-remat", "llama-scan"), 1e-3, NONLINEAR),
    "parallel_adapter": Row(
        jpeft.parallel_adapter(size=4, activation="gelu"), ("bert-scan", "gpt2-remat", "llama"), why_no_merge=NONLINEAR
    ),
    "lora": Row(jpeft.lora(rank=2), (*SMALL, "remat", "bert", "gpt2", "llama-scan")),
    "lora-two-view": Row(jpeft.lora(rank=2, view="two-view"), ("einsum", "bert-scan", "llama-remat")),
    "lora-factored": Row(
        jpeft.lora(
            rank={r".*(up|down|down_proj|intermediate/dense)/kernel": 3, ".*": 2},
            view="factored",
            rslora=True,
            target=r".*(kernel|embedding)",
        ),
        ("einsum", "bert-remat", "llama-scan"),
    ),
    # The factors of the start stay in the adapter; a frozen factor; ranks that the statistics of the inputs give.
    "lora-pissa": Row(jpeft.lora(rank=2, init="pissa", view="two-view"), ("einsum", "bert-remat", "llama-scan")),
    "lora-fa": Row(jpeft.lora(rank=2, init="orthogonal", freeze_a=True, b_lr_scale=4.0), ("plain", "bert-remat", "llama-scan")),
    "lora-eva": Row(jpeft.lora(rank=2, init="eva", rho=2.0), ("plain", "bert-remat", "llama-scan")),
    "dora": Row(jpeft.dora(rank=2), ("einsum", "scan-mha", "bert-remat", "gpt2", "llama-scan")),
    # So many steps that the 20 of a test take no rank.
    "adalora": Row(jpeft.adalora(rank=3, target_rank=2, total_steps=1000), ("einsum", "bert-remat", "llama-scan")),
    "ia3": Row(jpeft.ia3(), ("einsum", "scan-mha", "bert-remat", "gpt2", "llama-scan")),
    "loha": Row(jpeft.loha(rank=2, effective_conv=True), ("einsum", "bert-remat", "llama-scan")),
    "lokr": Row(jpeft.lokr(rank=1, alpha=2, decompose_both=True), ("einsum", "bert-remat", "llama-scan")),
    "oft": Row(jpeft.oft(block_size=8), ("plain", "bert-remat", "llama-scan")),
    "hra": Row(jpeft.hra(rank=4), ("scan-mha", "bert-remat", "llama")),
    "vera": Row(jpeft.vera(rank=8), ("jit", "bert-remat", "llama-scan")),
    "miss": Row(jpeft.miss(rank=3), ("plain", "bert-remat", "llama-scan")),
    "boft": Row(jpeft.boft(block_size=4, n_butterfly_factor=2), ("plain", "bert-remat", "llama-scan")),
    "shira": Row(jpeft.shira(rank=2), ("plain", "bert-remat", "llama-scan")),
    "hard_prompt": Row(jpeft.hard_prompt(tokens=(3, 7)), ("bert-scan", "gpt2-remat", "llama"), 10.0, LONGER_TEXT),
    "prompt_tuning": Row(jpeft.prompt_tuning(length=3), ("plain", "bert-scan", "gpt2-remat", "llama-scan"), 10.0, LONGER_TEXT),
    "p_tuning": Row(
        jpeft.p_tuning(template=(("start", 2), ("end", (-1, 3))), hidden=3), ("bert", "gpt2-remat", "llama-scan"), 10.0, LONGER_TEXT
    ),
    "multitask_prompt_tuning": Row(
        jpeft.multitask_prompt_tuning(length=3, rank=2), ("bert-scan", "gpt2-remat", "llama"), 10.0, LONGER_TEXT
    ),
    "prefix_tuning": Row(jpeft.prefix_tuning(length=3, mlp=5), ("bert-scan", "gpt2-remat", "llama", "llama-scan"), 10.0, LONGER_KEYS),
    "p_tuning_v2": Row(jpeft.p_tuning_v2(length=3), ("bert-remat", "gpt2", "llama-scan"), 10.0, LONGER_KEYS),
    "adaption_prompt": Row(jpeft.adaption_prompt(length=3, layers=1), ("bert-scan", "gpt2-remat", "llama"), why_no_merge=OWN_ATTENTION),
    "chain": Row(
        jpeft.chain(bitfit=jpeft.bitfit(), lora=jpeft.lora(rank=2), adapter=jpeft.adapter(size=3)),
        ("jit", "bert-remat", "llama-scan"),
        1e-2,
        NONLINEAR,
    ),
    "chain-sparse": Row(jpeft.chain(lora=jpeft.lora(rank=1), fish=jpeft.fish_mask(sparsity=0.03)), ("scan", "bert-remat", "llama")),
    "chain-mergeable": Row(
        jpeft.chain(lora=jpeft.lora(rank=2), second=jpeft.lora(rank=1, target="@ffn_in|@ffn_out"), bitfit=jpeft.bitfit()),
        ("einsum", "bert-remat", "llama-scan"),
    ),
    # What docs/skeletons offers to copy.
    "skeleton-method": Row(skeleton("method").OutputShift(target=".*(out|down|o_proj|c_proj|dense)/kernel"), KINDS, why_no_merge="bias"),
    "skeleton-weight-method": Row(skeleton("weight_method").RowScale(), KINDS),
}

METHODS = {name: row.method for name, row in ROWS.items()}
MERGES = {name: row.why_no_merge for name, row in ROWS.items() if row.why_no_merge}  # those that do not, and why
PROMPTS = ["hard_prompt", "prompt_tuning", "p_tuning", "multitask_prompt_tuning"]  # methods that put tokens into the text
NEED_STATS = {name for name, row in ROWS.items() if row.method.requires_stats}  # methods that are told by data what to train


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell of the table."""

    method_name: str
    model_name: str

    @property
    def method(self) -> jpeft.Method:
        return METHODS[self.method_name]

    @property
    def model(self) -> nn.Module:
        return MODELS[self.model_name]

    @property
    def params(self) -> Any:
        return base(self.model_name)

    @property
    def stats(self) -> Any:
        return information(self.model_name) if self.method_name in NEED_STATS else None

    @functools.cached_property
    def peft(self) -> jpeft.Peft:
        return jpeft.apply(self.params, method=self.method, key=jax.random.key(7), stats=self.stats)

    @functools.cached_property
    def noisy(self) -> jpeft.Peft:
        return self.peft.replace(adapter=noised(self.peft.adapter))

    @functools.cached_property
    def forward(self):
        return jax.jit(jpeft.wrap(self.model.apply, self.method))


@functools.cache
def base(model_name: str) -> Any:
    return jax.jit(MODELS[model_name].init)(jax.random.key(0), batch()["x"])["params"]


@functools.cache
def base_logits(model_name: str) -> jax.Array:
    return jax.jit(MODELS[model_name].apply)({"params": base(model_name)}, batch()["x"])


@functools.cache
def information(model_name: str) -> Any:
    """Statistics of every kind that methods of the table require."""

    def losses(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(MODELS[model_name].apply({"params": params}, batch["x"]), batch["y"])

    found = fisher(losses, base(model_name), [batch()], chunk=BATCH)
    moments = input_moments(MODELS[model_name].apply, base(model_name), [batch()["x"]], method=jpeft.lora(init="eva"))
    return [found, Movement(found.values), moments]


@functools.cache
def case(method_name: str, model_name: str) -> Case:
    return Case(method_name, model_name)


@functools.cache
def batch() -> dict[str, jax.Array]:
    x = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, VOCAB)
    return {"x": x, "y": x[:, 0] % CLASSES}


def noised(tree: Any, scale: float = 0.1, seed: int = 3) -> Any:
    """The tree with noise on every leaf: zero-initialised leaves would hide a wrong merge or order."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = lambda key, leaf: (leaf + scale * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
    return jax.tree.unflatten(treedef, [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])


def fit(model: nn.Module, peft: jpeft.Peft, ids: jax.Array, labels: jax.Array, *, steps: int, rate: float) -> list[float]:
    """The losses of so many steps of AdamW on one batch."""
    forward, tx = jpeft.wrap(model.apply, peft.method), jpeft.optimizer(optax.adamw(rate), peft)

    @jax.jit
    def step(adapter, state, peft):
        def loss_fn(adapter):
            logits = forward(peft.replace(adapter=adapter).variables, ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    adapter, state, losses = peft.adapter, tx.init(peft.adapter), []
    for _ in range(steps):
        adapter, state, loss = step(adapter, state, peft)
        losses.append(float(loss))
    return losses


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    """Compile as a user does, with the optimisations that the suite otherwise does without."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def compiled_flops(fn: Any, *args: Any) -> float:
    """XLA's own count for the compiled function."""
    with optimised():
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def added_flops(method: str, *, width: int = 128, rows: int = 1024, **options: Any) -> float:
    """The FLOPs of a training step of one dense layer, beside the layer's own, with its inputs differentiated."""
    model, x = nn.Dense(width), jnp.ones((rows, width))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)

    def flops(peft: jpeft.Peft) -> float:
        run = jpeft.wrap(model.apply, peft.method)
        loss = lambda adapter, x: jnp.sin(run(peft.replace(adapter=adapter).variables, x)).sum()
        return compiled_flops(jax.grad(loss, (0, 1)), peft.adapter, x)

    own = jpeft.apply(zeros, method=jpeft.lora(rank=1, target="kernel")).replace(adapter={}, method=jpeft.lora(rank=1, target="kernel"))
    return flops(jpeft.apply(zeros, method=method, head=None, **options)) - flops(own)

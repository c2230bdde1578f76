"""The cases that JAX runs: jpeft, qwix on the same model, full fine-tuning."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

import jpeft
from jpeft.models import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, generate
from jpeft.training.cost import cost
from steps.cases import ALPHA, BERT, LLAMA, QWIX, RANK, Case, Shape, Size
from steps.measure import GIB, PRODUCT, host_peak, numbers, product_rate, timed

Line = dict[str, Any]
PROJECTIONS = r".*_proj/kernel"


def run(case: Case, size: Size) -> Iterator[Line]:
    """Yield the lines of a case."""
    yield from {"llama": train_llama, "bert": train_bert, "sweep": sweep, "generate": generation}[case.kind](
        case, size, **dict(case.options)
    )


# --- models -----------------------------------------------------------------------------------------------------------


def llama(shape: Shape, *, remat: Any = False) -> tuple[Any, Any]:
    """Return a model with random parameters, all in the shape's dtype, as a checkpoint has them."""
    config = LlamaConfig.llama_3_2_1b(
        **shape.fields,
        num_key_value_heads=shape.kv_heads,
        dtype=jnp.dtype(shape.dtype),
        param_dtype=jnp.dtype(shape.dtype),
        scan=True,
        remat=remat,
    )
    model = LlamaForCausalLM(config)
    return model, initial(model)


def bert(shape: Shape) -> tuple[Any, Any]:
    """Return a classifier with random parameters in float32, scanned: unrolled layers take a GPU's compiler minutes."""
    config = BertConfig(
        **shape.fields,
        dtype=jnp.dtype(shape.dtype),
        scan=True,
    )
    model = BertForSequenceClassification(config, num_labels=2)
    return model, initial(model)


def initial(model: Any) -> Any:
    """Return random parameters, made on the device."""
    return jax.jit(lambda key: model.init(key, jnp.ones((1, 8), jnp.int32))["params"])(jax.random.key(0))


def tokens(shape: Shape, case: Case) -> jax.Array:
    """Return random token ids."""
    return jnp.asarray(np.random.default_rng(0).integers(0, shape.vocabulary, (case.batch, case.length)), jnp.int32)


# --- steps ------------------------------------------------------------------------------------------------------------


class Step:
    """A compiled training step and its state.

    Args:
      loss: `(trained, frozen) -> loss`.
      tx: The optimizer.
      trained: What is trained.
      frozen: What is not.
    """

    def __init__(self, loss: Callable[[Any, Any], jax.Array], tx: optax.GradientTransformation, trained: Any, frozen: Any):
        def step(trained: Any, state: Any, frozen: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(trained, frozen)
            updates, state = tx.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state, value

        self.frozen = frozen
        # A copy, because the step overwrites its arguments.
        self.trained = jax.tree.map(jnp.copy, trained)
        self.state = jax.jit(tx.init)(self.trained)
        self.jitted = jax.jit(step, donate_argnums=(0, 1))

    def trace(self) -> None:
        """Trace the step, which Python does."""
        self.traced = self.jitted.trace(self.trained, self.state, self.frozen)

    def compile(self) -> Step:
        """Compile the step, which threads may do side by side."""
        begun = time.perf_counter()
        self.compiled = self.traced.lower().compile()
        self.compile_seconds = time.perf_counter() - begun
        return self

    def __call__(self) -> None:
        """Take a step."""
        self.trained, self.state, self.loss = self.compiled(self.trained, self.state, self.frozen)
        self.loss.block_until_ready()

    def line(self, case: Case, size: Size, rate: float, *, full: bool = False, alone: bool = True) -> Line:
        """Measure it. Where it is not alone in its process, its peak is what the compiler says that it needs."""
        seconds = timed(self, size)
        spent, memory = cost(self.compiled, self.traced.jaxpr), self.compiled.memory_analysis()
        return numbers(
            case,
            size,
            seconds,
            rate,
            full=full,
            TFLOP=float(f"{(spent.flops or 0) / 1e12:.4g}"),
            temp_GiB=round(memory.temp_size_in_bytes / GIB, 3) if memory else None,
            peak_GiB=peak() if alone else needs(self.compiled),
            compile_s=round(self.compile_seconds, 1),
            loss=round(float(self.loss), 3),
        )


def rate_of(size: Size, dtype: str) -> float:
    """Return what the device reaches in one large product."""
    # Random numbers: a product of ones takes less power, so it runs at a rate that no training step sees.
    x = jax.random.normal(jax.random.key(0), (PRODUCT[size], PRODUCT[size]), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul)
    return product_rate(lambda: product(x, x).block_until_ready(), size)


def peak() -> float:
    """Return the most memory that the device has held, in GiB; of the process on a CPU."""
    found = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return host_peak() if found is None else round(found / GIB, 3)


def needs(compiled: Any) -> float | None:
    """Return the memory that a compiled function needs with its arguments, in GiB."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return round((held + memory.temp_size_in_bytes) / GIB, 3)


def train_llama(case: Case, size: Size, *, remat: Any = False, full: bool = False, view: Any = "auto") -> Iterator[Line]:
    """A step of a language model: LoRA on all projections, or all weights."""
    shape = LLAMA[size]
    model, params = llama(shape, remat=remat)
    ids = tokens(shape, case)
    if case.who == QWIX:
        apply, tx, trained, frozen = of_qwix(model, ids)
    elif full:
        tx, trained, frozen = optax.adamw(1e-4), params, {}
        apply = lambda trained, frozen: lambda *given, **more: model.apply({"params": trained}, *given, **more)
    else:
        peft = jpeft.apply(params, method="lora", rank=RANK, alpha=ALPHA, target=PROJECTIONS, view=view)
        forward = jpeft.wrap(model.apply, peft.method)
        tx, trained, frozen = jpeft.optimizer(optax.adamw(1e-4), peft), peft.adapter, params
        apply = lambda trained, frozen: (
            lambda *given, **more: forward(peft.replace(adapter=trained, params=frozen).variables, *given, **more)
        )
    step = Step(lambda trained, frozen: next_token_loss(apply(trained, frozen), ids), tx, trained, frozen)
    del params, trained
    step.trace()
    step.compile()
    line = step.line(case, size, rate_of(size, shape.dtype), full=full)
    yield case.line(**line, trained=sum(leaf.size for leaf in jax.tree.leaves(step.trained)))


def next_token_loss(apply: Callable[..., Any], ids: jax.Array) -> jax.Array:
    """Return the mean loss of predicting each token from those before it."""
    labels = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-100)  # the last token predicts nothing
    return apply(ids, labels=labels).loss.sum() / ids[:, 1:].size


def of_qwix(model: Any, ids: jax.Array) -> Any:
    """Return the same for qwix's LoRA: the model as a function, its optimizer, its adapter and the base."""
    import qwix  # pyright: ignore[reportMissingImports]

    rule = qwix.LoraRule(module_path=".*_proj", rank=RANK, alpha=ALPHA)
    lora = qwix.apply_lora_to_model(model, qwix.LoraProvider([rule]))
    flat = traverse_util.flatten_dict(jax.jit(lambda key: lora.init(key, ids[:1, :8])["params"])(jax.random.key(1)))
    split = lambda adapter: traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if ("lora" in path[-1]) == adapter})
    whole = lambda *trees: traverse_util.unflatten_dict({k: v for tree in trees for k, v in traverse_util.flatten_dict(tree).items()})
    apply = lambda trained, frozen: lambda *given, **more: lora.apply({"params": whole(frozen, trained)}, *given, **more)
    return apply, optax.adamw(1e-4), split(True), split(False)


def train_bert(case: Case, size: Size, *, methods: tuple[str, ...] = ()) -> Iterator[Line]:
    """A step of every method, compiled side by side, since nothing is timed meanwhile; one line for each."""
    shape = BERT[size]
    model, params = bert(shape)
    ids, labels = tokens(shape, case), jnp.arange(case.batch) % 2
    rate = rate_of(size, shape.dtype)
    with concurrent.futures.ThreadPoolExecutor(8 if size == "gpu" else 1) as pool:
        waiting = []
        for name in methods or ("full", *jpeft.methods()):
            try:
                step = bert_step(model, params, name, ids, labels)
                step.trace()
                waiting.append((name, pool.submit(step.compile)))
            except Exception as error:  # such as a method that has nothing to train here
                yield case.line(method=name, failed=reason(error))
        concurrent.futures.wait([future for _, future in waiting])
        for name, future in waiting:
            try:
                yield case.line(method=name, **future.result().line(case, size, rate, full=name == "full", alone=False))
            except Exception as error:
                yield case.line(method=name, failed=reason(error))


def bert_step(model: Any, params: Any, name: str, ids: jax.Array, labels: jax.Array) -> Step:
    """Return the step of one method with its defaults."""
    score = lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()
    if name == "full":
        return Step(lambda trained, _: score(model.apply({"params": trained}, ids)), optax.adamw(1e-4), params, {})
    options: dict[str, Any] = {"hard_prompt": {"tokens": (5, 6, 7)}, "trainable_tokens": {"tokens": (5, 6, 7)}}.get(name, {})
    keys = lambda path: jax.random.key(len(jax.tree_util.keystr(path)))
    scores = jax.tree_util.tree_map_with_path(lambda path, leaf: jax.random.uniform(keys(path), leaf.shape), params)
    peft = jpeft.apply(params, method=name, stats=scores if name == "fish_mask" else None, **options)
    if not jax.tree.leaves(peft.adapter):
        raise ValueError("nothing to train")
    forward = jpeft.wrap(model.apply, peft.method)
    loss = lambda trained, frozen: score(forward(peft.replace(adapter=trained, params=frozen).variables, ids))
    return Step(loss, jpeft.optimizer(optax.adamw(1e-4), peft), peft.adapter, params)


# --- several adapters, generation -------------------------------------------------------------------------------------


def sweep(case: Case, size: Size, *, adapters: int = 8) -> Iterator[Line]:
    """A step of eight adapters under `vmap`, and eight steps of one."""
    shape = BERT[size]
    model, params = bert(shape)
    ids, labels = tokens(shape, case), jnp.arange(case.batch) % 2
    method = jpeft.lora(rank=8)
    forward, tx = jpeft.wrap(model.apply, method), optax.adamw(1e-4)

    def step(adapter: Any, state: Any, params: Any) -> Any:
        def loss(adapter: Any) -> jax.Array:
            logits = forward(jpeft.Peft(params, adapter, method).variables, ids).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    each = [jpeft.apply(params, method=method, key=jax.random.key(seed)).adapter for seed in range(adapters)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    for what in ("together", "in turn"):
        together = what == "together"
        fn = jax.vmap(step, in_axes=(0, 0, None)) if together else step
        states = [(stacked, jax.vmap(tx.init)(stacked))] if together else [(one, tx.init(one)) for one in each]
        begun = time.perf_counter()
        compiled = jax.jit(fn).lower(*states[0], params).compile()
        seconds = time.perf_counter() - begun
        memory: Any = compiled.memory_analysis()
        call = lambda compiled=compiled, states=states: jax.block_until_ready([compiled(*state, params) for state in states])
        spent = timed(call, size)
        yield case.line(
            method=what,
            ms=round(1e3 * spent, 3),
            tokens_s=round(adapters * case.batch * case.length / spent),
            temp_GiB=round(memory.temp_size_in_bytes / GIB, 3),
            peak_GiB=needs(compiled),
            compile_s=round(seconds, 1),
            loss=round(float(jnp.mean(call()[0][2])), 3),
        )


def generation(case: Case, size: Size) -> Iterator[Line]:
    """Greedy continuations, with the adapter beside the weights and merged into them."""
    shape = LLAMA[size]
    model, params = llama(shape)
    ids, new = tokens(shape, case), 8 if size == "toy" else case.length
    peft = jpeft.apply(params, method="lora", rank=RANK, alpha=ALPHA, target=PROJECTIONS)
    forward = jpeft.wrap(model.apply, peft.method)
    for what, apply, variables in (("unmerged", forward, peft.variables), ("merged", model.apply, {"params": jpeft.merge(peft)})):
        call = lambda apply=apply, variables=variables: generate(apply, variables, ids, max_new_tokens=new).tokens.block_until_ready()
        begun = time.perf_counter()
        call()
        first = time.perf_counter() - begun
        seconds = timed(call, size if size == "toy" else "cpu")
        yield case.line(
            method=what,
            ms=round(1e3 * seconds, 3),
            tokens_s=round(case.batch * new / seconds),
            peak_GiB=peak(),
            compile_s=round(max(first - seconds, 0), 1),
        )


def reason(error: BaseException) -> str:
    """Return an error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]

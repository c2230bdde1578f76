"""The cases that torch runs: HF PEFT, and full fine-tuning."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from steps.cases import ALPHA, BERT, LLAMA, RANK, Case, Shape, Size
from steps.measure import GIB, PRODUCT, host_peak, numbers, product_rate, timed

Line = dict[str, Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(case: Case, size: Size) -> Iterator[Line]:
    """Yield the lines of a case."""
    if size == "toy":
        torch.set_num_threads(1)  # threads cost more than they bring
    yield from {"llama": train_llama, "bert": train_bert, "generate": generation}[case.kind](case, size, **dict(case.options))


def llama(shape: Shape) -> Any:
    """Return a model with random weights in the shape's dtype."""
    config = LlamaConfig(
        **shape.fields,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(getattr(torch, shape.dtype))


def lora() -> LoraConfig:
    """Return LoRA on all projections."""
    return LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")


def train_llama(
    case: Case, size: Size, *, compiled: bool = False, checkpointing: bool = False, liger: bool = False, full: bool = False
) -> Iterator[Line]:
    """A step of a language model: LoRA on all projections, or all weights."""
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

        apply_liger_kernel_to_llama()
    shape = LLAMA[size]
    model = llama(shape)
    ids = torch.randint(0, shape.vocabulary, (case.batch, case.length), device=DEVICE)
    model = model if full else get_peft_model(model, lora())
    model.train()
    model.config.use_cache = False
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forward = compile_for(size)(model) if compiled else model
    line = measure(case, size, model, lambda: forward(input_ids=ids, labels=ids).loss, rate_of(size, shape.dtype), full=full)
    yield case.line(**line, trained=sum(each.numel() for each in model.parameters() if each.requires_grad))


def train_bert(case: Case, size: Size, *, methods: tuple[str, ...], compiled: bool = False) -> Iterator[Line]:
    """A step of every method; one line for each."""
    shape = BERT[size]
    rate = rate_of(size, shape.dtype)
    ids = torch.randint(0, shape.vocabulary, (case.batch, case.length), device=DEVICE)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(case.batch, device=DEVICE) % 2}
    low = torch.autocast(DEVICE, torch.bfloat16) if shape.dtype == "bfloat16" else contextlib.nullcontext()
    for name in methods:
        try:
            model = bert(shape, name)
            forward = compile_for(size)(model) if compiled else model

            def loss(forward: Any = forward) -> Any:
                with low:
                    return forward(**given).loss

            yield case.line(method=name, **measure(case, size, model, loss, rate, full=name == "full"))
        except Exception as error:
            yield case.line(method=name, failed=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])


def bert(shape: Shape, name: str) -> Any:
    """Return a classifier with one method."""
    config = BertConfig(
        **shape.fields,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: Any = BertForSequenceClassification(config)
    configs: dict[str, Any] = {
        "lora": LoraConfig(r=8, target_modules=["query", "key", "value", "dense"], task_type="SEQ_CLS"),
        "ia3": IA3Config(task_type="SEQ_CLS"),
        "prompt": PromptTuningConfig(num_virtual_tokens=20, task_type="SEQ_CLS"),
        "prefix": PrefixTuningConfig(num_virtual_tokens=20, task_type="SEQ_CLS"),
    }
    if name in configs:
        model = get_peft_model(model, configs[name])
    if name == "bitfit":
        for path, each in model.named_parameters():
            each.requires_grad = "bias" in path or "classifier" in path
    return model.to(DEVICE).train()


def measure(case: Case, size: Size, model: Any, loss: Callable[[], Any], rate: float, *, full: bool) -> Line:
    """Time steps of AdamW, once the first ones have compiled what there is to compile."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4, fused=DEVICE == "cuda")
    last: list[Any] = []

    def step() -> None:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        last[:] = [value.detach()]

    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    step()
    first = time.perf_counter() - begun
    seconds = timed(step, size)
    more = {"peak_GiB": peak(), "compile_s": round(max(first - seconds, 0), 1), "loss": round(float(last[0]), 3)}
    return numbers(case, size, seconds, rate, full=full, TFLOP=None, temp_GiB=None, **more)


def generation(case: Case, size: Size) -> Iterator[Line]:
    """Greedy continuations with the adapter beside the weights."""
    shape = LLAMA[size]
    model: Any = get_peft_model(llama(shape), lora()).eval()
    new = 8 if size == "toy" else case.length
    ids = torch.randint(0, shape.vocabulary, (case.batch, case.length), device=DEVICE)
    fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def call() -> None:
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fixed)
        wait()

    begun = time.perf_counter()
    call()
    seconds = time.perf_counter() - begun
    if size != "gpu":  # there one call takes five seconds, and the second one as long as the first
        seconds = timed(call, "toy")
    yield case.line(method="unmerged", ms=round(1e3 * seconds, 3), tokens_s=round(case.batch * new / seconds), peak_GiB=peak())


def compile_for(size: Size) -> Callable[[Any], Any]:
    """Return `torch.compile`; at toy size without the compiler behind it, which takes minutes on a CPU."""
    return functools.partial(torch.compile, backend="eager" if size == "toy" else "inductor")


def rate_of(size: Size, dtype: str) -> float:
    """Return what the device reaches in one large product."""
    # Random numbers: a product of ones takes less power, so it runs at a rate that no training step sees.
    x = torch.randn((PRODUCT[size], PRODUCT[size]), dtype=getattr(torch, dtype), device=DEVICE)

    def product() -> None:
        torch.matmul(x, x)
        wait()

    return product_rate(product, size)


def peak() -> float:
    """Return the most memory that tensors have taken on the device, in GiB; of the process on a CPU."""
    return round(torch.cuda.max_memory_allocated() / GIB, 3) if DEVICE == "cuda" else host_peak()


def wait() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()

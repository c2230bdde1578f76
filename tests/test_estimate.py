"""`jpeft estimate`: the numbers of a step that was never run, beside those of a real one; operations in loops."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import optimised

import jpeft
import jpeft.estimation.estimate
from jpeft.cli import main
from jpeft.cli.estimate import print_estimates
from jpeft.core.flops import count_flops
from jpeft.estimation import program
from jpeft.estimation.estimate import Fit
from jpeft.estimation.memory import largest_that_fits, parse_memory
from jpeft.estimation.shapes import find_config
from jpeft.models import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, abstract_params
from jpeft.tasks.task import find_task
from jpeft.training.config import parse_options
from jpeft.training.cost import cost
from jpeft.training.schedule import clipped_adamw, learning_rate_schedule
from jpeft.training.step import make_step

ROWS, LENGTH = 4, 16
BERT = BertConfig(
    vocab_size=80,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
LLAMA = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
)
METHODS = ("lora rank=4", "adapter", "prefix_tuning length=4", "fish_mask sparsity=0.2", "full")


def real_step(config, row):
    """The compiled step of a method, made from arrays as the trainer makes it, and its adapter."""
    if config is BERT:
        task, model = find_task("sequence-classification"), BertForSequenceClassification(config, 2)
        batch = {"label": jnp.zeros(ROWS, jnp.int32), "token_type_ids": jnp.zeros((ROWS, LENGTH), jnp.int32)}
    else:
        task, model = find_task("generation"), LlamaForCausalLM(config)
        batch = {"label": jnp.ones((ROWS, LENGTH), jnp.int32)}
    batch |= dict.fromkeys(("input_ids", "attention_mask"), jnp.ones((ROWS, LENGTH), jnp.int32))
    draw = lambda leaf: jnp.asarray(np.random.default_rng(0).normal(size=leaf.shape), leaf.dtype)
    params = jax.tree.map(draw, abstract_params(model))
    name, *options = row.split()
    name, options = ("freeze", ["target=.*"]) if name == "full" else (name, options)
    stats = jax.tree.map(jnp.abs, params) if name == "fish_mask" else None
    peft = jpeft.apply(params, method=name, stats=stats, **parse_options(options))
    tx = jpeft.optimizer(clipped_adamw(learning_rate_schedule("linear", 1e-3, 100, 0.06), weight_decay=0.01, clip=1.0), peft)
    step = make_step(jpeft.wrap(model.apply, peft.method), tx, task, peft)
    arguments = (peft.adapter, tx.init(peft.adapter), params, batch, jax.random.key(0), np.int32(0))
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(*arguments)
    compiled = traced.lower().compile()
    return compiled, cost(compiled, traced.jaxpr), peft


@pytest.mark.parametrize("config", [BERT, LLAMA], ids=["bert", "llama"])
def test_the_estimate_is_that_of_the_real_step(config):
    """Without an array, for five methods: parameters exactly, operations and bytes within 5 %."""
    before = len(jax.live_arrays())
    found = jpeft.estimate(config, METHODS, batch_size=ROWS, max_length=LENGTH)
    assert len(jax.live_arrays()) - before < 10  # keys and scalars
    assert [each.method for each in found] == [*METHODS[:-1], "full fine-tuning"]
    for each, row in zip(found, METHODS, strict=True):
        compiled, spent, peft = real_step(config, row)
        summary, memory = jpeft.summary(peft), compiled.memory_analysis()
        assert (each.base, each.trained, each.stored) == (summary.base, summary.trained, summary.stored)
        assert (each.weights_bytes, each.adapter_bytes) == (summary.base_bytes, summary.bytes)
        assert each.flops == pytest.approx(spent.flops, rel=0.05)
        assert each.temporary_bytes == pytest.approx(memory.temp_size_in_bytes, rel=0.05)
        arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        assert each.total_bytes == pytest.approx(arguments + memory.temp_size_in_bytes, rel=0.05)
        # Two moments of what is trained, and counters.
        assert 0 <= each.optimizer_bytes - 2 * 4 * each.trained < 200 + 8 * (each.stored - each.trained)
        assert (each.platform, each.devices, each.fit) == ("cpu", 1, None)


def test_a_config_alone_on_the_command_line(tmp_path, capfd):
    """A folder with a config.json and no weights: a table, or JSON with the numbers of Python."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA.to_hf()}))
    flags = ["--batch-size", "4", "--max-length", "16", "--scan", "True"]
    assert main(["estimate", str(tmp_path), "lora rank=4", *flags, "--json"]) == 0
    (found,) = json.loads(capfd.readouterr().out)
    python = jpeft.estimate(tmp_path / "config.json", "lora rank=4", batch_size=4, max_length=16, scan=True)
    assert found == python.to_json()
    assert found["settings"]["task"] == "generation"
    print_estimates([python])
    head, row, _, about, compiled = capfd.readouterr().out.splitlines()
    assert head.split() == ["method", "trained", "stored", "GFLOP/step", "weights", "adapter", "optimizer", "temporaries", "total"]
    assert row.split()[:4] == ["lora", "rank=4", f"{python.trained:,}", f"{python.stored:,}"]
    assert "a step of 4 × 16 tokens on one device; layers scanned, remat=False." in about
    assert compiled.startswith("Compiled for cpu;")


def test_what_fits(monkeypatch):
    """The least recomputation with which the batch fits, and the largest batch with that; of whole micro-batches."""
    of = {False: 1000, "dots": 500, True: 100}

    def step_cost(run, *rest):
        found = program.step_cost(run, *rest) if not tried else tried[0]
        tried.append(found)
        return found._replace(total_bytes=10_000 + of[run.remat] * run.batch_size)

    tried = []
    monkeypatch.setattr(jpeft.estimation.estimate, "step_cost", step_cost)
    fit = lambda batch, memory, **more: jpeft.estimate(BERT, "bitfit", batch_size=batch, max_length=16, memory=memory, **more).fit
    assert fit(8, "18kB") == Fit(18_000, True, False, 8)
    assert fit(8, 17_999) == Fit(17_999, True, "dots", 15)
    assert fit(8, 17_999, grad_accum=4) == Fit(17_999, True, "dots", 12)
    assert fit(8, 11_000) == Fit(11_000, True, True, 10)
    assert fit(8, 10_500) == Fit(10_500, False, True, 5)
    assert fit(8, 9_000, remat=True) == Fit(9_000, False, True, 0)
    assert len(tried) < 40


def test_the_search_takes_few_tries():
    tried = []
    bytes_of = lambda number: tried.append(number) or 5_000 + 7 * number + number // 3
    assert largest_that_fits(bytes_of, 100_000, 16) == max(n for n in range(20_000) if 5_000 + 7 * n + n // 3 <= 100_000)
    assert len(tried) <= 7
    assert parse_memory("80 GB") == 80 * 10**9


def test_meshes():
    """On devices that are there, bytes of one of them; on more, what a plan and the traced program say."""
    one = jpeft.estimate(BERT, "full", batch_size=8, max_length=16)
    two = jpeft.estimate(BERT, "full", batch_size=8, max_length=16, mesh="fsdp=2")
    assert (two.devices, two.platform) == (2, "cpu")
    assert 0.5 <= two.optimizer_bytes / one.optimizer_bytes < 0.6
    assert 0.5 <= two.weights_bytes / one.weights_bytes < 0.6
    assert two.total_bytes < 0.8 * one.total_bytes
    many = jpeft.estimate(BERT, "full", batch_size=16, max_length=16, mesh="fsdp=16")
    assert (many.devices, many.platform, many.temporary_bytes, many.total_bytes) == (16, "", None, None)
    assert many.weights_bytes < 0.2 * one.weights_bytes
    assert many.flops == pytest.approx(one.flops / 8, rel=0.2)


def test_the_costliest_stage():
    """FAR's priming trains more than its learners do; the adapter that remains is the learners'."""
    far = jpeft.estimate(BERT, "far", batch_size=4, max_length=16)
    priming, learners = (jpeft.estimate(BERT, f"far stage={stage}", batch_size=4, max_length=16) for stage in ("priming", "learners"))
    assert far.trained == priming.trained > learners.trained
    assert far.stored == learners.stored
    assert far.flops == max(priming.flops, learners.flops)


def test_of_a_model_on_the_hub_config_json_alone_is_downloaded(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA.to_hf()}))
    asked = []
    download = lambda *given, **more: asked.append((given, more)) or str(tmp_path / "config.json")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    config, folder = find_config("owner/model", "v2")
    assert asked == [(("owner/model", "config.json"), {"revision": "v2"})]
    assert (config, folder) == (LLAMA, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/no/where"], "There is no folder /no/where"),
        (["FOLDER", "loar"], "There is no method 'loar'"),
        (["FOLDER", "lora rank=0"], "rank"),
        (["FOLDER", "bitfit", "--max-length", "16"], "bitfit: the model has no bias parameters"),
        (["FOLDER", "lora", "--task", "token-classification"], "A llama model has no use for the task 'token-classification'"),
        (["FOLDER", "lora", "--memory", "16"], "--memory must be a positive number with a unit, such as 16GiB"),
        (["FOLDER", "lora", "--max-length", "65"], "--max-length=65 is more than the model's 64 positions."),
        (["FOLDER", "lora", "--grad-accum", "3"], "--grad-accum=3 does not divide --batch-size=16."),
        (["FOLDER", "lora", "--labels", "0"], "--labels must be at least 1, got 0."),
        (["FOLDER", "lora", "--mesh", "row=2"], "row=2"),
        (["FOLDER/empty", "lora"], "has no config.json"),
    ],
)
def test_bad_input_gets_one_line(arguments, said, tmp_path, fails):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA.to_hf()}))
    (tmp_path / "empty").mkdir()
    given = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    assert said in fails("estimate", *given)


def test_a_model_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="model must be a folder, a hub id or a configuration"):
        jpeft.estimate(3)
    with pytest.raises(ValueError, match="method must name one method or more"):
        jpeft.estimate(BERT, [])
    for wrong, said in {"dtype": "int8", "param_dtype": "nothing", "batch_size": 0, "mesh": "rows=3"}.items():
        with pytest.raises(ValueError, match=f"^{wrong}"):
            jpeft.estimate(BERT, **{wrong: said})
    (Path(tmp_path) / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="model_type 'mamba'; supported: "):
        jpeft.estimate(tmp_path)


# --- operations ---------------------------------------------------------------------------------------------------------


def trace(fn, *arguments):
    return jax.jit(fn).trace(*arguments)


def test_operations_are_those_that_xla_counts():
    """Within 1 % on a model without loops, forward and back."""
    config = LlamaConfig(vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config)
    params, ids = abstract_params(model), jax.ShapeDtypeStruct((2, 32), jnp.int32)
    loss = lambda params, ids: model.apply({"params": params}, ids).sum()
    traced = trace(jax.value_and_grad(loss), params, ids)
    with optimised():
        counted = traced.lower().compile().cost_analysis()["flops"]
    assert count_flops(traced.jaxpr).all == pytest.approx(counted, rel=0.01)
    assert cost(traced.lower().compile(), traced.jaxpr).flops == pytest.approx(counted, rel=0.02)


def test_operations_in_loops():
    """Scans, their unrolled forms and gradients, counted loops, branches, remat, functions with gradients of their own."""
    x = jnp.ones((8, 8))
    product = 2 * 8**3

    def scanned(x, unroll=1):
        return jax.lax.scan(lambda y, _: (y @ x, None), x, length=10, unroll=unroll)[0]

    assert count_flops(trace(scanned, x).jaxpr) == (10 * product, product)
    assert count_flops(trace(lambda x: scanned(x, 4), x).jaxpr) == (10 * product, (4 + 2) * product)
    assert count_flops(trace(lambda x: jax.lax.fori_loop(2, 7, lambda _, y: y @ x, x), x).jaxpr)[0] == pytest.approx(5 * product, rel=0.01)
    assert count_flops(trace(lambda x: jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ x, x), x).jaxpr).all == product
    nested = lambda x: jax.lax.map(scanned, jnp.stack([x] * 3))
    assert count_flops(trace(nested, x).jaxpr) == (30 * product, product)
    assert count_flops(trace(lambda x: jax.lax.cond(x[0, 0] > 0, scanned, jnp.sin, x), x).jaxpr).all == pytest.approx(
        10 * product, rel=0.01
    )
    gradient = count_flops(trace(jax.grad(lambda x: scanned(x).sum()), x).jaxpr)
    assert gradient.all == pytest.approx(30 * product, rel=0.1)
    again = count_flops(trace(jax.grad(lambda x: jax.checkpoint(jnp.cos)(x @ x).sum()), x).jaxpr)
    assert again.all == pytest.approx(3 * product, rel=0.15)
    dead = lambda x: (x, x @ x)[0]
    assert count_flops(trace(dead, x).jaxpr).all == 0
    convolution = lambda x: jax.lax.conv_general_dilated(x[None, None], jnp.ones((5, 1, 3, 3)), (1, 1), "SAME")
    assert count_flops(trace(convolution, x).jaxpr).all == 2 * 5 * 64 * 9


def test_operations_on_a_mesh_and_in_a_kernel():
    """All devices of a mesh count; a kernel counts at every place of its grid."""
    from jax.experimental import pallas as pl

    mesh = jpeft.sharding.make_mesh(data=4, devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec("data")
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert count_flops(trace(split, jnp.ones((8, 8))).jaxpr).all == 4 * 2 * 2 * 8 * 2

    def kernel(x, out):
        out[...] = x[...] @ x[...]

    block = pl.BlockSpec((8, 8), lambda i: (i, 0))
    call = pl.pallas_call(
        kernel, grid=(3,), in_specs=[block], out_specs=block, out_shape=jax.ShapeDtypeStruct((24, 8), jnp.float32), interpret=True
    )
    assert count_flops(trace(call, jnp.ones((24, 8))).jaxpr).all == 3 * 2 * 8**3


def test_scanned_and_accumulating_steps_are_counted():
    """Both cost what the plain step costs, nearly: XLA's own count would be half of it, or less."""
    two = dataclasses.replace(LLAMA, num_hidden_layers=2)
    plain, scanned, accumulating = (
        jpeft.estimate(two, "full", batch_size=4, max_length=16, **settings).flops for settings in ({}, {"scan": True}, {"grad_accum": 2})
    )
    assert scanned == pytest.approx(plain, rel=0.05)
    assert accumulating == pytest.approx(plain, rel=0.05)

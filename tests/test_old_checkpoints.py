"""What an earlier version wrote still works: adapters load and compute the same, finished runs answer, unfinished ones reach the same end.

The files are in fixtures/b1b49ce.tar.gz; fixtures/make_b1b49ce.py made them, at that commit, with the models and methods of this file. Only
public modules are imported here, and what is trained or filled in by random numbers is stored, not made again.
"""

import dataclasses
import functools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jpeft
import jpeft.models
from jpeft.cli import main
from jpeft.training.run import load_run

ARCHIVE = Path(__file__).parent / "fixtures" / "b1b49ce.tar.gz"
# Stands in the configurations of the stored runs for the folder they were made in.
HERE = "@HERE@"

# --- models, whose parameters are functions of their paths and shapes ---------------------------------------------------------------------

VOCAB, CLASSES = 23, 3
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16
)


class Small(nn.Module):
    """An embedding, a block of a transformer and a head; attention is flax's own, with kernels of three axes, or left out."""

    attention: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCAB, 8, name="embed")(ids)
        if self.attention:
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm(name="ln_1")(x))
        x = x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm(name="ln_2")(x))))
        return nn.Dense(CLASSES, name="classifier")(nn.LayerNorm(name="ln_f")(x).mean(1))


def bert(**changes: Any) -> nn.Module:
    return jpeft.models.BertForSequenceClassification(jpeft.models.BertConfig(**SIZES, **changes), num_labels=CLASSES)


MODELS = {
    "small": Small(),
    "mha": Small(attention=True),
    "bert": bert(),
    "bert-scan": bert(scan=True),
    "gpt2": jpeft.models.GPT2LMHeadModel(jpeft.models.GPT2Config(**SIZES)),
    "llama": jpeft.models.LlamaForCausalLM(
        jpeft.models.LlamaConfig(**SIZES, model_type="qwen3", num_key_value_heads=1, rope=jpeft.models.Rope(100.0), attention_bias=True)
    ),
}


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1) that look random: hashes of the name and of each place, the same bits everywhere and always."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint64) * 2654435761 + zlib.crc32(name.encode())
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        x = ((x ^ (x >> np.uint64(15))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(16)
    return (x.astype(np.float64) / 2**31 - 1).reshape(shape)


IDS = np.floor((noise("ids", (4, 6)) + 1) / 2 * VOCAB).astype(np.int32)


@functools.cache
def base(model: str) -> Any:
    """The parameters of a model: norms near one, all else within 0.4 of zero."""
    shapes = jax.eval_shape(MODELS[model].init, jax.random.key(0), IDS)["params"]
    fill = lambda path, shape: 1 + 0.1 * noise(path, shape) if re.search(r"(scale|norm/weight)$", path) else 0.4 * noise(path, shape)
    return jpeft.unflatten({path: jnp.asarray(fill(path, leaf.shape), jnp.float32) for path, leaf in jpeft.flatten(shapes).items()})


def logits(forward: Callable[..., Any], variables: Any) -> np.ndarray:
    """What a model, wrapped or not, says about the fixed texts."""
    out = jax.jit(forward)(variables, IDS)
    return np.asarray(getattr(out, "logits", out))


# --- adapters -----------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A saved adapter: the model it is for, the method it was saved with, and whether that merges."""

    model: str
    method: Callable[[], jpeft.Method]
    merges: bool = True


AROUND: Any = (("start", 2), ("end", (-1, 3)))
BEFORE: Any = (("start", 1), (("before", int(IDS[0, 2])), 2))


def in_all_axes() -> jpeft.Method:
    return jpeft.lora(rank=2, axes=jpeft.kernel_axes(MODELS["mha"], base("mha"), IDS))


CASES = {
    "freeze": Case("bert", lambda: jpeft.freeze(top=1)),
    "bitfit": Case("gpt2", lambda: jpeft.bitfit()),
    "fish_mask": Case("small", lambda: jpeft.fish_mask(sparsity=0.1)),
    # After the first of two refreshes, with entries that are kept.
    "fish_mask-refreshed": Case("small", lambda: jpeft.fish_mask(sparsity=0.1, refresh=1)),
    "diff_pruning": Case("small", lambda: jpeft.diff_pruning(sparsity=0.1)),
    "diff_pruning-unstructured": Case("small", lambda: jpeft.diff_pruning(sparsity=0.1, structured=False, l0=1e-5)),
    "diff_pruning-mask": Case("bert-scan", lambda: jpeft.diff_pruning(sparsity=0.1, stage="mask")),
    "diff_pruning-advanced": Case("small", lambda: jpeft.diff_pruning(sparsity=0.1, stage="mask")),
    "far": Case("bert", lambda: jpeft.far()),
    "far-learners": Case("bert-scan", lambda: jpeft.far(retention=0.4, stage="learners")),
    "far-advanced": Case("llama", lambda: jpeft.far(retention=0.3, stage="learners")),
    "adapter": Case("bert", lambda: jpeft.adapter(size=4), merges=False),
    "pfeiffer": Case("bert", lambda: jpeft.pfeiffer(size=4), merges=False),
    "pfeiffer-lin": Case("llama", lambda: jpeft.pfeiffer(size=4, activation="silu", own_norm=True), merges=False),
    "compacter": Case("gpt2", lambda: jpeft.compacter(size=4), merges=False),
    "compacter-scan": Case("bert-scan", lambda: jpeft.compacter(size=4, division=2), merges=False),
    "parallel_adapter": Case("bert", lambda: jpeft.parallel_adapter(size=4), merges=False),
    "parallel_adapter-layer": Case("llama", lambda: jpeft.parallel_adapter(size=4, scale=2.0, activation="gelu"), merges=False),
    "lora": Case("bert", lambda: jpeft.lora(rank=2)),
    "lora-rules": Case(
        "llama",
        lambda: jpeft.lora(
            rank={r".*(up|down)_proj/kernel": 3, ".*": 2}, alpha={".*mlp.*": 8.0, ".*": 4.0}, view="factored", rslora=True,
            target=r".*(kernel|embedding)", init="gaussian", dropout=0.1,
        ),
    ),
    "lora-names": Case("bert", lambda: jpeft.lora(rank=1, target=["query", "value"], view="two-view", head=None)),
    "lora-scan": Case("bert-scan", lambda: jpeft.lora(rank=2)),
    "lora-axes": Case("mha", in_all_axes),
    "hard_prompt": Case("bert", lambda: jpeft.hard_prompt(tokens=(3, 7)), merges=False),
    "hard_prompt-headless": Case("gpt2", lambda: jpeft.hard_prompt(tokens=(3, 7)), merges=False),
    "prompt_tuning": Case("gpt2", lambda: jpeft.prompt_tuning(length=3), merges=False),
    "prompt_tuning-tokens": Case("llama", lambda: jpeft.prompt_tuning(init="tokens", tokens=(4, 2, 9), edges=(1, 0)), merges=False),
    "prompt_tuning-labels": Case("bert", lambda: jpeft.prompt_tuning(init="labels", labels=((1,), (2, 4), (5,)), length=4), merges=False),
    "prompt_tuning-told-labels": Case("bert-scan", lambda: jpeft.prompt_tuning(init="labels", length=4), merges=False),
    "p_tuning": Case("bert", lambda: jpeft.p_tuning(template=AROUND, hidden=3), merges=False),
    "p_tuning-mlp": Case("gpt2", lambda: jpeft.p_tuning(template=BEFORE, encoder="mlp"), merges=False),
    "p_tuning-folded": Case("bert", lambda: jpeft.prompt_tuning(template=AROUND), merges=False),
    "p_tuning-mlp-folded": Case("gpt2", lambda: jpeft.prompt_tuning(template=BEFORE), merges=False),
    "prefix_tuning": Case("gpt2", lambda: jpeft.prefix_tuning(length=3, mlp=5), merges=False),
    "prefix_tuning-folded": Case("gpt2", lambda: jpeft.prefix_tuning(length=3, mlp=None), merges=False),
    "prefix_tuning-scan": Case("bert-scan", lambda: jpeft.prefix_tuning(length=2, mlp=3, shift=False), merges=False),
    "p_tuning_v2": Case("bert", lambda: jpeft.p_tuning_v2(length=3), merges=False),
    "p_tuning_v2-mlp": Case("llama", lambda: jpeft.p_tuning_v2(length=3, mlp=4), merges=False),
    "chain": Case("bert", lambda: jpeft.chain(bitfit=jpeft.bitfit(), lora=jpeft.lora(rank=2), adapter=jpeft.adapter(size=3)), merges=False),
    "chain-two-loras": Case("bert-scan", lambda: jpeft.chain(first=jpeft.lora(rank=1), second=jpeft.lora(rank=2, target=r".*key/kernel"))),
    "chain-gates": Case("small", lambda: jpeft.chain(lora=jpeft.lora(rank=1), diff=jpeft.diff_pruning(sparsity=0.1, mask_share=0.25))),
    "chain-mask": Case(
        "small", lambda: jpeft.chain(lora=jpeft.lora(rank=1), diff=jpeft.diff_pruning(sparsity=0.1, mask_share=0.25, stage="mask"))
    ),
    "chain-folded": Case(
        "bert", lambda: jpeft.chain(prefix=jpeft.prefix_tuning(length=3, mlp=None), ffn=jpeft.parallel_adapter(size=3)), merges=False
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The unpacked archive, with this folder's name in the configurations of runs: they have the absolute paths of model and data."""
    folder = tmp_path_factory.mktemp("b1b49ce")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for config in folder.glob("runs/*/*/config.json"):
        config.write_text(config.read_text().replace(HERE, str(folder)))
    return folder


@pytest.fixture(scope="module")
def expected(stored):
    with np.load(stored / "expected.npz") as arrays:
        return dict(arrays)


def close(actual: Any, desired: Any) -> None:
    np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5)


def same_method(loaded: jpeft.Method, made: jpeft.Method) -> bool:
    """Whether the methods are equal, but for defaults that were regexes then and are roles now: a record keeps its regex."""
    if made.parts:
        return all(same_method(one, two) for (_, one), (_, two) in zip(loaded.parts, made.parts, strict=True))
    now_roles = {name: dict(loaded.options)[name] for name, value in made.options if str(value).startswith("@")}
    return loaded == made.replace(**now_roles)


def test_every_adapter_has_its_case(stored):
    assert sorted(path.name for path in (stored / "adapters").iterdir()) == sorted(CASES)
    newer = {"dora", "ia3", "trainable_tokens"}
    newer |= {"adalora", "adaption_prompt", "ln_tuning", "multitask_prompt_tuning"}
    newer |= {"loha", "lokr", "oft", "boft", "hra", "vera", "miss", "shira"}
    assert set(jpeft.methods()) - newer <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_loads_and_computes_the_same(stored, expected, name):
    case = CASES[name]
    model, folder = MODELS[case.model], stored / "adapters" / name
    peft = jpeft.load(folder, base(case.model))
    assert same_method(peft.method, case.method())
    recorded = json.loads((folder / "jpeft.json").read_text())
    assert jpeft.make(recorded["method"]) == peft.method
    assert {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in jpeft.flatten(peft.adapter).items()} == recorded["leaves"]
    wanted = expected[f"adapters/{name}"]
    close(logits(jpeft.wrap(model.apply, peft.method), peft.variables), wanted)
    if case.merges:
        close(logits(model.apply, {"params": jpeft.merge(peft)}), wanted)
    else:
        with pytest.raises(ValueError):
            jpeft.merge(peft)


@pytest.mark.parametrize("name", ["lora", "fish_mask-refreshed", "chain-mask", "p_tuning_v2"])
def test_an_adapter_is_still_refused_on_another_base(stored, name):
    other = jax.tree.map(lambda leaf: leaf + 1, base(CASES[name].model))
    with pytest.raises(ValueError, match="trained on another base"):
        jpeft.load(stored / "adapters" / name, other)


@pytest.mark.parametrize("name", ["p_tuning", "p_tuning-mlp", "prefix_tuning"])
def test_an_adapter_folds_to_the_stored_one(stored, name):
    params = base(CASES[name].model)
    folded, wanted = (jpeft.load(stored / "adapters" / each, params) for each in (name, f"{name}-folded"))
    folded = jpeft.fold(folded)
    assert folded.method == wanted.method
    jax.tree.map(close, folded.adapter, wanted.adapter)


# --- runs ---------------------------------------------------------------------------------------------------------------------------------

# Flags of the stored runs. Paths are below the folder that the archive is unpacked in.
COMMON = ("--data", "runs/base/data.csv", "--max-length", "8", "--progress", "none", "--batch-size", "8", "--steps", "16")
COMMON += ("--log-every", "2", "--checkpoint-every", "3", "--eval-every", "5", "--keep", "1")
# A model without a head, which is then drawn, and one with its head.
ENCODER, CLASSIFIER = ("--model", "runs/base/encoder"), ("--model", "runs/base/classifier")
RUNS = {
    "lora": (*ENCODER, *COMMON, "--keep-best", "--method", "lora", "rank=2", "target=['query','value']"),
    "far": (*CLASSIFIER, *COMMON, "--accumulate", "2", "--method", "far", "retention=0.3", "priming_share=0.5"),
    "diff_pruning": (*ENCODER, *COMMON, "--method", "diff_pruning", "sparsity=0.1", "l0=1e-5"),
}
# The unfinished ones, some of them one run that was stopped in several places.
UNFINISHED = {"lora": "lora", "far-priming": "far", "far-learners": "far", "diff_pruning-mask": "diff_pruning"}
TEXTS = ("the old iron seen here", "rain now", "one plum two pear")
# What is compared of a result: the rest is time and memory.
RESULT = ("validation", "test", "best", "best_step", "steps", "trained", "stored", "changed")


@pytest.fixture
def at(stored, monkeypatch):
    """The unpacked archive, as the working directory."""
    monkeypatch.chdir(stored)
    return Path(os.getcwd())


@pytest.fixture(scope="module")
def ends(stored):
    """How each run ended when it was not interrupted: results, the lines of metrics.jsonl, the methods."""
    return json.loads((stored / "runs" / "ends.json").read_text())


def draws() -> np.ndarray:
    """Normal numbers. Their last bits are the compiler's, and with them a new head's."""
    return np.asarray(jax.random.normal(jax.random.key(0), (16, 16)))


def lines_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without timings."""
    return [
        {name: value for name, value in json.loads(line).items() if name != "samples_per_second"}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def agree(actual: Any, desired: Any) -> None:
    """Equal in all but the last digits of their numbers."""
    if isinstance(desired, dict):
        assert actual.keys() >= desired.keys()
        for name, value in desired.items():
            agree(actual[name], value)
    elif isinstance(desired, list):
        assert len(actual) == len(desired)
        for one, other in zip(actual, desired, strict=True):
            agree(one, other)
    elif isinstance(desired, float):
        assert actual == pytest.approx(desired, rel=1e-4, abs=1e-4)
    else:
        assert actual == desired


def ends_as_before(run: Path, name: str, ends: Any, expected: dict[str, np.ndarray]) -> None:
    """Result, log and adapter of a finished run."""
    result = json.loads((run / "result.json").read_text())
    # What is trained used to be that of the last stage; it is that of the costliest one now.
    trained = result["stages"][-1]["trained"] if "stages" in result else result["trained"]
    agree(result | {"trained": trained}, ends[name]["result"])
    agree(lines_of(run), ends[name]["lines"])
    peft = load_run(run).peft
    assert peft.method == jpeft.make(ends[name]["method"])
    wanted = {path.removeprefix(f"runs/{name}/"): leaf for path, leaf in expected.items() if path.startswith(f"runs/{name}/")}
    found = jpeft.flatten(peft.adapter)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, atol=1e-6, err_msg=path)


def words(text: str) -> list[Any]:
    """A printed table: its numbers as such."""
    return [float(word) if re.fullmatch(r"[\d.]+", word) else word for word in text.split()]


def test_a_finished_run_is_still_finished(at, ends, expected, capfd):
    run = at / "runs/finished/lora"
    ends_as_before(run, "lora", ends, expected)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["train", *RUNS["lora"], "--output", "runs/finished/lora", "--resume"]) == 0
    assert "16 steps" in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_a_finished_run_is_evaluated_as_before(at, capfd):
    assert main(["eval", "runs/finished/lora", "--split", "validation"]) == 0
    agree(words(capfd.readouterr().out), words((at / "runs/eval.txt").read_text()))


def test_a_finished_run_predicts_as_before(at):
    assert main(["predict", "runs/finished/lora", "--text", *TEXTS, "--output", "predictions.jsonl"]) == 0
    new, old = (
        [json.loads(line) for line in (at / name).read_text().splitlines()] for name in ("predictions.jsonl", "runs/predictions.jsonl")
    )
    agree(new, old)


def test_a_finished_run_merges(at):
    assert main(["merge", "runs/finished/lora", "merged"]) == 0
    run, merged = load_run("runs/finished/lora"), jpeft.models.load("merged")
    assert merged.labels == run.labels
    adapted = jpeft.wrap(run.loaded.model.apply, run.peft.method)
    close(logits(merged.model.apply, {"params": merged.params}), logits(adapted, run.peft.variables))


@pytest.mark.parametrize("name", UNFINISHED)
def test_an_unfinished_run_goes_on_to_the_same_end(at, ends, expected, name, capfd):
    """Killed between checkpoints (lora), or interrupted in the first or the last stage of a method that has two."""
    folder, flags = at / "runs/unfinished" / name, RUNS[UNFINISHED[name]]
    assert not (folder / "result.json").exists()
    # Continued, not begun again.
    (step,) = [int(path.parent.name) for path in folder.glob("checkpoints/*/checksums.json")]
    flags = [flag if flag != "none" else "lines" for flag in flags]
    if flags[:2] == ENCODER and not np.array_equal(draws(), expected["draws"]):
        # This compiler draws another head, to the last bit, and these runs recorded one fingerprint of base and head together.
        assert main(["train", *flags, "--output", f"runs/unfinished/{name}", "--resume"]) == 2
        assert "its base changed" in capfd.readouterr().err
        return
    assert main(["train", *flags, "--output", f"runs/unfinished/{name}", "--resume"]) == 0
    assert f"after step {step}" in "".join(capfd.readouterr())
    ends_as_before(folder, UNFINISHED[name], ends, expected)

"""What is damaged: small models, runs, an adapter and data, made once and copied back before each mutation."""

import contextlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tiny_text import NOISE, WORDS, make_decoder, make_model, make_rows, shard, write_csv

import jpeft
from jpeft.training.config import TrainConfig
from jpeft.training.progress import SilentReporter
from jpeft.training.train import train

# Flags of the runs; the same for a continued one.
SHORT: dict[str, Any] = {"max_length": 8, "batch_size": 8, "progress": "none", "options": ("rank=2", "target=['query','value']")}
STEPS = 4


class Stopped(Exception):
    """The run was stopped on purpose."""


class StopsAt(SilentReporter):
    """Stops a run as a crash would, after some steps."""

    def __init__(self, step: int):
        self.step = step

    def update(self, step: int, loss: float, metric: str, rate: float) -> None:
        if step >= self.step:
            raise Stopped


class World:
    """A folder `path` that damage is done in, and a whole copy of it.

    The runs name their model and data by absolute paths, so what is damaged is always at the same place.
    """

    def __init__(self, path: Path):
        self.path = path
        self.whole = path.with_name(f"{path.name}.whole")
        if not self.whole.exists():
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            _make(path)
            path.rename(self.whole)
        self.restore()
        # The base of the adapter, as whoever calls `jpeft.load` has it in memory.
        loaded = jpeft.models.load(path / "encoder", num_labels=3)
        self.params, self.apply = loaded.params, loaded.model.apply

    def restore(self, names: Iterable[str] | None = None) -> None:
        """Undo all damage; in some entries of the world, if it is known that there is none elsewhere."""
        if names is None:
            shutil.rmtree(self.path, ignore_errors=True)
            shutil.copytree(self.whole, self.path)
            return
        for name in names:
            path, whole = self.path / name, self.whole / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if whole.is_dir():
                shutil.copytree(whole, path)
            elif whole.exists():
                shutil.copy2(whole, path)


def _make(world: Path) -> None:
    (world / "elsewhere").mkdir()
    (world / "elsewhere" / "precious.txt").write_text("not ours")
    rows = make_rows(40)
    write_csv(world / "data.csv", rows)
    (world / "pairs.jsonl").write_text("".join(json.dumps({"text": text, "target": label}) + "\n" for text, label in rows))
    make_model(world / "encoder")
    (world / "encoder" / "README.md").write_text("# A model\n")
    _make_word_list(world / "words", world / "encoder")
    make_decoder(world / "shards")
    shard(world / "shards", parts=2)
    _make_llama(world / "decoder", world / "shards")

    often = {"steps": STEPS, "checkpoint_every": 1, "log_every": 1}
    train(_config(world, "run", **often))
    train(_config(world, "other", **often, seed=1))
    with contextlib.suppress(Stopped):
        train(_config(world, "unfinished", **often), report=StopsAt(3))
    generation = {"task": "generation", "target": "target", "options": ("rank=2",)}
    train(_config(world, "writer", steps=STEPS, model=str(world / "decoder"), data=str(world / "pairs.jsonl"), **generation))

    params = jpeft.models.load(world / "encoder", num_labels=3).params
    jpeft.save(world / "adapter", jpeft.apply(params, method="lora", rank=2, target=["query", "value"]))
    jpeft.save(world / "prompt", jpeft.apply(params, method="prompt_tuning", length=2))


def _config(world: Path, output: str, **changes: Any) -> TrainConfig:
    places = {"model": str(world / "encoder"), "data": str(world / "data.csv"), "output": str(world / output)}
    return TrainConfig(**{**places, **SHORT, **changes})


def _make_word_list(folder: Path, encoder: Path) -> None:
    """The encoder again, with the kind of tokenizer that older folders have: vocab.txt."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(encoder / name, folder / name)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *NOISE, *(word for kind in WORDS.values() for word in kind)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 32}))


def _make_llama(folder: Path, with_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer)
    config = jpeft.models.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = jpeft.models.LlamaForCausalLM(config)
    params = model.init(jax.random.key(0), np.ones((1, 8), np.int32))["params"]
    jpeft.models.save(folder, model, params, tokenizer=tokenizer)

"""A tiny random BERT folder with a tokenizer, and sentences in three classes: for tests of trainer and command line."""

import csv
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jpeft.models

# A class shows in its own words; the rest is noise.
WORDS = {"fruit": ("apple", "pear", "plum"), "metal": ("iron", "zinc", "lead"), "water": ("rain", "lake", "pond")}
NOISE = ("the", "a", "some", "old", "new", "seen", "here", "now", "one", "two")


def make_model(folder: Path, *, seed: int = 0, dropout: float = 0.1) -> Path:
    """A two-layer BERT of width 16 with a word-level tokenizer, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *NOISE, *(word for kind in WORDS.values() for word in kind)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special)
    config = jpeft.models.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        # Far from zero, so that a random encoder tells words apart.
        initializer_range=0.3,
    )
    model = jpeft.models.BertModel(config)
    params = model.init(jax.random.key(seed), np.ones((1, 8), np.int32))["params"]
    jpeft.models.save(folder, model, params, tokenizer=fast)
    return folder


def shard(folder: Path, parts: int = 3) -> list[str]:
    """Splits model.safetensors into several files and their index, as large checkpoints are; the files' names."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    files = [f"model-{part:05}-of-{parts:05}.safetensors" for part in range(1, parts + 1)]
    weight_map = {name: files[i % parts] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return files


def make_rows(count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """`count` different (text, label) rows, classes in turn."""
    rng = np.random.default_rng(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = sorted(WORDS)[len(rows) % len(WORDS)]
        words = [*rng.choice(NOISE, 4), *rng.choice(WORDS[label], 2)]
        rows[" ".join(rng.permutation(words))] = label
    return list(rows.items())


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    """The rows as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def make_base(folder: Path, **sizes: int) -> dict[str, Any]:
    """A model folder and a data folder with so many rows in each split, as the first fields of a configuration."""
    make_model(folder / "model")
    rows = make_rows(sum(sizes.values()))
    for name, size in sizes.items():
        write_csv(folder / "data" / f"{name}.csv", rows[:size])
        rows = rows[size:]
    return {"model": str(folder / "model"), "data": str(folder / "data"), "max_length": 8, "progress": "none"}


def make_decoder(folder: Path, *, seed: int = 0, dropout: float = 0.0, positions: int = 32) -> Path:
    """A two-layer GPT-2 of width 16 with a word-level tokenizer that has no padding token, like GPT-2's own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<unk>", *NOISE, *(word for kind in WORDS.values() for word in kind), *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    config = jpeft.models.GPT2Config(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        attention_dropout=dropout,
        hidden_dropout=dropout,
        embedding_dropout=dropout,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = jpeft.models.GPT2LMHeadModel(config)
    params = model.init(jax.random.key(seed), np.ones((1, 8), np.int32))["params"]
    jpeft.models.save(folder, model, params, tokenizer=fast)
    return folder

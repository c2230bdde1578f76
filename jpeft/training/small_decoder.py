"""A small pretrained decoder where none can be downloaded: a GPT-2 of two million parameters, trained once on the docstrings at hand.

    from jpeft.training.small_decoder import decoder
    folder = decoder()            # minutes the first time, nothing afterwards

It is an ordinary Hugging Face folder with a byte-level BPE tokenizer, for ``jpeft train --model``, `jpeft.models.load` or transformers.
It writes the language of numerical Python and little sense: enough to tell one fine-tuning method from another.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jpeft
from jpeft import models
from jpeft.checkpoint.files import write_atomically
from jpeft.data import python_docs
from jpeft.training.config import TrainConfig
from jpeft.training.train import train

END = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the decoder is made."""

    # Packages whose docstrings it learns.
    packages: tuple[str, ...] = python_docs.PACKAGES
    # Words of the tokenizer, the 256 bytes and the end of text among them.
    vocabulary: int = 2048
    layers: int = 4
    width: int = 192
    heads: int = 6
    # Longest sequence. Later tasks take half of it, which leaves the rest to prompts.
    length: int = 256
    # Steps of `batch_size` full rows: a million and a half tokens, none of them twice.
    steps: int = 1500
    batch_size: int = 4
    learning_rate: float = 3e-3
    seed: int = 0


def decoder(recipe: Recipe = Recipe(), *, cache: str | os.PathLike[str] | None = None, progress: Any = "auto") -> Path:
    """The folder of the decoder, which is trained if it is not there.

    All weights are trained, from random ones, with the library's own trainer (`freeze` with every path as its target). A training
    that was interrupted goes on where it was; two processes that ask at once wait for each other.

    Args:
      recipe: How it is made.
      cache: Folder to keep it in; `cache_folder()` if None. Another recipe, or another version of a package it learns from, is another
        decoder.
      progress: As `TrainConfig.progress`.

    Returns:
      A Hugging Face folder.

    Raises:
      ValueError: if a package it learns from is not installed.
    """
    from filelock import FileLock

    folder = Path(cache or cache_folder()) / f"decoder-{_key(recipe)}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "run" / "result.json").exists():  # which the trainer writes last
            if not (folder / "start").exists():
                _write_start(folder, recipe)
            _pretrain(folder, recipe, progress)
    return folder / "run" / "merged"


def cache_folder() -> Path:
    """Where made models are kept: $JPEFT_CACHE, or `jpeft` in the user's cache folder."""
    if given := os.environ.get("JPEFT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jpeft")


def _key(recipe: Recipe) -> str:
    # That of jpeft too, because another version may not continue an interrupted run of this one.
    versions = {name: importlib.metadata.version(name) for name in recipe.packages} | {"jpeft": jpeft.__version__}
    about = json.dumps({"recipe": dataclasses.asdict(recipe), "versions": versions}, sort_keys=True)
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def _write_start(folder: Path, recipe: Recipe) -> None:
    """What training starts from: the texts in `data`, then in `start` the tokenizer and the model with random weights."""
    tables = python_docs.docs(recipe.packages)
    (folder / "data").mkdir(exist_ok=True)
    for name, table in tables.items():
        write_atomically(folder / "data" / f"{name}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in table.text))
    tokenizer = _tokenizer(tables["train"].text, recipe)
    config = models.GPT2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.length,
        # Less than one pass over the data: there is nothing to regularise.
        attention_dropout=0.0,
        hidden_dropout=0.0,
        embedding_dropout=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = models.GPT2LMHeadModel(config)
    params = jax.jit(model.init)(jax.random.key(recipe.seed), jnp.ones((1, 8), jnp.int32))["params"]
    models.save(folder / "start", model, params, tokenizer=tokenizer)


def _tokenizer(texts: list[str], recipe: Recipe) -> Any:
    """Byte-level BPE, as GPT-2's: any text is a sequence of its words."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, bos_token=END, model_max_length=recipe.length)


def _pretrain(folder: Path, recipe: Recipe, progress: Any) -> None:
    train(
        TrainConfig(
            model=str(folder / "start"),
            output=str(folder / "run"),
            data=str(folder / "data"),
            task="generation",
            method="freeze",
            options=("target=.*",),
            max_length=recipe.length,
            batch_size=recipe.batch_size,
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            schedule="cosine",
            seed=recipe.seed,
            log_every=25,
            checkpoint_every=250,
            keep=1,
            resume=True,
            export=True,
            progress=progress,
        )
    )

"""A small pretrained decoder for machines without network: a GPT-2 of two million parameters, trained once on installed docstrings.

    from jpeft.training.small_decoder import decoder
    folder = decoder()            # minutes the first time, nothing afterwards

The folder is an ordinary Hugging Face folder with a byte-level BPE tokenizer, for ``jpeft train --model``, `jpeft.models.load` or
transformers. The model's texts look like docstrings and make little sense, but it is good enough to compare fine-tuning methods.
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
    """How the decoder is made.

    Attributes:
      packages: Packages whose docstrings are the training data.
      vocabulary: Tokens of the tokenizer, including the 256 bytes and the end of text.
      layers: Number of layers.
      width: Width of a layer.
      heads: Attention heads of a layer.
      length: Longest sequence. Fine-tuning tasks use half of it and leave the rest to prompts.
      steps: Training steps: a million and a half tokens, none of them twice.
      batch_size: Full rows of a step.
      learning_rate: Peak learning rate.
      seed: Seed of initial weights and data order.
    """

    packages: tuple[str, ...] = python_docs.PACKAGES
    vocabulary: int = 2048
    layers: int = 4
    width: int = 192
    heads: int = 6
    length: int = 256
    steps: int = 1500
    batch_size: int = 4
    learning_rate: float = 3e-3
    seed: int = 0


def decoder(recipe: Recipe = Recipe(), *, cache: str | os.PathLike[str] | None = None, progress: Any = "auto") -> Path:
    """Return the folder of the decoder, after training it if it does not exist.

    All weights are trained from random values with `jpeft.training` (`freeze` with every path as its target). An interrupted training is
    continued. If two processes call this at once, one waits for the other.

    Args:
      recipe: How the decoder is made.
      cache: Folder that holds decoders; `cache_folder()` if None. Each recipe, and each version of the packages, has its own decoder.
      progress: As `TrainConfig.progress`.

    Returns:
      A Hugging Face folder.

    Raises:
      ValueError: if a package of the recipe is not installed.
    """
    from filelock import FileLock

    folder = Path(cache or cache_folder()) / f"decoder-{_key(recipe)}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "run" / "result.json").exists():  # the trainer writes it last
            if not (folder / "start").exists():
                _write_start(folder, recipe)
            _pretrain(folder, recipe, progress)
    return folder / "run" / "merged"


def cache_folder() -> Path:
    """Return the folder of decoders: $JPEFT_CACHE, or `jpeft` in the user's cache folder."""
    if given := os.environ.get("JPEFT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jpeft")


def _key(recipe: Recipe) -> str:
    # The version of jpeft counts too, because another version may be unable to continue an interrupted run.
    versions = {name: importlib.metadata.version(name) for name in recipe.packages} | {"jpeft": jpeft.__version__}
    about = json.dumps({"recipe": dataclasses.asdict(recipe), "versions": versions}, sort_keys=True)
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def _write_start(folder: Path, recipe: Recipe) -> None:
    """Write the training data to `data`, and tokenizer and model with random weights to `start`."""
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
        # No dropout: training is less than one pass over the data, so nothing needs regularisation.
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
    """Return a byte-level BPE tokenizer like GPT-2's, which can encode any text."""
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

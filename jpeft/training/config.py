"""The configurations of training and of comparing: frozen dataclasses, a comment per field, turned into flags by tyro."""

from __future__ import annotations

import ast
import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import tyro

OptionPairs = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME=VALUE ...]")]
TaskName = Literal["sequence-classification", "token-classification", "generation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a training run and a comparison of many have in common."""

    # (A blank line after each banner keeps it out of the flags' help.)
    # --- what is trained, on what -----------------------------------------------------------------

    # Folder with a Hugging Face checkpoint (config.json, model.safetensors, tokenizer files), or a hub id.
    model: str
    # Data: a folder with train/validation/test files, a file, "hub:name[/config]", or what comes along: "builtin", for generation also
    # one of "builtin:reference" and "builtin:summaries".
    data: str
    # Folder of the run: config, metrics, curve, checkpoints, adapter, result. Must be new or empty.
    output: str
    # Column that holds the text; for generation, what the target continues, or all there is.
    text: str = "text"
    # Column that holds the second text of a pair; none for single texts.
    pair: str | None = None
    # Column that holds the label.
    label: str = "label"
    # Column that holds what is to be generated; without one, generation learns to continue the texts themselves.
    target: str | None = None
    # Column that holds a list of tags, for token classification; that of the text then holds lists of words.
    tags: str = "tags"
    # What the model is asked to do.
    task: TaskName = "sequence-classification"
    # Tokens per text (or pair), longer ones are cut; plain texts for generation fill rows of this length. Every batch has it.
    max_length: int = 128

    # --- optimisation -----------------------------------------------------------------------------

    # Examples per optimizer step.
    batch_size: int = 16
    # Passes over the training data.
    epochs: int = 5
    # Optimizer steps, instead of epochs.
    steps: int | None = None
    # Peak learning rate; none takes the method's own default.
    learning_rate: float | None = None
    # Learning rate of the newly made head, as a multiple of the others': it starts from nothing, all else from something good. None takes
    # the method's own default.
    head_rate: float | None = None
    # Course of the learning rate after the warmup; linear and cosine end at zero.
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    # Share of all steps over which the learning rate rises linearly.
    warmup: float = 0.06
    # Decoupled weight decay of the trained parameters (frozen ones are never decayed).
    weight_decay: float = 0.01
    # Largest global norm of the gradient over the trained parameters; none for no clipping.
    clip: float | None = 1.0
    # Micro-batches a step's batch is split into, to save memory; must divide batch_size.
    accumulate: int = 1
    # Type the model computes in; parameters stay float32.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Recompute activations in the backward pass, to save memory; "dots" keeps the products of matrices, and costs next to no time.
    remat: bool | Literal["dots"] = False
    # Run the layers as one scanned loop, to compile faster.
    scan: bool = False
    # Devices by axis, e.g. data=2,fsdp=4 or fsdp=-1 (-1: what is left); none for one device. data and fsdp split the batch, fsdp and tensor
    # the weights.
    mesh: str | None = None

    # --- evaluation, logging, checkpoints ---------------------------------------------------------

    # Steps between evaluations on the validation split; none for the end of each epoch.
    eval_every: int | None = None
    # Evaluations without a better validation metric before training stops; none never stops early.
    patience: int | None = None
    # Keep the adapter of the best evaluation instead of the last one (implied by patience).
    keep_best: bool = False
    # Steps between two lines in metrics.jsonl.
    log_every: int = 10
    # Steps between checkpoints.
    checkpoint_every: int = 100
    # Checkpoints kept on disk.
    keep: int = 2
    # What is shown while training; auto is a bar on a terminal and lines elsewhere.
    progress: Literal["auto", "bar", "lines", "none"] = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Fine-tune a pretrained model: `jpeft train --model FOLDER --output RUN --method lora rank=8`.

    Example:
        >>> TrainConfig(model="bert-base-uncased", data="builtin", output="run", method="lora", options=("rank=8",)).method
        'lora'
    """

    # Name of the PEFT method; `jpeft methods` lists them.
    method: str = "lora"
    # Options of the method, e.g. rank=8 alpha=16; values are Python literals, anything else is a string.
    options: OptionPairs = ()
    # Seed of the adapter, the new head, the data order and dropout; the pretrained base never depends on it.
    seed: int = 0
    # Continue the run in `output` from its newest checkpoint.
    resume: bool = False
    # Delete the finished or broken run in `output` first.
    overwrite: bool = False
    # Also write the merged model as a Hugging Face folder, `output`/merged.
    export: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """Train several methods on one task with shared seeds: a table and a picture of quality against parameters.

    Each method and seed is a run of its own below the output folder. The same command again reads finished runs back and continues
    an interrupted one.
    """

    # Folder of the comparison: a run folder for each method and seed, results.json, table.md, compare.png.
    output: str
    # Rows, each a method with options in quotes: lora "lora rank=4 target=['query','value']" "bitfit learning_rate=1e-3". Rows are
    # also "head-only" and "full" (fine-tuning); "all" stands for these two and every method that applies.
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ROW ...")] = ("all",)
    # Seeds that every row is trained with.
    seeds: tuple[int, ...] = (0, 1, 2)
    # Which parameters the picture shows on its horizontal axis.
    parameters: Literal["trained", "stored", "changed"] = "trained"


# Changing one of these between an interrupted run and its continuation leaves the trained adapter as it is (a mesh, but for rounding).
WITHOUT_EFFECT = frozenset({"output", "log_every", "checkpoint_every", "keep", "resume", "overwrite", "export", "progress", "mesh"})


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Turns `("rank=8", "target=.*query/kernel")` into keyword arguments of a method's factory.

    Values are Python literals, `true`, `false` and `none` in any case among them; what is no literal is a string.

    Raises:
        ValueError: for a pair without `=` or a name given twice.

    Example:
        >>> parse_options(["rank=8", "target=.*query/kernel", "bias=False"])
        {'rank': 8, 'target': '.*query/kernel', 'bias': False}
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"method option {pair!r} is not of the form NAME=VALUE, such as rank=8")
        if name in options:
            raise ValueError(f"method option {name!r} is given twice: {list(pairs)}")
        options[name] = _value(text)
    return options


def resolved(config: TrainConfig) -> TrainConfig:
    """The same configuration with local paths made absolute, so that a run can be opened from any directory."""
    local = {name: os.path.abspath(path) for name in ("model", "data") if os.path.exists(path := getattr(config, name))}
    return dataclasses.replace(config, output=os.path.abspath(config.output), **local)


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ between two configurations (as dicts) and change what is trained: name -> (old, new).

    Example:
        >>> changed_fields({"seed": 0, "keep": 2}, {"seed": 1, "keep": 3})
        {'seed': (0, 1)}
    """
    names = [name for name in {**old, **new} if name not in WITHOUT_EFFECT]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON values."""
    return dataclasses.asdict(config) | {"options": list(config.options)}


def from_json(values: Mapping[str, Any]) -> TrainConfig:
    """Inverse of `to_json`; fields unknown to this version are a ValueError."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"the run's configuration has unknown fields {unknown}: it was written by another version of jpeft")
    return TrainConfig(**{**values, "options": tuple(values.get("options", ()))})


def check_values(config: TrainConfig) -> None:
    """Refuses values that cannot be meant.

    Called by the trainer and not at construction, where the command line's parser would take the error for its own.

    Raises:
        ValueError: naming the field, its value and what it may be.
    """
    for name in ("max_length", "batch_size", "epochs", "accumulate", "log_every", "checkpoint_every", "keep"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    for name in ("steps", "eval_every", "patience"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1 (or none), got {value}")
    for name in ("learning_rate", "head_rate", "clip"):
        if (value := getattr(config, name)) is not None and not value > 0:
            raise ValueError(f"{name} must be positive (or none), got {value}")
    if not 0 <= config.warmup <= 1:
        raise ValueError(f"warmup is a share of all steps between 0 and 1, got {config.warmup}")
    if not config.weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {config.weight_decay}")
    if config.batch_size % config.accumulate:
        raise ValueError(f"accumulate={config.accumulate} does not divide batch_size={config.batch_size}")
    if config.resume and config.overwrite:
        raise ValueError("resume continues the run in the output folder and overwrite deletes it: give one of them")
    parse_options(config.options)


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

"""The configurations of training and of comparing: frozen dataclasses whose fields are the command line's flags.

A flag is one field here: its help text, range and rules are arguments of `setting` (docs/guides/adding_a_flag.md).
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from jpeft.models.checkpoints.added_tokens import check_added_tokens
from jpeft.sharding import parse_mesh
from jpeft.tasks.registry import TASKS
from jpeft.training.options import check_method
from jpeft.training.options import parse_options as parse_options
from jpeft.training.setting import check_ranges, configuration, names_where, renamed, setting, unrecorded

# The names of all tasks, so that the command line lists them.
if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]


@configuration
class Settings:
    """What a training run and a comparison of many have in common."""

    # --- what is trained, on what -----------------------------------------------------------------

    model: str = setting("Folder with a Hugging Face checkpoint (config.json, model.safetensors, tokenizer files), or a hub id.")
    data: str = setting(
        'Data: a folder with train/validation/test files, a file, "hub:name[/config]", or a built-in data set: "builtin" for '
        'classification, "builtin:docs", "builtin:reference" or "builtin:summaries" for generation.'
    )
    output: str = setting(
        "Folder of the run: configuration, metrics, curve, checkpoints, adapter, result. Must be new or empty.", resume_safe=True
    )
    revision: str | None = setting("Branch, tag or commit of the model on the hub; none for its main branch.", default=None)
    fresh_head: bool = setting(
        "Initialise a new head with labels, even if the checkpoint has one for the labels of the data.", default=False
    )
    keep_head: bool = setting(
        "Keep the checkpoint's head with labels, even if its labels have other names: its outputs are taken in their order.", default=False
    )
    untie: bool = setting(
        "Give the head of a language model a copy of the word embedding, where the two are one, so that one of them alone may be changed.",
        default=False,
    )
    text: str = setting("Text column. For generation: the prompt if --target is given, otherwise the whole text.", default="text")
    pair: str | None = setting("Column of the second text of a pair; none for single texts.", default=None)
    label: str = setting("Label column.", default="label")
    target: str | None = setting(
        "Column of the text to generate. Without it, generation learns to continue the texts of the text column.", default=None
    )
    tags: str = setting("For token classification: column of the lists of tags. The text column then holds lists of words.", default="tags")
    tag_names: tuple[str, ...] = setting(
        "Names of the tags 0, 1, ... in the data, if its tags are numbers: O B-PER I-PER ...", default=(), metavar="[NAME ...]"
    )
    task: TaskName = setting("Task of the model.", default="sequence-classification", registry=TASKS)
    add_tokens: tuple[str, ...] = setting(
        "Tokens that the model does not have yet: each is added to the tokenizer, and as a row to the embedding, which is trained beside "
        "whatever the method trains.",
        default=(),
        metavar="TOKEN ...",
    )
    max_length: int = setting(
        "Tokens per text (or pair). Longer texts are cut; plain texts for generation are joined and cut into rows of this length. Every "
        "batch has this length.",
        default=128,
        at_least=1,
    )

    overlong: Literal["error", "cut", "drop"] = setting(
        "Generation: rows longer than max_length. error refuses them; cut takes tokens from the beginning of the text, down to half of a "
        "row, and then from the end of the target; drop leaves the rows out.",
        default="error",
    )

    # --- optimisation -----------------------------------------------------------------------------

    batch_size: int = setting("Examples per optimizer step.", default=16, at_least=1)
    epochs: int = setting("Passes over the training data.", default=5, at_least=1)
    steps: int | None = setting("Optimizer steps; replaces epochs.", default=None, at_least=1)
    learning_rate: float | None = setting("Peak learning rate; none for the method's default.", default=None, above=0, per_row=True)
    head_lr_scale: float | None = setting(
        "Learning rate of a newly initialised head, as a multiple of the learning rate of all other parameters; none for the method's "
        "default.",
        default=None,
        above=0,
        old_names=("head_rate",),
    )
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "Schedule of the learning rate after the warmup; linear and cosine end at zero.", default="linear"
    )
    warmup: float = setting("Share of all steps over which the learning rate rises linearly.", default=0.06, at_least=0, at_most=1)
    weight_decay: float = setting("Decoupled weight decay of the trained parameters; frozen ones never decay.", default=0.01, at_least=0)
    decay_biases: bool = setting("Let weight decay act on biases and normalisations, too.", default=False, unrecorded=True)
    label_smoothing: float = setting(
        "Share of the target probability that the training loss spreads evenly over all classes (all tokens of the vocabulary, for "
        "generation).",
        default=0.0,
        at_least=0,
        at_most=1,
    )
    clip: float | None = setting(
        "Largest global norm of the gradient over the trained parameters; none for no clipping.", default=1.0, above=0
    )
    grad_accum: int = setting(
        "Micro-batches that each batch is split into, to save memory; must divide batch_size.",
        default=1,
        at_least=1,
        old_names=("accumulate",),
    )
    dtype: Literal["float32", "bfloat16"] | None = setting(
        "Type that the model computes in; none for bfloat16 on an accelerator with a base in bfloat16, and float32 elsewhere.",
        default=None,
        unrecorded="float32",
    )
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        "Type of the frozen base; none for the checkpoint's own. What is trained is float32 in any case.",
        default=None,
        unrecorded="float32",
    )
    remat: bool | Literal["dots", "auto"] = setting(
        'Recompute activations in the backward pass, to save memory; "dots" keeps the results of matrix products and costs little time. '
        '"auto" takes the first of False, "dots" and True whose step fits into the memory of the device, where the device tells it.',
        default="auto",
        # Another one changes the adapter by rounding errors only.
        resume_safe=True,
        unrecorded=False,
    )
    attention: Literal["auto", "xla", "cudnn", "splash"] = setting(
        "Who computes attention: auto takes the kernel of the device where it can (cudnn on a GPU, splash on a TPU), else XLA. A kernel "
        "that is asked for by name is an error where it cannot.",
        default="auto",
        # Another one changes the adapter by rounding errors only.
        resume_safe=True,
        unrecorded="xla",
    )
    scan: bool | None = setting(
        "Run the layers as one scanned loop, to compile faster; none to do so for decoders, and encoders of 12 layers or more, unless the "
        "method is told about single layers.",
        default=None,
        unrecorded=False,
    )
    mesh: str | None = setting(
        "Devices by axis, e.g. data=2,fsdp=4 or fsdp=-1 (-1: all remaining devices); none for one device. data and fsdp split the batch, "
        "fsdp and tensor the weights.",
        default=None,
        # Another mesh changes the adapter by rounding errors only.
        resume_safe=True,
    )

    movement_steps: int | None = setting(
        "Steps of full fine-tuning that measure how far each weight moves, for methods that start from that (far stage=learners, "
        "diff_pruning stage=mask); none for a tenth of the run's steps.",
        default=None,
        at_least=1,
    )

    # --- evaluation, logging, checkpoints ---------------------------------------------------------

    eval_every: int | None = setting(
        "Steps between evaluations on the validation split; none for one at the end of each epoch.", default=None, at_least=1
    )
    patience: int | None = setting(
        "Stop after this many evaluations without a better validation metric; none never stops early.", default=None, at_least=1
    )
    keep_best: bool = setting("Keep the adapter of the best evaluation instead of the last one (implied by patience).", default=False)
    log_every: int = setting("Steps between two lines in metrics.jsonl.", default=10, at_least=1, resume_safe=True)
    checkpoint_every: int = setting("Steps between checkpoints.", default=100, at_least=1, resume_safe=True)
    keep: int = setting("Number of checkpoints kept on disk.", default=2, at_least=1, resume_safe=True)
    progress: Literal["auto", "bar", "lines", "none"] = setting(
        "Progress display; auto is a bar on a terminal and lines elsewhere.", default="auto", resume_safe=True
    )


@configuration
class TrainConfig(Settings):
    """Fine-tune a pretrained model: `jpeft train --model FOLDER --output RUN --method lora rank=8`.

    Example: `TrainConfig(model="bert-base-uncased", data="builtin", output="run", method="lora", options=("rank=8",))`.
    """

    method: str = setting("Name of the PEFT method; `jpeft methods` lists them.", default="lora", per_row=True)
    options: tuple[str, ...] = setting(
        "Options of the method, e.g. rank=8 alpha=16; values are Python literals, anything else is a string.",
        default=(),
        per_row=True,
        positional=True,
        metavar="[NAME=VALUE ...]",
    )
    adapter: str | None = setting(
        "Folder of an adapter to train on, or a hub id: of HF PEFT, of the library adapters, of jpeft, or of a run. It brings its method "
        "and options. none begins with a new adapter.",
        default=None,
        # What it was is in the run's configuration; where it lies does not matter.
        resume_safe=True,
    )
    seed: int = setting(
        "Seed of the adapter, the new head, the data order and dropout; the pretrained base does not depend on it.",
        default=0,
        at_least=0,
        at_most=2**32 - 1,
        per_row=True,
    )
    resume: bool = setting("Continue the run in `output` from its newest checkpoint.", default=False, resume_safe=True)
    overwrite: bool = setting("Delete the run in `output` first.", default=False, resume_safe=True)
    export: bool = setting("Also write the merged model as a Hugging Face folder, `output`/merged.", default=False, resume_safe=True)


@configuration
class CompareConfig(Settings):
    """Train several methods on one task with shared seeds: a table and a picture of quality against parameters.

    Each method and seed is a run of its own below the output folder. The same command run again reads finished runs back and continues an
    interrupted one.
    """

    output: str = setting("Folder of the comparison: a run folder for each method and seed, results.json, table.md, compare.png.")
    methods: tuple[str, ...] = setting(
        "Rows, each a method with options in quotes: lora \"lora rank=4 target=['query','value']\" \"bitfit learning_rate=1e-3\". The "
        'baselines "head-only" and "full" (fine-tuning) are rows too; "all" stands for the baselines and every method that applies.',
        default=("all",),
        metavar="ROW ...",
    )
    seeds: tuple[int, ...] = setting("Seeds; every row is trained once with each.", default=(0, 1, 2))
    parameters: Literal["trained", "stored", "changed"] = setting(
        "Parameter count on the horizontal axis of the picture.", default="trained"
    )


def resolved(config: TrainConfig) -> TrainConfig:
    """Return the same configuration with local paths made absolute, so that a run can be opened from any directory."""
    places = {name: path for name in ("model", "data", "adapter") if (path := getattr(config, name)) is not None}
    local = {name: os.path.abspath(path) for name, path in places.items() if os.path.exists(path)}
    return dataclasses.replace(config, output=os.path.abspath(config.output), **local)


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ between two configurations (as dicts) and change what is trained: name -> (old, new).

    >>> changed_fields({"seed": 0, "keep": 2}, {"seed": 1, "keep": 3})
    {'seed': (0, 1)}
    """
    safe = names_where(TrainConfig, lambda about: about.resume_safe)
    names = [name for name in {**old, **new} if name not in safe]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def to_json(config: TrainConfig, **used: Any) -> dict[str, Any]:
    """Return the configuration as JSON values.

    Args:
      config: The configuration.
      **used: The values that the run uses for fields that are None, which stands for a default of the method.
    """
    # Lists, as JSON reads them back.
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()}
    by_default = [name for name in used if values[name] is None]
    return values | {name: used[name] for name in by_default} | ({"by_default": by_default} if by_default else {})


def from_json(values: Mapping[str, Any]) -> TrainConfig:
    """Read what `to_json` wrote, also by an earlier version: fields that are newer have the values that it behaved by.

    Raises:
      ValueError: for fields that this version does not know.
    """
    names = renamed(TrainConfig)
    values = {names.get(name, name): value for name, value in values.items()}
    by_default = values.pop("by_default", ())
    values |= dict.fromkeys(by_default) if set(by_default) <= values.keys() else {"by_default": by_default}
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"The run's configuration has unknown fields {unknown}: it was written by another version of jpeft.")
    found: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return TrainConfig(**unrecorded(TrainConfig) | found)


def pinned(config: TrainConfig, record: Mapping[str, Any]) -> TrainConfig:
    """Return a configuration with what a run has found out for settings of the model that are left to it, as the run recorded them.

    Earlier versions recorded a value where there is a default now. A run keeps the form that it began with.
    """
    found = {name: record.get(name) for name in ("dtype", "param_dtype", "scan") if getattr(config, name) is None}
    return dataclasses.replace(config, **found)


def check_values(config: TrainConfig) -> None:
    """Raise a ValueError for values out of range or at odds with each other.

    The trainer calls this. The constructor does not, because the command line's parser would take the error for its own.

    Raises:
      ValueError: naming the field, its value and what it may be.
    """
    check_ranges(config)
    if config.batch_size % config.grad_accum:
        raise ValueError(f"grad_accum={config.grad_accum} does not divide batch_size={config.batch_size}.")
    if config.fresh_head and config.keep_head:
        raise ValueError("`fresh_head` leaves out the checkpoint's head and `keep_head` keeps it: give one of them.")
    if config.resume and config.overwrite:
        raise ValueError("`resume` continues the run in the output folder and `overwrite` replaces it: give one of them.")
    check_method(config.method, parse_options(config.options))
    if config.adapter is not None and (config.options or config.add_tokens):
        name = "options" if config.options else "add_tokens"
        raise ValueError(f"The adapter in {config.adapter} brings its method and options: leave out `{name}`.")
    if config.mesh is not None:
        parse_mesh(config.mesh)
    if len(set(config.tag_names)) < len(config.tag_names):
        raise ValueError(f"tag_names must be different names, got {', '.join(config.tag_names)}.")
    check_added_tokens(config.add_tokens)

"""From a configuration to the model and its method, in the order in which they are built: columns, base, method, adapter."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

import jpeft
from jpeft import models, registry
from jpeft.core.method import Method
from jpeft.core.peft import Peft
from jpeft.tasks.task import Task, find_task
from jpeft.tasks.token_ids import check_token_ids
from jpeft.training.added_tokens import with_added_tokens
from jpeft.training.config import TrainConfig, parse_options
from jpeft.training.keys import keys
from jpeft.tree.head import HEAD


def read_columns(config: TrainConfig, task: Task) -> dict[str, Any]:
    """Return the columns that the task reads, as arguments of `jpeft.data.read` and `splits`.

    Raises:
      ValueError: if the configuration names a column that the task does not use.
    """
    optional = {"pair": config.pair, "label": config.label, "target": config.target, "tags": config.tags}
    # `label` and `tags` have a default, so they may be set where the task does not use them.
    unused = [name for name in ("pair", "target") if optional[name] is not None and name not in task.columns]
    if unused:
        raise ValueError(
            f"The task {task.name} has no use for `{unused[0]}`={optional[unused[0]]!r}; it reads {', '.join(('text', *task.columns))}."
        )
    if config.tag_names and "tags" not in task.columns:
        raise ValueError(f"The task {task.name} has no use for tag_names: it reads {', '.join(('text', *task.columns))}.")
    columns = {"text": config.text, **{name: column if name in task.columns else None for name, column in optional.items()}}
    return columns | {"tag_names": config.tag_names}


def load_base(config: TrainConfig, labels: tuple[str, ...], mesh: Mesh | None = None) -> models.Loaded:
    """Load the pretrained model with a head for `labels`, on a mesh if one is given.

    Raises:
      ValueError: from the loader, or if the model cannot take `max_length` tokens.
    """
    loaded = models.load(
        config.model,
        task=find_task(config.task).model,
        labels=labels,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        remat=False if config.remat == "auto" else config.remat,
        attention=config.attention,
        scan=False if config.scan is None and picks_blocks(config) else config.scan,
        add_tokens=config.add_tokens,
        fresh_head=config.fresh_head,
        keep_head=config.keep_head,
        untie=config.untie,
        revision=config.revision,
        key=keys(config.seed).head,
        mesh=mesh,
    )
    if config.max_length > loaded.config.max_length:
        raise ValueError(f"max_length={config.max_length} is more than the model's {loaded.config.max_length} positions.")
    return loaded


def picks_blocks(config: TrainConfig) -> bool:
    """Return whether the method is told about single blocks of the model, which stacked blocks do not let it choose."""
    method: Any = registry.methods()[config.method].factory
    options = parse_options(config.options)
    return method.picks_blocks({name: value for name, value in options.items() if name != "tokens"})


def method_options(config: TrainConfig, tokenizer: Any = None) -> dict[str, Any]:
    """Return the method's options. If `tokens` is text and a tokenizer is given, it becomes the token ids of the text."""
    options = parse_options(config.options)
    if isinstance(options.get("tokens"), str) and tokenizer is not None:
        options["tokens"] = tokenizer(options["tokens"], add_special_tokens=False)["input_ids"]
    return options


def make_method(config: TrainConfig, loaded: models.Loaded, recorded: dict[str, Any] | None = None) -> Method:
    """Make the method that the configuration names; of a run that is continued, the method that its folder records.

    A record has all options, so a run keeps the defaults that it began with, whatever they are in this version. Every parameter that the
    checkpoint lacks is trained along as part of the head: beside the head, that may be a pooler, which must not keep its random initial
    values.
    """
    if recorded is not None:
        return jpeft.make(recorded)
    given = parse_options(config.options).get("tokens")
    options = method_options(config, None if given is None else loaded.tokenizer)
    if isinstance(given, str):
        check_token_ids({"input_ids": np.asarray([options["tokens"]], np.int32)}, loaded)
    others = [path for path in loaded.initialised if not re.fullmatch(HEAD, path)]
    if others and "head" not in options:
        options["head"] = "|".join([HEAD, *sorted(map(re.escape, others))])
    return with_added_tokens(config.method, options, loaded)


def attach(
    config: TrainConfig,
    loaded: models.Loaded,
    make_statistics: Callable[[Method], Any] | None = None,
    recorded: dict[str, Any] | None = None,
    steps: int | None = None,
) -> Peft:
    """Return the base with a newly initialised adapter of the configured method.

    Args:
      config: Names the method.
      loaded: The base.
      make_statistics: Makes the statistics that the method requires; see `jpeft.training.statistics`. None where there is no data.
      recorded: As for `make_method`.
      steps: Number of updates of the run, for a method that spreads something over them. None where nothing is trained.

    Raises:
      ValueError: if the method requires statistics and they cannot be made, or if it needs an index for each example.
    """
    method = make_method(config, loaded, recorded)
    if method.takes_index:
        raise ValueError(
            f"{method!r} needs an index for each example, and the trainer gives none: train it in a loop of your own, with jpeft.assign."
        )
    method = method if steps is None else method.for_steps(steps)
    stats = None
    if method.requires_stats:
        if make_statistics is None:
            kinds = ", ".join(kind.__name__ for kind in method.requires_stats)
            raise ValueError(f"{config.method} requires the statistics {kinds} of a model and its data, and there is no data here.")
        stats = make_statistics(method)
    return jpeft.apply(loaded.params, method=method, key=keys(config.seed).adapter, stats=stats)

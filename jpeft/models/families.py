"""The families of models, one folder each. A new family is a folder and a line in `FOLDERS` (see docs/guides/adding_a_family.md)."""

import functools
import importlib
from typing import Any

import flax.linen as nn
import jax

from jpeft.models.common.family import Family, token_ids
from jpeft.sharding import Rules

# Each folder of `jpeft.models` has a module `family` that defines FAMILY.
FOLDERS = (
    "bert",
    "gpt2",
    "llama",
)

FAMILIES: tuple[Family, ...] = tuple(importlib.import_module(f"jpeft.models.{folder}.family").FAMILY for folder in FOLDERS)

LANGUAGE_MODEL = "language-model"  # the task that stands for a family's masked or causal language model


def family_of(model_type: str) -> Family:
    """Return the family of a model type.

    Raises:
      ValueError: if no family has it.

    >>> family_of("qwen3").config.__name__
    'LlamaConfig'
    """
    for family in FAMILIES:
        if model_type in family.hf_classes:
            return family
    raise ValueError(
        f"Unknown model_type {model_type!r}; supported: {', '.join(name for family in FAMILIES for name in family.hf_classes)}."
    )


def tasks() -> tuple[str, ...]:
    """Return the names of all tasks that some family has a model for.

    >>> tasks()[:3]
    ('encoder', 'sequence-classification', 'token-classification')
    """
    return (*dict.fromkeys(task for family in FAMILIES for task in family.models), LANGUAGE_MODEL)


def resolve_task(family: Family, task: str) -> str | None:
    """Return the key of `family.models` for a task; None if the family has no model for it.

    >>> resolve_task(family_of("gpt2"), "language-model")
    'causal-lm'
    """
    task = family.language_model or task if task == LANGUAGE_MODEL else task
    return task if task in family.models else None


def model_types(task: str) -> list[str]:
    """Return the model types that have a model for the task.

    >>> model_types("masked-lm")
    ['bert', 'roberta', 'distilbert', 'xlm-roberta', 'camembert', 'electra']
    """
    return [name for family in FAMILIES if resolve_task(family, task) for name in family.hf_classes]


def partition_rules(model: nn.Module) -> Rules:
    """Return how the parameters of one of our models are split over a mesh: rules for `jpeft.sharding`.

    >>> from jpeft.models import BertConfig, BertModel, abstract_params
    >>> from jpeft.sharding import abstract_mesh, placements
    >>> model = BertModel(BertConfig(num_hidden_layers=1))
    >>> placed = placements(abstract_params(model), abstract_mesh(8, fsdp=4, tensor=2), partition_rules(model))
    >>> placed["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"].spec
    P('fsdp', 'tensor')
    """
    return family_of(model.config.model_type).partition


def abstract_params(model: nn.Module) -> dict[str, Any]:
    """Return the parameter tree of a model as `jax.ShapeDtypeStruct`s. Nothing is computed or allocated.

    The family of ``model.config.model_type`` says which inputs the model needs. A model without such a configuration is given token ids.

    >>> from jpeft.models import BertConfig, BertForMaskedLM
    >>> abstract_params(BertForMaskedLM(BertConfig.roberta_base(scan=True)))["lm_head"]["bias"].shape
    (50265,)
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    family = next((family for family in FAMILIES if model_type in family.hf_classes), None)
    (_, first), *others = (token_ids if family is None else family.example_inputs)(config).items()
    return jax.eval_shape(functools.partial(model.init, jax.random.key(0)), first, **dict(others))["params"]

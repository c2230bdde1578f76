"""The families of models there are: which model types each covers, its models by task, and how its checkpoints are laid out."""

import dataclasses
import re
from typing import Any

import flax.linen as nn

from . import bert, gpt2
from .bert_config import BertConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of architectures."""

    config: Any  # class with from_hf and to_hf
    names: dict[str, str]  # model type -> what the names of Hugging Face's classes begin with
    tasks: dict[str, tuple[type[nn.Module], str]]  # task -> our class, and what the name of Hugging Face's ends with
    blocks: str  # the module that holds the blocks
    prefix: str | None = None  # in front of the body's tensors in the checkpoint of a model with a head; None: the model type
    untransposed: re.Pattern[str] = re.compile("(?!)")  # paths of kernels that are (in, out) in checkpoints too


FAMILIES = (
    Family(
        config=BertConfig,
        names={"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"},
        tasks={
            "encoder": (bert.BertModel, "Model"),
            "sequence-classification": (bert.BertForSequenceClassification, "ForSequenceClassification"),
            "token-classification": (bert.BertForTokenClassification, "ForTokenClassification"),
            "masked-lm": (bert.BertForMaskedLM, "ForMaskedLM"),
        },
        blocks="layer",
    ),
    Family(
        config=gpt2.GPT2Config,
        names={"gpt2": "GPT2"},
        tasks={"decoder": (gpt2.GPT2Model, "Model"), "causal-lm": (gpt2.GPT2LMHeadModel, "LMHeadModel")},
        blocks="h",
        prefix="transformer",
        untransposed=re.compile(r".*/(c_attn|c_proj|c_fc)/kernel"),
    ),
)

TASKS = tuple(dict.fromkeys(task for family in FAMILIES for task in family.tasks))


def of(model_type: str) -> Family:
    """The family of a model type that is known to exist."""
    return next(family for family in FAMILIES if model_type in family.names)


def model_types(task: str) -> list[str]:
    """The model types that have a model for the task."""
    return [name for family in FAMILIES if task in family.tasks for name in family.names]

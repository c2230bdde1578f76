"""The families of models there are: which model types each covers, its models by task, and how its checkpoints are laid out."""

import dataclasses
import re
from typing import Any

import flax.linen as nn

from jpeft.models import bert, gpt2, llama
from jpeft.models.bert_config import BertConfig
from jpeft.models.partition import BERT_RULES, GPT2_RULES, LLAMA_RULES
from jpeft.sharding import Rules


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of architectures."""

    config: Any  # class with from_hf and to_hf
    names: dict[str, str]  # model type -> what the names of Hugging Face's classes begin with
    tasks: dict[str, tuple[type[nn.Module], str]]  # task -> our class, and what the name of Hugging Face's ends with
    language_model: str  # the task that "language-model" stands for
    blocks: str  # the module that holds the blocks
    prefix: str | None = None  # in front of the body's tensors in the checkpoint of a model with a head; None: the model type
    partition: Rules = ()  # how its parameters are split over a mesh
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
        language_model="masked-lm",
        blocks="layer",
        partition=BERT_RULES,
    ),
    Family(
        config=gpt2.GPT2Config,
        names={"gpt2": "GPT2"},
        tasks={"decoder": (gpt2.GPT2Model, "Model"), "causal-lm": (gpt2.GPT2LMHeadModel, "LMHeadModel")},
        language_model="causal-lm",
        blocks="h",
        prefix="transformer",
        partition=GPT2_RULES,
        untransposed=re.compile(r".*/(c_attn|c_proj|c_fc)/kernel"),
    ),
    Family(
        config=llama.LlamaConfig,
        names={"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"},
        tasks={"decoder": (llama.LlamaModel, "Model"), "causal-lm": (llama.LlamaForCausalLM, "ForCausalLM")},
        language_model="causal-lm",
        blocks="layers",
        prefix="model",
        partition=LLAMA_RULES,
    ),
)

LANGUAGE_MODEL = "language-model"  # the masked or the causal one, whichever a family has
TASKS = (*dict.fromkeys(task for family in FAMILIES for task in family.tasks), LANGUAGE_MODEL)


def of(model_type: str) -> Family:
    """The family of a model type that is known to exist."""
    return next(family for family in FAMILIES if model_type in family.names)


def partition_rules(model: nn.Module) -> Rules:
    """How the parameters of one of our models are split over a mesh: rules for `jpeft.sharding`.

    >>> from jpeft.models import BertConfig, BertModel, abstract_params
    >>> from jpeft.sharding import abstract_mesh, placements
    >>> model = BertModel(BertConfig(num_hidden_layers=1))
    >>> placed = placements(abstract_params(model), abstract_mesh(8, fsdp=4, tensor=2), partition_rules(model))
    >>> placed["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"].spec
    P('fsdp', 'tensor')
    """
    return of(model.config.model_type).partition


def model_types(task: str) -> list[str]:
    """The model types that have a model for the task."""
    return [name for family in FAMILIES if task in (*family.tasks, LANGUAGE_MODEL) for name in family.names]

"""What the formats of prompts share: one tensor without a module, and the sizes of the model in the configuration."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jpeft.hf_peft.config import ANY, COUNT, COUNT_OR_NULL, FLAG, TEXT, Config, Key
from jpeft.hf_peft.sites import Base

TENSOR = "prompt_embeddings"

# Tasks whose models HF PEFT runs with a prompt.
TASKS = ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS")

KEYS: Mapping[str, Key] = {
    "num_virtual_tokens": Key(None, COUNT),
    "token_dim": Key(None, COUNT_OR_NULL),
    "num_transformer_submodules": Key(None, COUNT_OR_NULL),
    "num_attention_heads": Key(None, COUNT_OR_NULL),
    "num_layers": Key(None, COUNT_OR_NULL),
    # How a new prompt begins.
    "prompt_tuning_init": Key("RANDOM", ANY),
    "prompt_tuning_init_text": Key(None, ANY),
    "tokenizer_name_or_path": Key(None, ANY),
    "tokenizer_kwargs": Key(None, ANY),
    "init_weights": Key(None, ANY),
    # The network that makes a prompt in training.
    "prefix_projection": Key(False, FLAG),
    "encoder_reparameterization_type": Key("MLP", TEXT),
    "encoder_hidden_size": Key(None, COUNT_OR_NULL),
    "encoder_num_layers": Key(2, ANY),
    "encoder_dropout": Key(0.0, ANY),
}


def keys(*names: str) -> dict[str, Key]:
    """The keys of all prompts, and some others."""
    return {name: KEYS[name] for name in (*list(KEYS)[:5], *names)}


def check_prompt(config: Config, base: Base) -> None:
    """Refuse prompts that jpeft's models cannot have.

    Raises:
      ValueError: naming the key.
    """
    if config["num_virtual_tokens"] is None:
        raise config.error("num_virtual_tokens is not given.")
    if config["num_transformer_submodules"] not in (None, 1):
        raise config.error("num_transformer_submodules=2 is for models with an encoder and a decoder, which jpeft does not have.")
    task = config["task_type"]
    if task in ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM") and base.task not in (None, task):
        raise config.error(f"task_type is {task}, and the model is one for {base.task}: where a prompt stands depends on it.")


def sizes(base: Base, width: int, rows: int, heads: int | None = None) -> dict[str, Any]:
    """The keys that describe the model.

    Args:
      base: The base.
      width: `token_dim`.
      rows: `num_virtual_tokens`.
      heads: The heads of the keys; None for those of the queries.
    """
    config = base.config
    return {
        "num_virtual_tokens": rows,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads or getattr(config, "num_attention_heads", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
    }


def require_task(base: Base, what: str) -> None:
    """Refuse models that HF PEFT does not run with a prompt: it would leave the prompt out.

    Raises:
      ValueError: naming the tasks.
    """
    if base.task not in TASKS:
        raise ValueError(f"HF PEFT runs {what} with models for {', '.join(TASKS[:4])} alone, and this model is for none of them.")


def as_rows(leaf: Any) -> np.ndarray:
    """A prompt as HF PEFT has it."""
    return np.asarray(leaf, np.float32)

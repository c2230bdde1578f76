"""The tiny models in torch, run by HF PEFT: what makes the goldens, and reads what jpeft exports."""

from typing import Any

import torch
import transformers

from goldens.base import IDS, MASK, TASKS, base_tensor

torch.set_num_threads(1)  # for models this small, more only wait for each other

GPT2 = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=4, n_positions=20, bos_token_id=1, eos_token_id=1)
CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=20,
        num_labels=3,
    ),
    "gpt2": GPT2,
    # Its head is a Linear; everything else in GPT-2 is a Conv1D, which many methods of HF PEFT do not know.
    "gpt2-untied": transformers.GPT2Config(**GPT2.to_diff_dict() | {"tie_word_embeddings": False, "vocab_size": 32}),
    "llama": transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
CLASSES = {
    "bert": transformers.BertForSequenceClassification,
    "gpt2": transformers.GPT2LMHeadModel,
    "gpt2-untied": transformers.GPT2LMHeadModel,
    "llama": transformers.LlamaForCausalLM,
}


def base_model(name: str) -> torch.nn.Module:
    """Return the tiny model with the weights of `base.py`."""
    torch.manual_seed(0)
    model = CLASSES[name](CONFIGS[name]).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(base_tensor(key, tuple(parameter.shape))))
    if name == "bert":
        accept_past_key_values(model)
    return model


def accept_past_key_values(model: Any) -> None:
    """Give BERT's encoder the argument by which HF PEFT recognises that it takes prefixes; transformers 5.24 calls it `cache`."""
    forward = model.bert.forward

    def renamed(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return forward(*args, cache=past_key_values, **kwargs)

    model.bert.forward = renamed


def run(model: torch.nn.Module, case: str) -> torch.Tensor:
    """Return the logits of the tokens of the batch, without those of virtual tokens in front."""
    inputs = {"input_ids": torch.from_numpy(IDS), "attention_mask": torch.from_numpy(MASK)}
    if case.startswith("multitask"):
        inputs["task_ids"] = torch.from_numpy(TASKS)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    return logits if logits.ndim == 2 else logits[:, -IDS.shape[1] :]

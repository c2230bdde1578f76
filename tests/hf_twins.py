"""A tiny model of transformers and the same model of jpeft, to compare methods with HF PEFT's."""

import tempfile
from typing import Any

import numpy as np

from jpeft.models import load

SIZES = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "llama": {"num_key_value_heads": 2, "max_position_embeddings": 32},
    "bert": {"max_position_embeddings": 32, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
}
COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def twins(family: str, **options: Any) -> tuple[Any, Any]:
    """The model of transformers, and what `jpeft.models.load` makes of it; options go to the latter."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = SIZES[family] | ({} if family == "gpt2" else COMMON)
    config = transformers.AutoConfig.for_model(family, **sizes, vocab_size=31, initializer_range=0.3, bos_token_id=1, eos_token_id=1)
    kind = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
    theirs = kind.from_config(config).eval()
    for leaf in theirs.parameters():
        if leaf.ndim == 1:  # transformers begins them at ones and zeros, which would hide a mistake
            leaf.data += 0.2 * torch.randn(leaf.shape)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        loaded = load(folder, task="encoder" if family == "bert" else "causal-lm", **options)
    return theirs, loaded


def to_torch(array: Any) -> Any:
    """An array as a tensor of torch."""
    import torch

    return torch.tensor(np.array(array))

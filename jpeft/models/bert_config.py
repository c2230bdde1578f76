"""Configuration of the BERT family."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from .activations import ACTIVATIONS

MODEL_TYPES = ("bert", "roberta", "distilbert")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape and numerics of an encoder; field names as in Hugging Face's `BertConfig`.

    Raises:
      ValueError: if the model type or the activation is unknown, or the heads do not divide the hidden size.

    >>> BertConfig.bert_base_cased(num_hidden_layers=2).hidden_size
    768
    """

    model_type: str = "bert"  # bert | roberta | distilbert: names, position counting, heads
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # before the classifier; None: as hidden_dropout_prob
    max_position_embeddings: int = 512  # rows of the table; RoBERTa cannot use its first pad_token_id + 1
    type_vocab_size: int = 2  # 0: no token-type embedding (DistilBERT)
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    dtype: Any = jnp.float32  # of the computation; softmax and LayerNorm statistics are always float32
    param_dtype: Any = jnp.float32
    remat: bool = False  # recompute each block in the backward pass instead of storing its activations
    scan: bool = False  # one traced block over parameters stacked on axis 0, instead of `num_hidden_layers` blocks

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"unknown model_type {self.model_type!r}; supported: {', '.join(MODEL_TYPES)}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"unknown hidden_act {self.hidden_act!r}; supported: {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")

    @property
    def max_length(self) -> int:
        """Longest sequence the position table holds."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.model_type == "roberta" else 0)

    @classmethod
    def from_hf(cls, config: Any, **overrides: Any) -> "BertConfig":
        """From a `transformers` configuration of one of the supported model types; `overrides` win.

        Raises:
          ValueError: for another model type, a decoder, or relative position embeddings.
        """
        if config.model_type not in MODEL_TYPES:
            raise ValueError(f"unsupported model_type {config.model_type!r}; supported: {', '.join(MODEL_TYPES)}")
        if getattr(config, "is_decoder", False):
            raise ValueError("this configuration has is_decoder=True; only encoders are supported")
        positions = getattr(config, "position_embedding_type", "absolute")
        if positions != "absolute":
            raise ValueError(f"position_embedding_type {positions!r} is not supported, only 'absolute'")
        fields: dict[str, Any] = {field: getattr(config, hf) for field, hf in HF_FIELDS[config.model_type].items() if hasattr(config, hf)}
        if config.model_type == "distilbert":
            fields |= {"type_vocab_size": 0, "layer_norm_eps": 1e-12}
        if fields.get("pad_token_id") is None:
            fields.pop("pad_token_id", None)
        for name in [n for n in fields if n.endswith(("_prob", "_dropout"))]:
            fields[name] = None if fields[name] is None else float(fields[name])
        return cls(**_defaults(overrides, model_type=config.model_type, **fields))

    def to_hf(self) -> dict[str, Any]:
        """The fields as Hugging Face's configuration of this model type calls them; inverse of `from_hf`."""
        fields = {hf: getattr(self, field) for field, hf in HF_FIELDS[self.model_type].items()}
        if fields.get("seq_classif_dropout", 0.0) is None:  # DistilBERT's has no default of its own
            fields["seq_classif_dropout"] = self.hidden_dropout_prob
        return fields

    @classmethod
    def bert_base_cased(cls, **overrides: Any) -> "BertConfig":
        """108,310,272 parameters with the pooler."""
        return cls(**_defaults(overrides, vocab_size=28996))

    @classmethod
    def bert_large_cased(cls, **overrides: Any) -> "BertConfig":
        """333,579,264 parameters with the pooler."""
        large = _defaults(overrides, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        return cls.bert_base_cased(**large)

    @classmethod
    def roberta_base(cls, **overrides: Any) -> "BertConfig":
        """124,645,632 parameters with the pooler."""
        base = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
        return cls(**_defaults(overrides, model_type="roberta", **base))

    @classmethod
    def distilbert_base(cls, **overrides: Any) -> "BertConfig":
        """66,362,880 parameters (the uncased vocabulary)."""
        base = {"num_hidden_layers": 6, "type_vocab_size": 0, "classifier_dropout": 0.2}
        return cls(**_defaults(overrides, model_type="distilbert", **base))


def _defaults(overrides: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    return defaults | overrides


_BERT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)
_DISTILBERT_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "pad_token_id": "pad_token_id",
}
# Our field -> the name in Hugging Face's configuration, by model type.
HF_FIELDS = {
    "bert": {name: name for name in _BERT_FIELDS},
    "roberta": {name: name for name in _BERT_FIELDS},
    "distilbert": _DISTILBERT_FIELDS,
}

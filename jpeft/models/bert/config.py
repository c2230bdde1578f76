"""The configuration of BERT, RoBERTa, DistilBERT, XLM-RoBERTa, CamemBERT and ELECTRA."""

import dataclasses
from typing import Any, ClassVar

from jpeft.models.common.config import ModelConfig, check_divides

_BERT_FIELDS = {
    name: name
    for name in (
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
        "tie_word_embeddings",
    )
}
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
    "tie_word_embeddings": "tie_word_embeddings",
}
# XLM-RoBERTa and CamemBERT are RoBERTa with other words.
_ROBERTAS = ("roberta", "xlm-roberta", "camembert")


@dataclasses.dataclass(frozen=True)
class BertConfig(ModelConfig):
    """Shape and numerics of an encoder: the fields of `ModelConfig` and these, named as in Hugging Face's `BertConfig`.

    Raises:
      ValueError: as `ModelConfig`; if the number of heads does not divide the hidden size; or if a field is set that the `config.json` of
        this model type does not have.

    >>> BertConfig.bert_base_cased(num_hidden_layers=2).hidden_size
    768
    """

    HF_FIELDS: ClassVar[dict[str, dict[str, str]]] = {
        "bert": _BERT_FIELDS,
        "roberta": _BERT_FIELDS,
        "distilbert": _DISTILBERT_FIELDS,
        "xlm-roberta": _BERT_FIELDS,
        "camembert": _BERT_FIELDS,
        "electra": _BERT_FIELDS | {"embedding_size": "embedding_size"},
    }

    model_type: str = "bert"  # decides names, how positions are counted, and heads
    vocab_size: int = 30522
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # before the classifier; None: hidden_dropout_prob
    max_position_embeddings: int = 512  # rows of the table; RoBERTa does not use the first pad_token_id + 1 rows
    type_vocab_size: int = 2  # 0: no token-type embedding (DistilBERT)
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    embedding_size: int | None = None  # width of the embeddings (ELECTRA); None: the hidden size
    tie_word_embeddings: bool = True  # the head of a masked language model uses the word embedding a second time

    def __post_init__(self):
        super().__post_init__()
        check_divides(self, "hidden_size", "num_attention_heads")
        if self.embedding_size is not None and self.model_type != "electra":
            raise ValueError(
                f"embedding_size={self.embedding_size}: the config.json of a {self.model_type} cannot say so; that of electra can."
            )
        if self.architecture == "roberta" and not 0 <= self.pad_token_id < self.max_position_embeddings - 1:
            raise ValueError(
                f"pad_token_id={self.pad_token_id}: a {self.model_type} counts positions from the next number on, and it has "
                f"max_position_embeddings={self.max_position_embeddings}."
            )

    @property
    def architecture(self) -> str:
        """The model type whose modules and names this one has: bert, roberta, distilbert or electra."""
        return "roberta" if self.model_type in _ROBERTAS else self.model_type

    @property
    def embedding_width(self) -> int:
        """Width of the embeddings."""
        return self.embedding_size or self.hidden_size

    @property
    def max_length(self) -> int:
        """Longest sequence that the position table has rows for."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.architecture == "roberta" else 0)

    @classmethod
    def _special_fields(cls, config: Any) -> dict[str, Any]:
        if getattr(config, "is_decoder", False):
            raise ValueError("This configuration has is_decoder=True; only encoders are supported.")
        # Relative positions were an option of older versions of `transformers`.
        positions = getattr(config, "position_embedding_type", "absolute")
        if positions != "absolute":
            raise ValueError(f"position_embedding_type {positions!r} is not supported, only 'absolute'.")
        if config.model_type != "distilbert" and config.type_vocab_size == 0:
            raise ValueError(f"type_vocab_size=0: a {config.model_type} needs token types, at least one.")
        fields: dict[str, Any] = {"type_vocab_size": 0, "layer_norm_eps": 1e-12} if config.model_type == "distilbert" else {}
        if config.model_type == "electra" and config.embedding_size == config.hidden_size:
            fields["embedding_size"] = None
        return fields if config.pad_token_id is not None else fields | {"pad_token_id": 0}

    def to_hf(self) -> dict[str, Any]:
        """Return the fields under the names of Hugging Face's configuration of this model type; the inverse of `from_hf`."""
        fields = super().to_hf()
        if "embedding_size" in fields:
            fields["embedding_size"] = self.embedding_width
        if fields.get("seq_classif_dropout", 0.0) is None:  # DistilBERT's configuration needs a number
            fields["seq_classif_dropout"] = self.hidden_dropout_prob
        return fields

    @classmethod
    def bert_base_cased(cls, **overrides: Any) -> "BertConfig":
        """Return the configuration of bert-base-cased: 108,310,272 parameters with the pooler."""
        return cls(**_with_defaults(overrides, vocab_size=28996))

    @classmethod
    def bert_large_cased(cls, **overrides: Any) -> "BertConfig":
        """Return the configuration of bert-large-cased: 333,579,264 parameters with the pooler."""
        large = _with_defaults(overrides, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        return cls.bert_base_cased(**large)

    @classmethod
    def roberta_base(cls, **overrides: Any) -> "BertConfig":
        """Return the configuration of roberta-base: 124,645,632 parameters with the pooler."""
        base = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
        return cls(**_with_defaults(overrides, model_type="roberta", **base))

    @classmethod
    def distilbert_base(cls, **overrides: Any) -> "BertConfig":
        """Return the configuration of distilbert-base-uncased: 66,362,880 parameters."""
        base = {"num_hidden_layers": 6, "type_vocab_size": 0, "classifier_dropout": 0.2}
        return cls(**_with_defaults(overrides, model_type="distilbert", **base))


def _with_defaults(overrides: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Return the overrides, and the defaults for fields without one."""
    return defaults | overrides

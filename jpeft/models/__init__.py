"""Flax models of our own, with pretrained weights from Hugging Face folders.

>>> import jpeft.models
>>> loaded = jpeft.models.load("bert-base-cased", labels=("no", "yes"))  # doctest: +SKIP
>>> logits = loaded.model.apply({"params": loaded.params}, input_ids)  # doctest: +SKIP
"""

from .bert import BertForMaskedLM as BertForMaskedLM
from .bert import BertForSequenceClassification as BertForSequenceClassification
from .bert import BertForTokenClassification as BertForTokenClassification
from .bert import BertModel as BertModel
from .bert import BertOutput as BertOutput
from .bert_config import BertConfig as BertConfig
from .decoder import DecoderOutput as DecoderOutput
from .families import partition_rules as partition_rules
from .generate import Generated as Generated
from .generate import generate as generate
from .gpt2 import GPT2Config as GPT2Config
from .gpt2 import GPT2LMHeadModel as GPT2LMHeadModel
from .gpt2 import GPT2Model as GPT2Model
from .hf import Loaded as Loaded
from .hf import load as load
from .hf import save as save
from .llama import LlamaConfig as LlamaConfig
from .llama import LlamaForCausalLM as LlamaForCausalLM
from .llama import LlamaModel as LlamaModel
from .rope import Rope as Rope
from .weights import abstract_params as abstract_params

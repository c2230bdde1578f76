"""Flax models of our own, with pretrained weights from Hugging Face folders.

>>> import jpeft.models
>>> loaded = jpeft.models.load("bert-base-cased", labels=("no", "yes"))  # doctest: +SKIP
>>> logits = loaded.model.apply({"params": loaded.params}, input_ids)  # doctest: +SKIP
"""

from jpeft.models.bert import BertForMaskedLM as BertForMaskedLM
from jpeft.models.bert import BertForSequenceClassification as BertForSequenceClassification
from jpeft.models.bert import BertForTokenClassification as BertForTokenClassification
from jpeft.models.bert import BertModel as BertModel
from jpeft.models.bert import BertOutput as BertOutput
from jpeft.models.bert_config import BertConfig as BertConfig
from jpeft.models.decoder import DecoderOutput as DecoderOutput
from jpeft.models.families import partition_rules as partition_rules
from jpeft.models.generate import Generated as Generated
from jpeft.models.generate import generate as generate
from jpeft.models.gpt2 import GPT2Config as GPT2Config
from jpeft.models.gpt2 import GPT2LMHeadModel as GPT2LMHeadModel
from jpeft.models.gpt2 import GPT2Model as GPT2Model
from jpeft.models.hf import Loaded as Loaded
from jpeft.models.hf import load as load
from jpeft.models.hf import save as save
from jpeft.models.llama import LlamaConfig as LlamaConfig
from jpeft.models.llama import LlamaForCausalLM as LlamaForCausalLM
from jpeft.models.llama import LlamaModel as LlamaModel
from jpeft.models.rope import Rope as Rope
from jpeft.models.weights import abstract_params as abstract_params

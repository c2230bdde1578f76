"""Flax models with pretrained weights from Hugging Face folders.

>>> import jpeft.models
>>> loaded = jpeft.models.load("bert-base-cased", labels=("no", "yes"))  # doctest: +SKIP
>>> logits = loaded.model.apply({"params": loaded.params}, input_ids)  # doctest: +SKIP
"""

from jpeft.models import families as families
from jpeft.models.bert.classification import BertForSequenceClassification as BertForSequenceClassification
from jpeft.models.bert.classification import BertForTokenClassification as BertForTokenClassification
from jpeft.models.bert.config import BertConfig as BertConfig
from jpeft.models.bert.masked_lm import BertForMaskedLM as BertForMaskedLM
from jpeft.models.bert.model import BertModel as BertModel
from jpeft.models.bert.model import BertOutput as BertOutput
from jpeft.models.checkpoints.loading import Loaded as Loaded
from jpeft.models.checkpoints.loading import load as load
from jpeft.models.checkpoints.saving import save as save
from jpeft.models.common.decoder import DecoderOutput as DecoderOutput
from jpeft.models.common.rope import Rope as Rope
from jpeft.models.families import abstract_params as abstract_params
from jpeft.models.families import partition_rules as partition_rules
from jpeft.models.generation.generate import Generated as Generated
from jpeft.models.generation.generate import generate as generate
from jpeft.models.gpt2.config import GPT2Config as GPT2Config
from jpeft.models.gpt2.model import GPT2LMHeadModel as GPT2LMHeadModel
from jpeft.models.gpt2.model import GPT2Model as GPT2Model
from jpeft.models.llama.config import LlamaConfig as LlamaConfig
from jpeft.models.llama.model import LlamaForCausalLM as LlamaForCausalLM
from jpeft.models.llama.model import LlamaModel as LlamaModel

"""The description of a family of models: everything that loading, saving, sharding and the tasks need to know about it.

A family's `family.py` makes one `Family`, and `jpeft.models.families` lists it. Regular expressions in a description match a whole name.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.models.common.config import ModelConfig
from jpeft.sharding import Rules

NOTHING = "(?!)"  # a regex that matches nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskModel:
    """The model of a family for one task.

    Attributes:
      module: our class, called as ``module(config)``, or as ``module(config, num_labels)`` if it `has_labels`.
      hf_suffix: what the name of Hugging Face's class ends with, such as "ForCausalLM".
      has_labels: the head has one output for each label, and config.json holds the names of the labels.
      scores_words: the head scores the words of the vocabulary, so a checkpoint may hold a copy of a tied word embedding.
      generates: the model can be called with ``cache_length=`` and ``logits_at=``, as `jpeft.models.generate` does.
      requires_tied_head: the head is always the word embedding; a checkpoint with a separate one is refused.
    """

    module: type[nn.Module]
    hf_suffix: str
    has_labels: bool = False
    scores_words: bool = False
    generates: bool = False
    requires_tied_head: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockStack:
    """One stack of equal blocks; an encoder-decoder has two.

    Attributes:
      path: the path of the module that holds the blocks, or the end of it: "layers", "encoder/block".
      num_layers: the field of the configuration that holds the number of blocks.
    """

    path: str
    num_layers: str = "num_hidden_layers"

    def find(self, modules: list[str]) -> int | None:
        """Return how many modules of a parameter's path lead to its block; None for a parameter outside this stack.

        >>> BlockStack(path="encoder/block").find("transformer/encoder/block/mlp/wi".split("/"))
        3
        """
        names = self.path.split("/")
        for start in range(len(modules) - len(names) + 1):
            if modules[start : start + len(names)] == names:
                return start + len(names)
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roles:
    """The modules of a family by the part they play: regexes of the end of a module's path, alternatives separated by ``|``.

    Attributes:
      embedding: the word embedding.
      embedding_out: a projection of the embeddings to the width of the blocks.
      position_tables: the other embeddings: of positions, of token types.
      attention_in: the projections that make queries, keys and values.
      attention_out: the projection of the context.
      ffn_in: the projections to the wide layer of the feed-forward network.
      ffn_out: the projection back.
      norms: the norms of blocks and embeddings.
      final_norm: the norm behind the last block.
      word_head: the untied head that scores words.
      label_head: the last layer of a head with labels.
      head: every module of every head, from the top of the tree. A checkpoint may lack them, and then they are newly initialised.
      pooler: a layer between the blocks and a head, which a checkpoint may lack too.
    """

    embedding: str
    attention_in: str
    attention_out: str
    ffn_in: str
    ffn_out: str
    norms: str
    final_norm: str = NOTHING
    embedding_out: str = NOTHING
    position_tables: str = NOTHING
    word_head: str = NOTHING
    label_head: str = NOTHING
    head: str = NOTHING
    pooler: str = NOTHING

    def matches(self, role: str, path: str) -> bool:
        """Return whether a module plays a role, given the path of the module or of one of its leaves.

        >>> roles = Roles(
        ...     embedding="wte", attention_in="c_attn", attention_out="attn/c_proj", ffn_in="c_fc", ffn_out="mlp/c_proj", norms="ln_1"
        ... )
        >>> roles.matches("ffn_out", "h/0/mlp/c_proj/kernel"), roles.matches("ffn_out", "h/0/attn/c_proj/kernel")
        (True, False)
        """
        # Heads are at the top of the tree; all other modules may be anywhere.
        start = "" if role == "head" else "(.*/)?"
        # Heads and poolers are whole subtrees; the other roles stand for one layer and its leaves.
        end = "(/.*)?" if role in ("head", "pooler") else "(/[^/]*)?"
        return re.fullmatch(f"{start}({getattr(self, role)}){end}", path) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointNames:
    r"""How the tensors of a family are called in a checkpoint, where that differs from our paths with dots in place of slashes.

    Attributes:
      body: the name of the body in our models with a head, or such a name for each model type; None for the model type.
      prefixed: checkpoints of models with a head have the body's name in front of the body's tensors.
      untransposed: regex of our paths of kernels that checkpoints store as (inputs, outputs), as we do, not as torch's Linear.
      old_names: pairs of a regex and its replacement, which give a tensor of an old checkpoint its present name.
      second_names: pairs of a regex and its replacement, which turn the name of a tensor into another name that a file may hold instead. If
        it holds both, the second one counts.
      buffers: regex of tensors that no model needs.
      tied: regex of copies of the word embedding and of its head's bias; models that score words do not need them.
    """

    body: str | Mapping[str, str] | None = None
    prefixed: bool = True
    untransposed: str = NOTHING
    old_names: tuple[tuple[str, str], ...] = ()
    second_names: tuple[tuple[str, str], ...] = ()
    buffers: str = NOTHING
    tied: str = NOTHING

    def body_of(self, model_type: str) -> str:
        """Return the name of the body in our models of this type with a head.

        >>> CheckpointNames(body="model").body_of("llama"), CheckpointNames().body_of("bert")
        ('model', 'bert')
        """
        return self.body[model_type] if isinstance(self.body, Mapping) else self.body or model_type


Inputs = Mapping[str, jax.ShapeDtypeStruct]


def token_ids(config: Any) -> Inputs:
    """Return the shape of a small batch of token ids: the example inputs of models that need nothing else."""
    del config
    return {"input_ids": jax.ShapeDtypeStruct((1, 2), jnp.int32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of architectures.

    Attributes:
      config: the configuration class.
      hf_classes: model type -> what the names of Hugging Face's classes begin with. The model types are those of config.json.
      models: task -> the model for it.
      language_model: the task of `models` that "language-model" stands for; None if the family has no language model.
      stacks: the stacks of blocks.
      roles: which module plays which part.
      partition: how the parameters are split over a mesh (`megatron_rules` makes such rules from the roles).
      names: the names of tensors in checkpoints.
      example_inputs: shapes of inputs that every model of the family can be initialised with, given the configuration. The first is passed
        by position, the others by name. An encoder-decoder also needs "decoder_input_ids".
    """

    config: type[ModelConfig]
    hf_classes: Mapping[str, str]
    models: Mapping[str, TaskModel]
    language_model: str | None
    stacks: tuple[BlockStack, ...]
    roles: Roles
    partition: Rules
    names: CheckpointNames = CheckpointNames()
    example_inputs: Callable[[Any], Inputs] = token_ids

    @property
    def is_decoder(self) -> bool:
        """Whether the family has a model that generates texts."""
        return any(model.generates for model in self.models.values())

    def task_model(self, model: nn.Module) -> TaskModel:
        """Return the description of one of the family's models.

        Raises:
          ValueError: if `model` is not an instance of one of the family's classes.
        """
        for described in self.models.values():
            if isinstance(model, described.module):
                return described
        classes = ", ".join(described.module.__name__ for described in self.models.values())
        raise ValueError(f"A {type(model).__name__} is none of the models of its family: {classes}.")

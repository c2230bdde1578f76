"""Reads a model from a Hugging Face folder, onto the devices of a mesh if asked."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding

from jpeft.deprecation import renamed_fields
from jpeft.models import families
from jpeft.models.checkpoints.added_tokens import add_tokens as with_tokens
from jpeft.models.checkpoints.folder import find_folder, read_config
from jpeft.models.checkpoints.notes import make_note, say
from jpeft.models.checkpoints.plan import open_checkpoint, plan_with_labels, plan_without_labels
from jpeft.models.checkpoints.reading import read_params
from jpeft.models.checkpoints.tokenizer import read_tokenizer
from jpeft.models.common.config import ModelConfig
from jpeft.sharding import Rules, place


@renamed_fields(new="initialised")
@dataclasses.dataclass(frozen=True)
class Loaded:
    """A pretrained model, as `load` returns it."""

    model: nn.Module
    params: dict[str, Any]  # the tree inside {"params": ...}
    labels: tuple[str, ...]  # of a head with labels, in the order of its outputs; else empty
    initialised: frozenset[str]  # paths of parameters that the checkpoint lacks, so that they are freshly initialised
    unused: frozenset[str]  # names of tensors that the model does not have
    folder: Path  # the local folder that everything was read from
    note: str = ""  # in one line, what is newly initialised and what has no place; empty if there is nothing to say
    # The tokens that `load(add_tokens=...)` gave rows to, with their ids. These rows are to be trained.
    added: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, read on first use.

        Raises:
          ValueError: if the folder has none, or its files are damaged.
        """
        return read_tokenizer(self.folder)


def load(
    path: str | os.PathLike[str],
    *,
    task: str = "sequence-classification",
    labels: Sequence[str] | None = None,
    num_labels: int | None = None,
    dtype: Any = None,
    param_dtype: Any = None,
    remat: bool | Literal["dots"] = False,
    scan: bool | None = None,
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto",
    fresh_head: bool = False,
    keep_head: bool = False,
    untie: bool = False,
    add_tokens: Sequence[str] = (),
    revision: str | None = None,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Loaded:
    """Return a model with the weights of a local folder or of a repository on the Hugging Face hub.

    A head with labels is kept where its labels are those asked for; its rows then follow the names. Labels without names (LABEL_0, LABEL_1,
    ...) stay in their order if they are as many. Otherwise a new head is initialised. A warning, `CheckpointNote`, says what is newly
    initialised and which tensors of the checkpoint have no place in the model.

    Args:
      path: a folder with config.json and model.safetensors (or its shards and their index), or a hub id.
      task: "encoder", "sequence-classification", "token-classification" or "masked-lm" for an encoder; "decoder" (without a head) or
        "causal-lm" for a decoder; "language-model" for "masked-lm" or "causal-lm", whichever the family has.
      labels: names of the classes; None for those in the checkpoint's configuration.
      num_labels: number of classes, instead of `labels`, if they have no names.
      dtype: of the computation; None for bfloat16 on an accelerator with parameters in bfloat16, and float32 elsewhere.
      param_dtype: of the parameters; None to keep each as the checkpoint stores it. What a method trains is float32 in any case.
      remat: recompute each block in the backward pass; "dots" stores the results of matrix products and recomputes the rest.
      scan: stack the parameters of the blocks and trace one block; None to do so in decoders, and in encoders of 12 blocks or more.
        Adapters and exported models do not depend on it.
      attention: who computes it: "auto" takes the kernel of the device where it can (cuDNN's on a GPU, splash attention on a TPU), else
        XLA. A kernel that is asked for by name is an error where it cannot.
      fresh_head: initialise a new head with labels even if the checkpoint has one for them.
      keep_head: keep the checkpoint's head with labels even if its labels have other names: its outputs are taken in their order.
      untie: give the head of a language model a copy of the word embedding, where the two are one, so that an adapter changes one of them
        alone, as those of HF PEFT may. It takes the memory of a second table.
      add_tokens: tokens that the model does not have, such as ("<ENT>",): they are added to the tokenizer, and as rows to the embedding
        (and to the head of a language model). A row begins as the mean of the checkpoint's rows; `jpeft.trainable_tokens` trains it.
      revision: branch, tag or commit of a repository on the hub; None for its main branch.
      key: for parameters that are freshly initialised; None for `jax.random.key(0)`.
      mesh: put the parameters on these devices (`jpeft.sharding.make_mesh`). Each process reads only the parts that its own devices hold,
        one parameter at a time, so no host needs memory for the whole model.
      rules: how the parameters are split over the mesh; None for the family's own (`partition_rules`).

    Returns:
      A `Loaded`. Its `initialised` lists the parameters that the checkpoint lacks, its `unused` the tensors that the model does not have.

    Raises:
      ValueError: if the folder, its configuration or its weights are missing, unsupported, quantised, damaged, not finite or of other
        shapes; if the labels are not known; if a language model lacks its head; if the head cannot be kept or untied; if rules are given
        without a mesh; for tokens that cannot be added.

    >>> loaded = load("distilbert-base-cased", labels=("no", "yes"), scan=True)  # doctest: +SKIP
    """
    if task not in families.tasks():
        raise ValueError(f"Unknown task {task!r}; there are {', '.join(families.tasks())}.")
    if rules is not None and mesh is None:
        raise ValueError("rules= say how parameters are split over a mesh: pass mesh= too.")
    if fresh_head and keep_head:
        raise ValueError("fresh_head leaves out the checkpoint's head and keep_head keeps it: give one of them.")
    folder = find_folder(path, revision)
    content, hf_config = read_config(folder, task)
    family = families.family_of(hf_config.model_type)
    described = family.models[families.resolve_task(family, task) or task]
    if (fresh_head or keep_head) and not described.has_labels:
        raise ValueError(f"fresh_head and keep_head are about a head with labels, and a model for the task {task!r} has none.")
    if untie and not described.scores_words:
        raise ValueError(f"untie=True is about the head of a language model, and a model for the task {task!r} has none.")
    checkpoint = open_checkpoint(
        folder, content, hf_config, dtype=dtype, param_dtype=param_dtype, remat=remat, scan=scan, attention=attention
    )
    if described.has_labels:
        plan = plan_with_labels(checkpoint, described, labels, num_labels, fresh=fresh_head, keep=keep_head)
    else:
        plan = plan_without_labels(checkpoint, described, untie=untie)
    split = family.partition if rules is None else rules
    shard = None if mesh is None else lambda entry: NamedSharding(mesh, place(entry.path, entry.shape, mesh, split).spec)
    params = read_params(checkpoint.tensors, plan, jax.random.key(0) if key is None else key, shard)
    unused = checkpoint.tensors.unused(scores_words=described.scores_words)
    note = make_note(folder, plan.fresh, unused, plan.remarks)
    say(note)
    loaded = Loaded(plan.model, params, plan.labels, plan.fresh, unused, folder, note)
    return with_tokens(loaded, add_tokens, mesh, split) if add_tokens else loaded
